"""Stub: the names of this module still live at their old addresses."""

from stllms.generate import (CHUNK, responses, summary, options, read)  # noqa: F401
