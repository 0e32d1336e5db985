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
from functools import cache
from typing import NamedTuple

from stllms.annotation import placing
from stllms.labels import PAPER, LabelSet
from stllms.records import Segment

#: Why a piece of a reply is not a segment.
UNKNOWN, EMPTY, OUTSIDE = "unknown label", "empty section", "outside any section"

_QUOTE = r"""\\?["'`*“”„‘’«»]"""
# What any label may look like. Every repetition is bounded: reading is linear in the reply.
_NAME = r"[^\W\d_][^\W\d]{0,24}(?:[ _‐‑–-]{1,3}[^\W\d_]{1,24}){0,3}"
_CLOSING = ("endsection", "endofsection", "sectionend")

#: A piece of a reply, and why it is no segment (``None``: it is one).
Piece = tuple[Segment, str | None]


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def own_names(labels: LabelSet, usual: str) -> str:
    """Alternatives of a regular expression, each with ``|`` behind it: the names of ``labels``
    that the expression ``usual`` does not match, in any case and with any hyphens.
    """
    other = [name for name in labels.names if not re.fullmatch(usual, name)]
    words = (re.findall(r"[^\W_]+", name) for name in sorted(other, key=len, reverse=True))
    return "".join("(?i:" + r"[ _/‐‑–-]{0,3}".join(each) + r")(?![\w/-])|" for each in words)


class _Grammar(NamedTuple):
    """How the labels of a set are written: their letters, closing tags, any tag."""

    names: dict[str, str]
    closing: frozenset[str]
    tag: re.Pattern[str]


@cache
def _grammar(labels: LabelSet) -> _Grammar:
    names = {_letters(name): name for name in labels.names}
    closing = {*_CLOSING, *(f"end{name}" for name in names)} - names.keys()
    own = own_names(labels, _NAME)
    tag = re.compile(
        rf"""\[\s{{0,3}}(?P<quote>(?:{_QUOTE}){{0,3}})\s{{0,3}}
        (?:(?!{own}(?!))(?P<number>\d{{1,2}})\s{{0,2}}[.):]?\s{{0,3}})?
        (?P<inner>(?:{_QUOTE}){{0,3}})(?P<slash>/?)(?P<name>{own}{_NAME})
        \s{{0,3}}(?:{_QUOTE}){{0,3}}\s{{0,3}}\]""",
        re.VERBOSE,
    )
    return _Grammar(names, frozenset(closing), tag)


def label_of(name: str, labels: LabelSet = PAPER) -> str | None:
    """The label that a judge means by ``name``, whatever its case and hyphens."""
    return _grammar(labels).names.get(_letters(name))


@dataclass(frozen=True)
class Reading:
    """What a reader made of one reply: all its ``pieces``, in order."""

    pieces: tuple[Piece, ...]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The pieces that were not rejected."""
        return tuple(segment for segment, reason in self.pieces if reason is None)


def read(markup: str, *, reader: str = "tolerant", labels: LabelSet = PAPER) -> Reading:
    """Segments of ``markup``, and the pieces that are none. Never raises, whatever the text.

    ``reader`` is one of :data:`READERS`.
    """
    if reader not in READERS:
        raise ValueError(f"no reader {reader!r}: choose one of {', '.join(READERS)}")
    return Reading(tuple(READERS[reader](markup, labels)))


def parse(markup: str, labels: LabelSet = PAPER) -> list[Segment]:
    """The segments that the tolerant reader finds; :func:`read` also tells what it rejected."""
    return list(read(markup, labels=labels).segments)


def align(
    markup: str, text: str, *, reader: str = "tolerant", labels: LabelSet = PAPER
) -> placing.Alignment:
    """A judge's reply, placed in the ``text`` of the chain that it is about.

    ``reader="published"`` also aligns as published (first exact occurrence). The characters
    of pieces that the reader rejected are counted under the reader's reason.
    """
    pieces = read(markup, reader=reader, labels=labels).pieces
    return placing.align(
        [segment for segment, _ in pieces],
        text,
        method="published" if reader == "published" else "tolerant",
        reasons=[reason for _, reason in pieces],
    )


def _published(markup: str, labels: LabelSet) -> Iterator[Piece]:
    spaced = "".join(f"{name}|" for name in labels.names if not re.fullmatch(r"[\w-]+", name))
    for match in re.finditer(
        rf'\["({spaced}[\w-]+)"\](.*?)\["end-section"\]', markup, re.DOTALL
    ):
        yield Segment(match[1], match[2].strip()), None


def _counted(markup: str, labels: LabelSet) -> Iterator[Piece]:
    marks = list(re.finditer(rf'\["?({"|".join(labels.names)})"?\]', markup))
    for mark, end in zip(marks, [*(m.start() for m in marks[1:]), len(markup)], strict=False):
        text = re.sub(r'\["?end-section"?\]', "", markup[mark.end() : end]).strip()
        yield Segment(mark[1], text), None


def _tolerant(markup: str, labels: LabelSet) -> Iterator[Piece]:
    current: str | None = None
    outer: list[str] = []  # sections that another one interrupted, innermost last
    position = 0
    for mark in [*_marks(markup, labels), _Mark("end", "", len(markup), len(markup))]:
        text = markup[position : mark.start].strip()
        if current is not None:
            yield _section(current, text, labels)
            if mark.kind != "close":
                outer.append(current)
        elif mark.kind == "close" and outer and text:
            yield _section(outer.pop(), text, labels)
        elif text:
            yield Segment("", text), OUTSIDE
        current = mark.label if mark.kind in ("open", "unknown") else None
        position = mark.end


def _section(label: str, text: str, labels: LabelSet) -> Piece:
    if label not in labels.names:
        return Segment(label, text), UNKNOWN
    return Segment(label, text), None if text else EMPTY


#: Readers by name: reply, labels -> pieces.
READERS = {"tolerant": _tolerant, "published": _published, "published-counts": _counted}


class _Mark(NamedTuple):
    kind: str  # "open", "close", "unknown", "end"
    label: str
    start: int
    end: int


def _marks(markup: str, labels: LabelSet = PAPER) -> list[_Mark]:
    """The tags of ``markup``, in order; brackets that are no tags are left out."""
    grammar = _grammar(labels)
    found = (_mark(match, grammar) for match in grammar.tag.finditer(markup))
    marks = [mark for mark in found if mark is not None]
    kept: list[_Mark] = []
    for i, mark in enumerate(marks):
        after = marks[i + 1].kind if i + 1 < len(marks) else "end"
        if mark.kind != "unknown" or _stands_as_tag(markup, mark, kept, after):
            kept.append(mark)
    return kept


def _mark(match: re.Match[str], grammar: _Grammar) -> _Mark | None:
    name = _letters(match["name"])
    known, marked = name in grammar.names, match["quote"] or match["inner"] or match["number"]
    if name in grammar.closing or (match["slash"] and (known or name == "section")):
        return _Mark("close", "", *match.span())
    if known and (marked or _is_word(name)):
        return _Mark("open", grammar.names[name], *match.span())
    if marked and len(name) > 2:
        return _Mark("unknown", match["name"].lower(), *match.span())
    return None


def _is_word(name: str) -> bool:
    """Not so where ``a[i]`` or ``[12]`` would be tags of labels that are called so."""
    return not name.isdigit() and (len(name) > 2 or not name.isascii())


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
