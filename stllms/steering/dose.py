"""Stub: the names of this module still live at their old addresses."""

from stllms.doses import (LIMITS, costs, table, broken, warning, suggested, summary, sweep)  # noqa: F401
