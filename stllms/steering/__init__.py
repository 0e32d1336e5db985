"""Stage 4: what is added where, a direction a row (METHOD, section 8).

``h[l*, t] += c * direction[b][l*]`` at one layer, every position, every step. Plain, positive
and negative chains of a task share batches and sampling noise, so that every steered chain
has its plain twin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stllms import decode, prompts, sampling
from stllms.decode import Intervention
from stllms.files import Rows, resumed
from stllms.models import Model
from stllms.progress import token_bar
from stllms.records import (
    STEERED,
    STEERED_KEY,
    Response,
    Steered,
    Task,
    from_rows,
    steered_from_row,
    to_row,
)
from stllms.vectors import Controls, SteeringVectors

__all__ = [
    "STEERED_KEY",
    "Arm",
    "Intervention",
    "arms",
    "by_arm",
    "check",
    "control_arms",
    "generate",
    "grid",
    "sweep_arms",
]  # fmt: skip

#: Tasks in a chunk: with all their arms the unit of refill, flush and resume.
CHUNK = 20
#: Control directions in the layer sweep of notebook 04.
SWEPT_CONTROLS = 4


def generate(
    model: Model,
    tasks: Sequence[Task],
    interventions: Sequence[Intervention | Sequence[Intervention] | None],
    *,
    max_new_tokens: int,
    batch_size: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    style: str = "sound",
    progress: bool = True,
    watch: Callable[[list[Response]], Any] | None = None,
) -> list[Response]:
    """One chain a task, each with its own intervention, several, or ``None`` for a plain one.

    A task may occur several times with different interventions; its rows share their
    noise. Arguments are those of :func:`stllms.generate.responses`; ``watch`` is called with
    the responses so far after every token, and what it raises ends the run. Raises
    ``ValueError`` for lists of different lengths, and for a layer or width the model does
    not have; ``SamplingError`` if the audit of the chains fails.
    """
    if len(tasks) != len(interventions):
        raise ValueError(f"{len(tasks)} tasks but {len(interventions)} interventions")
    with token_bar(len(tasks), "steered", most=max_new_tokens, enabled=progress) as bar:
        made = _chains(
            model,
            tasks,
            [_several(item) for item in interventions],
            style,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            temperature=temperature,
            seed=seed,
            progress=bar.tick,
            watch=watch,
        )
    sampling.audit(made).check()
    return made


def _several(item: Intervention | Sequence[Intervention] | None) -> tuple[Intervention, ...]:
    if item is None:
        return ()
    return (item,) if isinstance(item, Intervention) else tuple(item)


def _chains(
    model: Model, tasks, interventions, style: str, *, watch=None, **options
) -> list[Response]:
    opened = [prompts.opening(model, task, style) for task in tasks]
    rows = [
        decode.Row(start[1], task.id, edits)
        for task, start, edits in zip(tasks, opened, interventions, strict=True)
    ]

    def read(written: Sequence[Sequence[int]]) -> list[Response]:
        return [
            prompts.response(model, task, start, ids)
            for task, start, ids in zip(tasks, opened, written, strict=True)
        ]

    follow = None if watch is None else (lambda written: watch(read(written)))
    made = decode.run(model, rows, watch=follow, **options)
    return [
        replace(one, audit=chain.audit)
        for one, chain in zip(read([chain.ids for chain in made]), made, strict=True)
    ]


@dataclass(frozen=True)
class Arm:
    """One way to write every chain: ``direction`` is a behaviour, ``none``, or a control such
    as ``shuffled:0``."""

    direction: str
    layer: int
    coefficient: float
    intervention: Intervention | None
    operation: str = "add"

    def key(self, task_id: str) -> tuple:
        """The row key of DESIGN for this arm of a task."""
        return (task_id, self.direction, self.layer, self.coefficient, self.operation)


def arms(
    vectors: SteeringVectors,
    layers: dict[str, int],
    coefficients: Sequence[float],
    *,
    operation: str = "add",
    where: str = "all",
) -> list[Arm]:
    """The plain arm and one arm a behaviour of ``layers`` and coefficient other than 0.

    A behaviour without a direction gets none. Raises ``ValueError`` for an unknown behaviour
    or layer, naming what exists.
    """
    made = [plain()]
    for behaviour, layer in layers.items():
        if behaviour in vectors.unavailable:
            continue
        if behaviour not in vectors.behaviours:
            have = ", ".join(vectors.behaviours)
            raise ValueError(f"no direction for {behaviour!r}; there are: {have}")
        if not 0 <= layer < vectors.n_layers:
            last = vectors.n_layers - 1
            raise ValueError(f"no layer {layer} in the vectors; they have layers 0 to {last}")
        direction = vectors.direction(behaviour, layer)
        for coefficient in coefficients:
            if coefficient != 0:
                edit = Intervention(direction, layer, coefficient, operation, where)
                made.append(Arm(behaviour, layer, float(coefficient), edit, operation))
    return made


def by_arm(every: Iterable[Arm]) -> dict[tuple, Intervention | None]:
    """What each arm does, by (direction, layer, coefficient, operation)."""
    return {arm.key("")[1:]: arm.intervention for arm in every}


def plain() -> Arm:
    """The arm in which nothing is done."""
    return Arm("none", -1, 0.0, None)


def sweep_arms(
    vectors: SteeringVectors, coefficients: Sequence[float], controls: Controls | None = None
) -> list[Arm]:
    """The plain arm, and every steered behaviour and control at every layer with the largest
    coefficient of each sign: an option of notebook 04, to see where a direction acts best."""
    ends = sorted({c for c in (min(coefficients), max(coefficients)) if c != 0})
    layers = range(vectors.n_layers)
    names = [b for b in STEERED if b in vectors.behaviours]
    each = [arms(vectors, dict.fromkeys(names, layer), ends)[1:] for layer in layers]
    if controls is not None:
        each.append(control_arms(controls, {str(layer): layer for layer in layers}, ends))
    return [plain(), *(arm for some in each for arm in some)]


def control_arms(
    controls: Controls, layers: dict[str, int], coefficients: Sequence[float]
) -> list[Arm]:
    """The arms of the control directions, at every steering layer. With a judge they may be for
    some of the tasks only (:func:`stllms.tasks.for_controls`)."""
    return [
        Arm(name, layer, float(c), Intervention(direction[layer], layer, c))
        for layer in sorted(set(layers.values()))
        for name, direction in zip(controls.names, controls.directions, strict=True)
        for c in coefficients
        if c != 0
    ]


def grid(
    model: Model,
    tasks: Sequence[Task],
    every: Iterable[Arm],
    *,
    max_new_tokens: int,
    batch_size: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    style: str = "sound",
    store: Rows | None = None,
    progress: bool = True,
) -> list[Steered]:
    """Every task under every arm, the arms of a task together.

    All arms of a chunk of tasks share batches. ``store`` has the row key of
    :class:`~stllms.records.Steered`; a chunk of which a row is missing is decoded whole, and
    the missing rows are added. The key does not say where a row was steered, so ``ValueError``
    is raised for a store and an arm that is not steered at all positions, ``SamplingError``
    if the audit of all chains fails.
    """
    every = list(every)
    cells = [(arm, task) for task in tasks for arm in every]
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    if store is not None and cells:
        _check_storable(every)
        store.bind({**model.identity, **options, **decode.fingerprints(by_arm(every))})
        ids = {task.id: prompts.opening(model, task, style)[1] for task in tasks}
        stored = from_rows(store.load(), steered_from_row, store.path)
        prompts.same(store.path, (one.response for one in stored), ids)

    def make(start: int, stop: int) -> list[dict[str, Any]]:
        part = cells[start:stop]
        made = _chains(
            model,
            [task for _, task in part],
            [_several(arm.intervention) for arm, _ in part],
            style,
            batch_size=batch_size,
            progress=bar.tick,
            **options,
        )
        return [
            to_row(Steered(*arm.key(task.id), response))
            for (arm, task), response in zip(part, made, strict=True)
        ]

    with token_bar(len(cells), "steered", most=max_new_tokens, enabled=progress) as bar:
        keys = [arm.key(task.id) for arm, task in cells]
        size = CHUNK * len(every)
        rows = resumed(keys, make, size=size, store=store, skip=bar.skip) if every else []
    found = [steered_from_row(row) for row in rows]
    sampling.audit(one.response for one in found).check()
    return found


def _check_storable(every: Sequence[Arm]) -> None:
    for arm in every:
        places = {item.where for item in _several(arm.intervention)}
        if places - {"all"}:
            raise ValueError(
                f"the arm of {arm.direction} acts on {', '.join(sorted(places))} tokens: a "
                "store keeps chains steered at all positions, so call grid without one"
            )


def check(vectors: SteeringVectors, model: Model, origin: str = "the directions") -> None:
    """Raises ``ValueError`` for directions of another model, naming both ``[L, D]``."""
    mine, its = tuple(vectors.overall.shape), (model.n_layers, model.d_model)
    if mine != its:
        raise ValueError(
            f"{origin}: directions [L, D] = {list(mine)} are of another model than "
            f"{model.name}, which has {list(its)}"
        )
