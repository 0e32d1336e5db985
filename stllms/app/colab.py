"""Stub: the names of this module still live at their old addresses."""

from stllms.colab import (REPOSITORY, BRANCH, INSTALL, machine, badge, renewed, unbadged, copy_of, write, renew_badges, main)  # noqa: F401
