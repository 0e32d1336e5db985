"""Old address of names that moved; deleted at the end."""

from stllms.fixtures.grammar import (WORDINGS, EXPONENTS, EXPONENT, CONCLUSIONS, FINAL, HINTS, zipf)  # noqa: F401
