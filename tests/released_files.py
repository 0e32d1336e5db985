"""Files of the form of the authors' released ones, written by the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stllms.labels import PAPER
from stllms.registry import MODELS

MODEL = "deepseek-r1-distill-qwen-1.5b"
PLACES = {
    "mean_vectors": f"mean_vectors_{MODEL}.pt",
    "layer_effects": f"layer_effects_{MODEL}.pt",
    "comparison": f"reasoning_comparison_{MODEL}.json",
}
#: Hub names of the ten models that the comparison knows, thinking and instruct by turns.
NAMES = [
    entry.hub_id.split("/")[-1].lower()
    for entry in MODELS.values()
    if entry.hub_id and entry.of_paper
]


def mean_vectors(layers: int = 28, width: int = 8, **counts: int) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    names = {"overall": 500, **dict.fromkeys(PAPER.names, 40), **counts}
    return {
        name: {"mean": torch.randn(layers, width, generator=rng), "count": n}
        for name, n in names.items()
    }


def layer_effects(layers: int = 28, responses: int = 9) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {b: rng.uniform(size=(responses, layers)).tolist() for b in PAPER.targets}


def chain(tag: str = '["{}"]', **counts: int) -> dict[str, Any]:
    """A chain with so many segments; ``label_counts`` sees tags without a number only."""
    named = {b: counts.get(b.replace("-", "_"), 0) for b in PAPER.names}
    markup = "".join(f'{tag.format(b)} text ["end-section"]' * n for b, n in named.items())
    stored = {b: n for b, n in named.items() if n and "0" not in tag}
    return {
        "response": "text",
        "thinking_process": "text",
        "label_counts": stored,
        "annotated_response": markup,
    }


def chains(n: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    keys = [b.replace("-", "_") for b in PAPER.names]
    counts = rng.integers(0, 4, (n, 6)).tolist()
    return [chain(**dict(zip(keys, row, strict=True))) for row in counts]


def write_comparison(folder: Path, model: str, rows: Any) -> Path:
    path = folder / f"reasoning_comparison_{model}.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def write_folder(folder: Path) -> Path:
    """One file of every kind of :data:`MODEL`."""
    folder.mkdir()
    torch.save(mean_vectors(summarizing=1), folder / PLACES["mean_vectors"])
    torch.save(layer_effects(), folder / PLACES["layer_effects"])
    write_comparison(folder, MODEL, chains())
    return folder


def lacking(content: dict[str, Any], name: str) -> dict[str, Any]:
    """Without one label."""
    return {key: value for key, value in content.items() if key != name}
