"""Old address of names that moved; deleted at the end."""

from stllms.annotation.placing import (METHODS, NOT_FOUND, EMPTY, LEFT_OUT, Alignment, align, place, annotation, failed, token_spans, with_spans, Summary, summarise, check)  # noqa: F401
