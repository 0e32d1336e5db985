"""Stub: the names of this module still live at their old addresses."""

from stllms.refusals import (check, Refused)  # noqa: F401
from stllms.estimate import (Work, works, conditions, table, line)  # noqa: F401
from stllms.waiting import (LABELLED, counted)  # noqa: F401
