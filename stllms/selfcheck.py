from stllms.models.selfcheck import (TRANSFORMERS, CURE, EXTREME, SENTENCE, CHAIN, TEXTS, tokenizer, is_byte_level, residual, extreme)  # noqa: F401
