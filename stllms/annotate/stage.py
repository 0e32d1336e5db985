"""Stage 2a: Responses -> Annotations, placed in characters and in tokens, stored.

Any annotator goes through here: it labels the chains that have no stored annotation of its
own (or whose annotation failed), the token spans are found in the ids that were used, and the
file is written as a whole in the order of the responses; what else it held stays in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from stllms import __version__, spans
from stllms.annotate import Annotator, annotator
from stllms.config import RunConfig
from stllms.files import Rows
from stllms.models import Model
from stllms.provenance import StaleArtefact, digest
from stllms.records import (
    Annotation,
    Response,
    Steered,
    annotation_from_row,
    from_rows,
    to_row,
)

KEY = ("task_id", "annotator")


def for_run(setup: RunConfig) -> Annotator:
    """The annotator of a run, with the options that its kind takes.

    A judge stores its replies in ``results/<slug>/judge``, where ``replay:`` finds them.
    """
    if setup.annotator.startswith("openai:"):
        return annotator(
            setup.annotator,
            base_url=setup.base_url,
            max_cost=setup.max_cost,
            folder=setup.folder / "judge",
            reader=setup.reader,
        )
    if setup.annotator.startswith("replay:"):
        return annotator(setup.annotator, reader=setup.reader)
    return annotator(setup.annotator)


def annotations(
    annotator: Annotator,
    responses: Sequence[Response],
    *,
    model: Model | None = None,
    store: Rows | None = None,
) -> list[Annotation]:
    """One annotation a response, in order.

    Args:
        model: gives the token spans (``spans`` stay empty without it, and for a response
            through an API, which has no ids).
        store: rows by ``task_id, annotator``. A chain it holds is not annotated again unless it
            failed; annotations of other annotators and of other chains stay in the file.

    Raises:
        StaleArtefact: for a stored annotation of another chain with the same task, or by an
            annotator that was another one then.
    """
    if store is not None:
        store.bind({f"annotator {annotator.name}": made_from(annotator)})
    rows = {} if store is None else store.by_key()
    path = "" if store is None else store.path
    stored = dict(zip(rows, from_rows(rows.values(), annotation_from_row, path), strict=True))
    mine = {}
    for response in responses:
        key = (response.task_id, annotator.name)
        if key in rows and rows[key].get("of") != _of(response):
            raise StaleArtefact(
                f"{store.path.name} labels another chain of task {response.task_id}: the "
                f"responses changed. --fresh makes it again; or move {store.path} away"
            )
        if key in rows and stored[key].failed is None:
            mine[response.task_id] = stored[key]
    todo = [response for response in responses if response.task_id not in mine]
    made = annotator.annotate(todo) if todo else []
    mine |= {
        annotation.task_id: _in_tokens(annotation, response, model)
        for response, annotation in zip(todo, made, strict=True)
    }
    found = [mine[response.task_id] for response in responses]
    if store is not None and todo:
        new = [
            to_row(annotation) | {"of": _of(response)}
            for annotation, response in zip(found, responses, strict=True)
        ]
        kept = {(row["task_id"], row["annotator"]) for row in new}
        others = [row for key, row in rows.items() if key not in kept]
        before = [row for row in others if row["annotator"] != annotator.name]
        behind = [row for row in others if row["annotator"] == annotator.name]
        store.write([*before, *new, *behind])
    return found


def made_from(annotator: Annotator) -> str:
    """What the labels of an annotator depend on: what it was trained on or replays
    (its ``fingerprint``), else the version of the package."""
    return getattr(annotator, "fingerprint", None) or f"stllms {__version__}"


def _of(response: Response) -> str:
    """A hash of the text and the ids that an annotation is about."""
    ids = [*response.prompt_ids, -1, *response.output_ids]
    return digest([response.thinking, ids])


def steered(
    annotator: Annotator,
    chains: Sequence[Steered],
    *,
    model: Model,
    store: Rows | None = None,
) -> list[Steered]:
    """The chains with their annotations; ``store`` is rewritten with what was missing."""
    if store is not None:
        store.bind({f"annotator {annotator.name}": made_from(annotator)})
    todo = [one for one in chains if not labelled(one, annotator.name)]
    made = annotator.annotate([one.response for one in todo]) if todo else []
    new = {
        one.key: replace(one, annotation=_in_tokens(annotation, one.response, model))
        for one, annotation in zip(todo, made, strict=True)
    }
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


def _in_tokens(annotation: Annotation, response: Response, model: Model | None) -> Annotation:
    if model is None or not response.output_ids:
        return annotation
    return spans.with_spans(annotation, model.offsets_of(response), response.thinking)


def load(store: Rows, annotator: str) -> list[Annotation]:
    """The stored annotations of one annotator."""
    found = from_rows(store.load(), annotation_from_row, store.path)
    return [annotation for annotation in found if annotation.annotator == annotator]


def table(made: Sequence[Annotation]) -> pd.DataFrame:
    """One row a segment: ``task_id, label, start, end, text``; the data of chain figures."""
    rows = [
        (one.task_id, segment.label, segment.start, segment.end, segment.text)
        for one in made
        for segment in one.segments
    ]
    return pd.DataFrame(rows, columns=["task_id", "label", "start", "end", "text"])
