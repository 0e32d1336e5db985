"""Files of the form of the authors' released ones, written by the tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from stllms.config import MODELS
from stllms.records import BEHAVIOURS, STEERED

MODEL = "deepseek-r1-distill-qwen-1.5b"
PLACES = {
    "mean_vectors": f"mean_vectors_{MODEL}.pt",
    "layer_effects": f"layer_effects_{MODEL}.pt",
    "comparison": f"reasoning_comparison_{MODEL}.json",
}
#: Names of models that the comparison knows.
NAMES = [
    entry.hub_id.split("/")[-1].lower()
    for entry in MODELS.values()
    if entry.hub_id and entry.kind != "unknown"
]


def mean_vectors(layers: int = 28, width: int = 8, **counts: int) -> dict:
    rng = torch.Generator().manual_seed(0)
    names = {"overall": 500, **dict.fromkeys(BEHAVIOURS, 40), **counts}
    return {
        name: {"mean": torch.randn(layers, width, generator=rng), "count": n}
        for name, n in names.items()
    }


def layer_effects(layers: int = 28, responses: int = 9) -> dict:
    rng = np.random.default_rng(0)
    return {b: rng.uniform(size=(responses, layers)).tolist() for b in STEERED}


def chains(n: int = 6, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        counts = {b: int(k) for b, k in zip(BEHAVIOURS, rng.integers(0, 4, 6), strict=True)}
        markup = "".join(f'["{b}"] text ["end-section"]' * k for b, k in counts.items())
        rows.append(
            {
                "response": "text",
                "thinking_process": "text",
                "label_counts": {b: k for b, k in counts.items() if k},
                "annotated_response": markup,
            }
        )
    return rows


def write_comparison(folder: Path, model: str, rows: list[dict]) -> Path:
    path = folder / f"reasoning_comparison_{model}.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def write_folder(made: Path) -> Path:
    """One file of every kind of :data:`MODEL`."""
    made.mkdir()
    torch.save(mean_vectors(summarizing=1), made / PLACES["mean_vectors"])
    torch.save(layer_effects(), made / PLACES["layer_effects"])
    write_comparison(made, MODEL, chains())
    return made


def lacking(made: dict, name: str) -> dict:
    """Without one label."""
    return {key: value for key, value in made.items() if key != name}
