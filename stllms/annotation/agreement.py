"""Stub: the names of this module still live at their old addresses."""

from stllms.agreement import (UNITS, Agreement, annotators, report, confusions, kappa, compare, unit_labels)  # noqa: F401
