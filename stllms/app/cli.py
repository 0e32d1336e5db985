"""Stub: the names of this module still live at their old addresses."""

