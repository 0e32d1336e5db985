"""Stub: the names of this module still live at their old addresses."""

from stllms.activations import (WINDOW, SAVE_EVERY, LEDGER, collect)  # noqa: F401
