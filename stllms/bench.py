"""The bench: a model with the directions, layers and annotator that steering it takes.

Where they come from: the package, a file, or the model's run, which is made if need be.
"""

from __future__ import annotations

import gc
import textwrap
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import pandas as pd
import torch

from stllms import (
    annotate,
    artifacts,
    checks,
    models,
    pipeline,
    refusals,
    registry,
    steering,
    vectors,
)
from stllms.annotate import Annotator, stage
from stllms.artifacts import BadFile, ChangedConfiguration, Folder
from stllms.config import PROFILES, RunConfig
from stllms.loading import ModelError
from stllms.models import Model
from stllms.organism import directions
from stllms.vectors import SteeringVectors

#: The stage whose needs are directions and layers: notebooks 01 to 03.
STEERS = "04_steer"
#: Fields of a run that its directions, or how it writes chains, depend on.
OF_THE_RUN = (
    "profile", "seed", "n_samples", "n_evaluate", "max_tokens", "temperature", "prompts",
    "quantization", "revision", "tasks",
)  # fmt: skip
#: Letters of an error of other packages that are shown.
SAID = 200


@dataclass(frozen=True)
class Bench:
    """A model with all that steering it takes.

    ``layers`` is the layer of each behaviour and ``coefficients`` the coefficient that is
    suggested for adding it, where one is known; ``origin`` says where the directions are from;
    ``preview`` labels for free while a chain is written, ``annotator`` at the end.
    """

    config: RunConfig
    model: Model
    directions: SteeringVectors
    layers: dict[str, int]
    origin: str
    annotator: Annotator
    preview: Annotator
    coefficients: dict[str, float] = field(default_factory=dict)


def bench(config: RunConfig, vectors_file: str | Path | None = None) -> Bench:
    """Loads a model and its directions.

    The directions are those of ``vectors_file`` (of notebook 02, or a released ``.pt``), else
    those that ship with an embedded model, else those of the run in ``results/<slug>/``, which
    notebooks 01 to 03 make first where there is none. **A run that is there is taken as it
    is**, whoever labelled it: what ``config`` leaves at its default (profile, temperature,
    limit of new tokens, ...) is the run's. Who labels is ``config.judge``, ``auto`` being the
    free preview. The judge's key and the model are looked for before anything is run. Raises
    ``ValueError`` for a model that cannot be steered here, :class:`ModelError` in a sentence
    for one that cannot be loaded, and the errors of these steps.
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
    labels = refusals.annotator(config) or stage.for_run(config)
    free = labels if labels.name == config.preview else annotate.annotator(config.preview)
    layers, coefficients = config.entry.steering_layers, {}
    if vectors_file is not None:
        path = Path(vectors_file).expanduser()
        read = vectors.load_published if path.suffix == ".pt" else SteeringVectors.load
        found, origin = read(path), path.name
    elif shipped:
        found, origin = directions.load(config.model), "shipped with the package"
        coefficients = dict(registry.TINY_THINKER_COEFFICIENTS)
    model = _model(config)
    if of_run:
        if not Folder(config).vectors.is_file():
            del model  # the notebooks load their own: two may not fit
            _free()
            _make(config)
            model = _model(config)
        found, layers, coefficients, origin = _of_run(config)
    steering.check(found, model, origin)
    default = vectors.steering_layers(None, found.n_layers)
    layers = {**default, **(layers or {})}
    return Bench(config, model, found, layers, origin, labels, free, coefficients)


def _model(config: RunConfig) -> Model:
    """The model; :class:`ModelError` says in one sentence why it cannot be loaded."""
    refusals.model(config)
    try:
        return models.for_run(config)
    except (ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever transformers makes of the files of others
        said = textwrap.shorten(str(error) or type(error).__name__, SAID, placeholder=" ...")
        raise ModelError(
            f"model: {config.model!r} cannot be loaded; expected config.json, weights and a "
            f"tokenizer that transformers can read ({said})"
        ) from error


def at_hand(config: RunConfig) -> list[str]:
    """The models that can be steered at once, that of ``config`` first.

    Those whose directions ship with the package, and those of the runs in the folder of results
    that hold directions and whose weights are on this machine.
    """
    shipped = [name for name in registry.MODELS if directions.shipped(name)]
    found = [_model_of(path) for path in sorted(config.results_folder.glob("*/run.json"))]
    return list(dict.fromkeys([config.model, *shipped, *filter(None, found)]))


def _model_of(run: Path) -> str | None:
    """The model of a run with directions if it can be loaded here, ``None`` otherwise."""
    if not run.with_name("vectors.safetensors").is_file():
        return None
    try:
        entry = registry.resolve(artifacts.read_json(run)["configuration"]["model"])
    except (BadFile, KeyError, TypeError, registry.UnknownModel):
        return None
    there = entry.source != "api" and not registry.missing_packages(entry.name)
    if entry.source == "hub":
        there = refusals.in_cache(entry.hub_id)
    return entry.name if there and registry.slug(entry.name) == run.parent.name else None


def of(name: str, config: RunConfig) -> RunConfig:
    """The run of another model that is at hand, with the judge and the folder of ``config``."""
    judge = "auto" if config.judge == "grammar" else config.judge
    kept = ("results", "device", "dtype", "base_url", "max_cost")
    return RunConfig(name, judge=judge, **{one: getattr(config, one) for one in kept})


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
    for name, now in registry.content_of(made.entry).items():
        then = identity.get(name)
        if then != now and (name != "revision" or None not in (then, now)):
            raise ValueError(
                f"{folder.label}: the {name} of the model changed since its directions were "
                f"made ({then} then, {now} now): make them again (stllms run --fresh), or name "
                "a file (--vectors)"
            )
    return made


def _make(config: RunConfig) -> None:
    """Runs notebooks 01 to 03 for a model without directions; says so before.

    Raises :class:`ModelError` with the last line of a notebook's error.
    """
    few = PROFILES["smoke"].n_build
    print(
        f"{config.model} has no directions in {Folder(config).label}: notebooks 01 to 03 make "
        f"them first, from {config.settings.n_build} tasks. Quicker: the profile smoke ({few} "
        "tasks), or a file of directions (stllms steer --vectors FILE)",
        flush=True,
    )
    try:
        pipeline.prepare(STEERS, config)
    except ChangedConfiguration as error:
        raise ValueError(
            f"{error}. It has no directions yet: finish it (stllms run, with its own "
            "options), or name a file of directions (--vectors)"
        ) from None
    except pipeline.StageError as error:
        raise ModelError(_last_of(str(error))) from error


def _last_of(said: str) -> str:
    """Of a notebook's failure: which cell, the last line of its error, where the copy is."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    where = [line for line in lines[1:] if line.startswith("as executed: ")]
    cause = [line for line in lines[1:] if line not in where][-1:]
    return " ".join([*lines[:1], *cause, *(f"({line})" for line in where)])


def _of_run(
    config: RunConfig,
) -> tuple[SteeringVectors, dict[str, int] | None, dict[str, float], str]:
    """Directions, layers, suggested coefficients and name of the model's run."""
    folder = Folder(config)
    layers, chosen = config.entry.steering_layers, folder / "steering_layers.json"
    if chosen.is_file():
        layers = artifacts.read_json(chosen)
    found = SteeringVectors.load(folder.vectors)
    return found, layers, _suggested(folder / "steering_suggested.csv"), folder.label


def _suggested(table: Path) -> dict[str, float]:
    """The coefficients above 0 that notebook 04 suggests; none where it has not run."""
    if not table.is_file():
        return {}
    rows = pd.read_csv(table).dropna(subset="coefficient")
    rows = rows[rows["sign"] == "+"]
    return dict(zip(rows["behaviour"], rows["coefficient"].astype(float), strict=True))
