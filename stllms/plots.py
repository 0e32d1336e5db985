"""Old address, deleted at the end."""

from stllms.plotting.axes import (COLOURS, HATCHES, LINE, MARKERS, MODES, NULL as HATCH, WHISKERS, bars, caption, chain, compare, curves, effect_panels, growth, heatmap, legend, matrix, missing, models_legend, short, side_legend, steering_bars, strip, style, totals)  # noqa: E501, F401
