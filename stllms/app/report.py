"""Stub: the names of this module still live at their old addresses."""

from stllms.report import (NAME, COMPARISON, NEEDS, FIRST, Section, ensure, is_current, write, main)  # noqa: F401
from stllms.page import (PICTURES, CSS_DPI, TAGS, GONE, ATTRIBUTES, STYLES, LONGEST, COMMITTED, VERSIONS, clean, legible, Heading, Output, Cell, Book, book, is_figure, picture, table, style, render)  # noqa: F401
