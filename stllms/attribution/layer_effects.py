"""Shim: these names live at another address; deleted at the end."""

from stllms.attribution.collecting import (SAVE_EVERY, collect)  # noqa: F401
from stllms.attribution.patching import (BUDGET, KL_ROWS, MAX_ROWS, OBJECTIVES, layer_effects, rows_of, surrogate)  # noqa: E501, F401
