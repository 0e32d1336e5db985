"""The behaviours, and the frozen records that one stage hands to the next.

Nothing here computes: a record is what a stage promises to the stage after it. All token
positions are into ``prompt_ids + output_ids``, the ids that were used (METHOD, section 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from os import PathLike
from typing import Any, TypeVar

from stllms import foreign

#: Any record.
R = TypeVar("R")

#: The six labels of the paper's annotation, in the order used everywhere.
BEHAVIOURS: tuple[str, ...] = (
    "initializing",
    "deduction",
    "adding-knowledge",
    "example-testing",
    "uncertainty-estimation",
    "backtracking",
)

#: The four behaviours that the paper steers, in the order of its figures.
STEERED: tuple[str, ...] = (
    "backtracking",
    "uncertainty-estimation",
    "example-testing",
    "adding-knowledge",
)

#: Kinds of control directions (METHOD, section 13): a direction is called ``"shuffled:0"``.
CONTROLS: tuple[str, ...] = ("shuffled", "covariance", "isotropic")

#: The rows of the paper's cosine heatmap.
HEATMAP: tuple[str, ...] = (
    "initializing",
    "backtracking",
    "uncertainty-estimation",
    "adding-knowledge",
    "deduction",
)

#: The ten categories of tasks.
CATEGORIES: tuple[str, ...] = (
    "mathematical logic",
    "spatial reasoning",
    "verbal logic",
    "pattern recognition",
    "lateral thinking",
    "causal reasoning",
    "probabilistic thinking",
    "systems thinking",
    "creative problem solving",
    "scientific reasoning",
)


def is_control(direction: str) -> bool:
    """Whether the name of a direction is that of a control."""
    kind, colon, number = direction.partition(":")
    return kind in CONTROLS and bool(colon) and number.isdigit()


@dataclass(frozen=True)
class Task:
    """A question. ``answer`` is the exact answer where one can be checked."""

    id: str
    category: str
    content: str
    answer: str | None = None


@dataclass(frozen=True)
class Response:
    """What a model wrote for one task.

    ``text`` is the decoded output up to the end-of-sequence token, tags included;
    ``thinking`` is the part between ``<think>`` and ``</think>`` and begins at character
    ``thinking_start`` of ``text`` (:func:`stllms.prompts.split` says which, where a model
    writes a tag twice). ``answer`` is what follows ``</think>`` (all of ``text``
    for a model that does not open a ``<think>``). ``closed`` says that the thinking ended
    before the token limit, ``finished`` that the model ended its turn before it.
    ``audit`` holds the sums over its tokens that the sampling audit is made of
    (:func:`stllms.sampling.entry`), and is no part of what was written: responses that differ
    in it alone are equal. ``None`` for text from a file or an API, and in older files.
    """

    task_id: str
    category: str
    prompt_text: str
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    text: str
    thinking: str
    thinking_start: int
    answer: str
    closed: bool
    finished: bool
    audit: dict[str, float] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Segment:
    """A labelled part of a thinking text as an annotator returned it, not yet placed."""

    label: str
    text: str


@dataclass(frozen=True)
class PlacedSegment:
    """A segment with its place: characters ``[start, end)`` of ``Response.thinking``."""

    label: str
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class TokenSpan:
    """Tokens ``[start, end)`` of ``prompt_ids + output_ids`` that show one behaviour."""

    label: str
    start: int
    end: int


Span = TokenSpan  # the new word, until this file moves


@dataclass(frozen=True)
class Annotation:
    """The labelled parts of one chain, in characters and in tokens, and the ledger.

    ``ledger`` counts what was placed and what was not, so that nothing is lost silently:
    at least ``placed``, ``rejected``, ``coverage`` (share of the non-white characters of
    the thinking text that carry a label); annotators add their own keys.
    ``failed`` names why a chain has no annotation at all, ``None`` for a good one.
    """

    task_id: str
    annotator: str
    segments: tuple[PlacedSegment, ...] = ()
    spans: tuple[TokenSpan, ...] = ()
    ledger: dict[str, Any] = field(default_factory=dict)
    failed: str | None = None


@dataclass(frozen=True)
class Steered:
    """A chain written under an intervention, and its annotation once it has one.

    ``direction`` is a behaviour, a control such as ``shuffled:0``, or ``none`` (then layer -1,
    coefficient 0).
    """

    task_id: str
    direction: str
    layer: int
    coefficient: float
    operation: str
    response: Response
    annotation: Annotation | None = None

    @property
    def key(self) -> tuple[str, str, int, float, str]:
        """What tells the row from others of its file."""
        return self.task_id, self.direction, self.layer, self.coefficient, self.operation


def to_row(record: Any) -> dict[str, Any]:
    """A record as a plain dictionary, ready for JSON."""
    return asdict(record)


class BadRow(ValueError):  # noqa: N818 - reads as what it is
    """A row is not the record it should be; the message, one line, names the field."""


def from_rows(rows: Iterable[Any], make: Callable[[Any], R], path: str | PathLike) -> list[R]:
    """``make`` of every row of the file ``path``, which a :class:`BadRow` names."""
    made = []
    for number, row in enumerate(rows, 1):
        try:
            made.append(make(row))
        except BadRow as error:
            raise BadRow(f"{path}, line {number}: {error}") from None
    return made


def response_from_row(row: Any) -> Response:
    """The inverse of :func:`to_row` for a :class:`Response`; extra keys are ignored. Raises
    :class:`BadRow`."""
    return _record(Response, row)


def annotation_from_row(row: Any) -> Annotation:
    """The inverse of :func:`to_row` for an :class:`Annotation`; extra keys are ignored. Raises
    :class:`BadRow`."""
    return _record(Annotation, row)


def steered_from_row(row: Any) -> Steered:
    """The inverse of :func:`to_row` for a :class:`Steered`. Raises :class:`BadRow`."""
    return _record(Steered, row)


def _record(kind: type[R], row: Any, at: str = "") -> R:
    """A record of ``kind`` from the fields of ``row``; ``at`` is its place in messages."""
    if not isinstance(row, dict):
        raise BadRow(f"{at or 'the row'}: {foreign.kind(row)}, expected an object")
    place = f"{at}." if at else ""
    names = {one.name: one.type for one in fields(kind)}
    missing = [name for name in names if name not in row and name not in _OPTIONAL]
    if missing:
        raise BadRow(f"it lacks {', '.join(place + name for name in missing)}")
    return kind(**{n: _value(t, row[n], f"{place}{n}") for n, t in names.items() if n in row})


def _value(kind: str, value: Any, at: str) -> Any:
    """``value`` as a field of the annotated type ``kind``; types not named here pass.

    Places and token ids are not negative (a layer may be -1), coefficients are finite.
    """
    if kind.endswith(" | None"):
        return None if value is None else _value(kind.removesuffix(" | None"), value, at)
    if kind in _RECORDS:
        return _record(_RECORDS[kind], value, at)
    if kind.startswith("tuple["):
        if not isinstance(value, list | tuple):
            raise BadRow(f"{at}: {foreign.kind(value)}, expected a list")
        inner = kind.removeprefix("tuple[").removesuffix(", ...]")
        if inner == "int" and {*map(type, value)} == {int} and min(value) >= 0:
            return tuple(value)  # token ids are many
        return tuple(_value(inner, item, f"{at}[{i}]") for i, item in enumerate(value))
    expected, good = _PLAIN.get(kind, ("", lambda _: True))
    if not good(value) or (kind == "int" and value == -1 and at != "layer"):
        shown = f" ({str(value)[:20]})" if isinstance(value, int | float) else ""
        raise BadRow(f"{at}: {foreign.kind(value)}{shown}, expected {expected}")
    return dict(value) if isinstance(value, dict) else value


#: Fields that a row may lack: they came later, or are written where there is one.
_OPTIONAL = frozenset({"audit", "failed"})
#: Annotated type of a field -> what is expected in words, and the test of a value.
_PLAIN: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("a text", lambda value: isinstance(value, str)),
    "bool": ("a boolean", lambda value: isinstance(value, bool)),
    "int": ("a whole number from 0 on", lambda value: type(value) is int and value >= -1),
    "float": ("a finite number", lambda value: type(value) in (int, float) and isfinite(value)),
    "dict[str, Any]": ("an object", lambda value: isinstance(value, dict)),
}
_RECORDS: dict[str, type] = {
    one.__name__: one for one in (PlacedSegment, TokenSpan, Response, Annotation)
}


#: The fields of :attr:`Steered.key`, the row key of ``steered.jsonl``.
STEERED_KEY = ("task_id", "direction", "layer", "coefficient", "operation")

from stllms.foreign import DEEPEST, amount, kind, loads  # noqa: E402, F401
