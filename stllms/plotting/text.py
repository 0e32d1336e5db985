"""Tables for display, and chains as coloured text: HTML for notebooks, or a terminal's.

The HTML has no scripts and no style sheet, escapes every text, and reads as a table where a
viewer drops the styles.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import pandas as pd

from stllms.labels import PAPER, Label, LabelSet
from stllms.records import Annotation, PlacedSegment, Response, Steered
from stllms.terminal import plain

#: Columns of tables that hold p-values.
P_VALUES = ("p", "p_holm")
#: The brightnesses of a terminal's cube of 216 colours, which begins at code 16, and of its
#: greys, which follow it.
_CUBE, _GREYS = (0, 95, 135, 175, 215, 255), range(8, 248, 10)
#: How much white is mixed in there: black letters have a contrast of 6 on every
#: :data:`~stllms.labels.PALETTE` colour, and no two of these become the same.
PALER = 0.4
#: Pixels of a bar for a share of 1.
WIDTH = 120

_SMALL = "font-size:12px"
_TEXT = f"font-family:monospace;{_SMALL};line-height:1.6;max-width:88ch;white-space:pre-wrap"
_TABLE = f"{_SMALL};line-height:1.5;border:none"
_CELL = "text-align:left;vertical-align:top;padding:2px 16px 2px 0;background:none;border:none"
_ROW = '<tr style="background:none">'


# --- tables ------------------------------------------------------------------------------


def by_name(values: np.ndarray, behaviours: Sequence[str]) -> dict[str, np.ndarray]:
    """``[N, L]`` (an array, or a tensor on the CPU) as one array a behaviour."""
    return dict(zip(behaviours, np.asarray(values), strict=True))


def layers(curves: Mapping[str, np.ndarray], **constant: str) -> pd.DataFrame:
    """One row a behaviour, one column a layer; ``constant`` columns come first."""
    table = pd.DataFrame(curves).T.add_prefix("layer ").rename_axis("behaviour").reset_index()
    for name, value in reversed(constant.items()):
        table.insert(0, name, value)
    return table


def growth(
    cosines: np.ndarray, counts: np.ndarray, shares: Sequence[float], behaviours: Sequence[str]
) -> pd.DataFrame:
    """Cosine between directions of disjoint halves, by the number of spans.

    ``cosines`` and ``counts`` of spans are ``[shares, N]``, at one layer.
    """
    found = pd.MultiIndex.from_product([shares, behaviours], names=["share", "behaviour"])
    found = found.to_frame(index=False)[["behaviour", "share"]]
    return found.assign(spans=np.ravel(counts), cosine=np.ravel(cosines))


def layer_text(chosen: Mapping[str, int]) -> str:
    """``planning 17, refusal 12`` for captions."""
    return ", ".join(f"{name} {layer}" for name, layer in chosen.items())


def intervals(
    table: pd.DataFrame, rows: Sequence[str], columns: str, *, digits: int = 2
) -> pd.DataFrame:
    """For display, from rows with ``value, low, high``: ``value (low to high)``, the value
    alone where the interval is missing, ``n/a`` without a value; laid out by :func:`wide`.
    """
    if table.empty:
        return pd.DataFrame(columns=[*rows])
    numbers = table[["value", "low", "high"]].to_numpy(float)
    texts = table.assign(text=[_interval(v, low, high, digits) for v, low, high in numbers])
    return wide(texts, rows, columns, "text").fillna("n/a").rename_axis(columns=None)


def _interval(value: float, low: float, high: float, digits: int) -> str:
    if np.isnan(value):
        return "n/a"
    form = f"z.{digits}f"  # z: no sign before a zero
    text = f"{value:{form}}"
    return text if np.isnan(low) else f"{text} ({low:{form}} to {high:{form}})"


def wide(
    table: pd.DataFrame, rows: Sequence[str], columns: str, values: str = "value"
) -> pd.DataFrame:
    """One row for each of ``rows``, one column for each of ``columns``, both in the order in
    which they occur, a missing cell NaN.

    Nothing is averaged: two numbers for one cell are a ``ValueError`` (pandas' ``pivot_table``
    would silently show their mean).
    """
    found = table.pivot(index=[*rows], columns=columns, values=values)
    order = table.set_index([*rows]).index.unique()
    return found.reindex(order).reindex(columns=table[columns].drop_duplicates())


def shown(table: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """For display: rounded, a missing number as ``n/a``, columns of whole numbers without a
    point, p-values too small for the digits as less than the last of them.
    """
    return table.apply(_column, digits=digits)


def _column(column: pd.Series, digits: int) -> pd.Series:
    if not pd.api.types.is_numeric_dtype(column):
        return column.where(column.notna(), "n/a")
    digits = 0 if (column.dropna() % 1 == 0).all() else digits
    least = 10.0**-digits if column.name in P_VALUES else 0.0

    def text(value: float) -> str:
        if np.isnan(value):
            return "n/a"
        return f"<{least:.{digits}f}" if 0 < value < least else f"{value:.{digits}f}"

    return column.map(text)


# --- chains as HTML ----------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One chain of several that are shown beside each other.

    ``shares`` has a number for each label of the set, NaN where there is none; ``note`` is a
    line below the chain.
    """

    title: str
    text: str
    segments: Sequence[PlacedSegment]
    shares: Sequence[float] = ()
    note: str = ""


def _parts(
    text: str, segments: Sequence[PlacedSegment]
) -> Iterator[tuple[PlacedSegment | None, str]]:
    """``(segment, text)`` in order, ``None`` between them; joined they are ``text``."""
    end = 0
    for segment in sorted(segments, key=lambda s: s.start):
        start = max(end, segment.start)  # segments of the published reader may overlap
        if start >= segment.end:
            continue
        if start > end:
            yield None, text[end:start]
        yield segment, text[start : segment.end]
        end = segment.end
    if end < len(text):
        yield None, text[end:]


def html(
    text: str,
    segments: Sequence[PlacedSegment],
    title: str = "",
    *,
    labels: LabelSet = PAPER,
) -> str:
    """A chain with the background of each segment in the colour of its behaviour."""
    pieces = [
        escape(part)
        if segment is None
        else f'<span title="{escape(segment.label)}" style="background:'
        f'{labels.colour(segment.label)}59">{escape(part)}</span>'
        for segment, part in _parts(text, segments)
    ]
    head = f"<b>{escape(title)}</b><br>" if title else ""
    return f'<div style="{_TEXT}">{head}{"".join(pieces)}</div>'


def html_chains(
    responses: Sequence[Response],
    annotations: Sequence[Annotation],
    *,
    labels: LabelSet = PAPER,
) -> str:
    """:func:`html` of several chains below each other, each with its task id."""
    return "<hr>".join(
        html(response.thinking, annotation.segments, response.task_id, labels=labels)
        for response, annotation in zip(responses, annotations, strict=True)
    )


def html_legend(labels: LabelSet = PAPER) -> str:
    """The labels' colours in a line."""
    return f'<div style="{_SMALL}">{" ".join(map(_swatch, labels.labels))}</div>'


def _swatch(label: Label) -> str:
    style = f"background:{label.colour}59;padding:0 4px"
    return f'<span style="{style}">{escape(label.name)}</span>'


def html_line(text: str, *, wrong: bool = False) -> str:
    """A line of status; ``wrong`` says that it is an error."""
    line = escape(" ".join(text.split()))
    return f'<span style="{_SMALL}">{"<b>error:</b> " if wrong else ""}{line}</span>'


def html_tokens(
    tokens: Sequence[str],
    values: Sequence[float],
    surprise: Sequence[float],
    *,
    title: str = "",
    most: float = 1.0,
) -> str:
    """Tokens on backgrounds from blue (``-most``) to orange (``most``), value and surprise on
    hovering. Bytes that are no whole character are shown as the decoder writes them."""
    pieces = []
    for token, value, nats in zip(tokens, values, surprise, strict=True):
        strength = min(1.0, abs(value) / most)
        colour = "#D55E00" if value > 0 else "#0072B2"
        note = f"{value:+.2f}" + ("" if math.isnan(nats) else f", {nats:.2f} nats")
        pieces.append(
            f'<span title="{note}" style="background:{colour}{round(160 * strength):02x}">'
            f"{escape(token)}</span>"
        )
    head = f"<b>{escape(title)}</b><br>" if title else ""
    return f'<div style="{_TEXT}">{head}{"".join(pieces)}</div>'


def html_panels(panels: Sequence[Panel], *, labels: LabelSet = PAPER) -> str:
    """The shares of all panels as small bars, with the colours' names, then the chains."""
    cell = f'<td style="{_CELL}">'
    heads = "".join(f"{cell}<b>{escape(panel.title)}</b></td>" for panel in panels)
    bars = "".join(
        f"{_ROW}{cell}{_swatch(one)}</td>"
        + "".join(f"{cell}{_bar(one.colour, panel.shares[place])}</td>" for panel in panels)
        + "</tr>"
        for place, one in enumerate(labels.labels)
    )
    return (
        f'<table style="{_TABLE};margin:0">{_ROW}{cell}<b>share</b></td>'
        f"{heads}</tr>{bars}</table>{_beside(panels, labels)}"
    )


def html_pairs(
    pairs: Mapping[str, tuple[Steered, Steered] | None], *, labels: LabelSet = PAPER
) -> str:
    """A legend, and for every name a baseline and a steered response side by side (both need an
    annotation); a line where there are none to show.
    """
    pieces = [html_legend(labels)]
    for name, pair in pairs.items():
        if pair is None:
            pieces.append(html_line(f"{name}: not steered, or no chain rose"))
            continue
        added = f"{pair[1].coefficient:+g} {pair[1].direction}, layer {pair[1].layer}"
        panels = [
            Panel(title, one.response.thinking, one.annotation.segments, note=one.task_id)
            for title, one in zip(("baseline", added), pair, strict=True)
            if one.annotation is not None
        ]
        pieces.append(_beside(panels, labels))
    return "".join(pieces)


def _beside(panels: Sequence[Panel], labels: LabelSet) -> str:
    """The chains of the panels, in one row."""
    return html_beside(
        [
            f"{html(panel.text, panel.segments, panel.title, labels=labels)}"
            f'<div style="{_SMALL};opacity:0.7">{escape(panel.note)}</div>'
            for panel in panels
        ]
    )


def html_beside(parts: Sequence[str]) -> str:
    """Pieces of HTML in one row, equally wide."""
    wide = f'<td style="{_CELL};width:{100 // len(parts)}%">'
    cells = "".join(f"{wide}{part}</td>" for part in parts)
    return f'<table style="{_TABLE};width:100%;margin:8px 0 0">{_ROW}{cells}</tr></table>'


def _bar(colour: str, share: float) -> str:
    if math.isnan(share):
        return "n/a"
    style = f"display:inline-block;height:9px;background:{colour}"
    return f'<span style="{style};width:{share * WIDTH:.0f}px"></span> {share:.0%}'


# --- chains in a terminal ----------------------------------------------------------------


def terminal(
    text: str,
    segments: Sequence[PlacedSegment],
    *,
    colour: bool,
    labels: LabelSet = PAPER,
) -> str:
    """A chain for a terminal: running text on coloured backgrounds, or, without colour, a
    line a segment that begins with its label. The text itself has no say in colours.
    """
    parts = [(segment, plain(part)) for segment, part in _parts(text, segments)]
    if colour:
        return "".join(
            part if segment is None else _paint(part, labels.colour(segment.label))
            for segment, part in parts
        )
    width = max(map(len, labels.names))
    return "\n".join(
        f"{'-' if segment is None else plain(segment.label):<{width}}  {' '.join(part.split())}"
        for segment, part in parts
        if part.strip()
    )


def terminal_shares(
    titles: Sequence[str],
    shares: Sequence[Sequence[float]],
    *,
    colour: bool,
    labels: LabelSet = PAPER,
) -> str:
    """A line a behaviour with its share in each chain; the labels are the colours' legend."""
    first = "share of tokens"
    width, wide = max(map(len, [first, *labels.names])), [max(6, len(one)) for one in titles]
    head = "  ".join(f"{title:>{w}}" for title, w in zip(titles, wide, strict=True))
    lines = [f"{first:<{width}}  {head}"]
    for place, one in enumerate(labels.labels):
        name = _paint(one.name, one.colour) if colour else one.name
        label = name + " " * (width - len(one.name))
        cells = [
            f"{'n/a' if math.isnan(of[place]) else f'{of[place]:.0%}':>{w}}"
            for of, w in zip(shares, wide, strict=True)
        ]
        lines.append("  ".join([label, *cells]))
    return "\n".join(lines)


def _paint(text: str, colour: str) -> str:
    """Black on the nearest of a terminal's colours to a paler ``#rrggbb``."""
    return f"\x1b[30;48;5;{terminal_code(colour)}m{text}\x1b[0m"


@functools.cache
def terminal_code(colour: str) -> int:
    """The code of a colour ``#rrggbb``, made paler, among the 240 fixed ones of terminals."""
    codes = [*itertools.product(_CUBE, repeat=3), *((grey,) * 3 for grey in _GREYS)]
    given = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    apart = np.array(codes) - (given + PALER * (255 - given))
    return 16 + int((apart**2).sum(1).argmin())
