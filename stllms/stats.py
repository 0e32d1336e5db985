"""Stub: the names of this module still live at their old addresses."""

from stllms.metrics import (Interval, bootstrap, resamples, sign_flip, holm)  # noqa: F401
