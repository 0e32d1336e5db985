"""Stub: the names of this module still live at their old addresses."""

from stllms.selfcheck import (TRANSFORMERS, CURE, EXTREME, SENTENCE, CHAIN, TEXTS, tokenizer, is_byte_level, residual, extreme)  # noqa: F401
