"""Old address of names that moved; deleted at the end."""

from stllms.annotation.sentences import split  # noqa: F401
