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
from typing import Annotated, Any, TypeVar

from pydantic import Field, StrictBool, TypeAdapter, ValidationError, model_validator

#: Any record.
R = TypeVar("R")
#: How fields are checked when a row is read: positions and token ids; a layer, -1 for none; a
#: coefficient.
Count = Annotated[int, Field(strict=True, ge=0)]
Layer = Annotated[int, Field(strict=True, ge=-1)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]

#: What stands around the thinking of a response.
OPEN, CLOSE = "<think>", "</think>"
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


class _Whole:
    """A record whose row has every field, those with a default too: only ``audit`` and
    ``failed`` may be missing (they came later)."""

    @model_validator(mode="before")
    @classmethod
    def _has_all(cls, row: Any) -> Any:
        names = {one.name for one in fields(cls)} - {"audit", "failed"}  # type: ignore[arg-type]
        if isinstance(row, dict) and (lacking := names - row.keys()):
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
        return row


@dataclass(frozen=True)
class Response(_Whole):
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
    prompt_ids: tuple[Count, ...]
    output_ids: tuple[Count, ...]
    text: str
    thinking: str
    thinking_start: Count
    answer: str
    closed: StrictBool
    finished: StrictBool
    audit: dict[str, Any] | None = field(default=None, compare=False)


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
    start: Count
    end: Count


@dataclass(frozen=True)
class Span:
    """Tokens ``[start, end)`` of ``prompt_ids + output_ids`` that show one behaviour."""

    label: str
    start: Count
    end: Count


@dataclass(frozen=True)
class Annotation(_Whole):
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
class Steered(_Whole):
    """A chain written under an intervention, and its annotation once it has one.

    ``direction`` is a behaviour, a control such as ``shuffled:0``, or ``none`` (then layer -1,
    coefficient 0).
    """

    task_id: str
    direction: str
    layer: Layer
    coefficient: Finite
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


def _reader(record: type[R]) -> Callable[[Any], R]:
    """The inverse of :func:`to_row` for one kind of record; extra keys are ignored."""
    adapter = TypeAdapter(record)

    def read(row: Any) -> R:
        try:
            return adapter.validate_python(row)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"])) or "the row"
            raise BadRow(f"{place}: {first['msg']}") from None

    return read


#: A record from its row, or :class:`BadRow`.
response_from_row = _reader(Response)
annotation_from_row = _reader(Annotation)
steered_from_row = _reader(Steered)
