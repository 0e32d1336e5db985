"""Old address of names that moved; deleted at the end."""

from stllms.fixtures.families import FAMILIES, Puzzle  # noqa: F401
