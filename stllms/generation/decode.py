"""Stub: the names of this module still live at their old addresses."""

from stllms.decode import (REFILL, ENDED, add, ablate, OPERATIONS, WHERE, Intervention, fingerprints, Row, Written, Edit, default_batch_size, run, think_end, intervene, edits)  # noqa: F401
from stllms.kvcache import (BufferedLayer, BatchCache)  # noqa: F401
from stllms.memory import (SHARE, SPARE, SAMPLING, weights, cache, row, free, rows)  # noqa: F401
