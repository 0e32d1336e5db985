"""Stub: the names of this module still live at their old addresses."""

from stllms.evaluation import (SIDE_EFFECTS, FRACTION, SHARE, measure, table, PLAIN, bars, MODES, differences, showcase, texts, changes)  # noqa: F401
from stllms.metrics import (EMPTY, token_fractions, segment_counts, segment_fractions, Coherence, coherence)  # noqa: F401
