"""The behaviours, and the frozen records that one stage hands to the next.

Nothing here computes: a record is what a stage promises to the stage after it. All token
positions are into ``prompt_ids + output_ids``, the ids that were used (METHOD, section 5).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

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

    ``direction`` is a behaviour, ``random:i`` or ``none`` (then layer -1, coefficient 0).
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


def response_from_row(row: dict[str, Any]) -> Response:
    """The inverse of :func:`to_row` for a :class:`Response`; extra keys are ignored."""
    names = Response.__dataclass_fields__
    values = {name: row[name] for name in names}
    values["prompt_ids"] = tuple(values["prompt_ids"])
    values["output_ids"] = tuple(values["output_ids"])
    return Response(**values)


def annotation_from_row(row: dict[str, Any]) -> Annotation:
    """The inverse of :func:`to_row` for an :class:`Annotation`; extra keys are ignored."""
    return Annotation(
        task_id=row["task_id"],
        annotator=row["annotator"],
        segments=tuple(PlacedSegment(**segment) for segment in row["segments"]),
        spans=tuple(TokenSpan(**span) for span in row["spans"]),
        ledger=dict(row["ledger"]),
        failed=row.get("failed"),
    )


def steered_from_row(row: dict[str, Any]) -> Steered:
    """The inverse of :func:`to_row` for a :class:`Steered`."""
    annotation = row["annotation"]
    return Steered(
        **{name: row[name] for name in STEERED_KEY},
        response=response_from_row(row["response"]),
        annotation=None if annotation is None else annotation_from_row(annotation),
    )


#: The fields of :attr:`Steered.key`, the row key of ``steered.jsonl``.
STEERED_KEY = ("task_id", "direction", "layer", "coefficient", "operation")
