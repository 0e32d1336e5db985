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
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from stllms.annotation import placing
from stllms.labels import BEHAVIOURS
from stllms.records import Annotation, Response, Segment

READERS = ("tolerant", "published", "published-counts")

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


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


_LABELS = {_letters(label): label for label in BEHAVIOURS}
_CLOSING = {"endsection", "endofsection", "sectionend"} | {f"end{name}" for name in _LABELS}


@dataclass(frozen=True)
class Reading:
    """What a reader made of one reply, in the order of the reply.

    ``pieces`` holds every part as ``(segment, reason)``, ``reason`` being ``None`` for a good
    one; :attr:`segments` are the good ones. ``forms`` counts what was unusual: ``unquoted``,
    ``numbered``, ``unclosed``, ``nested``.
    """

    pieces: tuple[tuple[Segment, str | None], ...]
    forms: dict[str, int] = field(default_factory=dict)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The pieces that were not rejected."""
        return tuple(segment for segment, reason in self.pieces if reason is None)


def read(markup: str, *, reader: str = "tolerant") -> Reading:
    """Segments of ``markup``, and the pieces that are none. Never raises, whatever the text.

    ``reader`` is one of :data:`READERS`.
    """
    if reader == "tolerant":
        return _read_tolerant(markup)
    if reader == "published":
        found = (Segment(m[1], m[2].strip()) for m in _PUBLISHED.finditer(markup))
        return Reading(tuple((segment, None) for segment in found))
    if reader == "published-counts":
        return _read_counts(markup)
    raise ValueError(f"no reader {reader!r}: choose one of {', '.join(READERS)}")


def parse(markup: str) -> list[Segment]:
    """The segments that the tolerant reader finds; :func:`read` also tells what it rejected."""
    return list(read(markup).segments)


def from_markup(
    response: Response,
    markup: str,
    annotator: str,
    *,
    reader: str = "tolerant",
    **ledger: Any,
) -> Annotation:
    """The annotation of one chain from a judge's reply.

    ``reader="published"`` also aligns as published (first exact occurrence). The characters
    of pieces that the reader rejected are counted under the reader's reason; ``ledger`` are
    more keys to record, such as usage or a prompt version.
    """
    reading = read(markup, reader=reader)
    alignment = placing.align(
        [segment for segment, _ in reading.pieces],
        response.thinking,
        method="published" if reader == "published" else "tolerant",
        reasons=[reason for _, reason in reading.pieces],
    )
    ledger = {"reader": reader, "forms": reading.forms, **ledger}
    return placing.annotation(alignment, response.task_id, annotator, **ledger)


def _read_counts(markup: str) -> Reading:
    marks = [m for m in _COUNTED.finditer(markup) if m[1] in BEHAVIOURS]
    pieces = []
    for i, mark in enumerate(marks):
        end = marks[i + 1].start() if i + 1 < len(marks) else len(markup)
        text = re.sub(r'\["?end-section"?\]', "", markup[mark.end() : end]).strip()
        pieces.append((Segment(mark[1], text), None))
    return Reading(tuple(pieces))


def _section(label: str, text: str) -> tuple[Segment, str | None]:
    segment = Segment(label, text.strip())
    if label not in BEHAVIOURS:
        return segment, UNKNOWN
    return segment, None if segment.text else EMPTY


def _read_tolerant(markup: str) -> Reading:
    pieces: list[tuple[Segment, str | None]] = []
    forms: Counter[str] = Counter()
    current: str | None = None
    outer: list[str] = []  # sections that another one interrupted, innermost last
    position = 0
    for mark in [*_marks(markup), _Mark("end", "", len(markup), len(markup))]:
        text = markup[position : mark.start]
        forms.update(mark.forms)
        if current is not None:
            pieces.append(_section(current, text))
            if mark.kind != "close":
                forms["unclosed"] += 1
                outer.append(current)
        elif mark.kind == "close" and outer and text.strip():
            forms["nested"] += 1
            pieces.append(_section(outer.pop(), text))
        elif text.strip():
            pieces.append((Segment("", text.strip()), OUTSIDE))
        current = mark.label if mark.kind in ("open", "unknown") else None
        position = mark.end
    return Reading(tuple(pieces), dict(forms))


@dataclass(frozen=True)
class _Mark:
    kind: str  # "open", "close", "unknown", "end"
    label: str
    start: int
    end: int
    forms: tuple[str, ...] = ()


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
    quoted, numbered = bool(match["quote"] or match["inner"]), match["number"] is not None
    forms = (() if quoted else ("unquoted",)) + (("numbered",) if numbered else ())
    start, end = match.span()
    if name in _CLOSING or (match["slash"] and (name in _LABELS or name == "section")):
        return _Mark("close", "", start, end, forms)
    if name in _LABELS:
        return _Mark("open", _LABELS[name], start, end, forms)
    if (quoted or numbered) and len(name) > 2:
        return _Mark("unknown", match["name"].lower(), start, end, forms)
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
