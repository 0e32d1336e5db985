"""The directions that ship with the embedded thinking model.

``python -m stllms.organism.directions`` makes them as notebooks 01 and 02 do at the default
profile, from the held-out ``build`` questions, and writes them beside the model's folder: in
it, other loaders would take ``*.safetensors`` for weights. To be run again whenever the weights
change: :func:`load` refuses directions of other weights. It also steers at every layer, on more
of the ``build`` questions: :data:`stllms.registry.TINY_THINKER_LAYERS` are what :func:`best`
reads in that sweep. The ``evaluate`` questions take no part.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import replace
from pathlib import Path

import pandas as pd

from stllms import (
    activations,
    doses,
    evaluation,
    generate,
    models,
    steering,
    tables,
    tasks,
    vectors,
)
from stllms.annotate import stage
from stllms.config import RunConfig
from stllms.organism import grammar
from stllms.vectors import SteeringVectors

HERE = Path(__file__).parents[1] / "fixtures"


def file(name: str) -> Path:
    """The directions of the embedded model ``name``, beside its folder."""
    return HERE / f"{name}.vectors.safetensors"


def sweep_file(name: str) -> Path:
    """The layer sweep of the embedded model ``name``, beside its folder."""
    return HERE / f"{name}.layer_sweep.csv"


def shipped(name: str) -> bool:
    """Whether directions ship for the embedded model ``name``."""
    return file(name).is_file()


def load(name: str) -> SteeringVectors:
    """The shipped directions; ``ValueError`` if they were made for other weights."""
    found = SteeringVectors.load(file(name))
    if found.config.get("weights") != weights(name):
        raise ValueError(
            f"{file(name).name} was made for other weights than those of {name}: make it again "
            "with python -m stllms.organism.directions"
        )
    return found


def weights(name: str) -> str:
    """Twelve hex digits of a hash of the weights of an embedded model."""
    content = (HERE / name / "model.safetensors").read_bytes()
    return hashlib.sha256(content).hexdigest()[:12]


def build(config: RunConfig) -> SteeringVectors:
    """Directions of an embedded model as notebook 02 makes them; ``config`` says from what."""
    model = models.for_run(config)
    asked = tasks.for_run(config, "build")
    made = generate.responses(model, asked, **generate.options(config))
    labelled = stage.annotations(stage.for_run(config), made, model=model)
    means = activations.collect(model, made, [one.spans for one in labelled], batch_size=16)
    built = vectors.difference_of_means(means)
    origin = {"weights": weights(config.model), "annotator": config.annotator}
    origin |= {"profile": config.profile, "responses": len(made), "seed": config.seed}
    return replace(built, config={**built.config, **origin})


def sweep(config: RunConfig, built: SteeringVectors, n: int) -> pd.DataFrame:
    """Every behaviour steered at every layer by -1 and +1, on ``n`` questions.

    Columns of :func:`stllms.doses.sweep`, and the share of ``well-formed`` chains.
    """
    model, labels = models.for_run(config), stage.for_run(config)
    asked = grammar.tasks("build", n, seed=config.seed + 1)
    arms = steering.sweep_arms(built, (-1.0, 1.0))
    chains = steering.grid(model, asked, arms, **generate.options(config))
    measured = evaluation.measure(stage.steered(labels, chains, model=model), asked)
    arm = ["direction", "layer", "coefficient"]
    whole = measured.groupby(arm)["well-formed"].mean().reset_index()
    whole = whole.rename(columns={"direction": "behaviour"})
    return doses.sweep(measured).merge(whole, on=["behaviour", "layer", "coefficient"])


def best(swept: pd.DataFrame) -> dict[str, int]:
    """The layer of each behaviour at which the smaller of its two effects, the rise with +1
    and the fall with -1, is largest, among layers where 9 of 10 chains stay well-formed.

    The last layer is left out by choice, though it moves all four behaviours most in the
    shipped sweep: what is added to its output is read by the final norm and the head alone,
    and by later tokens only through the token that is chosen. It reweights words.
    """
    swept = swept[swept["layer"] < swept["layer"].max()]
    effect = swept["coefficient"] * (swept["value"] - swept["plain"])
    kept = swept.assign(effect=effect.where(swept["well-formed"] >= 0.9, -1.0))
    smaller = kept.groupby(["behaviour", "layer"])["effect"].min()
    return {name: int(smaller[name].idxmax()) for name in kept["behaviour"].unique()}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m stllms.organism.directions", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", default="tiny-thinker", help="an embedded model")
    parser.add_argument("--profile", default="default", help="of stllms.run")
    parser.add_argument("--out", type=Path, help="file (default: beside the model's folder)")
    parser.add_argument("--sweep", type=int, default=200, help="questions of the layer sweep")
    given = parser.parse_args(argv)
    config = RunConfig(model=given.model, profile=given.profile, device="cpu")
    if not config.embedded:
        parser.error(f"{config.model} is no embedded model: notebook 02 makes its directions")
    path = given.out or file(config.model)
    made = build(config)
    made.save(path)
    spans = dict(zip(made.behaviours, made.counts.tolist(), strict=True))
    print(f"{path.name} {tuple(made.directions.shape)}; spans: {spans}")
    print("unavailable:", made.unavailable or "none")
    if given.sweep:
        swept = sweep(config, made, given.sweep)
        table = given.out.with_suffix(".csv") if given.out else sweep_file(config.model)
        swept.round(4).to_csv(table, index=False)
        print(f"{table.name}: steer at {tables.layer_text(best(swept))}")


if __name__ == "__main__":
    main()
