"""Stub: the names of this module still live at their old addresses."""

from stllms.annotate.markup import (READERS, UNKNOWN, EMPTY, OUTSIDE, Reading, read, parse)  # noqa: F401
