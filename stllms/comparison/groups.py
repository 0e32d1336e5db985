"""Stub: the names of this module still live at their old addresses."""

from stllms.comparison import (EMPTY, DRAWS, NOWHERE, Setup, Member, member, ordered, colours, setups, groups, table, ledger, caption, group_intervals, treatments, pairs, unpaired, width)  # noqa: F401
