"""One question answered twice, plain and steered: what the demo and the command line share.

Both chains are rows of one batch with one key, so they share their sampling noise and part
where the direction first changes the choice of a token. With coefficient 0 they are the same
text.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from stllms import (
    annotate,
    artifacts,
    checks,
    decode,
    generate,
    metrics,
    models,
    pipeline,
    registry,
    steering,
    vectors,
)
from stllms.annotate import Annotator, stage
from stllms.artifacts import BadFile, ChangedConfiguration, Folder
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
#: The stage whose needs are directions and layers: notebooks 01 to 03.
STEERS = "04_steer"
#: Fields of a run that its directions, or how it writes chains, depend on.
OF_THE_RUN = (
    "profile", "seed", "n_samples", "n_evaluate", "max_tokens", "temperature", "prompts",
    "quantization", "revision", "tasks",
)  # fmt: skip


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
    """Loads a model and its directions.

    The directions are those of ``vectors_file`` (of notebook 02, or a released ``.pt``), else
    those that ship with an embedded model, else those of the run in ``results/<slug>/``, which
    notebooks 01 to 03 make first where there is none. **A run that is there is taken as it
    is**, whoever labelled it: what ``config`` leaves at its default (profile, temperature,
    limit of new tokens, ...) is the run's. Who labels is ``config.judge``, ``auto`` being the
    free preview. Raises ``ValueError`` for a model that cannot be steered here, and the errors
    of these steps.
    """
    if config.entry.source == "api":
        raise ValueError(
            f"model: {config.model!r} is reached through an API, where nothing can be added to "
            "its activations; expected a model with weights"
        )
    shipped = vectors_file is None and directions.shipped(config.model)
    of_run = vectors_file is None and not shipped
    if of_run and Folder(config).vectors.is_file():
        config = _as_the_run(config)
    checks.hardware(config.device, config.quantization)
    if vectors_file is not None:
        path = Path(vectors_file).expanduser()
        read = vectors.load_published if path.suffix == ".pt" else SteeringVectors.load
        found, layers, origin = read(path), config.entry.steering_layers, path.name
    elif shipped:
        found, origin = directions.load(config.model), "shipped with the package"
        layers = config.entry.steering_layers
    else:
        found, layers, origin = _of_run(config)
    model = models.for_run(config)
    steering.check(found, model, origin)
    default = vectors.steering_layers(None, found.n_layers)
    labels = stage.for_run(config)
    free = labels if labels.name == config.preview else annotate.annotator(config.preview)
    return Bench(config, model, found, {**default, **(layers or {})}, origin, labels, free)


def _as_the_run(config: RunConfig) -> RunConfig:
    """``config`` with the values of the run in its folder where it sets none of its own.

    Raises ``ValueError`` for directions that other weights of the model gave.
    """
    folder = Folder(config)
    record = folder.record()
    stored, identity = record.get("configuration"), record.get("identity")
    if not isinstance(stored, dict) or not isinstance(identity, dict):
        raise BadFile(
            f"{folder.label} holds directions but no run.json to say whose: name the file "
            f"itself (--vectors {folder.vectors})"
        )
    default = {one.name: one.default for one in fields(RunConfig)}
    free = [name for name in OF_THE_RUN if getattr(config, name) == default[name]]
    taken = {name: stored[name] for name in free if name in stored}
    try:
        replace(config, tasks=taken.get("tasks"))
    except ValueError:  # the file has gone; only the demo's list of questions is of it
        del taken["tasks"]
    made = replace(config, **taken)
    now = made.revision or registry.revision_of(made.entry)
    if now != identity.get("revision"):
        raise ValueError(
            f"{folder.label}: its directions are of revision {identity.get('revision')} of the "
            f"model, which is now {now}: make them again (stllms run --fresh), or name a file "
            "(--vectors)"
        )
    return made


def _of_run(config: RunConfig) -> tuple[SteeringVectors, dict[str, int] | None, str]:
    """Directions, layers and name of the model's run, which is made if it is not there."""
    folder = Folder(config)
    if not folder.vectors.is_file():
        try:
            folder = pipeline.ensure(STEERS, config)
        except ChangedConfiguration as error:
            raise ValueError(
                f"{error}. It has no directions yet: finish it (stllms run, with its own "
                "options), or name a file of directions (--vectors)"
            ) from None
    layers, chosen = config.entry.steering_layers, folder / "steering_layers.json"
    if chosen.is_file():
        layers = artifacts.read_json(chosen)
    return SteeringVectors.load(folder.vectors), layers, folder.label


def check(ask: Ask) -> None:
    """Refuses, without a bench, what no bench can do; ``ValueError`` names the field."""
    checks.one_of("behaviour", ask.behaviour, BEHAVIOURS)
    checks.real("coefficient", ask.coefficient)
    checks.one_of("operation", ask.operation, tuple(decode.OPERATIONS))
    checks.one_of("where", ask.where, decode.WHERE)
    _own(ask)


def _own(ask: Ask) -> dict[str, Any]:
    """The values of ``ask`` for decoding that are not left to the bench."""
    given = {
        "max_new_tokens": checks.whole("max_tokens", ask.max_tokens, least=1),
        "temperature": checks.real("temperature", ask.temperature, least=0.0),
        "seed": checks.whole("seed", ask.seed, least=0),
    }
    return {name: value for name, value in given.items() if value is not None}


def layer_of(bench: Bench, behaviour: str) -> int:
    """The layer a behaviour is steered at: one without its own takes that of backtracking."""
    return bench.layers.get(behaviour, bench.layers["backtracking"])


def intervention(bench: Bench, ask: Ask) -> Intervention:
    """What is done to the steered row; ``ValueError`` names what is wrong, and what exists."""
    check(ask)
    layer = layer_of(bench, ask.behaviour) if ask.layer is None else ask.layer
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
    return {**generate.options(bench.config), **_own(ask)}


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
