"""Shim: these names live at another address; deleted at the end."""

from stllms.vectors.means import (MIN_SPANS, PARTS, Means, is_build, mark, part_of)  # noqa: F401
from stllms.vectors.quality import (Separability, area, separability)  # noqa: F401
