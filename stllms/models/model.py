"""Stub: the names of this module still live at their old addresses."""

from stllms.models import (Model, find_layers, Traced, wrap)  # noqa: F401
from stllms.detokenize import (Decode, REPLACEMENT, character_ends, character_ranges)  # noqa: F401
