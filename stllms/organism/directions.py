"""The directions that ship with the embedded thinking model (made by training/directions.py)."""

from __future__ import annotations

import hashlib
from pathlib import Path

from stllms.fixtures import FOLDER as HERE
from stllms.vectors import SteeringVectors


def file(name: str) -> Path:
    """The directions of the embedded model ``name``, beside its folder."""
    return HERE / f"{name}.vectors.safetensors"


def shipped(name: str) -> bool:
    """Whether directions ship for the embedded model ``name``."""
    return file(name).is_file()


def load(name: str) -> SteeringVectors:
    """The shipped directions; ``ValueError`` if they were made for other weights."""
    found = SteeringVectors.load(file(name))
    if found.config.get("weights") != weights(name):
        raise ValueError(
            f"{file(name).name} was made for other weights than those of {name}: make it again "
            "with python training/directions.py"
        )
    return found


def weights(name: str) -> str:
    """Twelve hex digits of a hash of the weights of an embedded model."""
    content = (HERE / name / "model.safetensors").read_bytes()
    return hashlib.sha256(content).hexdigest()[:12]
