r"""The reader of a judge's markup, ``["label"] the text ["end-section"]``, repeated.

``"tolerant"`` (default) takes every form that judges write: quoted or not, numbered
(``[0. label]``), other case, spaces or underscores for hyphens, a missing closing tag, a
section inside another one, text around the sections. ``"published"`` takes quoted and closed
tags only and keeps unknown labels (method, section 4); ``"published-counts"`` takes each
opening tag of a known label in lower case, quoted or not, for a segment (section 9). Square
brackets that hold anything but a label (``f[0]``, ``[ x^2 \]``, ``x = ["apple"]``) are text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from stllms.annotation import placing
from stllms.labels import BEHAVIOURS
from stllms.records import Segment

#: Why a piece of a reply is not a segment.
UNKNOWN, EMPTY, OUTSIDE = "unknown label", "empty section", "outside any section"

_QUOTE = r"""\\?["'`*“”„‘’«»]"""
# Every repetition is bounded, so that reading is linear in the length of the reply.
_TAG = re.compile(
    rf"""\[\s{{0,3}}(?P<quote>(?:{_QUOTE}){{0,3}})\s{{0,3}}
    (?:(?P<number>\d{{1,2}})\s{{0,2}}[.):]?\s{{0,3}})?(?P<inner>(?:{_QUOTE}){{0,3}})
    (?P<slash>/?)(?P<name>[^\W\d_][^\W\d]{{0,24}}(?:[ _‐‑–-]{{1,3}}[^\W\d_]{{1,24}}){{0,3}})
    \s{{0,3}}(?:{_QUOTE}){{0,3}}\s{{0,3}}\]""",
    re.VERBOSE,
)
_PUBLISHED = re.compile(r'\["([\w-]+)"\](.*?)\["end-section"\]', re.DOTALL)
_COUNTED = re.compile(r'\["?([a-z-]+)"?\]')


#: A piece of a reply, and why it is no segment (``None``: it is one).
Piece = tuple[Segment, str | None]


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


_LABELS = {_letters(label): label for label in BEHAVIOURS}
_CLOSING = {"endsection", "endofsection", "sectionend"} | {f"end{name}" for name in _LABELS}


def label_of(name: str) -> str | None:
    """The label that a judge means by ``name``, whatever its case and hyphens."""
    return _LABELS.get(_letters(name))


@dataclass(frozen=True)
class Reading:
    """What a reader made of one reply: all its ``pieces``, in order."""

    pieces: tuple[Piece, ...]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The pieces that were not rejected."""
        return tuple(segment for segment, reason in self.pieces if reason is None)


def read(markup: str, *, reader: str = "tolerant") -> Reading:
    """Segments of ``markup``, and the pieces that are none. Never raises, whatever the text.

    ``reader`` is one of :data:`READERS`.
    """
    if reader not in READERS:
        raise ValueError(f"no reader {reader!r}: choose one of {', '.join(READERS)}")
    return Reading(tuple(READERS[reader](markup)))


def parse(markup: str) -> list[Segment]:
    """The segments that the tolerant reader finds; :func:`read` also tells what it rejected."""
    return list(read(markup).segments)


def align(markup: str, text: str, *, reader: str = "tolerant") -> placing.Alignment:
    """A judge's reply, placed in the ``text`` of the chain that it is about.

    ``reader="published"`` also aligns as published (first exact occurrence). The characters
    of pieces that the reader rejected are counted under the reader's reason.
    """
    pieces = read(markup, reader=reader).pieces
    return placing.align(
        [segment for segment, _ in pieces],
        text,
        method="published" if reader == "published" else "tolerant",
        reasons=[reason for _, reason in pieces],
    )


def _published(markup: str) -> Iterator[Piece]:
    for match in _PUBLISHED.finditer(markup):
        yield Segment(match[1], match[2].strip()), None


def _counted(markup: str) -> Iterator[Piece]:
    marks = [m for m in _COUNTED.finditer(markup) if m[1] in BEHAVIOURS]
    for mark, end in zip(marks, [*(m.start() for m in marks[1:]), len(markup)], strict=False):
        text = re.sub(r'\["?end-section"?\]', "", markup[mark.end() : end]).strip()
        yield Segment(mark[1], text), None


def _tolerant(markup: str) -> Iterator[Piece]:
    current: str | None = None
    outer: list[str] = []  # sections that another one interrupted, innermost last
    position = 0
    for mark in [*_marks(markup), _Mark("end", "", len(markup), len(markup))]:
        text = markup[position : mark.start].strip()
        if current is not None:
            yield _section(current, text)
            if mark.kind != "close":
                outer.append(current)
        elif mark.kind == "close" and outer and text:
            yield _section(outer.pop(), text)
        elif text:
            yield Segment("", text), OUTSIDE
        current = mark.label if mark.kind in ("open", "unknown") else None
        position = mark.end


def _section(label: str, text: str) -> Piece:
    if label not in BEHAVIOURS:
        return Segment(label, text), UNKNOWN
    return Segment(label, text), None if text else EMPTY


#: Readers by name: reply -> pieces.
READERS = {"tolerant": _tolerant, "published": _published, "published-counts": _counted}


class _Mark(NamedTuple):
    kind: str  # "open", "close", "unknown", "end"
    label: str
    start: int
    end: int


def _marks(markup: str) -> list[_Mark]:
    """The tags of ``markup``, in order; brackets that are no tags are left out."""
    marks = [mark for match in _TAG.finditer(markup) if (mark := _mark(match)) is not None]
    kept: list[_Mark] = []
    for i, mark in enumerate(marks):
        after = marks[i + 1].kind if i + 1 < len(marks) else "end"
        if mark.kind != "unknown" or _stands_as_tag(markup, mark, kept, after):
            kept.append(mark)
    return kept


def _mark(match: re.Match[str]) -> _Mark | None:
    name = _letters(match["name"])
    if name in _CLOSING or (match["slash"] and (name in _LABELS or name == "section")):
        return _Mark("close", "", *match.span())
    if name in _LABELS:
        return _Mark("open", _LABELS[name], *match.span())
    if (match["quote"] or match["inner"] or match["number"]) and len(name) > 2:
        return _Mark("unknown", match["name"].lower(), *match.span())
    return None


def _stands_as_tag(markup: str, mark: _Mark, before: list[_Mark], after: str) -> bool:
    """Whether an unknown name in brackets is a tag: only where a section can begin.

    That is outside any section, or at the start of a line with its own closing tag.
    ``x = ["apple"]`` and ``d["key"]`` inside a section stay text.
    """
    previous = before[-1] if before else _Mark("close", "", 0, 0)
    between = markup[previous.end : mark.start]
    if previous.kind == "close" and not between.strip():
        return True
    line_start = not between.rpartition("\n")[2].strip() and "\n" in between
    return line_start and after == "close"
