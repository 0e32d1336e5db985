"""The frozen records that one stage hands to the next, and JSON that others wrote.

A record is what a stage promises to the stage after it; nothing is computed here. All token
positions index ``prompt_ids + output_ids``, the ids that were used (method, section 5).

A stranger's file or a server's reply may be nested 2,500 deep, or hold a number of 5,000
digits: :func:`loads` is the one way to parse such text, with one kind of error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from typing import Any, TypeVar

#: Any record.
R = TypeVar("R")

#: The fields of :attr:`Steered.key`, the row key of ``steered.jsonl``.
STEERED_KEY = ("task_id", "direction", "layer", "coefficient", "operation")


@dataclass(frozen=True)
class Task:
    """A task. ``answer`` is the exact answer where one can be checked; ``messages`` is the chat
    (``{"role", "content"}``) that is sent in place of a prompt made of ``content``."""

    id: str
    category: str
    content: str
    answer: str | None = None
    messages: tuple[Mapping[str, str], ...] = field(default=(), kw_only=True)


@dataclass(frozen=True)
class Response:
    """What a model wrote for one task.

    ``text`` is the decoded output up to the end-of-sequence token, tags included;
    ``thinking`` is the part between ``<think>`` and ``</think>`` and begins at character
    ``thinking_start`` of ``text`` (:func:`stllms.generation.prompts.split` decides where a
    model writes a tag twice). ``answer`` is what follows ``</think>`` (all of ``text`` for a
    model that does not open a ``<think>``). ``closed`` says that the thinking ended before the
    token limit, ``finished`` that the model ended its turn before it.
    ``audit`` holds the per-response sums of the sampling audit
    (:func:`stllms.runs.audit.entry`); responses that differ only in it are equal.
    It is ``None`` for text from a file or an API, and in older files.
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
    """A labelled piece of a thinking text as an annotator returned it, not yet placed."""

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
class Span:
    """Tokens ``[start, end)`` of ``prompt_ids + output_ids`` that show one behaviour."""

    label: str
    start: int
    end: int


@dataclass(frozen=True)
class Annotation:
    """The labelled segments of one chain, in characters and in tokens.

    ``ledger`` counts what was placed and what was not, so that nothing is lost silently:
    at least ``placed``, ``rejected``, ``coverage`` (share of the non-white characters of
    the thinking text that carry a label); annotators add their own keys.
    ``failed`` names why a chain has no annotation at all, ``None`` for a good one.
    """

    task_id: str
    annotator: str
    segments: tuple[PlacedSegment, ...] = ()
    spans: tuple[Span, ...] = ()
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
    def labelled(self) -> Annotation:
        """The annotation; ``ValueError`` where nobody has annotated the chain yet."""
        if self.annotation is None:
            raise ValueError(f"the chain of {self.response.task_id} is not annotated yet")
        return self.annotation

    @property
    def key(self) -> tuple[str, str, int, float, str]:
        """What tells the row from others of its file."""
        return self.task_id, self.direction, self.layer, self.coefficient, self.operation


def to_row(record: Any) -> dict[str, Any]:
    """A record as a plain dictionary, ready for JSON."""
    return asdict(record)


# -- JSON that others wrote ----------------------------------------------------------------

#: Deeper lists and objects are refused: nothing that is read here has more than ten levels.
DEEPEST = 100

_KINDS: dict[str, Any] = {
    "a boolean": bool,
    "a number": (int, float),
    "a text": str,
    "a list": list,
    "an object": dict,
}


def loads(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises ``ValueError``, one line, for anything else: text that is not JSON, is nested deeper
    than :data:`DEEPEST`, holds a number of thousands of digits, or bytes that are not UTF-8.
    ``NaN`` and ``Infinity`` are read as Python does: check numbers with :func:`amount`.
    """
    too_deep = f"nested deeper than {DEEPEST} levels"
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(too_deep) from None
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            child
            for one in level
            if isinstance(one, dict | list)
            for child in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return value
    raise ValueError(too_deep)


def amount(value: Any) -> float | None:
    """A number that counts or costs: finite and not negative, not a boolean; else ``None``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if math.isfinite(number) and number >= 0 else None


def kind(value: Any) -> str:
    """What a JSON value is, in the words of JSON, for messages."""
    if value is None:
        return "null"
    names = (name for name, types in _KINDS.items() if isinstance(value, types))
    return next(names, type(value).__name__)


# -- records from rows ---------------------------------------------------------------------


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


#: Fields that a row may lack: they came later, or are written only where there is a value.
_OPTIONAL = frozenset({"audit", "failed"})

#: Annotated type of a field -> what is expected in words, and the test of a value. Positions
#: and token ids are not negative (only a layer may be -1), coefficients are finite.
_PLAIN: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("a text", lambda value: isinstance(value, str)),
    "bool": ("a boolean", lambda value: isinstance(value, bool)),
    "int": ("a whole number from 0 on", lambda value: type(value) is int and value >= -1),
    "float": (
        "a finite number",
        lambda value: type(value) in (int, float) and math.isfinite(value),
    ),
    "dict[str, Any]": ("an object", lambda value: isinstance(value, dict)),
}

_RECORDS: dict[str, type] = {
    one.__name__: one for one in (PlacedSegment, Span, Response, Annotation)
}


def _record(record: type[R], row: Any, at: str = "") -> R:
    """A record from the fields of ``row``; ``at`` is its place in messages."""
    if not isinstance(row, dict):
        raise BadRow(f"{at or 'the row'}: {kind(row)}, expected an object")
    place = f"{at}." if at else ""
    names = {one.name: str(one.type) for one in fields(record)}  # type: ignore[arg-type]
    missing = [name for name in names if name not in row and name not in _OPTIONAL]
    if missing:
        raise BadRow(f"it lacks {', '.join(place + name for name in missing)}")
    return record(**{n: _value(t, row[n], f"{place}{n}") for n, t in names.items() if n in row})


def _value(type_name: str, value: Any, at: str) -> Any:
    """``value`` as a field of the annotated type; types not in the tables above pass."""
    if type_name.endswith(" | None"):
        return None if value is None else _value(type_name.removesuffix(" | None"), value, at)
    if type_name in _RECORDS:
        return _record(_RECORDS[type_name], value, at)
    if type_name.startswith("tuple["):
        if not isinstance(value, list | tuple):
            raise BadRow(f"{at}: {kind(value)}, expected a list")
        inner = type_name.removeprefix("tuple[").removesuffix(", ...]")
        if inner == "int" and {*map(type, value)} == {int} and min(value) >= 0:
            return tuple(value)  # token ids are many
        return tuple(_value(inner, item, f"{at}[{i}]") for i, item in enumerate(value))
    expected, good = _PLAIN.get(type_name, ("", lambda _: True))
    if not good(value) or (type_name == "int" and value == -1 and at != "layer"):
        shown = f" ({str(value)[:20]})" if isinstance(value, int | float) else ""
        raise BadRow(f"{at}: {kind(value)}{shown}, expected {expected}")
    return dict(value) if isinstance(value, dict) else value
