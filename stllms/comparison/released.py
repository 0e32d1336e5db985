"""Stub: the names of this module still live at their old addresses."""

from stllms.published import (PATTERNS, MADE, SET, TREATMENTS, run, ensure, find, listing)  # noqa: F401
from stllms.published_tables import (EARLY, read_vectors, left_out, labels, Released, read_effects, n_responses, peaks, ENDS, read_counts, members, changes)  # noqa: F401
from stllms.released_effects import (views)  # noqa: F401
from stllms.released import (load_comparison, load_layer_effects)  # noqa: F401
