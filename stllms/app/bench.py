"""Stub: the names of this module still live at their old addresses."""

from stllms.bench import (STEERS, OF_THE_RUN, SAID, Bench, bench, at_hand, of)  # noqa: F401
from stllms.pairs import (TYPED, MOST, LABELLED, Ask, Pair, task, check, layer_of, coefficient_of, intervention, decoding, write, write_all, label, shares, title, note, same, broke, remark)  # noqa: F401
