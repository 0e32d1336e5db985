"""Old address of names that moved; deleted at the end."""

from stllms.annotation.markup import (READERS, UNKNOWN, EMPTY, OUTSIDE, Reading, read, parse)  # noqa: F401
