"""Stub: the names of this module still live at their old addresses."""

from stllms.spans import (METHODS, NOT_FOUND, EMPTY, LEFT_OUT, Alignment, align, place, annotation, failed, token_spans, with_spans, Summary, summarise, check)  # noqa: F401
from stllms.sentences import (split)  # noqa: F401
