"""Stub: the names of this module still live at their old addresses."""

from stllms.coloured import (COLOURS, OTHER, TERMINAL, WIDTH, Panel, html, html_chains, html_legend, html_line, html_panels, html_pair, html_pairs, terminal, terminal_shares)  # noqa: F401
from stllms.tables import (P_VALUES, by_name, layers, growth, layer_text, intervals, wide, shown)  # noqa: F401
