"""Segments -> characters of the thinking text -> half-open token spans; nothing uncounted.

:func:`align` places what an annotator returned. The tolerant method is one global, monotone
alignment: the longest common subsequence of the words of the text and of the words of all
segments in order, ignoring case and the style of quotes and dashes. Each segment takes its
densest run of matched words. ``"published"`` takes the first exact occurrence of each segment,
in any order (method, section 4). :func:`token_spans` turns characters into tokens (section 5).
Every character that is not white space is labelled, or counted under the reason why not.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from rapidfuzz.distance import LCSseq

from stllms.records import Annotation, PlacedSegment, Response, Segment, Span

METHODS = ("tolerant", "published")

#: Why a segment was not placed, and why a character carries no label.
NOT_FOUND, EMPTY, LEFT_OUT = "not in the text", "empty segment", "left out by the annotator"

#: A run of matched words ends where the text skips more words than the segment, plus this.
_SLACK = 6
#: What a segment must find in one run to be placed: more than this share of its words, or
#: this many.
_LEAST, _ENOUGH = 0.5, 30

#: Scripts that write no spaces between words, as a range of characters.
CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
# Long words are cut, so that endless digits and scripts without spaces still align in part.
_WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]{{1,16}}|[^\w\s]")
_SAME = str.maketrans("“”„«»‘’`´–—‑−", '"""""\'\'\'\'----')


@dataclass(frozen=True)
class Alignment:
    """Where segments went in a text.

    ``placed`` is in the order of the text, ``rejected`` holds ``(segment, reason)``,
    ``ambiguous`` counts placed segments whose exact text occurs more than once,
    ``characters`` says how many of those that are not white space are ``"labelled"``, or why
    not, and ``spans`` is filled when :func:`align` was given offsets.
    """

    placed: tuple[PlacedSegment, ...]
    rejected: tuple[tuple[Segment, str], ...]
    ambiguous: int
    characters: dict[str, int]
    spans: tuple[Span, ...] = ()

    @property
    def total(self) -> int:
        """The characters of the text that are not white space."""
        return sum(self.characters.values())

    @property
    def coverage(self) -> float:
        """The labelled share of them; 1 for an empty text."""
        return self.characters["labelled"] / self.total if self.total else 1.0


def align(
    segments: Sequence[Segment],
    text: str,
    offsets: Any = None,
    *,
    method: str = "tolerant",
    reasons: Sequence[str | None] | None = None,
) -> Alignment:
    """Place ``segments`` in ``text``; with ``offsets [T, 2]`` also in tokens.

    ``reasons`` (one per segment, ``None`` for a good one) includes the pieces that a reader
    has already rejected: they are located but never placed, and the characters they cover
    are counted under their reason. ``method`` is ``"tolerant"`` or ``"published"``.
    """
    if method not in METHODS:
        raise ValueError(f"no alignment {method!r}: choose one of {', '.join(METHODS)}")
    reasons = [None] * len(segments) if reasons is None else reasons
    find = _find_in_order if method == "tolerant" else _find_first
    found = find([segment.text for segment in segments], text)

    placed, rejected, elsewhere = [], [], []
    for segment, reason, at in zip(segments, reasons, found, strict=True):
        if reason is not None:
            rejected.append((segment, reason))
            elsewhere += [(reason, *at)] if at else []
        elif at is None:
            rejected.append((segment, NOT_FOUND if segment.text.strip() else EMPTY))
        else:
            placed.append(PlacedSegment(segment.label, text[slice(*at)], *at))
    made = place(placed, text, rejected, elsewhere)
    return made if offsets is None else replace(made, spans=token_spans(placed, offsets, text))


def place(
    placed: Iterable[PlacedSegment],
    text: str,
    rejected: Sequence[tuple[Segment, str]] = (),
    elsewhere: Sequence[tuple[str, int, int]] = (),
) -> Alignment:
    """The :class:`Alignment` of segments whose places are known: of rules, a grammar, a model.

    Every character of ``text`` is labelled or counted under a reason; ``elsewhere`` holds
    ``(reason, start, end)`` of rejected pieces that were located.
    """
    placed = sorted(placed, key=lambda segment: (segment.start, segment.end))
    names = ["labelled", *dict.fromkeys(reason for reason, _, _ in elsewhere), LEFT_OUT]
    state = np.full(len(text), len(names) - 1)
    for reason, start, end in elsewhere:
        state[start:end] = names.index(reason)
    for segment in placed:
        state[segment.start : segment.end] = 0
    counts = np.bincount(state[solid(text)], minlength=len(names)).tolist()
    return Alignment(
        placed=tuple(placed),
        rejected=tuple(rejected),
        ambiguous=sum(text.find(s.text) != text.rfind(s.text) for s in placed),
        characters={n: c for n, c in zip(names, counts, strict=True) if c or n == "labelled"},
    )


def annotation(alignment: Alignment, task_id: str, annotator: str, **ledger: Any) -> Annotation:
    """The record of one chain: its counts, and ``ledger``, the annotator's own keys."""
    counts = {
        "placed": len(alignment.placed),
        "rejected": len(alignment.rejected),
        "reasons": dict(Counter(reason for _, reason in alignment.rejected)),
        **{name: getattr(alignment, name) for name in ("ambiguous", "coverage", "total")},
        "characters": alignment.characters,
    }
    return Annotation(task_id, annotator, alignment.placed, alignment.spans, counts | ledger)


def failed(text: str, task_id: str, annotator: str, why: str, **ledger: Any) -> Annotation:
    """The record of a chain without any annotation: every character counted as failed."""
    total = int(solid(text).sum())
    empty = Alignment((), (), 0, {"labelled": 0} | ({"failed": total} if total else {}))
    made = annotation(empty, task_id, annotator, coverage=0.0, **ledger)
    return replace(made, failed=why)


def solid(text: str) -> np.ndarray:
    """Which characters of a text are not white space, ``[len(text)]`` booleans."""
    return np.array([not c.isspace() for c in text], dtype=bool)


# --- the two ways to find a segment ------------------------------------------------------


def _find_first(parts: list[str], text: str) -> list[tuple[int, int] | None]:
    """First exact occurrence of each part anywhere in the text."""
    starts = [text.find(part) if part.strip() else -1 for part in parts]
    return [
        (start, start + len(part)) if start >= 0 else None
        for start, part in zip(starts, parts, strict=True)
    ]


def _words(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The words and signs of a text, normalised, and their characters ``[start, end)``."""
    matches = list(_WORD.finditer(text))
    if text.isascii():
        return [m[0].lower() for m in matches], [m.span() for m in matches]
    fold = unicodedata.normalize
    words = [fold("NFKC", m[0].translate(_SAME)).lower() for m in matches]
    return words, [m.span() for m in matches]


def _find_in_order(parts: list[str], text: str) -> list[tuple[int, int] | None]:
    """One longest common subsequence for all parts; each takes its densest run of words."""
    words, places = _words(text)
    read: list[str] = []
    bounds = [0]
    for part in parts:
        read += _words(part)[0]
        bounds.append(len(read))
    partner = np.full(len(read) + 1, -1)
    for tag, i, i_end, j, j_end in LCSseq.opcodes(read, words):
        if tag == "equal":
            partner[i:i_end] = np.arange(j, j_end)

    found: list[tuple[int, int] | None] = []
    for first, last in pairwise(bounds):
        at = np.flatnonzero(partner[first:last] >= 0)
        to = _tightened(at, partner[first:last][at], read[first:last], words)
        run = _densest_run(at, to, last - first)
        found.append(run and (places[run[0]][0], places[run[1] - 1][1]))
    return found


def _tightened(at: np.ndarray, to: np.ndarray, part: list[str], words: list[str]) -> np.ndarray:
    """The same matches of ``part[at]`` with ``words[to]``, as close together as they can be.

    Equal words are interchangeable to the longest common subsequence: the first "Wait," or
    the last full stop of a part may have matched far away. Each is moved beside its neighbour
    where that word is the same: first the beginnings to the right, then the ends to the left.
    """
    to = to.copy()
    if not ((np.diff(at) == 1) & (np.diff(to) > 1)).any():
        return to
    for k in range(len(at) - 2, -1, -1):
        beside = to[k + 1] - 1
        if at[k + 1] == at[k] + 1 and to[k] < beside and part[at[k]] == words[beside]:
            to[k] = beside
    for k in range(1, len(at)):
        beside = to[k - 1] + 1
        if at[k - 1] == at[k] - 1 and to[k] > beside and part[at[k]] == words[beside]:
            to[k] = beside
    return to


def _densest_run(at: np.ndarray, to: np.ndarray, length: int) -> tuple[int, int] | None:
    """Words ``[start, end)`` of the text for a part of ``length`` words whose words ``at``
    matched the text's words ``to``; ``None`` where too few did.
    """
    if not len(at):
        return None
    cuts = np.flatnonzero(np.diff(to) > np.diff(at) + _SLACK) + 1
    run = max(np.split(to, cuts), key=len)
    if len(run) <= _LEAST * length and len(run) < _ENOUGH:
        return None
    return int(run[0]), int(run[-1]) + 1


# --- tokens ------------------------------------------------------------------------------


def token_spans(placed: Iterable[PlacedSegment], offsets: Any, text: str) -> tuple[Span, ...]:
    """Half-open token spans of placed segments, in the order of the text.

    ``offsets [T, 2]`` are the characters of the thinking text that each token covers;
    tokens outside it (prompt, tags, answer) have ``start == end`` or negative values. A token
    across a boundary belongs to the segment that holds its first character that is not white
    space, so that spans of segments that do not overlap never overlap. A segment without a
    token of its own (shorter than the token it shares) has no span.
    """
    offsets = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = np.clip(offsets[:, 0], 0, len(text)), np.minimum(offsets[:, 1], len(text))
    solids = np.append(np.flatnonzero(solid(text)), len(text))
    first = solids[np.searchsorted(solids, starts)]
    first[first >= ends] = -1  # nothing but white space, or outside the text
    spans = []
    for segment in sorted(placed, key=lambda segment: (segment.start, segment.end)):
        at = np.flatnonzero((first >= segment.start) & (first < segment.end))
        if len(at):
            spans.append(Span(segment.label, int(at[0]), int(at[-1]) + 1))
    return tuple(spans)


def with_spans(annotation: Annotation, offsets: Any, text: str) -> Annotation:
    """The annotation with its token spans; ``offsets`` and ``text`` as in :func:`token_spans`.

    The ledger gains ``spans`` and ``without_token``, the segments that own no token.
    """
    spans = token_spans(annotation.segments, offsets, text)
    counts = {"spans": len(spans), "without_token": len(annotation.segments) - len(spans)}
    return replace(annotation, spans=spans, ledger=annotation.ledger | counts)


def check(response: Response, found: Sequence[Span]) -> None:
    """Refuses a span that is empty or outside its response, naming both."""
    tokens = len(response.prompt_ids) + len(response.output_ids)
    for span in found:
        if not 0 <= span.start < span.end <= tokens:
            raise ValueError(
                f"response {response.task_id!r}: span [{span.start}, {span.end}) of "
                f"{span.label!r} is empty or outside its {tokens} tokens"
            )


# --- the coverage of a run ---------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """The coverage of a run: ``characters`` (labelled, or why not) adds up to ``total``.

    ``rows`` has one dictionary per chain (``task_id``, ``annotator``, ``failed``, ``placed``,
    ``rejected``, ``ambiguous``, ``coverage``, ``total``) for a table or a strip plot.
    """

    chains: int
    failed: int
    total: int
    coverage: float
    characters: dict[str, int]
    rows: tuple[dict[str, Any], ...] = field(repr=False)


def summarise(annotations: Iterable[Annotation]) -> Summary:
    """The coverage of a run of chains."""
    characters: Counter[str] = Counter({"labelled": 0})
    rows = []
    for one in annotations:
        characters.update(one.ledger["characters"])
        row = {name: getattr(one, name) for name in ("task_id", "annotator", "failed")}
        keys = ("placed", "rejected", "ambiguous", "coverage", "total")
        rows.append(row | {key: one.ledger[key] for key in keys})
    total = characters.total()
    return Summary(
        chains=len(rows),
        failed=sum(row["failed"] is not None for row in rows),
        total=total,
        coverage=characters["labelled"] / total if total else 1.0,
        characters=dict(characters),
        rows=tuple(rows),
    )
