"""Stub: the names of this module still live at their old addresses."""

from stllms.plots import (MODES, MARKERS, HATCH, WHISKERS, LINE, LETTER, style, caption, short, bars, heatmap, curves, missing, strip, matrix, chain, n_lines, legend, side_legend, compare, totals, models_legend, HATCHES, growth, effect_panels, steering_bars)  # noqa: F401
from stllms.panels import (MOST_LINES, LINE_HEIGHT, HEAD_AND_FOOT, confusions, chains, twins, effect_rows, released_effects, doses, sweep)  # noqa: F401
