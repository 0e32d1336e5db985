"""Stub: the names of this module still live at their old addresses."""

from stllms.means import (PARTS, MIN_SPANS, NOT_PROJECTED, part_of, mark, is_build, digest, Means, TENSORS, METADATA, Separability, separability, area)  # noqa: F401
