"""Stub: the names of this module still live at their old addresses."""

from stllms.claims import (REPRODUCED, DIFFERS, PART, NEEDS, ORDER, COMPARISON, GROUP, COMPARED, PAIR, STEERING, PEAKS, LATE, HEATMAP_MODEL, TRIANGLE, Made, Row, display, layers_of, needs, listed, compared, steered, peaked, distinct, triangle, early)  # noqa: F401
from stllms.findings import (LEVEL, SAME, KINDS, VALUES, released_comparison, slug_of, run_comparison, run_steering, released_effects, run_effects, released_heatmap, run_heatmap, run_embedding)  # noqa: F401
from stllms.ledger import (MARKS, COLUMNS, ledger, write, markdown, put, main)  # noqa: F401
