"""Stub: the names of this module still live at their old addresses."""

from stllms.refusals import (annotator, check, in_cache, model, Refused)  # noqa: F401
from stllms.estimate import (Work, works, conditions, table, line)  # noqa: F401
from stllms.waiting import (LABELLED, counted)  # noqa: F401
