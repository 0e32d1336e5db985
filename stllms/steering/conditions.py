"""What is added where: conditions, and the grid of tasks and conditions (method, section 8).

``h[l*, t] += c * direction[b][l*]`` at one layer, every position, every step. The responses of
a task under all conditions share batches and sampling noise, so that every steered response
has its baseline: the unsteered response of the same task and noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

from stllms.generation import prompts
from stllms.labels import PAPER, LabelSet
from stllms.models import engines
from stllms.models.engines import Row
from stllms.models.engines.interventions import Intervention, fingerprints
from stllms.models.model import Model
from stllms.records import Response, Steered, Task, from_rows, steered_from_row, to_row
from stllms.runs import audit
from stllms.runs.store import Rows, resumed
from stllms.runs.workers import Tick, over
from stllms.terminal import token_bar
from stllms.vectors.directions import SteeringVectors
from stllms.vectors.nulls import Controls

#: Tasks in a chunk: under all their conditions the unit of refill, flush and resume.
CHUNK = 20
#: Rows of :func:`generate` that a worker gets at once.
ROWS = 100
#: Control directions in the layer sweep of notebook 04.
SWEPT_CONTROLS = 4


@dataclass(frozen=True)
class Condition:
    """One way to steer: ``direction`` is a behaviour, ``none``, or a control such as
    ``shuffled:0``.
    """

    direction: str
    layer: int
    coefficient: float
    intervention: Intervention | None
    operation: str = "add"

    def key(self, task_id: str) -> tuple[str, str, int, float, str]:
        """The row key of a task under this condition."""
        return (task_id, self.direction, self.layer, self.coefficient, self.operation)


def plain() -> Condition:
    """The condition in which nothing is done: the baseline."""
    return Condition("none", -1, 0.0, None)


def conditions(
    vectors: SteeringVectors,
    layers: dict[str, int],
    coefficients: Sequence[float],
    labels: LabelSet = PAPER,
) -> list[Condition]:
    """The baseline, and a condition for every behaviour of ``layers`` and every coefficient
    other than 0.

    A behaviour without a direction gets none. Raises ``ValueError`` for one that is none of
    ``labels``, for what it does could not be measured, and for an unknown behaviour or layer,
    naming what exists.
    """
    _refuse_others(layers, labels, "the layers")
    return [plain()] + [
        Condition(name, layer, float(c), Intervention(vectors.direction(name, layer), layer, c))
        for name, layer in layers.items()
        if name not in vectors.unavailable
        for c in filter(None, coefficients)
    ]


def control_conditions(
    controls: Controls, layers: dict[str, int], coefficients: Sequence[float]
) -> list[Condition]:
    """Every control direction at every steering layer with every coefficient other than 0.

    With a judge they may be for some of the tasks only (:func:`stllms.tasks.subset`).
    """
    return [
        Condition(name, layer, float(c), Intervention(direction[layer], layer, c))
        for layer in sorted(set(layers.values()))
        for name, direction in zip(controls.names, controls.directions, strict=True)
        for c in filter(None, coefficients)
    ]


def sweep_conditions(
    vectors: SteeringVectors,
    coefficients: Sequence[float],
    controls: Controls | None = None,
    labels: LabelSet = PAPER,
) -> list[Condition]:
    """The baseline, and every target and control at every layer with the largest
    coefficient of each sign, to see where a direction acts best.
    """
    ends = sorted({min(coefficients), max(coefficients)} - {0})
    names = [name for name in labels.targets if name in vectors.behaviours]
    found = [plain()]
    for layer in range(vectors.n_layers):
        found += conditions(vectors, dict.fromkeys(names, layer), ends, labels)[1:]
    if controls is not None:
        layers = {str(layer): layer for layer in range(vectors.n_layers)}
        found += control_conditions(controls, layers, ends)
    return found


def by_condition(every: Iterable[Condition]) -> dict[tuple, Intervention | None]:
    """What each condition does, by (direction, layer, coefficient, operation)."""
    return {one.key("")[1:]: one.intervention for one in every}


def generate(
    model: Model,
    tasks: Sequence[Task],
    interventions: Sequence[Intervention | None],
    *,
    max_new_tokens: int,
    batch_size: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    style: str = "sound",
    system: str | None = None,
    progress: bool = True,
    watch: Callable[[list[Response]], Any] | None = None,
) -> list[Response]:
    """One response a task, each with its own intervention or ``None`` for none.

    A task may occur several times with different interventions; its rows share their
    noise. Arguments are those of :func:`stllms.generation.chains.responses`; ``watch`` is
    called with the responses so far after every token, and what it raises ends the run.
    Raises ``ValueError`` for lists of different lengths, and for a layer or width the model
    does not have; ``SamplingError`` if the audit of the responses fails.
    """
    if len(tasks) != len(interventions):
        raise ValueError(f"{len(tasks)} tasks but {len(interventions)} interventions")
    make = partial(
        _steered,
        style=style,
        system=system,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
    )
    pairs = list(zip(tasks, interventions, strict=True))
    size = len(pairs) or 1 if model.workers is None else ROWS
    parts = (pairs[start : start + size] for start in range(0, len(pairs), size))
    shown = token_bar(len(tasks), "steered", most=max_new_tokens, enabled=progress)
    with engines.writing(model), shown as bar:
        if watch is None:
            responses = [one for made in over(model, make, parts, bar.tick) for one in made]
        else:  # it is asked after every token, here
            responses = make(model, pairs, bar.tick, watch=watch)
    audit.audit(responses).check()
    return responses


def _steered(
    model: Model,
    part: Sequence[tuple[Task, Intervention | None]],
    tick: Tick,
    *,
    style: str,
    system: str | None,
    watch: Callable[[list[Response]], Any] | None = None,
    **options: Any,
) -> list[Response]:
    """The responses to a part of the tasks; ``options`` are those of
    :func:`stllms.models.engines.generate`."""
    opened = [prompts.opening(model, task, style, system) for task, _ in part]
    rows = [
        Row(ids, task.id, () if edit is None else (edit,))
        for (task, edit), (_, ids) in zip(part, opened, strict=True)
    ]

    def read(written: Sequence[Sequence[int]], audits: Iterable[Any]) -> list[Response]:
        cells = zip(part, opened, written, audits, strict=False)
        return [prompts.response(model, task, *cell) for (task, _), *cell in cells]

    follow = None if watch is None else (lambda ids: watch(read(ids, repeat(None))))
    written = engines.generate(model, rows, watch=follow, progress=tick, **options)
    return read([one.ids for one in written], [one.audit for one in written])


def grid(
    model: Model,
    tasks: Sequence[Task],
    every: Iterable[Condition],
    *,
    max_new_tokens: int,
    batch_size: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    style: str = "sound",
    system: str | None = None,
    store: Rows | None = None,
    progress: bool = True,
) -> list[Steered]:
    """Every task under every condition, the conditions of a task together.

    All conditions of a chunk of tasks share batches. ``store`` has the row key of
    :class:`~stllms.records.Steered`; a chunk of which a row is missing is decoded whole, and
    the missing rows are added. Raises ``ValueError`` for a store and a condition that
    does not steer all positions (the key does not tell), ``SamplingError`` if the audit fails.
    """
    every = list(every)
    cells = [(condition, task) for task in tasks for condition in every]
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    if store is not None and cells:
        if any(one.intervention and one.intervention.where != "all" for one in every):
            raise ValueError("a store keeps responses steered at all positions: call without")
        store.bind({**model.identity, **options, **fingerprints(by_condition(every))})
        ids = {task.id: prompts.opening(model, task, style, system)[1] for task in tasks}
        stored = from_rows(store.load(), steered_from_row, store.path)
        prompts.same(store.path, (one.response for one in stored), ids)

    shown = token_bar(len(cells), "steered", most=max_new_tokens, enabled=progress)
    with engines.writing(model), shown as bar:
        keys = [condition.key(task.id) for condition, task in cells]
        size = CHUNK * len(every)
        make = partial(_cells, style=style, system=system, batch_size=batch_size, **options)
        rows = (
            resumed(keys, cells, make, size=size, model=model, store=store, bar=bar)
            if every
            else []
        )
    found = [steered_from_row(row) for row in rows]
    audit.audit(one.response for one in found).check()
    return found


def _cells(
    model: Model, part: Sequence[tuple[Condition, Task]], tick: Tick, **options: Any
) -> list[dict[str, Any]]:
    """The rows of a chunk of tasks under all conditions."""
    pairs = [(task, condition.intervention) for condition, task in part]
    responses = _steered(model, pairs, tick, **options)
    return [
        to_row(Steered(*condition.key(task.id), response))
        for (condition, task), response in zip(part, responses, strict=True)
    ]


def check(
    vectors: SteeringVectors,
    model: Model,
    origin: str = "the directions",
    labels: LabelSet | None = None,
) -> None:
    """Raises ``ValueError`` for directions of another model, naming both ``[L, D]``, and for
    one of a behaviour that ``labels``, where given, do not have."""
    mine, its = tuple(vectors.overall.shape), (model.n_layers, model.d_model)
    if mine != its:
        raise ValueError(
            f"{origin}: directions [L, D] = {list(mine)} are of another model than "
            f"{model.name}, which has {list(its)}"
        )
    if labels is not None:
        _refuse_others(vectors.behaviours, labels, origin)


def _refuse_others(names: Iterable[str], labels: LabelSet, origin: str) -> None:
    """Raises ``ValueError`` for a behaviour that is no label."""
    for name in names:
        if name not in labels.names:
            raise ValueError(
                f"{origin}: {name!r} is none of the labels {labels.name!r} "
                f"({', '.join(labels.names)}): make directions with these labels"
            )
