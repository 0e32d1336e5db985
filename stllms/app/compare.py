"""Stub: the names of this module still live at their old addresses."""

from stllms.compare import (READERS, members, of_model, of_run, of_released, entry_of)  # noqa: F401
