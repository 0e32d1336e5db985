"""Released files -> arrays and tables, each file checked and named in every complaint.

What :mod:`stllms.published` draws and :mod:`stllms.ledger` cites is computed here. A label that
a file lacks, or has too little of, is left out and listed with the reason; a file that cannot
be read, or is not what its name says, raises ``BadFile``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from stllms import artifacts, compare, comparison, vectors
from stllms.artifacts import BadFile
from stllms.comparison import Member
from stllms.config import ModelEntry
from stllms.records import BEHAVIOURS, STEERED
from stllms.vectors import SteeringVectors

#: Layers 0-4, left out where the ledger asks for the peak behind the first layers.
EARLY = 5


# -- directions --------------------------------------------------------------------------


def read_vectors(path: Path) -> SteeringVectors:
    """:func:`vectors.load_published`, with every complaint naming the file."""
    try:
        found = vectors.load_published(path)
    except BadFile:
        raise
    except (RuntimeError, ValueError) as error:  # shapes that differ, values that are NaN
        raise BadFile(f"{path}: {str(error).splitlines()[0]}") from None
    _check_layers(path, found.n_layers)
    return found


def _check_layers(path: Path, n_layers: int) -> None:
    last = max((compare.entry_of(path).steering_layers or {"": 0}).values())
    if last >= n_layers:
        raise BadFile(f"{path}: {n_layers} layers, but the model is steered at layer {last}")


def left_out(found: SteeringVectors) -> dict[str, str]:
    """The labels of a file that have no direction here -> why."""
    least = found.config["min_spans"]
    few = {b: f"spans: {n}, at least {least} needed" for b, n in found.unavailable.items()}
    return few | {name: f"spans: {n}, no behaviour" for name, n in found.left_out.items()}


def labels(entry: ModelEntry, found: SteeringVectors) -> pd.DataFrame:
    """Every label of a file: its spans, and whether it has a direction here."""
    norms = found.overall.norm(dim=-1)
    spans = dict(zip(found.behaviours, found.counts.tolist(), strict=True))
    rows = [
        (entry.display, name, n, status)
        for status, group in (
            ("direction", spans),
            ("too few spans", found.unavailable),
            ("left out: no behaviour", found.left_out),
        )
        for name, n in group.items()
    ]
    made = pd.DataFrame(rows, columns=["model", "label", "spans", "status"])
    return made.assign(first_norm=float(norms[0]), last_norm=float(norms[-1]))


# -- layer effects -----------------------------------------------------------------------


@dataclass(frozen=True)
class Released:
    """Released layer effects: steered behaviour -> ``[responses, L]``; label -> why not."""

    effects: dict[str, np.ndarray]
    left_out: dict[str, str]


def read_effects(path: Path) -> Released:
    """The layer effects of the four steered behaviours, as far as the file has them."""
    content = {b: v.numpy() for b, v in artifacts.load_layer_effects(path).items()}
    content = {b: np.where(np.isfinite(v), v, np.nan) for b, v in content.items()}
    why = {name: "not in the file" for name in STEERED if name not in content}
    for name, values in content.items():
        if name not in STEERED:
            why[name] = "not steered"
        elif not len(_known(values)):
            why[name] = f"responses: {len(values)}, none without NaN"
    found = {name: content[name] for name in STEERED if name not in why}
    sizes = sorted({values.shape[1] for values in found.values()})
    if len(sizes) > 1:
        raise BadFile(f"{path}: behaviours differ in their number of layers {sizes}")
    for n_layers in sizes:
        _check_layers(path, n_layers)
    return Released(found, why)


def _known(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values).all(1)]


def n_responses(curves: pd.DataFrame) -> str:
    """``45``, or ``40 to 45`` where behaviours or layers differ; from ``effects.curve``."""
    low, high = int(curves["n"].min()), int(curves["n"].max())
    return str(low) if low == high else f"{low} to {high}"


def peaks(
    measured: Mapping[str, np.ndarray],
    steering_layers: Mapping[str, int] | None,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Peak layer and rank of the steering layer from effects ``[R, L]``, a row a behaviour.

    ``peak`` is the layer of the largest mean, ``late_peak`` that among layers from
    :data:`EARLY` on, ``rank`` that of the steering layer among all (1 is the largest; missing
    without a published layer), ``late_rank`` that from :data:`EARLY` on. ``*_low`` and
    ``*_high`` are central 95 % over bootstrap samples of the responses.
    """
    rows = []
    for name, values in measured.items():
        known = _known(values)
        samples = np.random.default_rng(seed).integers(len(known), size=(draws, len(known)))
        means = np.vstack([known.mean(0), known[samples].mean(1)])
        layer = None if steering_layers is None else steering_layers.get(name)
        row = {"behaviour": name, "n": len(known), "layers": known.shape[1]}
        for prefix, skip in (("", 0), ("late_", EARLY if known.shape[1] > EARLY else 0)):
            row |= _spread(f"{prefix}peak", means[:, skip:].argmax(1) + skip)
        row["steering_layer"] = np.nan if layer is None else layer
        for prefix, skip in (("", 0), ("late_", EARLY)):
            if layer is None or layer < skip:
                row |= dict.fromkeys((f"{prefix}rank{end}" for end in ENDS), np.nan)
            else:
                ranks = (means[:, skip:] > means[:, [layer]]).sum(1) + 1
                row |= _spread(f"{prefix}rank", ranks)
        rows.append(row)
    return pd.DataFrame(rows)


#: Endings of the columns that :func:`_spread` makes.
ENDS = ("", "_low", "_high")


def _spread(name: str, drawn: np.ndarray) -> dict[str, int]:
    """The value (first) and the central 95 % of its bootstrap samples (the rest)."""
    low, high = np.quantile(drawn[1:], [0.025, 0.975], method="nearest")
    return {name: int(drawn[0]), f"{name}_low": int(low), f"{name}_high": int(high)}


# -- comparison --------------------------------------------------------------------------


def read_counts(path: Path) -> list[dict[str, int]]:
    """The files' own ``label_counts``, one dictionary a chain, zeros left out."""
    counts = []
    for number, row in enumerate(artifacts.load_comparison(path)):
        stored = row["label_counts"]
        if not isinstance(row["annotated_response"], str):
            raise BadFile(f"{path}: chain {number}: annotated_response is no text")
        if not isinstance(stored, dict) or not all(type(n) is int for n in stored.values()):
            raise BadFile(f"{path}: chain {number}: label_counts is not label -> count")
        counts.append({label: n for label, n in stored.items() if n})
    return counts


def members(paths: Sequence[Path], treatment: str) -> list[Member]:
    """The models of released files under a treatment of METHOD section 11, in stable order."""
    reader = compare.READERS[treatment]
    return comparison.ordered([compare.of_released(path, reader) for path in paths])


def changes(
    published: Sequence[Member],
    sound: Sequence[Member],
    stored: Mapping[str, Sequence[Mapping[str, int]]],
) -> pd.DataFrame:
    """What the reader changes, a row a model: chains without segments, recovered, changed.

    ``equal_stored`` counts the chains whose published reading is exactly the file's own
    ``label_counts`` (``stored``, by display name).
    """
    rows = []
    for old, new in zip(published, sound, strict=True):
        counted = [
            {b: int(n) for b, n in zip(BEHAVIOURS, chain, strict=True) if n}
            for chain in old.counts
        ]
        equal = sum(a == b for a, b in zip(counted, stored[old.display], strict=True))
        empty = old.counts.sum(1) == 0
        rows.append(
            {
                "model": old.display,
                "kind": old.kind,
                "chains": len(counted),
                "equal_stored": equal,
                "empty_published": old.empty,
                "empty_sound": new.empty,
                "recovered": int((empty & (new.counts.sum(1) > 0)).sum()),
                "otherwise_changed": int(((old.counts != new.counts).any(1) & ~empty).sum()),
                "segments_published": old.counts.sum(1).mean(),
                "segments_sound": new.counts.sum(1).mean(),
            }
        )
    return pd.DataFrame(rows)
