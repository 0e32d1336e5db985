"""Old address of names that moved; deleted at the end."""

from stllms.annotation.annotators import Lexical  # noqa: F401
from stllms.annotation.sentences import (CUES, label, segments as merged)  # noqa: F401
