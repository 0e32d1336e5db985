"""Stub: the names of this module still live at their old addresses."""

from stllms.run import (Chosen, main, listing)  # noqa: F401
