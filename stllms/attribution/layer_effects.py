"""Stub: the names of this module still live at their old addresses."""

from stllms.attribution import (OBJECTIVES, SAVE_EVERY, BUDGET, MAX_ROWS, KL_ROWS, layer_effects, rows_of, surrogate, collect)  # noqa: F401
from stllms.rows import (Prefix, Rows)  # noqa: F401
