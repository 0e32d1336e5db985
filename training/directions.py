"""Make the directions that ship with the embedded thinking model, and sweep its layers.

``python training/directions.py`` makes them as notebooks 01 and 02 do at the default profile,
from the held-out ``build`` questions, and writes them beside the model's folder. Run it again
whenever the weights change: loading refuses directions of other weights. It also steers at
every layer, on more of the ``build`` questions: :func:`best` reads
:data:`stllms.registry.TINY_THINKER_LAYERS` in that sweep. The ``evaluate`` questions take no
part.

``--run results/smol-thinker`` ships the directions of a run instead, that of a model with an
adapter, as they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from stllms.annotation import annotators
from stllms.config import PROFILES
from stllms.generation.chains import responses
from stllms.models.loading import load
from stllms.models.model import Model
from stllms.plotting.text import layer_text
from stllms.records import Task
from stllms.registry import FIXTURES
from stllms.runs.files import read_json
from stllms.steering import dose, measures
from stllms.steering.conditions import grid, sweep_conditions
from stllms.vectors.activations import collect
from stllms.vectors.directions import (
    SteeringVectors,
    difference_of_means,
    shipped_file,
    weights_of,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from training import chains

MODEL = "tiny-thinker"
#: The layer sweep of the model, beside its folder, and the coefficients that it steers by.
SWEEP = FIXTURES / f"{MODEL}.layer_sweep.csv"
COEFFICIENTS = (-1.0, 1.0)


def build(model: Model, tasks: Sequence[Task], decoding: dict[str, Any]) -> SteeringVectors:
    """Directions of an embedded model as notebook 02 makes them."""
    made = responses(model, tasks, **decoding)
    labelled = annotators.annotations(annotators.Grammar(), made, model=model)
    means = collect(model, made, [one.spans for one in labelled], batch_size=16)
    built = difference_of_means(means)
    origin: dict[str, Any] = {
        "weights": weights_of(model.name),
        "annotator": "grammar",
        "responses": len(made),
    }
    origin |= {"seed": decoding["seed"]}
    return replace(built, config={**built.config, **origin})


def of_run(folder: Path) -> tuple[str, SteeringVectors]:
    """The model of a run, and the directions that notebook 02 left there, with the hash of the
    weights they are of."""
    run = read_json(folder / "run.json")["configuration"]
    found = SteeringVectors.load(folder / "vectors.safetensors")
    origin = {"weights": weights_of(run["model"]), "profile": run["profile"]}
    return run["model"], replace(found, config={**found.config, **origin})


def sweep(
    model: Model, built: SteeringVectors, tasks: Sequence[Task], decoding: dict[str, Any]
) -> pd.DataFrame:
    """Every behaviour steered at every layer by -1 and +1.

    Columns of :func:`stllms.steering.dose.sweep`, and the share of ``well-formed`` chains.
    """
    conditions = sweep_conditions(built, COEFFICIENTS)
    chains = grid(model, tasks, conditions, **decoding)
    measured = measures.measure(
        annotators.steered(annotators.Grammar(), chains, model=model), tasks
    )
    by = ["direction", "layer", "coefficient"]
    whole = measured.groupby(by)["well-formed"].mean().reset_index()
    whole = whole.rename(columns={"direction": "behaviour"})
    return dose.sweep(measured).merge(whole, on=["behaviour", "layer", "coefficient"])


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


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="default", choices=sorted(PROFILES))
    parser.add_argument("--out", type=Path, help="file (default: beside the model's folder)")
    parser.add_argument("--sweep", type=int, default=200, help="questions of the layer sweep")
    parser.add_argument("--run", type=Path, help="folder of a run whose directions are to ship")
    given = parser.parse_args(argv)
    if given.run:
        name, made = of_run(given.run)
        made.save(given.out or shipped_file(name))
        print(f"{name}: {', '.join(made.behaviours)}")
        return
    profile, seed = PROFILES[given.profile], 0
    decoding = {
        "max_new_tokens": profile.max_tokens,
        "temperature": profile.temperature,
        "seed": seed,
    }
    model = load(MODEL, device="cpu")
    path = given.out or shipped_file(MODEL)
    made = build(model, chains.tasks("build", profile.n_build, seed=seed), decoding)
    made = replace(made, config=made.config | {"profile": given.profile})
    made.save(path)
    spans = dict(zip(made.behaviours, made.counts.tolist(), strict=True))
    print(f"{path.name} {tuple(made.directions.shape)}; spans: {spans}")
    print("unavailable:", made.unavailable or "none")
    if given.sweep:
        tasks = chains.tasks("build", given.sweep, seed=seed + 1)
        swept = sweep(model, made, tasks, decoding)
        table = given.out.with_suffix(".csv") if given.out else SWEEP
        swept.round(4).to_csv(table, index=False)
        print(f"{table.name}: steer at {layer_text(best(swept))}")


if __name__ == "__main__":
    main()
