"""Stub: the names of this module still live at their old addresses."""

from stllms.artifacts import (ChangedConfiguration, Folder, save_figure, Finding, verify, versions, commit, now)  # noqa: F401
