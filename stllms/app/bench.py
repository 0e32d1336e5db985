"""Steering one question: what the command ``stllms steer`` and the demo share.

A :class:`Bench` is a model with the directions, layers and annotators that steering it takes.
They come from the package, a file, or the model's run, which is made if need be. :func:`write`
answers a question twice, as the baseline and steered: both chains are rows of one batch with
one key, so they share their sampling noise and part where the direction first changes the
choice of a token. With coefficient 0 they are the same text.
"""

from __future__ import annotations

import textwrap
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from stllms import config, models, registry
from stllms.annotation import annotators
from stllms.annotation.annotators import Annotator
from stllms.app import preflight, stages
from stllms.config import RunConfig
from stllms.labels import PAPER, LabelSet
from stllms.models.engines.interventions import WHERE, Intervention
from stllms.models.model import Model, ModelError
from stllms.records import Response, Steered, Task
from stllms.runs.artifacts import Folder
from stllms.runs.files import BadFile, load_table, read_json
from stllms.steering import conditions
from stllms.steering.conditions import Condition
from stllms.steering.measures import token_fractions
from stllms.vectors import directions
from stllms.vectors.directions import SteeringVectors

#: Fields of a run that its directions, or how it writes chains, depend on.
OF_THE_RUN = (
    "profile", "seed", "n_samples", "n_evaluate", "max_tokens", "temperature", "prompts",
    "system", "quantization", "revision", "tasks", "labels",
)  # fmt: skip
#: The task id of a question that somebody typed, and so the key of its noise.
TYPED = "question"
#: The largest absolute coefficient; beyond it nothing but noise is left of any model.
MOST = 1000.0
#: A chain of which less than this share is labelled is mostly unlabelled.
LABELLED = 0.5
#: What transformers may make of the files of others.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError)
#: A cell may write while the demo's thread does: a hook acts in every forward of its model.
ONE = threading.Lock()

Pair = tuple[Steered, Steered]
#: Direction, layer, coefficient and operation of a chain.
Way = tuple[str, int, float, str]


@dataclass(frozen=True)
class Bench:
    """A model with all that steering it takes.

    ``layers`` is the layer of each behaviour and ``coefficients`` the coefficient that is
    suggested for adding it, where one is known; ``origin`` says where the directions are from.
    """

    config: RunConfig
    model: Model
    directions: SteeringVectors
    layers: dict[str, int]
    origin: str
    annotator: Annotator
    coefficients: dict[str, float]

    @property
    def labels(self) -> LabelSet:
        """What the chains are labelled with: the labels of the run."""
        return self.config.label_set

    @property
    def behaviours(self) -> tuple[str, ...]:
        """What can be steered: the labels in their order, then directions of other names (of a
        person's file)."""
        others = (name for name in self.directions.behaviours if name not in self.labels.names)
        return (*self.labels.names, *others)

    @property
    def first(self) -> str:
        """What is steered where nobody chooses: the first target that has a direction, else
        the first direction."""
        known = self.directions.behaviours
        return next((name for name in self.labels.targets if name in known), known[0])

    def layer_of(self, behaviour: str) -> int:
        """The layer a behaviour is steered at: without its own, that of the first target with
        a layer, else the middle."""
        known = (behaviour, *self.labels.targets)
        middle = directions.default_layer(self.directions.n_layers)
        return next((self.layers[name] for name in known if name in self.layers), middle)

    def coefficient_of(self, behaviour: str) -> float:
        """The coefficient suggested for adding a behaviour; 1 where none is known."""
        return self.coefficients.get(behaviour, 1.0)


@dataclass(frozen=True)
class Ask:
    """What is written: a question, an intervention, and how tokens are chosen.

    ``None`` is the default of the bench: the behaviour's own layer, the profile's temperature
    (0 is greedy) and limit of new tokens, the run's seed. Raises ``ValueError`` for a wrong
    value, by the name of its field.
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

    def __post_init__(self) -> None:
        config.real("coefficient", self.coefficient)
        if abs(self.coefficient) > MOST:
            raise ValueError(f"coefficient: expected a number from {-MOST:g} to {MOST:g}")
        registry.operator.find(self.operation)
        config.one_of("where", self.where, WHERE)
        config.real("temperature", self.temperature, least=0.0)
        config.whole("seed", self.seed, least=0)
        config.whole("max_tokens", self.max_tokens, least=1)


# -- the bench -----------------------------------------------------------------------------


def bench(
    setup: RunConfig, vectors_file: str | Path | None = None, behaviour: str | None = None
) -> Bench:
    """Loads a model and its directions.

    The directions are those of ``vectors_file`` (of notebook 02, or a released ``.pt``), else
    those that ship with an embedded model (of the paper's labels), else those of the run in
    ``results/<slug>/``, which notebooks 01 to 03 make first where there is none. **A run that
    is there is taken as it is**, whoever labelled it: what ``setup`` leaves at its default
    (profile, temperature, limit of new tokens, labels, ...) is the run's. Who labels is
    ``setup.judge``. The judge's key, the model and the direction of ``behaviour`` are looked
    for before anything is run or loaded. Raises ``ValueError`` for a model that cannot be
    steered here, :class:`ModelError` in a sentence for one that cannot be loaded, and
    the errors of these steps.
    """
    if setup.entry.source == "api":
        raise ValueError(
            f"model: {setup.model!r} is reached through an API, where nothing can be added to "
            "its activations; expected a model with weights"
        )
    shipped = directions.shipped(setup.model) and not setup.own_labels
    of_run = vectors_file is None and not shipped
    there = of_run and Folder(setup).vectors.is_file()
    if there:
        setup = _as_the_run(setup)
    config.hardware(setup.device, setup.quantization)
    annotator = preflight.annotator(setup)
    preflight.model(setup)
    if of_run and not there:
        if behaviour is not None:
            config.one_of("behaviour", behaviour, setup.label_set.names)
        _make(setup)
    found, origin, layers, coefficients = _directions(setup, vectors_file)
    if behaviour is not None:
        config.one_of("behaviour", behaviour, (*found.behaviours, *found.unavailable))
        found.index(behaviour)
    model = _model(setup)
    conditions.check(found, model, origin)
    return Bench(setup, model, found, layers, origin, annotator, coefficients)


def _directions(
    setup: RunConfig, file: str | Path | None
) -> tuple[SteeringVectors, str, dict[str, int], dict[str, float]]:
    """The directions, where they are from, and the layers and coefficients known for them."""
    names, coefficients = setup.label_set.names, {}
    layers = {b: n for b, n in (setup.entry.steering_layers or {}).items() if b in names}
    if file is not None:
        path = Path(file).expanduser()
        read = directions.load_published if path.suffix == ".pt" else SteeringVectors.load
        found, origin = read(path), path.name
    elif directions.shipped(setup.model) and not setup.own_labels:
        found, origin = directions.load_shipped(setup.model), "shipped with the package"
        coefficients = dict(setup.entry.coefficients)
    else:
        folder = Folder(setup)
        found, origin = SteeringVectors.load(folder.vectors), folder.label
        coefficients = _suggested(folder / "steering_suggested.csv")
        if (folder / "steering_layers.json").is_file():
            layers = read_json(folder / "steering_layers.json")
    middle = dict.fromkeys(setup.label_set.targets, directions.default_layer(found.n_layers))
    return found, origin, middle | layers, coefficients


def _model(setup: RunConfig) -> Model:
    """The model; :class:`ModelError` says in one sentence why it cannot be loaded."""
    try:
        return models.load(setup.model, **setup.loading)
    except UNREADABLE as error:
        said = textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
        raise ModelError(
            f"model: {setup.model!r} cannot be loaded; expected config.json, weights and a "
            f"tokenizer that transformers can read ({said})"
        ) from error


def _as_the_run(setup: RunConfig) -> RunConfig:
    """``setup`` with the values of the run in its folder where it sets none of its own.

    Raises ``ValueError`` for directions that other weights of the model, or other labels,
    gave.
    """
    folder = Folder(setup)
    record = folder.record()
    stored, identity = record.get("configuration"), record.get("identity")
    if not isinstance(stored, dict) or not isinstance(identity, dict):
        raise BadFile(
            f"{folder.label} holds directions but no run.json to say whose: name the file "
            f"itself (--vectors {folder.vectors})"
        )
    default = RunConfig()
    free = [name for name in OF_THE_RUN if getattr(setup, name) == getattr(default, name)]
    run = replace(setup, **{name: stored[name] for name in free if name in stored})
    if (then := identity.get("labels")) != (now := run.label_identity):
        raise ValueError(
            f"{folder.label}: its directions are of the labels {then or PAPER.name}, not of "
            f"{now or PAPER.name}: name another --results, or make them again (stllms run "
            "--fresh)"
        )
    for name, now in registry.content_of(run.entry).items():
        then = identity.get(name)
        if then != now and (name != "revision" or None not in (then, now)):
            raise ValueError(
                f"{folder.label}: the {name} of the model changed since its directions were "
                f"made ({then} then, {now} now): make them again (stllms run --fresh), or name "
                "a file (--vectors)"
            )
    return run


def _make(setup: RunConfig) -> None:
    """Runs notebooks 01 to 03 for a model without directions; says so before."""
    print(
        f"{setup.model} has no directions in {Folder(setup).label}: notebooks 01 to 03 make "
        f"them first, from {setup.settings.n_build} tasks. Quicker: the profile smoke, or a "
        "file of directions (stllms steer --vectors FILE)",
        flush=True,
    )
    stages.prepare("04_steer", setup)


def _suggested(table: Path) -> dict[str, float]:
    """The coefficients above 0 that notebook 04 suggests; none where it has not run."""
    if not table.is_file():
        return {}
    rows = load_table(table).dropna(subset="coefficient")
    rows = rows[rows["sign"] == "+"]
    return dict(zip(rows["behaviour"], rows["coefficient"].astype(float), strict=True))


# -- one question --------------------------------------------------------------------------


def task(question: str) -> Task:
    """A task of a typed question; ``ValueError`` for an empty one, and for one whose bytes
    were no UTF-8 (a terminal hands them on as lone surrogates)."""
    if not question.strip():
        raise ValueError("the question is empty: type one, or choose one")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"question: character {error.start + 1} is no UTF-8; type it in a UTF-8 terminal"
        ) from None
    return Task(TYPED, TYPED, question.strip())


def intervention(bench: Bench, ask: Ask) -> Intervention:
    """What is done to the steered row; ``ValueError`` names what is wrong, and what exists."""
    layer = bench.layer_of(ask.behaviour) if ask.layer is None else ask.layer
    direction = bench.directions.direction(ask.behaviour, layer)
    return Intervention(direction, layer, ask.coefficient, ask.operation, ask.where)


def decoding(bench: Bench, ask: Ask) -> dict[str, Any]:
    """How tokens are chosen: as in the run, with the values of ``ask`` put in."""
    own = {"max_new_tokens": ask.max_tokens, "temperature": ask.temperature, "seed": ask.seed}
    return bench.config.decoding | {n: value for n, value in own.items() if value is not None}


def write(
    bench: Bench, ask: Ask, *, watch: Callable[[list[Response]], Any] | None = None
) -> Pair:
    """The baseline and the steered chain, written together and labelled by the annotator.

    ``watch`` is called with both responses so far after every token; what it raises ends the
    run. Raises ``ValueError`` for a question that does not fit the context, and for a layer or
    a direction that there is not.
    """
    return write_all(bench, ask, [ask.task], watch=watch)[0]


def write_all(
    bench: Bench,
    ask: Ask,
    tasks: Sequence[Task],
    *,
    watch: Callable[[list[Response]], Any] | None = None,
) -> list[Pair]:
    """:func:`write` for several tasks instead of that of ``ask``, in one batch."""
    edit = intervention(bench, ask)
    with ONE:
        responses = conditions.generate(
            bench.model,
            [one for one in tasks for _ in range(2)],
            [None, edit] * len(tasks),
            **decoding(bench, ask),
            progress=False,
            watch=watch,
        )
        return label(bench, ask, responses, bench.annotator)


def label(
    bench: Bench, ask: Ask, responses: Sequence[Response], annotator: Annotator
) -> list[Pair]:
    """Responses, baseline and steered in turn, as labelled pairs; whole or being written."""
    how = conditions_of(bench, ask) * (len(responses) // 2)
    chains = [Steered(one.task_id, *way, one) for one, way in zip(responses, how, strict=True)]
    labelled = annotators.steered(annotator, chains, model=bench.model)
    return list(zip(labelled[::2], labelled[1::2], strict=True))


def conditions_of(bench: Bench, ask: Ask) -> tuple[Way, Way]:
    """What is done to the baseline, which is nothing, and to the steered chain."""
    edit = intervention(bench, ask)
    steered = Condition(ask.behaviour, edit.layer, float(ask.coefficient), edit, ask.operation)
    return conditions.plain().key("")[1:], steered.key("")[1:]


# -- what is said of a pair ----------------------------------------------------------------


def shares(chain: Steered, *, labels: LabelSet = PAPER) -> np.ndarray:
    """Share of each label among the labelled tokens, ``[N]``; NaN without."""
    return token_fractions([chain.labelled], labels.names)[0]


def title(chain: Steered) -> str:
    """``baseline``, or what was done to the chain."""
    if chain.direction == "none":
        return "baseline"
    how = "" if chain.operation == "add" else f" {chain.operation}"
    return f"{chain.coefficient:+g}{how} {chain.direction}, layer {chain.layer}"


def note(chain: Steered) -> str:
    """Length, answer, whether the chain ended, and how much of it is labelled, in a line."""
    response, label = chain.response, chain.labelled
    parts = (
        f"{len(response.output_ids)} tokens",
        f"answer: {' '.join(response.answer.split())}" if response.answer else "no answer",
        "" if response.finished else "not finished",
        f"no labels ({label.failed})"
        if label.failed
        else f"{label.ledger['coverage']:.0%} labelled",
    )
    return "; ".join(filter(None, parts))


def same(pair: Pair) -> bool:
    """Whether steering changed no token."""
    baseline, steered = (chain.response.output_ids for chain in pair)
    return baseline == steered


def broke(pair: Pair) -> list[str]:
    """What is wrong with the steered chain and not with the baseline."""

    def bare(chain: Steered) -> bool:
        label = chain.labelled
        return label.failed is None and label.ledger["coverage"] < LABELLED

    baseline, steered = pair
    wrong = {
        "not finished": baseline.response.finished and not steered.response.finished,
        "mostly unlabelled": bare(steered) and not bare(baseline),
    }
    return [what for what, holds in wrong.items() if holds]


def remark(pair: Pair) -> str:
    """What a reader of a pair should know: that nothing changed, or that the text broke."""
    if pair[1].coefficient == 0:
        return ""
    if same(pair):
        return "the push changed no token: try another seed or a larger coefficient"
    if wrong := broke(pair):
        return f"the push broke the text ({', '.join(wrong)}): try a smaller coefficient"
    return ""
