"""Shim: these names live at another address; deleted at the end."""

from stllms.vectors.quality import (COLUMNS, table)  # noqa: F401
