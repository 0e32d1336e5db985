"""Stub: the names of this module still live at their old addresses."""

from stllms.likelihood import (CHUNK, TOKENS, LOGITS, scores)  # noqa: F401
