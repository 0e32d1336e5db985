"""Layer effects over responses: the file, curves, the best layer and how sure it is, ranks.

Effects are per response, ``[R, N, L]`` (made by :func:`stllms.attribution.collect`), NaN where
a response has no position for a behaviour. Nothing here touches a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor

from stllms import artifacts
from stllms.means import is_build
from stllms.metrics import bootstrap
from stllms.records import Annotation, Response

#: Whose spans the positions come from: the behaviour's (the text) or all others (published).
SETS: tuple[str, ...] = ("own", "others")
#: Responses with a behaviour that each half needs to choose a layer, or to confirm it.
LEAST = 2


@dataclass(frozen=True)
class LayerEffects:
    """Per-response effects: ``effects["<objective>/<own or others>"]`` is ``[R, N, L]``.

    NaN where a response has no position of that kind. Keys are sorted, as a file has them: a
    run that was stopped and one that was not make the same tables. ``directions`` is a hash of
    those that were measured, ``dtype`` the model's, ``fingerprints`` holds the
    :func:`fingerprint` of every response, ``ledger`` is :func:`ledger_of` all that was given.
    A file of an earlier version has none of the last three.
    """

    effects: dict[str, Tensor]
    response_ids: tuple[str, ...]
    behaviours: tuple[str, ...]
    model: str
    directions: str = ""
    dtype: str = ""
    fingerprints: tuple[str, ...] = ()
    ledger: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "effects", dict(sorted(self.effects.items())))

    def plus(self, response_id: str, mark: str, found: Mapping[str, Tensor]) -> LayerEffects:
        """With one more response: its fingerprint, its effects ``[N, L]`` under every key."""
        return replace(
            self,
            effects={k: torch.cat([v, found[k][None]]) for k, v in self.effects.items()},
            response_ids=(*self.response_ids, response_id),
            fingerprints=(*self.fingerprints, mark),
        )

    def first(self, n: int) -> LayerEffects:
        """Of the first ``n`` responses, or of all if there are fewer."""
        return replace(
            self,
            effects={key: values[:n] for key, values in self.effects.items()},
            response_ids=self.response_ids[:n],
            fingerprints=self.fingerprints[:n],
        )

    def of(self, key: str) -> np.ndarray:
        """The effects under ``key`` as an array ``[R, N, L]``; ``KeyError`` with those there
        are."""
        if key not in self.effects:
            there = ", ".join(self.effects) or "none"
            raise KeyError(f"no effects {key!r} were measured; there are {there}")
        return self.effects[key].numpy()

    def save(self, path: Path) -> None:
        """Safetensors; the other fields are metadata."""
        rest = {name: value for name, value in vars(self).items() if name != "effects"}
        artifacts.save_tensors(path, self.effects, rest)

    @classmethod
    def load(cls, path: Path) -> LayerEffects:
        """The inverse of :meth:`save`; ``artifacts.BadFile`` for a file of something else."""
        effects, metadata = artifacts.load_tensors(path)
        if not {"response_ids", "behaviours", "model"} <= set(metadata):
            raise artifacts.BadFile(
                f"{path}: no layer effects, but {', '.join(effects) or 'no tensors'}: "
                "choose another path"
            )
        shape = (len(metadata["response_ids"]), len(metadata["behaviours"]))
        for key, values in effects.items():
            if values.ndim != 3 or tuple(values.shape[:2]) != shape:
                raise artifacts.BadFile(
                    f"{path}: {key} has shape {tuple(values.shape)}, expected {shape} and "
                    "layers; delete the file"
                )
        return cls(
            effects,
            tuple(metadata["response_ids"]),
            tuple(metadata["behaviours"]),
            metadata["model"],
            metadata.get("directions", ""),
            metadata.get("dtype", ""),
            tuple(metadata.get("fingerprints", ())),
            metadata.get("ledger", {}),
        )

    def resume(self, path: Path | None, wanted: Sequence[str]) -> LayerEffects:
        """What ``path`` holds of the work of ``self`` on the responses with the fingerprints
        ``wanted``, else ``self``.

        It is the same work if model, dtype, directions, behaviours and keys are equal and the
        shorter of the two lists of fingerprints begins the longer one.

        Raises:
            artifacts.BadFile: a file of something else than layer effects.
        """
        if path is None or not path.is_file():
            return self
        found = self.load(path)
        begun = found.fingerprints[: len(wanted)] == tuple(wanted)[: len(found.response_ids)]
        same = begun and found._work == self._work
        return replace(found, ledger=self.ledger) if same else self

    @property
    def _work(self) -> tuple[object, ...]:
        return (self.model, self.dtype, self.directions, self.behaviours, tuple(self.effects))


def null_key(k: int) -> str:
    """The key of a random direction's exact effects at own spans."""
    return f"kl/own/random:{k}"


def fingerprint(response: Response, annotation: Annotation) -> str:
    """A hash of all that the effects of one response depend on: task, ids and spans."""
    ids = [*response.prompt_ids, *response.output_ids]
    places = [(span.label, span.start, span.end) for span in annotation.spans]
    return sha256(repr((response.task_id, ids, places)).encode()).hexdigest()[:16]


def measurable(
    responses: Sequence[Response], annotations: Sequence[Annotation]
) -> list[tuple[Response, Annotation]]:
    """The responses that have a usable span, each with its annotation.

    Raises ``ValueError`` for lists of different length, in another order, or a task twice.
    """
    if len(responses) != len(annotations):
        raise ValueError(f"{len(responses)} responses but {len(annotations)} annotations")
    pairs = list(zip(responses, annotations, strict=True))
    for response, annotation in pairs:
        if response.task_id != annotation.task_id:
            raise ValueError(
                f"the annotation of {annotation.task_id} stands at the response of "
                f"{response.task_id}: both lists should be in one order"
            )
    for task_id, times in Counter(response.task_id for response in responses).items():
        if times > 1:
            raise ValueError(f"{times} responses have task id {task_id}: give each task once")
    return [pair for pair in pairs if _usable(pair[1])]


def _usable(annotation: Annotation) -> bool:
    """Whether any span has a position ``t = s - 1`` with a token before it."""
    return any(span.start > 1 for span in annotation.spans)


def ledger_of(annotations: Sequence[Annotation]) -> dict[str, int]:
    """What can be measured of these annotations, and what cannot.

    ``responses`` and ``spans`` are those that can. A span at one of the first two tokens has
    no earlier position with a token before it.
    """
    starts = [span.start for annotation in annotations for span in annotation.spans]
    responses = sum(_usable(annotation) for annotation in annotations)
    late = sum(start > 1 for start in starts)
    return {
        "responses": responses,
        "responses without a usable span": len(annotations) - responses,
        "spans": late,
        "spans at the first two tokens": len(starts) - late,
    }


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


def beside_nulls(rows: pd.DataFrame, measured: LayerEffects) -> pd.DataFrame:
    """:func:`table` of exact effects at own spans with the columns ``null_low, null_high``:
    the range of the random directions' means, at the same layer, positions and responses."""
    keys = [key for key in measured.effects if _is_null(key)]
    if not keys:
        return rows.assign(null_low=np.nan, null_high=np.nan)
    chance = table({key: measured.of(key) for key in keys}, measured.behaviours)
    means = chance.groupby(["behaviour", "layer"])["mean"].agg(["min", "max"])
    means.columns = ["null_low", "null_high"]
    return rows.join(means, on=["behaviour", "layer"])


def _is_null(key: str) -> bool:
    return key.startswith(null_key(0)[:-1])


@dataclass(frozen=True)
class BestLayer:
    """The layer of the largest mean effect, chosen on one half of the responses.

    The half that chooses are the responses from which directions are built
    (:func:`stllms.means.is_build`), the other one confirms. ``rank_in_other_half`` is the
    layer's rank there (1 is the largest), ``support`` the share of bootstrap samples of all
    responses in which it is the largest, ``low`` and ``high`` the central 95 % of the largest
    layers in those samples.
    """

    behaviour: str
    layer: int
    rank_in_other_half: int
    support: float
    low: int
    high: int
    n: int


def best_layer(
    effects: np.ndarray,
    behaviour: str,
    response_ids: Sequence[str],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> BestLayer:
    """:class:`BestLayer` from effects ``[R, L]`` of the responses ``response_ids``.

    Raises ``ValueError`` where a half has fewer than two responses with the behaviour.
    """
    known, build = _known(effects, response_ids)
    if not _enough(build):
        raise ValueError(
            f"{behaviour}: {build.sum()} responses with effects in the build half and "
            f"{(~build).sum()} in the other, at least {LEAST} needed in each: measure more"
        )
    layer = int(known[build].mean(0).argmax())
    rng = np.random.default_rng(seed)
    samples = rng.integers(len(known), size=(draws, len(known)))
    peaks = np.array([known[sample].mean(0).argmax() for sample in samples])
    low, high = np.quantile(peaks, [0.025, 0.975], method="nearest")
    return BestLayer(
        behaviour=behaviour,
        layer=layer,
        rank_in_other_half=rank(known[~build].mean(0), layer),
        support=float((peaks == layer).mean()),
        low=int(low),
        high=int(high),
        n=len(known),
    )


def _known(effects: np.ndarray, response_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The responses with effects, and which of them are of the build half."""
    if len(effects) != len(response_ids):
        raise ValueError(f"{len(effects)} rows of effects but {len(response_ids)} response ids")
    known = ~np.isnan(effects).any(1)
    build = np.array([is_build(name) for name in response_ids], dtype=bool)
    return effects[known], build[known]


def _enough(build: np.ndarray) -> bool:
    return min(build.sum(), (~build).sum()) >= LEAST


def rank(values: np.ndarray, layer: int) -> int:
    """The rank of a layer's value among all layers, 1 for the largest."""
    return int((np.asarray(values) > values[layer]).sum()) + 1


def rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's correlation over the layers of mean curves ``[..., L]``: ``[...]``; NaN if one
    is flat or unknown."""
    ranks = [rankdata(lines, axis=-1) for lines in (first, second)]
    x, y = (rank - rank.mean(-1, keepdims=True) for rank in ranks)
    with np.errstate(invalid="ignore"):
        return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))


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


def agreement(
    measured: LayerEffects,
    reference: str,
    names: Sequence[str],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank correlation over the layers of every set's mean curve with that of ``reference``.

    Rows ``behaviour, set, value, low, high, n``. Both curves are of the ``n`` responses with
    effects in both sets; the central 95 % is over bootstrap samples of these responses, in
    which both curves are resampled together. A behaviour without effects in ``reference`` is
    left out; a value is NaN where no response has both, or a curve is flat.
    """
    rows = []
    base = measured.of(reference)
    others = [key for key in measured.effects if key != reference and not _is_null(key)]
    for name in [n for n in names if n in measured.behaviours]:
        place = measured.behaviours.index(name)
        if np.isnan(base[:, place]).any(1).all():
            continue
        for key in others:
            pair = np.stack([base[:, place], measured.of(key)[:, place]], axis=1)
            both = pair[~np.isnan(pair).any((1, 2))]
            rows.append((name, key, *_correlation(both, draws, seed), len(both)))
    return pd.DataFrame(rows, columns=["behaviour", "set", "value", "low", "high", "n"])


def _correlation(both: np.ndarray, draws: int, seed: int) -> tuple[float, float, float]:
    """Of the mean curves of two sets ``[R, 2, L]``: rank correlation and bootstrap interval."""
    value = rank_correlation(*both.mean(0)) if len(both) else np.nan
    if np.isnan(value):
        return (np.nan,) * 3
    n = len(both)
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    first, second = np.einsum("dr,rsl->sdl", times / n, both)
    low, high = np.nanquantile(rank_correlation(first, second), [0.025, 0.975])
    return float(value), float(low), float(high)


def best_layers(measured: LayerEffects, key: str, names: Sequence[str]) -> pd.DataFrame:
    """A :func:`best_layer` a behaviour, where two responses of each half have effects.

    The last layer is left out: only the head comes after it, so that a direction added there
    is a constant added to the logits, and no step of reasoning can follow from it.
    """
    rows = []
    for name in [n for n in names if n in measured.behaviours]:
        values = measured.of(key)[:, measured.behaviours.index(name), :-1]
        if _enough(_known(values, measured.response_ids)[1]):
            rows.append(vars(best_layer(values, name, measured.response_ids)))
    columns = list(BestLayer.__dataclass_fields__)
    return pd.DataFrame(rows, columns=columns)


def chosen_layers(best: pd.DataFrame, known: Mapping[str, int] | None) -> dict[str, int]:
    """The steering layers: those of the registry where the model has them, else the best."""
    if known:
        return dict(known)
    return {row["behaviour"]: int(row["layer"]) for _, row in best.iterrows()}
