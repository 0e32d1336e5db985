"""Stub: the names of this module still live at their old addresses."""

from stllms.records import (BEHAVIOURS, STEERED, CONTROLS, HEATMAP, CATEGORIES, is_control)  # noqa: F401
from stllms.coloured import (COLOURS, OTHER)  # noqa: F401
