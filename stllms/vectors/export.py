"""Stub: the names of this module still live at their old addresses."""

from stllms.export import (LAYER_INDEX, RESCALING, safetensors, gguf, main)  # noqa: F401
