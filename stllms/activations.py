"""Shim: these names live at another address; deleted at the end."""

from stllms.vectors.activations import (SAVE_EVERY, WINDOW, collect)  # noqa: F401
