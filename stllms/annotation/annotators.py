"""Annotators: thinking text -> labelled segments, behind one protocol, stored and resumable.

=================  ======================================================================
``grammar``        the truth about the embedded models' chains, from their own grammar
``lexical``        cue words and a few rules; no training, no dependence on a judge
``offline``        a sentence classifier trained on published annotations (offline_card.md)
``openai:MODEL``   a language model as judge, through any OpenAI-compatible server
``replay:FOLDER``  the stored replies of a judge
=================  ======================================================================
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from stllms import __version__
from stllms.annotation import placing, sentences
from stllms.fixtures import grammar
from stllms.hashes import digest
from stllms.records import (
    Annotation,
    PlacedSegment,
    Response,
    Steered,
    annotation_from_row,
    from_rows,
    to_row,
)
from stllms.runs.files import StaleArtefact

if TYPE_CHECKING:  # torch and pandas are heavy
    import pandas as pd

    from stllms.models.model import Model
    from stllms.runs.store import Rows

#: What :func:`annotator` accepts.
NAMES = ("grammar", "lexical", "offline", "openai:MODEL", "replay:FOLDER")

#: The row key of ``annotations.jsonl``.
KEY = ("task_id", "annotator")


@runtime_checkable
class Annotator(Protocol):
    """Anything with a ``name`` that labels chains.

    A ``fingerprint`` says what its labels depend on (weights, stored replies); without one that
    is the version of the package.
    """

    name: str

    def annotate(self, responses: Sequence[Response]) -> list[Annotation]:
        """One annotation per response, in the same order; ``spans`` empty."""
        ...


def annotator(name: str, **options: Any) -> Annotator:
    """The annotator called ``name``, one of :data:`NAMES`; ``options`` are its own."""
    kind, _, rest = name.partition(":")
    if kind in ("openai", "replay") and rest:
        from stllms.annotation import judge

        return (judge.Judge if kind == "openai" else judge.Replay)(rest, **options)
    if name == "offline":
        from stllms.annotation import offline

        return offline.Offline(**options)
    if name == "grammar":
        return Grammar(**options)
    if name == "lexical":
        return Lexical(**options)
    raise ValueError(f"no annotator {name!r}: choose one of {', '.join(NAMES)}")


class Lexical:
    """Cue words over sentences; every character that is not white space gets a label."""

    name = "lexical"

    def annotate(self, responses: Sequence[Response]) -> list[Annotation]:
        """One annotation per response, in order."""
        made = []
        for response in responses:
            text, places = response.thinking, sentences.split(response.thinking)
            labels = [sentences.label(text[slice(*at)], i) for i, at in enumerate(places)]
            alignment = placing.place(sentences.segments(text, places, labels), text)
            made.append(placing.annotation(alignment, response.task_id, self.name))
        return made


class Grammar:
    """The exact annotator of the grammar: the truth about a chain of the embedded models.

    A sentence that the grammar cannot have written gets no label and is listed in the ledger
    under ``unknown``; on chains drawn from the grammar there is none.
    """

    name = "grammar"

    def annotate(self, responses: Sequence[Response]) -> list[Annotation]:
        """One annotation per response, in order."""
        made = []
        for response in responses:
            text = response.thinking
            found = list(grammar.sentences(text))
            placed = [PlacedSegment(b, text[i:j], i, j) for b, i, j in found if b is not None]
            unknown = [text[i:j] for b, i, j in found if b is None]
            alignment = placing.place(placed, text)
            one = placing.annotation(alignment, response.task_id, self.name, unknown=unknown)
            made.append(one)
        return made


# --- the stage: annotations of a run, stored ---------------------------------------------


def annotations(
    annotator: Annotator,
    responses: Sequence[Response],
    *,
    model: "Model | None" = None,
    store: "Rows | None" = None,
) -> list[Annotation]:
    """One annotation per response, in order.

    Args:
        annotator: labels the chains that ``store`` lacks.
        responses: the chains.
        model: gives the token spans (``spans`` stay empty without it, and for a response
            through an API, which has no ids).
        store: rows by :data:`KEY`. A chain it holds is not annotated again unless it failed;
            annotations of other annotators and of other chains stay in the file.

    Raises:
        StaleArtefact: for a stored annotation of another chain with the same task, or by an
            annotator that was another one then.

    """
    if store is None:
        return _annotated(annotator, responses, model)
    _bind(store, annotator)
    rows = store.by_key()
    stored = {one.task_id: one for one in load(store, annotator.name)}
    for response in responses:
        row = rows.get((response.task_id, annotator.name))
        if row is not None and row.get("of") != _of(response):
            raise StaleArtefact(
                f"{store.path.name} labels another chain of task {response.task_id}: the "
                f"responses changed. --fresh makes it again; or move {store.path} away"
            )
    made = {task_id: one for task_id, one in stored.items() if one.failed is None}
    todo = [response for response in responses if response.task_id not in made]
    if todo:
        made |= {one.task_id: one for one in _annotated(annotator, todo, model)}
        new = [to_row(made[one.task_id]) | {"of": _of(one)} for one in responses]
        keys = {(row["task_id"], row["annotator"]) for row in new}
        store.write([*(row for key, row in rows.items() if key not in keys), *new])
    return [made[response.task_id] for response in responses]


def steered(
    annotator: Annotator,
    chains: Sequence[Steered],
    *,
    model: "Model",
    store: "Rows | None" = None,
) -> list[Steered]:
    """The chains with their annotations; ``store`` is rewritten with what was missing."""
    if store is not None:
        _bind(store, annotator)
    todo = [one for one in chains if not labelled(one, annotator.name)]
    made = _annotated(annotator, [one.response for one in todo], model)
    new = {one.key: replace(one, annotation=a) for one, a in zip(todo, made, strict=True)}
    found = [new.get(one.key, one) for one in chains]
    if store is not None and new:
        known = {one.key for one in found}
        kept = [row for row in store.load() if tuple(row[k] for k in store.key) not in known]
        store.write([*kept, *map(to_row, found)])
    return found


def labelled(one: Steered, annotator: str) -> bool:
    """Whether a chain has an annotation of an annotator that did not fail."""
    label = one.annotation
    return label is not None and label.annotator == annotator and label.failed is None


def load(store: "Rows", annotator: str) -> list[Annotation]:
    """The stored annotations of one annotator."""
    found = from_rows(store.load(), annotation_from_row, store.path)
    return [annotation for annotation in found if annotation.annotator == annotator]


def table(made: Sequence[Annotation]) -> "pd.DataFrame":
    """One row per segment: ``task_id, label, start, end, text``; the data of chain figures."""
    import pandas as pd

    columns = ["label", "start", "end", "text"]
    rows = [
        [one.task_id, *(getattr(segment, name) for name in columns)]
        for one in made
        for segment in one.segments
    ]
    return pd.DataFrame(rows, columns=["task_id", *columns])


def _annotated(
    annotator: Annotator, responses: Sequence[Response], model: "Model | None"
) -> list[Annotation]:
    """New annotations, with token spans where a model and the ids are known."""
    made = annotator.annotate(responses) if responses else []
    return [
        annotation
        if model is None or not response.output_ids
        else placing.with_spans(annotation, model.offsets_of(response), response.thinking)
        for annotation, response in zip(made, responses, strict=True)
    ]


def _bind(store: "Rows", annotator: Annotator) -> None:
    """Notes in the record of ``store`` what its labels depend on; refuses other ones."""
    made_from = getattr(annotator, "fingerprint", None) or f"stllms {__version__}"
    store.bind({f"annotator {annotator.name}": made_from})


def _of(response: Response) -> str:
    """A hash of the text and the ids that an annotation is about."""
    ids = [*response.prompt_ids, -1, *response.output_ids]
    return digest([response.thinking, ids])
