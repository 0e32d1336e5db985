"""The verbs of ``import stllms``: a stage each, on plain things as well as on records.

Texts are tasks or chains, a ``transformers`` model with its tokenizer is a model, ranges of
characters are labels. What comes back has a table (``to_frame``), a picture (``plot``) and a
page for notebooks. Nothing is written to a disk: notebooks 01 to 05 call the stages themselves,
whose results are stored and resumed.

Bad input is a ``ValueError`` of one line that says what to do.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from stllms import annotation, models, stats, steering
from stllms import tasks as task_files
from stllms.annotation import annotators, placing
from stllms.attribution import collecting
from stllms.attribution.effects import LayerEffects
from stllms.comparison import groups
from stllms.config import check_style, real, whole
from stllms.generation import chains as writing
from stllms.generation import prompts as styles
from stllms.labels import PAPER, Label, LabelSet
from stllms.models import loading
from stllms.models.engines.interventions import Intervention
from stllms.models.model import Model
from stllms.plotting import axes as draw
from stllms.plotting import text
from stllms.records import Annotation, PlacedSegment, Response, Task
from stllms.registry import MODELS, ModelEntry
from stllms.steering import conditions
from stllms.vectors import activations, directions
from stllms.vectors import contrast as pairing
from stllms.vectors.directions import SteeringVectors
from stllms.vectors.means import MIN_SPANS, Means
from stllms.vectors.nulls import Controls

#: Tasks: one or several texts, records or chats (``[{"role", "content"}, ...]``), or the path
#: of a JSONL file of them (:func:`stllms.tasks.from_file`).
Tasks = str | Path | Task | Iterable[str | Task | Sequence[Mapping[str, str]]]
#: Chains: one or several texts or records, or the path of a file of them
#: (:func:`stllms.generation.prompts.read`).
Texts = str | Path | Response | Iterable[str | Response]
#: ``(label, start, end)`` of one chain, in characters of its thinking.
Spans = Sequence[tuple[str, int, int]]
#: A set of labels, one as a dictionary or a YAML file (:class:`stllms.labels.LabelSet`), or
#: names alone.
Labels = LabelSet | Mapping[str, Any] | str | Path | Sequence[str]

#: What text without a label is called where a person labelled the spans.
UNLABELLED = "unlabelled"
#: Chains that a notebook shows.
SHOWN = 5
#: Estimators that need no span means one by one.
OF_SUMS = ("difference-of-means", "difference-from-others")


# --- what comes back ---------------------------------------------------------------------


class Chains(list[Response]):
    """What a model wrote, in the order of the tasks."""

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        return Chains(found) if isinstance(place, slice) else found

    def __repr__(self) -> str:
        tokens = sum(len(one.output_ids) for one in self)
        cut = sum(not one.finished for one in self)
        return f"Chains({len(self)} responses, {tokens:,} tokens, {cut} cut at the limit)"

    def _repr_html_(self) -> str:
        pages = [text.html_line(repr(self))]
        for one in self[:SHOWN]:
            asked = text.html(one.prompt_text, (), f"{one.task_id}: asked")
            pages.append(asked + text.html(one.text, (), "written"))
        return "<hr>".join(pages) + _more(len(self))

    def to_frame(self) -> pd.DataFrame:
        """A row for each response."""
        rows = [
            (
                one.task_id,
                one.prompt_text,
                one.thinking,
                one.answer,
                len(one.output_ids),
                one.finished,
            )
            for one in self
        ]
        columns = ["task_id", "prompt", "thinking", "answer", "tokens", "finished"]
        return pd.DataFrame(rows, columns=columns)

    @draw.styled()
    def plot(self, ax: Axes | None = None) -> Axes:
        """How long the responses are."""
        ax = _figure(5, 2.4).subplots() if ax is None else ax
        ax.hist([len(one.output_ids) for one in self], bins=30, color=draw.MODES["plain"])
        ax.set(xlabel="output tokens", ylabel="responses")
        return ax


class Labelled(list[Annotation]):
    """The annotations of ``chains``, in their order, with labels of the set ``labels``."""

    def __init__(
        self, found: Iterable[Annotation], chains: Sequence[Response], labels: LabelSet
    ) -> None:
        super().__init__(found)
        self.chains, self.labels = list(chains), labels

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        if isinstance(place, slice):
            return Labelled(found, self.chains[place], self.labels)
        return found

    def __repr__(self) -> str:
        found = [segment.label for one in self for segment in one.segments]
        said = [f"{n} {name}" for name in self.labels.names if (n := found.count(name))]
        parts = [f"{len(self)} chains", ", ".join(said) or "no segment"]
        if never := annotators.never(self, self.labels):
            parts.append(f"never: {', '.join(never)}")
        if failed := sum(one.failed is not None for one in self):
            parts.append(f"{failed} failed")
        return f"Labelled({'; '.join(parts)})"

    def _repr_html_(self) -> str:
        head = text.html_line(repr(self)) + text.html_legend(self.labels)
        shown = text.html_chains(self.chains[:SHOWN], self[:SHOWN], labels=self.labels)
        return f"{head}<hr>{shown}{_more(len(self))}"

    def to_frame(self) -> pd.DataFrame:
        """A row for each segment: ``task_id, label, start, end, text``."""
        return annotators.table(self)

    @draw.styled()
    def plot(self, number: int = 0) -> Axes:
        """One chain, its segments coloured."""
        one = self.chains[number]
        shown = [(f"task {one.task_id}", one.thinking, self[number].segments)]
        return draw.chains(_figure(5, 3), shown, labels=self.labels).axes[0]


@dataclass(frozen=True, repr=False)
class Comparison:
    """Labels of several sets of chains side by side.

    ``table``: segment counts and fractions (:func:`stllms.comparison.groups.table`).
    ``differences``: fractions of the first less those of each other one, paired by task
    (:func:`stllms.comparison.groups.pairs`); nothing where tasks or annotators differ.
    """

    members: tuple[groups.Member, ...]
    table: pd.DataFrame
    differences: pd.DataFrame
    labels: LabelSet

    def __repr__(self) -> str:
        names = ", ".join(f"{one.name}: {len(one.task_ids)} chains" for one in self.members)
        if self.differences.empty:
            return f"Comparison({names}; not of the same tasks and annotator: not subtracted)"
        return f"Comparison({names})\n{text.shown(self.differences).to_string(index=False)}"

    def _repr_html_(self) -> str:
        rows = self.table[self.table["metric"] == "segment fraction"]
        fractions = text.intervals(rows, ["behaviour"], "model").to_html()
        page = text.html_line("Segment fractions, with 95 % intervals over tasks:") + fractions
        if self.differences.empty:
            return page + text.html_line(repr(self))
        less = text.html_line("The first less each other one, paired by task:")
        return page + less + text.shown(self.differences).to_html(index=False)

    def to_frame(self) -> pd.DataFrame:
        """``table``."""
        return self.table

    @draw.styled()
    def plot(self) -> list[Axes]:
        """Counts and fractions, with intervals over tasks."""
        figure = _figure(groups.width(self.members), 4.5)
        palette = groups.colours(self.members)
        return draw.comparison(figure, self.table, "both", palette=palette).axes


def _figure(width: float, height: float) -> Figure:
    """A new figure of pyplot, as pandas makes one: a notebook shows it below its cell."""
    return plt.figure(figsize=(width, height))


def _more(n: int) -> str:
    return text.html_line(f"and {n - SHOWN} more") if n > SHOWN else ""


# --- the verbs ---------------------------------------------------------------------------


def load(model: str | Path | Model | nn.Module, tokenizer: Any = None, **options: Any) -> Model:
    """A checked model: by name, hub id or folder, or a ``transformers`` one and its tokenizer.

    ``options`` are those of :func:`stllms.models.load`. A model that is given is put into eval
    mode without parameter gradients; nothing is copied.
    """
    if isinstance(model, Model):
        return model
    if isinstance(model, str | Path):
        if tokenizer is not None:
            raise ValueError(f"{model} brings its own tokenizer: leave tokenizer out")
        return models.load(model, **options)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"load: {type(model).__name__} is no model: give a name, a hub id, a folder, or a "
            "transformers model and its tokenizer"
        )
    if tokenizer is None:
        raise ValueError("a transformers model needs its tokenizer: load(model, tokenizer)")
    if options:
        raise ValueError(f"load: {', '.join(options)} cannot be set on a model that is loaded")
    name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    return loading.checked(model, tokenizer, name)


def generate(
    model: Model | str,
    tasks: Tasks,
    *,
    max_new_tokens: int = 1000,
    temperature: float = 0.0,
    seed: int = 0,
    prompts: str = "bare",
    system: str | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Chains:
    """What a model writes for tasks (:func:`stllms.generation.chains.responses`).

    Texts are called ``"1"``, ``"2"``, ... in their order. Noise depends on the seed and the
    name alone, so that :func:`steer` of the same tasks has each of these as its baseline.

    Args:
        tasks: texts, records, chats, or the path of a JSONL file.
        temperature: 0 is greedy.
        prompts: a style or a template with ``{question}`` in it
            (:func:`stllms.generation.prompts.opening`); the text alone unless said.
        system: a system message.
    """
    options = _decoding(max_new_tokens, temperature, seed, prompts, system, batch_size)
    return Chains(writing.responses(load(model), _tasks(tasks), progress=progress, **options))


def annotate(
    chains: Texts,
    annotator: str | annotators.Function = "lexical",
    *,
    labels: Labels = PAPER,
    **options: Any,
) -> Labelled:
    """Labelled segments of every chain (:func:`stllms.annotation.annotator`).

    Args:
        chains: records, texts, or the path of a file of them.
        annotator: a name, or a function text -> ``[(label, start, end), ...]``.
        labels: the set they are of.
        options: of the annotator.
    """
    found, known = _chains(chains), _labels(labels)
    by = annotation.annotator(annotator, labels=known, **options)
    return Labelled(by.annotate(found), found, known)


def train(
    model: Model | str,
    chains: Texts,
    labelled: Sequence[Annotation] | Sequence[Spans],
    *,
    labels: Labels | None = None,
    estimator: str = "difference-of-means",
    min_spans: int = MIN_SPANS,
    controls: int = 0,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> SteeringVectors:
    """A direction for every label and layer, from labelled chains.

    Args:
        chains: those that are labelled; of a text without a model's prompt too.
        labelled: what :func:`annotate` gave, annotations, or a person's own spans: for each
            chain a list of ``(label, start, end)``. What such spans leave out counts as a label
            of its own, :data:`UNLABELLED`, which the others are compared with.
        labels: the set; by default that of ``labelled``, or the labels that occur.
        estimator: a registered one (:mod:`stllms.vectors.estimators`).
        min_spans: a label with fewer spans has no direction, and a warning says so.
        controls: control directions of each kind to collect, with their ``seed``;
            :func:`stllms.vectors.nulls.control_directions` makes them of ``.collected``.

    Returns:
        The directions; their ``.collected`` is what they were made from
        (:class:`~stllms.vectors.means.Means`), for nulls and quality.
    """
    model = load(model)
    responses, found, known = _labelled(model, chains, labelled, labels)
    used = known
    if any(span.label == UNLABELLED for one in found for span in one.spans):
        used = replace(known, labels=(*known.labels, Label(UNLABELLED)))
    means = activations.collect(
        model,
        responses,
        [one.spans for one in found],
        labels=used,
        keep=() if estimator in OF_SUMS else range(model.n_layers),
        controls=controls,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    return _directions(means, known.names, estimator, min_spans)


def contrast(
    model: Model | str,
    pairs: str | Path | Iterable[Any],
    *,
    name: str = "positive",
    position: str = "last",
    estimator: str = "difference-of-means",
    min_spans: int = MIN_SPANS,
    controls: int = 0,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> SteeringVectors:
    """The direction from the negative to the positive side of pairs, at every layer.

    Args:
        pairs: ``(positive, negative)``, dictionaries, :class:`stllms.vectors.contrast.Pair`, or
            the path of a JSONL file.
        name: what the direction is called.
        position: where a side is read out, one of :data:`stllms.vectors.contrast.POSITIONS`.
        min_spans: the fewest pairs. The other arguments, and what comes back: :func:`train`.
    """
    if isinstance(pairs, str | Path):
        given = pairing.read_pairs(pairs)
    else:
        given = [pairing.as_pair(one, str(n)) for n, one in enumerate(pairs, 1)]
    means = pairing.collect(
        load(model),
        given,
        name=name,
        position=position,
        controls=controls,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    return _directions(means, (name,), estimator, min_spans)


def layer_effects(
    model: Model | str,
    chains: Texts,
    labelled: Sequence[Annotation] | Sequence[Spans],
    vectors: SteeringVectors,
    *,
    targets: Sequence[str] | None = None,
    controls: Controls | None = None,
    n_positions: int | None = 50,
    seed: int = 0,
    progress: bool = True,
) -> LayerEffects:
    """At which layer each direction changes the next token
    (:func:`stllms.attribution.collecting.collect`).

    ``chains`` and ``labelled`` as in :func:`train`; ``n_positions`` a direction are drawn by
    ``seed``, ``None`` measures at all.
    """
    model = load(model)
    conditions.check(vectors, model)
    responses, found, _ = _labelled(model, chains, labelled, None)
    return collecting.collect(
        model,
        responses,
        found,
        vectors,
        targets=targets,
        controls=controls,
        n_positions=n_positions,
        seed=seed,
        progress=progress,
    )


def steer(
    model: Model | str,
    tasks: Tasks,
    vector: Any,
    *,
    layer: int | Sequence[int],
    coefficient: float | Sequence[float] = 1.0,
    operation: str = "add",
    where: str = "all",
    max_new_tokens: int = 1000,
    temperature: float = 0.0,
    seed: int = 0,
    prompts: str = "bare",
    system: str | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Chains:
    """What a model writes under an intervention.

    Args:
        vector: ``vectors["label"]`` or a tensor ``[D]``; or a list with one for each task,
            ``None`` for an unsteered one. ``layer`` and ``coefficient`` may be lists, too.
        operation: a registered operator; ``where``: as of
            :class:`~stllms.models.engines.interventions.Intervention`.

    The other arguments are those of :func:`generate`.
    """
    asked, model = _tasks(tasks), load(model)
    options = _decoding(max_new_tokens, temperature, seed, prompts, system, batch_size)
    each = [_each(one, len(asked)) for one in (vector, layer, coefficient)]
    for one in each[2]:
        real("coefficient", one)
    pushes = [
        None if v is None else Intervention(_direction(v, at), at, c, operation, where)
        for v, at, c in zip(*each, strict=True)
    ]
    return Chains(steering.generate(model, asked, pushes, progress=progress, **options))


def compare(
    labelled: Mapping[str, Sequence[Annotation]],
    *,
    labels: Labels | None = None,
    empty: str = "apart",
    seed: int = 0,
) -> Comparison:
    """Labels of several sets of chains side by side: ``{"A": labelled, "B": labelled}``.

    A name of the registry is that model. ``empty`` and ``seed`` as of
    :func:`stllms.comparison.groups.table`.
    """
    if not isinstance(labelled, Mapping) or len(labelled) < 2:
        raise ValueError("compare: give two or more, {'A': labelled, 'B': labelled}")
    sets = [one.labels for one in labelled.values() if isinstance(one, Labelled)]
    known = PAPER if labels is None and not sets else _labels(labels or sets[0])
    for name, one in labelled.items():
        if isinstance(one, Labelled) and one.labels.names != known.names:
            raise ValueError(
                f"compare: {name} has the labels {', '.join(one.labels.names)}, expected "
                f"{', '.join(known.names)} in all: annotate them with one set"
            )
    members = [
        groups.member(MODELS.get(name, ModelEntry(name, None, name)), list(one), labels=known)
        for name, one in labelled.items()
    ]
    differences = _differences(members, empty, seed)
    table = groups.table(members, empty=empty, seed=seed)
    return Comparison(tuple(members), table, differences, known)


# --- plain things ------------------------------------------------------------------------


def _is_path(given: Any) -> bool:
    return isinstance(given, Path) or (isinstance(given, str) and given.endswith(".jsonl"))


def _tasks(given: Tasks) -> list[Task]:
    if _is_path(given):
        return task_files.from_file(Path(str(given)).expanduser())
    listed = [given] if isinstance(given, str | Task) else given
    found = [_task(one, number) for number, one in enumerate(listed, 1)]  # type: ignore[arg-type]
    if not found:
        raise ValueError("there are no tasks: give at least one text, Task or chat")
    return found


def _task(given: Any, number: int) -> Task:
    if isinstance(given, Task):
        return given
    if isinstance(given, str) and given.strip():
        return Task(str(number), "own", given)
    if isinstance(given, str):
        raise ValueError(f"task {number} is empty")
    if isinstance(given, Mapping):
        raise ValueError(f"task {number}: {given!r:.60} is a message: a chat is a list of them")
    if isinstance(given, Sequence):
        chat = task_files.messages(given, f"task {number}")
        return Task(str(number), "own", chat[-1]["content"], messages=chat)
    raise ValueError(
        f"task {number}: expected a text, a Task or a chat, not {type(given).__name__}"
    )


def _chains(given: Texts) -> list[Response]:
    if _is_path(given):
        return styles.read(str(given))
    listed = [given] if isinstance(given, str | Response) else given
    found = [_chain(one, number) for number, one in enumerate(listed, 1)]  # type: ignore[arg-type]
    if not found:
        raise ValueError("there are no chains: give at least one text or Response")
    return found


def _chain(given: Any, number: int) -> Response:
    if isinstance(given, Response):
        return given
    if not isinstance(given, str):
        kind = type(given).__name__
        raise ValueError(f"chain {number}: expected a text or a Response, not {kind}")
    if not given.strip():
        raise ValueError(f"chain {number} is empty")
    return styles.chain(str(number), given, whole=True)


def _labels(given: Labels) -> LabelSet:
    if isinstance(given, LabelSet):
        return given
    if isinstance(given, Mapping):
        return LabelSet.from_dict(given)
    if isinstance(given, str | Path):
        return LabelSet.load(given)
    names = [str(name) for name in given]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"labels: {name} is there {names.count(name)} times: drop one")
    return LabelSet.from_dict({"labels": dict.fromkeys(names)})


def _each(given: Any, n: int) -> list[Any]:
    """One for each of ``n`` tasks."""
    if not isinstance(given, list | tuple):
        return [given] * n
    if len(given) != n:
        raise ValueError(f"a list of {len(given)} for {n} tasks: give one for each, or one")
    return list(given)


def _direction(given: Any, layer: int) -> Tensor:
    """The direction ``[D]`` that somebody means at a layer."""
    if isinstance(given, SteeringVectors):
        names = " or ".join(f"[{name!r}]" for name in given.behaviours)
        raise ValueError(f"several directions: choose one, vectors{names}")
    if isinstance(given, directions.SteeringVector):
        return given.at(layer)
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{type(given).__name__} is no direction: give vectors['label'] or a tensor [D]"
        ) from None


def _decoding(
    max_new_tokens: int,
    temperature: float,
    seed: int,
    prompts: str,
    system: str | None,
    batch_size: int | None,
) -> dict[str, Any]:
    """Options of :func:`stllms.generation.chains.responses`, checked."""
    return {
        "max_new_tokens": whole("max_new_tokens", max_new_tokens, least=1, optional=False),
        "temperature": real("temperature", temperature, least=0.0),
        "seed": whole("seed", seed, least=0, optional=False),
        "style": check_style(prompts),
        "system": system,
        "batch_size": whole("batch_size", batch_size, least=1),
    }


# --- labelled chains ---------------------------------------------------------------------


def _labelled(
    model: Model, chains: Texts, labelled: Iterable[Any], labels: Labels | None
) -> tuple[list[Response], list[Annotation], LabelSet]:
    """Chains with ids, their annotations with token spans, and the set of labels."""
    responses, given = _chains(chains), list(labelled)
    if len(responses) != len(given):
        raise ValueError(
            f"{len(responses)} chains, but labels of {len(given)}: give one list each"
        )
    done = [isinstance(one, Annotation) for one in given]
    if any(done) and not all(done):
        raise ValueError("give annotations of all chains, or spans of all")
    if labels is not None:
        known = _labels(labels)
    else:
        known = labelled.labels if isinstance(labelled, Labelled) else _occurring(given)
    if all(done):
        if len(known.names) == 1:
            raise ValueError(
                f"{known.names[0]} is the only label: there is nothing to compare it with; "
                "label the rest of the chains as well"
            )
        found = given
    else:
        own = iter(given)
        by = annotators.OfFunction(lambda _: next(own), labels=known, called="spans")
        found = [
            _with_rest(*pair) for pair in zip(by.annotate(responses), responses, strict=True)
        ]
    pairs = [_in_tokens(model, *pair) for pair in zip(responses, found, strict=True)]
    return [response for response, _ in pairs], [one for _, one in pairs], known


def _occurring(given: Sequence[Any]) -> LabelSet:
    """The labels that occur, in order."""
    every = [one.segments if isinstance(one, Annotation) else one for one in given]
    names = dict.fromkeys(
        str(one.label if isinstance(one, PlacedSegment) else one[0])
        for spans in every
        for one in spans
        if isinstance(one, PlacedSegment) or (isinstance(one, tuple | list) and one)
    )
    if not names:
        raise ValueError("nothing is labelled: give (label, start, end) in at least one chain")
    return _labels(list(names))


def _with_rest(one: Annotation, response: Response) -> Annotation:
    """With what is between the spans of a person, as :data:`UNLABELLED`."""
    thinking, end, rest = response.thinking, 0, []
    for start, stop in [*((s.start, s.end) for s in one.segments), (len(thinking),) * 2]:
        if thinking[end:start].strip():
            rest.append(PlacedSegment(UNLABELLED, thinking[end:start], end, start))
        end = stop
    return replace(one, segments=tuple(sorted([*one.segments, *rest], key=lambda s: s.start)))


def _in_tokens(
    model: Model, response: Response, one: Annotation
) -> tuple[Response, Annotation]:
    """A chain with ids and its annotation with token spans.

    A text gets its ids here, without a prompt. Models attend to the first token of a sequence
    where there is nothing to attend to, so spans begin behind it and the token that their
    window has before them (:mod:`stllms.vectors.contrast` leaves it out as well).
    """
    if one.task_id != response.task_id:
        raise ValueError(
            f"the annotation of {one.task_id} stands at the chain of {response.task_id}: give "
            "both in one order"
        )
    if response.output_ids:
        offsets = model.offsets_of(response)
        return response, placing.with_spans(one, offsets, response.thinking)
    found = model.tokenizer(response.text, return_offsets_mapping=True)
    ids = tuple(found["input_ids"])
    if len(ids) > model.max_context:
        raise ValueError(
            f"chain {response.task_id}: {len(ids)} tokens, {model.name} takes "
            f"{model.max_context}: cut it"
        )
    offsets = np.array(found["offset_mapping"]).reshape(-1, 2) - response.thinking_start
    placed = placing.with_spans(one, offsets, response.thinking)
    spans = [replace(span, start=max(span.start, 2)) for span in placed.spans if span.end > 2]
    return replace(response, output_ids=ids), replace(placed, spans=tuple(spans))


def _directions(
    means: Means, names: Sequence[str], estimator: str, min_spans: int
) -> SteeringVectors:
    """Directions of ``names`` alone; the other labels are what they are compared with."""
    counts = dict(zip(means.behaviours, means.counts.sum(0).tolist(), strict=True))
    few = {name: counts[name] for name in names if counts[name] < min_spans}
    said = ", ".join(f"{name} {n}" for name, n in few.items())
    need = f"of {min_spans} that a direction needs: give more, or lower min_spans"
    if len(few) == len(names):
        raise ValueError(f"too few examples ({said}) {need}")
    vectors = directions.estimate(means, estimator, min_spans=min_spans)
    if few:
        warnings.warn(f"no direction of some labels ({said}) {need}", stacklevel=3)
    vectors = vectors.only([name for name in names if name not in few])
    return replace(vectors, unavailable=few, collected=means)


# --- comparison --------------------------------------------------------------------------


def _differences(members: Sequence[groups.Member], empty: str, seed: int) -> pd.DataFrame:
    """The first less each other one; :func:`stllms.comparison.groups.pairs` of both."""
    first, *others = members
    tables = [
        groups.pairs(
            [
                replace(first, kind="thinking", pair=other.name),
                replace(other, kind="instruct", pair=first.name),
            ],
            empty=empty,
            seed=seed,
        )
        for other in others
    ]
    found = pd.concat(tables, ignore_index=True)
    found = found.rename(columns={"thinking": "first", "instruct": "second"})
    return found.assign(p_holm=stats.holm(found["p"].to_numpy(float)))
