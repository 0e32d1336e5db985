"""The directions that ship with the embedded thinking model.

``python -m stllms.organism.directions`` makes them as notebooks 01 and 02 do at the default
profile, from the held-out ``build`` questions, and writes ``vectors.safetensors`` beside the
weights. To be run again whenever the weights change: :func:`load` refuses directions of
other weights.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import replace
from pathlib import Path

from stllms import activations, generate, models, tasks, vectors
from stllms.annotate import stage
from stllms.config import RunConfig
from stllms.vectors import SteeringVectors

HERE = Path(__file__).parent
FILE = "vectors.safetensors"


def shipped(name: str) -> bool:
    """Whether directions ship for the embedded model ``name``."""
    return (HERE / name / FILE).is_file()


def load(name: str) -> SteeringVectors:
    """The shipped directions; ``ValueError`` if they were made for other weights."""
    found = SteeringVectors.load(HERE / name / FILE)
    if found.config.get("weights") != weights(name):
        raise ValueError(
            f"{name}/{FILE} was made for other weights than those beside it: make it again "
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


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m stllms.organism.directions", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", default="tiny-thinker", help="an embedded model")
    parser.add_argument("--profile", default="default", help="of stllms.run")
    parser.add_argument("--out", type=Path, help="file (default: beside the weights)")
    given = parser.parse_args(argv)
    config = RunConfig(model=given.model, profile=given.profile, device="cpu")
    if not config.embedded:
        parser.error(f"{config.model} is no embedded model: notebook 02 makes its directions")
    path = given.out or HERE / config.model / FILE
    made = build(config)
    made.save(path)
    spans = dict(zip(made.behaviours, made.counts.tolist(), strict=True))
    print(f"{path.name} {tuple(made.directions.shape)}; spans: {spans}")
    print("unavailable:", made.unavailable or "none")


if __name__ == "__main__":
    main()
