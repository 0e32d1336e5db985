"""Chains as coloured text: small pieces of HTML for notebooks, and text for a terminal.

The colours of the behaviours are here; :mod:`stllms.plots` draws with the same ones. The HTML
has no scripts and no style sheet, escapes every text, and reads as a table where a viewer
drops the styles. Nothing heavy is imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from stllms.records import BEHAVIOURS, Annotation, PlacedSegment, Response, Steered
from stllms.terminal import plain

#: One colour a behaviour, told apart by colour-blind readers (Okabe and Ito's palette).
COLOURS: dict[str, str] = {
    "initializing": "#999999",
    "deduction": "#0072B2",
    "adding-knowledge": "#009E73",
    "example-testing": "#E69F00",
    "uncertainty-estimation": "#CC79A7",
    "backtracking": "#D55E00",
}
#: A label that is no behaviour (the published reader keeps such).
OTHER = "#555555"
#: The same for terminals of 256 colours, light enough for black letters.
TERMINAL: dict[str, int] = {
    "initializing": 252,
    "deduction": 111,
    "adding-knowledge": 79,
    "example-testing": 221,
    "uncertainty-estimation": 218,
    "backtracking": 209,
}
#: Pixels of a bar for a share of 1.
WIDTH = 120

_TEXT = (
    "font-family:monospace;font-size:12px;line-height:1.6;max-width:88ch;white-space:pre-wrap"
)
_TABLE = "font-size:12px;line-height:1.5;border:none"
_CELL = "text-align:left;vertical-align:top;padding:2px 16px 2px 0;background:none;border:none"
_ROW = '<tr style="background:none">'


@dataclass(frozen=True)
class Panel:
    """One chain of several that are shown beside each other.

    ``shares`` has a number a behaviour of :data:`BEHAVIOURS`, NaN where there is none; ``note``
    is a line below the chain.
    """

    title: str
    text: str
    segments: Sequence[PlacedSegment]
    shares: Sequence[float]
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


def html(text: str, segments: Sequence[PlacedSegment], title: str = "") -> str:
    """A chain with the background of each segment in the colour of its behaviour."""
    pieces = [
        escape(part)
        if segment is None
        else f'<span title="{escape(segment.label)}" style="background:'
        f'{COLOURS.get(segment.label, OTHER)}59">{escape(part)}</span>'
        for segment, part in _parts(text, segments)
    ]
    head = f"<b>{escape(title)}</b><br>" if title else ""
    return f'<div style="{_TEXT}">{head}{"".join(pieces)}</div>'


def html_chains(responses: Sequence[Response], annotations: Sequence[Annotation]) -> str:
    """:func:`html` of several chains below each other, each with its task id."""
    return "<hr>".join(
        html(response.thinking, annotation.segments, response.task_id)
        for response, annotation in zip(responses, annotations, strict=True)
    )


def html_legend(behaviours: Sequence[str] = BEHAVIOURS) -> str:
    """The behaviours' colours in a line."""
    return f'<div style="font-size:12px">{" ".join(map(_swatch, behaviours))}</div>'


def _swatch(name: str) -> str:
    return f'<span style="background:{COLOURS[name]}59;padding:0 4px">{name}</span>'


def html_line(text: str, *, wrong: bool = False) -> str:
    """A line of status; ``wrong`` says that it is an error."""
    line = escape(" ".join(text.split()))
    return f'<span style="font-size:12px">{"<b>error:</b> " if wrong else ""}{line}</span>'


def html_panels(panels: Sequence[Panel]) -> str:
    """The shares of all panels as small bars, with the colours' names, then the chains."""
    cell, row = f'<td style="{_CELL}">', _ROW
    heads = "".join(f"{cell}<b>{escape(panel.title)}</b></td>" for panel in panels)
    bars = "".join(
        f"{row}{cell}{_swatch(name)}</td>"
        + "".join(f"{cell}{_bar(name, panel.shares[place])}</td>" for panel in panels)
        + "</tr>"
        for place, name in enumerate(BEHAVIOURS)
    )
    return (
        f'<table style="{_TABLE};margin:0">{row}{cell}<b>share</b></td>'
        f"{heads}</tr>{bars}</table>{_beside(panels)}"
    )


def html_pair(plain: Steered, steered: Steered) -> str:
    """A plain chain and its steered twin side by side; both need an annotation."""
    names = ("plain", f"{steered.coefficient:+g} {steered.direction}, layer {steered.layer}")
    panels = [
        Panel(name, one.response.thinking, one.annotation.segments, (), one.task_id)
        for name, one in zip(names, (plain, steered), strict=True)
    ]
    return _beside(panels)


def html_pairs(pairs: Mapping[str, tuple[Steered, Steered] | None]) -> str:
    """A legend, and :func:`html_pair` of every name; a line where there is none to show."""
    said = '<p style="font-size:12px;opacity:0.7">{}: not steered, or no chain rose</p>'
    return html_legend() + "".join(
        html_pair(*pair) if pair else said.format(escape(name)) for name, pair in pairs.items()
    )


def _beside(panels: Sequence[Panel]) -> str:
    """The chains of the panels, in one row."""
    wide = f'<td style="{_CELL};width:{100 // len(panels)}%">'
    chains = "".join(
        f"{wide}{html(panel.text, panel.segments, panel.title)}"
        f'<div style="font-size:12px;opacity:0.7">{escape(panel.note)}</div></td>'
        for panel in panels
    )
    return f'<table style="{_TABLE};width:100%;margin:8px 0 0">{_ROW}{chains}</tr></table>'


def _bar(name: str, share: float) -> str:
    if math.isnan(share):
        return "n/a"
    style = f"display:inline-block;height:9px;background:{COLOURS[name]}"
    return f'<span style="{style};width:{share * WIDTH:.0f}px"></span> {share:.0%}'


# --- terminal -----------------------------------------------------------------------------


def terminal(text: str, segments: Sequence[PlacedSegment], *, colour: bool) -> str:
    """A chain for a terminal: running text on coloured backgrounds, or, without colour, a
    line a segment that begins with its label. The text itself has no say in colours."""
    parts = [(segment, plain(part)) for segment, part in _parts(text, segments)]
    if colour:
        return "".join(part if s is None else _paint(part, s.label) for s, part in parts)
    width = max(map(len, BEHAVIOURS))
    return "\n".join(
        f"{'-' if segment is None else plain(segment.label):<{width}}  {' '.join(part.split())}"
        for segment, part in parts
        if part.strip()
    )


def terminal_shares(
    titles: Sequence[str], shares: Sequence[Sequence[float]], *, colour: bool
) -> str:
    """A line a behaviour with its share in each chain; the labels are the colours' legend."""
    width, wide = max(map(len, BEHAVIOURS)), [max(6, len(title)) for title in titles]
    head = "  ".join(f"{title:>{w}}" for title, w in zip(titles, wide, strict=True))
    lines = [f"{'share of tokens':<{width}}  {head}"]
    for place, name in enumerate(BEHAVIOURS):
        label = (_paint(name, name) if colour else name) + " " * (width - len(name))
        cells = zip(shares, wide, strict=True)
        lines.append(f"{label}  {'  '.join(_percent(of[place]).rjust(w) for of, w in cells)}")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return "n/a" if math.isnan(share) else f"{share:.0%}"


def _paint(text: str, label: str) -> str:
    """Black on the colour of the behaviour, out of the 256 of terminals."""
    return f"\x1b[30;48;5;{TERMINAL.get(label, 246)}m{text}\x1b[0m"
