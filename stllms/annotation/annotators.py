"""Annotators: thinking text -> labelled segments, behind one protocol, stored and resumable.

==================  =====================================================================
``grammar``         the truth about the embedded models' chains, from their own grammar
``lexical``         cue words and a few rules; no training, no dependence on a judge
``offline``         a sentence classifier trained on our own labelled chains (offline_card.md)
``offline:FOLDER``  one trained on a person's own labels (``training/offline.py``)
``openai:MODEL``    a language model as judge, through any OpenAI-compatible server
``replay:FOLDER``   the stored replies of a judge
a function          of a person's own, in a script or registered by name
==================  =====================================================================
"""

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from stllms import __version__, registry
from stllms.annotation import placing, sentences
from stllms.fixtures import grammar
from stllms.hashes import digest
from stllms.labels import PAPER, LabelSet
from stllms.records import (
    Annotation,
    PlacedSegment,
    Response,
    Segment,
    Steered,
    annotation_from_row,
    from_rows,
    to_row,
)
from stllms.runs.files import StaleArtefact
from stllms.runs.workers import over
from stllms.terminal import token_bar

if TYPE_CHECKING:  # torch and pandas are heavy
    import pandas as pd

    from stllms.models.model import Model
    from stllms.runs.store import Rows
    from stllms.runs.workers import Tick

#: The row key of ``annotations.jsonl``.
KEY = ("task_id", "annotator")
#: Chains in a part that a worker labels.
CHUNK = 100
#: Why a character has no label by cue words.
NO_CUE = "no cue"

#: What an annotator may be made of: the thinking text -> ``(label, start, end)`` in its
#: characters, or segments.
Function = Callable[[str], Iterable[tuple[str, int, int] | Segment | PlacedSegment]]


@runtime_checkable
class Annotator(Protocol):
    """Anything with a ``name`` that labels chains.

    A ``fingerprint`` says what its labels depend on (weights, stored replies, a function);
    without one that is the version of the package. ``labels`` is the set that they are of;
    without it the paper's. ``shared`` says that it can be pickled and labels each chain on its
    own, so that workers may share them; without it this process labels all of them.
    """

    name: str

    def annotate(self, responses: Sequence[Response]) -> list[Annotation]:
        """One annotation per response, in the same order; ``spans`` empty."""
        ...


def annotator(name: str | Function, *, labels: LabelSet = PAPER, **options: Any) -> Annotator:
    """The annotator called ``name``, with labels of the set ``labels``.

    Args:
        name: a function (:data:`Function`), or what :data:`stllms.registry.annotator` has: a
            kind, and behind a colon what it takes first (``openai:MODEL``). What is registered
            is such a function, or makes an annotator: ``make(*, labels, **options)``.
        labels: what may be labelled.
        options: those of the annotator itself.

    Raises:
        ValueError: no such annotator, one that does not know these labels, or something
            behind the colon that is missing or not expected.

    """
    if not isinstance(name, str):
        return OfFunction(name, labels=labels, **options)
    kind, _, rest = name.partition(":")
    known = registry.annotator.find(kind)
    parameters = inspect.signature(known).parameters
    if "labels" not in parameters:
        _check_rest(name, None)
        return OfFunction(known, labels=labels, called=name, **options)
    takes = next((p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD), None)
    _check_rest(name, None if takes is None or takes.name == "labels" else takes)
    made = known(*[rest] if rest else [], labels=labels, **options)
    if not isinstance(made, Annotator):
        raise ValueError(
            f"annotator {kind!r}: what is registered takes labels, so it was called to make an "
            f"annotator, and gave {made!r:.60}; a function of a text takes the text alone"
        )
    return made


def _check_rest(name: str, takes: inspect.Parameter | None) -> None:
    """Refuses what is behind the colon of a name, or that nothing is."""
    kind, _, rest = name.partition(":")
    if takes is None and kind != name:
        raise ValueError(f"annotator {name!r}: {kind} takes nothing behind a colon")
    if takes is not None and not rest and (kind != name or takes.default is takes.empty):
        wanted = takes.name.upper()
        raise ValueError(f"annotator {name!r}: {wanted} is missing; expected {kind}:{wanted}")


class OfFunction:
    """A function of a thinking text as annotator, called as the function.

    Raises ``ValueError`` by name where it gives anything but segments, a label that the set
    does not have, or places that are none of the text or overlap.
    """

    def __init__(
        self, function: Function, *, labels: LabelSet = PAPER, called: str | None = None
    ) -> None:
        if not callable(function) or isinstance(function, type):
            raise ValueError(
                f"annotator {function!r:.60}: expected a name, or a function of a text that "
                "gives (label, start, end) of every segment"
            )
        name = getattr(function, "__name__", type(function).__name__)
        self.name = called or name.strip("<>")
        self.labels, self.function = labels, function
        self.fingerprint = _source_hash(function)

    def annotate(self, responses: Sequence[Response]) -> list[Annotation]:
        """One annotation per response, in order."""
        return [self._one(response) for response in responses]

    def _one(self, response: Response) -> Annotation:
        text, where = response.thinking, f"annotator {self.name!r}, task {response.task_id!r}"
        given = self.function(text)
        if not isinstance(given, Iterable) or isinstance(given, str | Mapping):
            raise ValueError(f"{where}: gave {given!r:.60}, expected a list of segments")
        given = list(given)
        try:
            found = [self._segment(one, text) for one in given]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None
        placed = sorted(
            (one for one in found if isinstance(one, PlacedSegment)),
            key=lambda one: (one.start, one.end),
        )
        for one, after in pairwise(placed):
            if after.start < one.end:
                raise ValueError(
                    f"{where}: {one.label} [{one.start}, {one.end}) and {after.label} "
                    f"[{after.start}, {after.end}) overlap: give every character one label"
                )
        bare = [one for one in found if not isinstance(one, PlacedSegment)]
        if bare and placed:
            raise ValueError(f"{where}: gave segments with and without places: give one kind")
        alignment = placing.align(bare, text) if bare else placing.place(placed, text)
        return placing.annotation(alignment, response.task_id, self.name)

    def _segment(self, one: Any, text: str) -> Segment | PlacedSegment:
        """One segment as the function gave it, checked."""
        if isinstance(one, Segment):
            self._check(one.label, one.text)
            return one
        if isinstance(one, PlacedSegment):
            said, one = one.text, (one.label, one.start, one.end)
            if said != text[one[1] : one[2]]:
                raise ValueError(f"{said!r:.60} is not what is at [{one[1]}, {one[2]})")
        if not isinstance(one, tuple | list) or len(one) != 3:
            raise ValueError(f"gave {one!r:.60}, expected (label, start, end) or a segment")
        label, start, end = one[0], operator.index(one[1]), operator.index(one[2])
        if not 0 <= start < end <= len(text):
            raise ValueError(
                f"{label!r} at [{start}, {end}) is empty or outside the {len(text)} characters "
                "of the text"
            )
        self._check(label, text[start:end])
        return PlacedSegment(label, text[start:end], start, end)

    def _check(self, label: Any, text: str) -> None:
        if label not in self.labels.names:
            hint = registry.did_you_mean(label, self.labels.names)
            raise ValueError(
                f"label {label!r} of {text!r:.60} is not among {', '.join(self.labels.names)}"
                f"{hint}"
            )


def _source_hash(function: Any) -> str:
    """A hash of the source of a function, where there is none of its bytecode; of an object
    that is called, of the source of its class."""
    if isinstance(function, partial):
        return digest(
            [_source_hash(function.func), repr(function.args), repr(function.keywords)]
        )
    function = inspect.unwrap(function)
    try:
        return digest(inspect.getsource(getattr(function, "__code__", type(function))))
    except (OSError, TypeError):
        pass
    code = getattr(function, "__code__", None)
    return digest(type(function).__qualname__ if code is None else _code(code))


def _code(code: Any) -> list[Any]:
    """What a code object does, without names of files and lines."""
    constants = [_code(one) if inspect.iscode(one) else repr(one) for one in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), constants]


@registry.annotator("grammar")
class Grammar:
    """The exact annotator of the grammar: the truth about a chain of the embedded models.

    A sentence that the grammar cannot have written gets no label and is listed in the ledger
    under ``unknown``; on chains drawn from the grammar there is none. ``ValueError`` for other
    labels than the paper's.
    """

    name = "grammar"

    def __init__(self, *, labels: LabelSet = PAPER) -> None:
        if set(labels.names) != set(PAPER.names):
            raise ValueError(
                f"grammar: its sentences have the paper's labels, not those of {labels.name!r} "
                f"({', '.join(labels.names)}): take lexical (with cues), a judge, or a function"
            )
        self.labels = labels

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


@registry.annotator("lexical")
class Lexical:
    """Cue words over sentences (:func:`~stllms.annotation.sentences.heard`). A sentence that
    no label speaks for is counted in the ledger's ``characters`` under :data:`NO_CUE`.
    """

    name = "lexical"

    def __init__(self, *, labels: LabelSet = PAPER) -> None:
        self.labels, self._heard = labels, sentences.heard(labels)

    def annotate(self, responses: Sequence[Response]) -> list[Annotation]:
        """One annotation per response, in order."""
        made = []
        for response in responses:
            text, places = response.thinking, sentences.split(response.thinking)
            names = [self._heard(text[slice(*at)], i) for i, at in enumerate(places)]
            left = [(NO_CUE, *at) for at, name in zip(places, names, strict=True) if not name]
            placed = sentences.segments(text, places, names)
            alignment = placing.place(placed, text, elsewhere=left)
            made.append(placing.annotation(alignment, response.task_id, self.name))
        return made


# What follows imports its module when it is asked for: weights, and a client of servers.


@registry.annotator("offline")
def _offline(weights: str | None = None, *, labels: LabelSet = PAPER) -> Annotator:
    from stllms.annotation import offline

    return offline.Offline(weights, labels=labels)


@registry.annotator("openai")
def _openai(model: str, *, labels: LabelSet = PAPER, **options: Any) -> Annotator:
    from stllms.annotation import judge

    return judge.Judge(model, labels=labels, **options)


@registry.annotator("replay")
def _replay(folder: str, *, labels: LabelSet = PAPER, **options: Any) -> Annotator:
    from stllms.annotation import judge

    return judge.Replay(folder, labels=labels, **options)


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


def never(made: Sequence[Annotation], labels: LabelSet = PAPER) -> tuple[str, ...]:
    """The labels of the set that no annotation has, in its order."""
    found = {segment.label for one in made for segment in one.segments}
    return tuple(name for name in labels.names if name not in found)


def _annotated(
    annotator: Annotator, responses: Sequence[Response], model: "Model | None"
) -> list[Annotation]:
    """New annotations, with token spans where a model and the ids are known. The workers of
    the model share the chains, if the annotator says that they may."""
    if not responses:
        return []
    if not (getattr(annotator, "shared", False) and getattr(model, "workers", None)):
        return _labelled(model, responses, annotator=annotator)
    parts = (responses[start : start + CHUNK] for start in range(0, len(responses), CHUNK))
    with token_bar(len(responses), "annotations", unit="responses") as bar:
        made = over(model, partial(_labelled, annotator=annotator), parts, bar.tick)
        return [annotation for part in made for annotation in part]


def _labelled(
    model: "Model | None",
    responses: Sequence[Response],
    tick: "Tick | None" = None,
    *,
    annotator: Annotator,
) -> list[Annotation]:
    """The annotations of a part of the responses."""
    made = annotator.annotate(responses)
    if tick is not None:
        tick(0, len(made))
    return [
        annotation
        if model is None or not response.output_ids
        else placing.with_spans(annotation, model.offsets_of(response), response.thinking)
        for annotation, response in zip(made, responses, strict=True)
    ]


def _bind(store: "Rows", annotator: Annotator) -> None:
    """Notes in the record of ``store`` what its labels depend on; refuses other ones."""
    made_from = getattr(annotator, "fingerprint", None) or f"stllms {__version__}"
    labels = getattr(annotator, "labels", PAPER)
    if labels != PAPER:
        told = [[one.name, one.definition, one.cues] for one in labels.labels]
        made_from += f", labels {digest(told)}"
    store.bind({f"annotator {annotator.name}": made_from})


def _of(response: Response) -> str:
    """A hash of the text and the ids that an annotation is about."""
    ids = [*response.prompt_ids, -1, *response.output_ids]
    return digest([response.thinking, ids])
