"""One question answered twice, plain and steered: what the demo and the command line share.

Both chains are rows of one batch with one key, so they share their sampling noise and part
where the direction first changes the choice of a token. With coefficient 0 they are the same
text.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stllms import (
    annotate,
    artifacts,
    checks,
    generate,
    metrics,
    models,
    pipeline,
    steering,
    vectors,
)
from stllms.annotate import Annotator, stage
from stllms.config import RunConfig
from stllms.decode import Intervention
from stllms.models import Model
from stllms.organism import directions
from stllms.records import BEHAVIOURS, Response, Steered, Task
from stllms.vectors import SteeringVectors

#: The task id of a question that somebody typed, and so the key of its noise.
TYPED = "question"
#: A cell may write while the demo's thread does: nnsight traces one at a time.
_ONE = threading.Lock()
#: The stage whose folder holds directions, and layers once it has run.
AFTER_DIRECTIONS = "03_attribute_layers"


@dataclass(frozen=True)
class Bench:
    """A model with all that steering it takes.

    ``layers`` is the layer of each behaviour; ``origin`` says where the directions are from;
    ``preview`` labels for free while a chain is written, ``annotator`` at the end.
    """

    config: RunConfig
    model: Model
    directions: SteeringVectors
    layers: dict[str, int]
    origin: str
    annotator: Annotator
    preview: Annotator


@dataclass(frozen=True)
class Ask:
    """What is written: a question, an intervention, and how tokens are chosen.

    ``None`` is the default of the bench: the behaviour's own layer, the profile's temperature
    (0 is greedy) and limit of new tokens, the run's seed.
    """

    task: Task
    behaviour: str
    coefficient: float = 1.0
    layer: int | None = None
    operation: str = "add"
    where: str = "all"
    temperature: float | None = None
    seed: int | None = None
    max_tokens: int | None = None


Pair = tuple[Steered, Steered]


def task(question: str) -> Task:
    """A task of a typed question; ``ValueError`` for an empty one."""
    if not question.strip():
        raise ValueError("the question is empty: type one, or choose one")
    return Task(TYPED, TYPED, question.strip())


def bench(config: RunConfig, vectors_file: str | Path | None = None) -> Bench:
    """Loads the model of a run and its directions.

    The directions are those of ``vectors_file`` (of notebook 02, or a released ``.pt``), else
    those that ship with an embedded model, else ``results/<slug>/vectors.safetensors``, which
    notebooks 01 and 02 make first if it is not there. Raises the errors of these steps.
    """
    found, layers, origin = _directions(config, vectors_file)
    model = models.for_run(config)
    steering.check(found, model, origin)
    labels = stage.for_run(config)
    free = labels if labels.name == config.preview else annotate.annotator(config.preview)
    return Bench(config, model, found, layers, origin, labels, free)


def _directions(
    config: RunConfig, file: str | Path | None
) -> tuple[SteeringVectors, dict[str, int], str]:
    """Directions, steering layers, and where they are from."""
    layers = config.entry.steering_layers
    if file is not None:
        path = Path(file).expanduser()
        read = vectors.load_published if path.suffix == ".pt" else SteeringVectors.load
        found, origin = read(path), path.name
    elif directions.shipped(config.model):
        found, origin = directions.load(config.model), "shipped with the package"
    else:
        folder = pipeline.ensure(AFTER_DIRECTIONS, config)
        found, origin = SteeringVectors.load(folder.vectors), folder.label
        if (folder / "steering_layers.json").is_file():
            layers = artifacts.read_json(folder / "steering_layers.json")
    default = vectors.steering_layers(None, found.n_layers)
    return found, {**default, **(layers or {})}, origin


def layer_of(bench: Bench, behaviour: str) -> int:
    """The layer a behaviour is steered at: one without its own takes that of backtracking."""
    return bench.layers.get(behaviour, bench.layers["backtracking"])


def intervention(bench: Bench, ask: Ask) -> Intervention:
    """What is done to the steered row; ``ValueError`` names what is wrong, and what exists."""
    checks.one_of("behaviour", ask.behaviour, BEHAVIOURS)
    layer = layer_of(bench, ask.behaviour) if ask.layer is None else ask.layer
    checks.real("coefficient", ask.coefficient)
    if not 0 <= layer < bench.model.n_layers:
        last = bench.model.n_layers - 1
        raise ValueError(f"layer: {layer}, {bench.model.name} has layers 0 to {last}")
    try:
        direction = bench.directions.direction(ask.behaviour, layer)
    except KeyError as error:
        raise ValueError(error.args[0]) from None
    return Intervention(direction, layer, ask.coefficient, ask.operation, ask.where)


def decoding(bench: Bench, ask: Ask) -> dict[str, Any]:
    """How tokens are chosen: those of the run with the values of ``ask`` put in."""
    given = {
        "max_new_tokens": checks.whole("max_tokens", ask.max_tokens, least=1),
        "temperature": checks.real("temperature", ask.temperature, least=0.0),
        "seed": checks.whole("seed", ask.seed, least=0),
    }
    own = {name: value for name, value in given.items() if value is not None}
    return {**generate.options(bench.config), **own}


def write(
    bench: Bench, ask: Ask, *, watch: Callable[[list[Response]], Any] | None = None
) -> Pair:
    """The plain and the steered chain, written together and labelled by the annotator.

    ``watch`` is called with both responses so far after every token; what it raises ends the
    run. Raises ``ValueError`` for an empty question, one that does not fit the context, and
    any wrong value of ``ask``.
    """
    return write_all(bench, ask, [ask.task], watch=watch)[0]


def write_all(
    bench: Bench,
    ask: Ask,
    asked: Sequence[Task],
    *,
    watch: Callable[[list[Response]], Any] | None = None,
) -> list[Pair]:
    """:func:`write` for several tasks instead of that of ``ask``, in one batch."""
    for one in asked:
        task(one.content)
    edit = intervention(bench, ask)
    with _ONE:
        made = steering.generate(
            bench.model,
            [one for one in asked for _ in range(2)],
            [None, edit] * len(asked),
            **decoding(bench, ask),
            progress=False,
            watch=watch,
        )
        return label(bench, ask, made, bench.annotator)


def label(bench: Bench, ask: Ask, made: Sequence[Response], annotator: Annotator) -> list[Pair]:
    """Responses, plain and steered in turn, as labelled pairs; whole or being written."""
    edit, plain = intervention(bench, ask), steering.plain()
    arm = steering.Arm(ask.behaviour, edit.layer, float(ask.coefficient), edit, ask.operation)
    chains = [
        Steered(*(arm if place % 2 else plain).key(one.task_id), one)
        for place, one in enumerate(made)
    ]
    labelled = stage.steered(annotator, chains, model=bench.model)
    return list(zip(labelled[::2], labelled[1::2], strict=True))


def shares(chain: Steered) -> np.ndarray:
    """Share of each of the six behaviours among the labelled tokens, ``[6]``; NaN without."""
    return metrics.token_fractions([chain.annotation], BEHAVIOURS)[0]


def title(chain: Steered) -> str:
    """``plain``, or what was done to the chain."""
    if chain.direction == "none":
        return "plain"
    how = "" if chain.operation == "add" else f" {chain.operation}"
    return f"{chain.coefficient:+g}{how} {chain.direction}, layer {chain.layer}"


def note(chain: Steered) -> str:
    """Length, how the chain ended, its answer, and how much of it is labelled, in a line."""
    response, label = chain.response, chain.annotation
    said = f"answer: {' '.join(response.answer.split())}" if response.answer else "no answer"
    parts = [f"{len(response.output_ids)} tokens", said]
    if not response.finished:
        parts.append("not finished")
    failed = f"no labels ({label.failed})"
    parts.append(failed if label.failed else f"{label.ledger['coverage']:.0%} labelled")
    return "; ".join(parts)
