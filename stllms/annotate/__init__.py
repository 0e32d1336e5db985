"""Old address of names that moved; deleted at the end."""

from stllms.annotation.annotators import NAMES, Annotator, annotator  # noqa: F401
from stllms.annotation.markup import Reading, from_markup, parse, read  # noqa: F401
