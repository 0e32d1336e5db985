"""Layer effects over responses: the file, curves, the best layer and how sure it is, ranks.

Effects are per response, ``[R, N, L]`` (made by :func:`stllms.attribution.collect`), NaN where
a response has no position for a behaviour. Nothing here touches a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor

from stllms import artifacts
from stllms.metrics import bootstrap
from stllms.records import Annotation

#: Whose spans the positions come from: the behaviour's (the text) or all others (published).
SETS: tuple[str, ...] = ("own", "others")


@dataclass(frozen=True)
class LayerEffects:
    """Per-response effects: ``effects["<objective>/<own or others>"]`` is ``[R, N, L]``.

    NaN where a response has no position of that kind. ``directions`` is a hash of those that
    were measured. Keys are sorted, as a file has them: a run that was stopped and one that was
    not make the same tables.
    """

    effects: dict[str, Tensor]
    response_ids: tuple[str, ...]
    behaviours: tuple[str, ...]
    model: str
    directions: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "effects", dict(sorted(self.effects.items())))

    def plus(self, response_id: str, found: dict[str, Tensor]) -> LayerEffects:
        """With one more response."""
        joined = {
            key: torch.cat([self.effects[key], found[key][None]])
            if key in self.effects
            else found[key][None]
            for key in found
        }
        return replace(self, effects=joined, response_ids=(*self.response_ids, response_id))

    def of(self, key: str) -> np.ndarray:
        """The effects under ``key`` as an array ``[R, N, L]``; ``KeyError`` with those there
        are."""
        if key not in self.effects:
            there = ", ".join(self.effects) or "none"
            raise KeyError(f"no effects {key!r} were measured; there are {there}")
        return self.effects[key].numpy()

    def save(self, path: Path) -> None:
        """Safetensors; the other fields are metadata."""
        artifacts.save_tensors(
            path,
            self.effects,
            {
                "response_ids": list(self.response_ids),
                "behaviours": list(self.behaviours),
                "model": self.model,
                "directions": self.directions,
            },
        )

    @classmethod
    def load(cls, path: Path) -> LayerEffects:
        """The inverse of :meth:`save`."""
        effects, metadata = artifacts.load_tensors(path)
        return cls(
            effects,
            tuple(metadata["response_ids"]),
            tuple(metadata["behaviours"]),
            metadata["model"],
            metadata.get("directions", ""),
        )

    def resume(
        self, path: Path | None, keys: Sequence[str], wanted: Sequence[str]
    ) -> LayerEffects:
        """What ``path`` holds if it began the work of ``self`` (behaviours, model, directions)
        on the responses ``wanted``, else ``self``."""
        if path is None or not path.is_file():
            return self
        found = self.load(path)
        ids = list(found.response_ids)
        same = replace(found, effects={}, response_ids=()) == self
        fits = set(found.effects) == set(keys) and ids == list(wanted)[: len(ids)]
        return found if same and fits else self


def curve(effects: np.ndarray, *, seed: int = 0) -> pd.DataFrame:
    """Per layer of one behaviour, from ``[R, L]``: mean, bootstrap interval, sd, responses.

    Responses are the units. The interval is the default band; ``mean -+ sd`` is the published
    one (METHOD, section 10).
    """
    rows = []
    for layer in range(effects.shape[1]):
        values = effects[:, layer]
        interval = bootstrap(values, seed=seed)
        known = values[~np.isnan(values)]
        sd = float(known.std(ddof=0)) if len(known) else np.nan
        rows.append((layer, interval.value, interval.low, interval.high, sd, interval.n))
    return pd.DataFrame(rows, columns=["layer", "mean", "low", "high", "sd", "n"])


def table(effects: Mapping[str, np.ndarray], behaviours: Sequence[str]) -> pd.DataFrame:
    """:func:`curve` of every behaviour of every set, with ``set`` and ``behaviour`` columns."""
    parts = [
        curve(values[:, row]).assign(set=name, behaviour=behaviour)
        for name, values in effects.items()
        for row, behaviour in enumerate(behaviours)
    ]
    columns = ["set", "behaviour", "layer", "mean", "low", "high", "sd", "n"]
    if not parts:
        return pd.DataFrame(columns=columns)
    return pd.concat(parts, ignore_index=True)[columns]


@dataclass(frozen=True)
class BestLayer:
    """The layer of the largest mean effect, chosen on one half of the responses.

    ``rank_in_other_half`` is its rank there (1 is the largest), ``support`` the share of
    bootstrap samples of all responses in which it is the largest, ``low`` and ``high`` the
    central 95 % of the largest layers in those samples.
    """

    behaviour: str
    layer: int
    rank_in_other_half: int
    support: float
    low: int
    high: int
    n: int


def best_layer(
    effects: np.ndarray, behaviour: str, *, draws: int = 2000, seed: int = 0
) -> BestLayer:
    """:class:`BestLayer` from effects ``[R, L]``; even responses choose, odd ones confirm.

    Raises ``ValueError`` with fewer than four responses that have the behaviour.
    """
    known = effects[~np.isnan(effects).any(1)]
    if len(known) < 4:
        raise ValueError(f"{behaviour}: {len(known)} responses with effects, at least 4 needed")
    choose, confirm = known[::2].mean(0), known[1::2].mean(0)
    layer = int(choose.argmax())
    rng = np.random.default_rng(seed)
    samples = rng.integers(len(known), size=(draws, len(known)))
    peaks = np.array([known[sample].mean(0).argmax() for sample in samples])
    low, high = np.quantile(peaks, [0.025, 0.975], method="nearest")
    return BestLayer(
        behaviour=behaviour,
        layer=layer,
        rank_in_other_half=rank(confirm, layer),
        support=float((peaks == layer).mean()),
        low=int(low),
        high=int(high),
        n=len(known),
    )


def rank(values: np.ndarray, layer: int) -> int:
    """The rank of a layer's value among all layers, 1 for the largest."""
    return int((np.asarray(values) > values[layer]).sum()) + 1


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's correlation over the layers of two mean curves ``[L]``; NaN if one is flat
    or unknown."""
    flat = [np.isnan(line).any() or np.ptp(line) == 0 for line in (first, second)]
    return float("nan") if any(flat) else float(spearmanr(first, second).statistic)


def how_many(
    annotations: Sequence[Annotation], names: Sequence[str], *, least: int = 50, each: int = 20
) -> int:
    """How many responses, from the first on, to measure: the paper's 50, and more until each
    of ``names`` occurs in ``each`` of them; all, where one of them never does so often."""
    seen = dict.fromkeys(names, 0)
    for n, annotation in enumerate(annotations):
        if n >= least and all(count >= each for count in seen.values()):
            return n
        for name in {span.label for span in annotation.spans} & set(names):
            seen[name] += 1
    return len(annotations)


def agreement(measured: LayerEffects, reference: str, names: Sequence[str]) -> pd.DataFrame:
    """Rank correlation over the layers of every set's mean curve with that of ``reference``.

    One row a behaviour, one column a set; a behaviour without effects is left out.
    """
    rows = []
    for name in [n for n in names if n in measured.behaviours]:
        place = measured.behaviours.index(name)
        means = {key: _mean_curve(measured.of(key)[:, place]) for key in measured.effects}
        if np.isnan(means[reference]).any():
            continue
        row = {key: rank_correlation(means[reference], line) for key, line in means.items()}
        rows.append({"behaviour": name, **{k: v for k, v in row.items() if k != reference}})
    return pd.DataFrame(rows)


def _mean_curve(effects: np.ndarray) -> np.ndarray:
    known = effects[~np.isnan(effects).any(1)]
    return known.mean(0) if len(known) else np.full(effects.shape[1], np.nan)


def best_layers(measured: LayerEffects, key: str, names: Sequence[str]) -> pd.DataFrame:
    """:func:`best_layer` of every behaviour that has effects in at least four responses.

    The last layer is left out: only the head comes after it, so that a direction added there
    is a constant added to the logits, and no step of reasoning can follow from it.
    """
    rows = []
    for name in [n for n in names if n in measured.behaviours]:
        values = measured.of(key)[:, measured.behaviours.index(name), :-1]
        if (~np.isnan(values).any(1)).sum() >= 4:
            rows.append(vars(best_layer(values, name)))
    columns = list(BestLayer.__dataclass_fields__)
    return pd.DataFrame(rows, columns=columns)


def chosen_layers(best: pd.DataFrame, known: Mapping[str, int] | None) -> dict[str, int]:
    """The steering layers: those of the registry where the model has them, else the best."""
    if known:
        return dict(known)
    return {row["behaviour"]: int(row["layer"]) for _, row in best.iterrows()}
