"""Stub: the names of this module still live at their old addresses."""

from stllms.files import (Rows, resumed)  # noqa: F401
from stllms.provenance import (RUN, INPUTS, Record, LockedFolder, locked)  # noqa: F401
