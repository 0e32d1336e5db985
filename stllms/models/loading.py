"""Stub: the names of this module still live at their old addresses."""

from stllms.models import (load)  # noqa: F401
from stllms.loading import (EMBEDDED, ModelError, read, pick_device, pick_dtype, quiet, source_of)  # noqa: F401
