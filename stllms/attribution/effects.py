"""Layer effects of a run: their file, curves, the best layer, agreement of objectives.

Effects are per response, ``[R, N, L]`` (made by :mod:`.collecting`), NaN where a response has
no position for a behaviour. Nothing here touches a model.

**Relative to the null.** Any vector of a direction's length changes the next token, the more so
the longer it is: the absolute curve grows with the layers. So the steering layer is chosen by
``mean effect / mean effect of the control directions``, both at the same positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from stllms.labels import PAPER, LabelSet, is_control
from stllms.records import Annotation
from stllms.runs.files import BadFile, load_tensors, save_tensors
from stllms.stats import bootstrap
from stllms.vectors.directions import default_layer
from stllms.vectors.means import is_build

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Whose spans the positions come from: the behaviour's (the text) or all others (published).
SETS: tuple[str, ...] = ("own", "others")
#: The exact effects of a behaviour at the positions where control directions are measured.
PAIRED = "kl/own/paired"
#: Responses with a behaviour that each half needs to choose a layer, or to confirm it.
LEAST = 2
#: A peak that no more than this share of bootstrap samples has is not taken.
STABLE = 0.5
#: Of a table of curves.
COLUMNS = ("set", "behaviour", "layer", "mean", "low", "high", "sd", "n")
#: Of the range of the controls in such a table.
NULLS = ("null_low", "null_high")


@dataclass(frozen=True, repr=False)
class LayerEffects:
    """Per-response effects: ``effects["<objective>/<own or others>"]`` is ``[R, N, L]``.

    NaN where a response has no position of that kind. Keys are sorted, as a file has them: a
    run that was stopped and one that was not make the same tables. ``directions`` is a hash of
    those that were measured, ``dtype`` the model's, ``fingerprints`` tell of every response
    what its effects depend on, ``ledger`` counts what was given, ``weights`` is the checksum of
    the model's.
    """

    effects: dict[str, Tensor]
    response_ids: tuple[str, ...]
    behaviours: tuple[str, ...]
    model: str
    directions: str = ""
    dtype: str = ""
    fingerprints: tuple[str, ...] = ()
    ledger: dict[str, int] = field(default_factory=dict)
    weights: str = ""

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

    def of(self, key: str) -> np.ndarray:
        """The effects under ``key`` as an array ``[R, N, L]``."""
        return self.effects[key].numpy()

    @property
    def controls(self) -> list[str]:
        """The keys of the control directions that were measured."""
        return [key for key in self.effects if is_control(key.rpartition("/")[2])]

    def __repr__(self) -> str:
        names, sets = ", ".join(self.behaviours), ", ".join(self._sets())
        return f"LayerEffects({names}; {sets}; {summary(self)})"

    def _sets(self) -> list[str]:
        """The keys of behaviours' own directions: objective and position set."""
        return [key for key in self.effects if key.count("/") == 1]

    def to_frame(self) -> pd.DataFrame:
        """:func:`table` of every objective and position set; where control directions were
        measured, their range stands beside the exact effects at own spans."""
        found = table({key: self.of(key) for key in self._sets()}, self.behaviours)
        if self.controls:
            own = found["set"] == "kl/own"
            found = _joined([beside_nulls(found[own], self), found[~own]], [*COLUMNS, *NULLS])
        return found

    def plot(self, key: str = "kl/own", labels: LabelSet = PAPER) -> list[Axes]:
        """A panel a behaviour: the mean effect at every layer and its interval; of ``kl/own``
        also the range of the controls where they were measured."""
        from matplotlib import pyplot  # these take seconds to import

        from stllms.plotting import axes

        if key not in self._sets():
            raise ValueError(f"no effects {key!r}; there are {', '.join(self._sets())}")
        rows = self.to_frame()
        rows = rows[rows["set"] == key]
        if not rows.get("null_low", rows["mean"]).notna().any():
            rows = rows.drop(columns=[*NULLS], errors="ignore")
        unit = "KL, nats" if key.startswith("kl/") else "surrogate gradient"
        with axes.styled():
            panels = axes.panels(pyplot.figure(figsize=(7, 2.3)), self.behaviours, sharey=True)
            axes.effect_panels(
                panels, rows, self.behaviours, label=unit, absent="not measured", labels=labels
            )
        return panels

    def save(self, path: Path) -> None:
        """Safetensors; the other fields are metadata."""
        rest = {name: value for name, value in vars(self).items() if name != "effects"}
        save_tensors(path, self.effects, rest)

    @classmethod
    def load(cls, path: Path) -> LayerEffects:
        """The inverse of :meth:`save`.

        Raises:
            BadFile: a file of something else.
        """
        effects, metadata = load_tensors(path)
        names = {name for name in cls.__dataclass_fields__ if name != "effects"}
        shape = [len(metadata.get(name, ())) for name in ("response_ids", "behaviours")]
        fits = (
            values.ndim == 3 and [*values.shape[:2]] == shape for values in effects.values()
        )
        if set(metadata) != names or not all(fits):
            there = ", ".join(effects) or "no tensors"
            raise BadFile(f"{path}: no layer effects, but {there}: move it away")
        lists = ("response_ids", "behaviours", "fingerprints")
        return cls(effects, **metadata | {name: tuple(metadata[name]) for name in lists})


def null_key(control: str) -> str:
    """The key of a control direction's exact effects at own spans."""
    return f"kl/own/{control}"


def summary(measured: LayerEffects) -> str:
    """How many responses and positions the exact effects are from, in a sentence."""
    sets = ("responses", "positions a behaviour, own", "positions a behaviour, controls")
    n, most, few = (measured.ledger.get(name, 0) for name in sets)
    text = f"{n} responses, up to {most} positions a behaviour"
    names = [key.rpartition("/")[2].partition(":")[0] for key in measured.controls]
    if not names:
        return f"{text}."
    kinds = " and ".join(f"{names.count(kind)} {kind}" for kind in dict.fromkeys(names))
    return f"{text}; controls ({kinds}) at up to {few} of them."


# --- curves ------------------------------------------------------------------------------


def curve(effects: np.ndarray) -> pd.DataFrame:
    """Per layer of one behaviour, from ``[R, L]``: mean, bootstrap interval, sd, responses.

    Responses are the units. The interval is the default band; ``mean -+ sd`` is the published
    one (method, section 10).
    """
    rows = []
    for layer, values in enumerate(effects.T):
        interval = bootstrap(values)
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
    return _joined(parts, COLUMNS)


def _joined(parts: Sequence[pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    if not parts:
        return pd.DataFrame(columns=list(columns))
    return pd.concat(parts, ignore_index=True)[list(columns)]


def relative(measured: LayerEffects, names: Sequence[str]) -> pd.DataFrame:
    """Per behaviour and layer the mean exact effect over the mean of the controls' mean
    effects, at the positions where both were measured.

    Columns of :func:`table`, and ``null_low, null_high``: the smallest and largest control on
    the same scale. The interval is over bootstrap samples of the responses, in which direction
    and controls are resampled together. No rows, where no control was measured.
    """
    parts = []
    for name in [n for n in names if n in measured.behaviours and measured.controls]:
        own, null = _with_controls(measured, PAIRED, name)
        known = ~np.isnan(own).any(1)
        own, null = own[known].astype(float), null[:, known].astype(float)
        mean, lines = _ratios(own, null)
        low = high = np.full(len(mean), np.nan)
        if len(own):
            samples = _ratios(own, null, _resampled(len(own)))[0]
            low, high = np.quantile(samples, [0.025, 0.975], axis=0)
        columns = {
            "set": "relative", "behaviour": name, "layer": np.arange(len(mean)), "mean": mean,
            "low": low, "high": high, "sd": np.nan, "n": len(own),
            "null_low": lines.min(0), "null_high": lines.max(0),
        }  # fmt: skip
        parts.append(pd.DataFrame(columns))
    return _joined(parts, (*COLUMNS, *NULLS))


def beside_nulls(rows: pd.DataFrame, measured: LayerEffects) -> pd.DataFrame:
    """:func:`table` of exact effects at own spans with the columns ``null_low, null_high``:
    the range of what the control directions do at the same layer.

    Controls are measured at a part of the positions. What each does there, relative to the
    behaviour's own effect at the same positions, is taken times the mean effect at all of them
    (a ratio estimate): both sides are then of the same positions.
    """
    null = relative(measured, measured.behaviours).set_index(["behaviour", "layer"])
    null = null[["mean", *NULLS]].rename(columns={"mean": "times"})
    joined = rows.join(null.astype(float), on=["behaviour", "layer"])
    for name in NULLS:
        joined[name] *= joined["mean"] / joined["times"]
    return joined.drop(columns="times")


def _with_controls(
    measured: LayerEffects, key: str, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Effects of a behaviour's direction ``[R, L]`` and of the controls ``[K, R, L]``."""
    place = measured.behaviours.index(name)
    null = [measured.of(control)[:, place] for control in measured.controls]
    return measured.of(key)[:, place], np.stack(null)


def _resampled(n: int, draws: int = 2000) -> np.ndarray:
    """How often each of ``n`` responses is in each bootstrap sample, ``[draws, n]``."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=draws)


def _ratios(
    own: np.ndarray, null: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """``[..., L]`` of the direction and ``[K, ..., L]`` of the controls, each over the mean of
    the controls; ``weights [..., R]`` of the responses, all alike unless given."""
    weights = np.ones(len(own)) if weights is None else weights
    with np.errstate(invalid="ignore", divide="ignore"):
        each = weights @ null
        middle = each.mean(0)
        return (weights @ own) / middle, each / middle


# --- the layer to steer at ---------------------------------------------------------------


class BestLayer(NamedTuple):
    """The layer to steer a behaviour at, and why.

    ``peak`` is the layer of the largest effect, relative to the controls where these were
    measured, on the responses from which directions are built (:func:`is_build`); ``relative``
    is its value there. The other half confirms it: ``held_out`` is the value there,
    ``null_held_out`` that of the strongest control, ``rank_in_other_half`` the peak's rank (1
    is the largest). ``layer`` is the peak if it is confirmed and stable, else the default;
    ``reason`` says which in words. ``support`` is the share of bootstrap samples of all
    responses in which the peak is the largest, ``low`` and ``high`` the central 95 % of the
    largest layers in those samples, ``n`` the number of responses.
    """

    behaviour: str
    layer: int
    reason: str
    peak: float = np.nan
    relative: float = np.nan
    held_out: float = np.nan
    null_held_out: float = np.nan
    rank_in_other_half: float = np.nan
    support: float = np.nan
    low: float = np.nan
    high: float = np.nan
    n: int = 0


def best_layer(
    effects: np.ndarray,
    behaviour: str,
    response_ids: Sequence[str],
    null: np.ndarray | None = None,
    *,
    draws: int = 2000,
) -> BestLayer:
    """:class:`BestLayer` from effects ``[R, L]`` of the responses ``response_ids``, and those
    of ``K`` control directions ``null [K, R, L]`` at the same positions.

    With controls a layer stands out if the direction does more there than every one of them on
    the held-out half; a direction like the controls would do so in one of ``K + 1`` cases. It
    is taken if, besides, most bootstrap samples of the responses have their peak there
    (:data:`STABLE`). Without controls the largest effect is taken as it is. With fewer than
    :data:`LEAST` responses in a half nothing is chosen: the default layer.
    """
    known = ~np.isnan(effects).any(1)
    build = np.array([is_build(name) for name in response_ids], dtype=bool)[known]
    effects = effects[known].astype(float)
    default = default_layer(effects.shape[1])
    if min(build.sum(), (~build).sum()) < LEAST:
        reason = (
            f"default: {build.sum()} responses with effects in the build half and "
            f"{(~build).sum()} in the other, at least {LEAST} needed in each"
        )
        return BestLayer(behaviour, default, reason, n=len(effects))
    flat = np.ones((1, *effects.shape)) if null is None else null[:, known]
    chooses, confirms = (_ratios(effects[half], flat[:, half]) for half in (build, ~build))
    peak = int(chooses[0].argmax())
    mean, controls = confirms[0], confirms[1][:, peak]
    peaks = _ratios(effects, flat, _resampled(len(effects), draws))[0].argmax(-1)
    low, high = np.quantile(peaks, [0.025, 0.975], method="nearest")
    support = float((peaks == peak).mean())
    value, beyond = mean[peak], int((controls >= mean[peak]).sum())
    held = f"{value:.2f} times the mean control on held-out responses"
    chosen = peak
    if null is None:
        reason = "largest effect; no controls were measured for it"
    elif beyond:
        chosen = default
        reason = (
            f"no layer stands out: the best, {peak}, has {held}, and {beyond} of "
            f"{len(controls)} controls do as much; default"
        )
    elif support <= STABLE:
        chosen = default
        reason = (
            f"no layer is stable: the best, {peak}, has {held}, above all {len(controls)}, but "
            f"is the best in {support:.0%} of resamples, which range from {low} to {high}; "
            "default"
        )
    else:
        reason = f"stands out: layer {peak} has {held}, above all {len(controls)}"
    return BestLayer(
        behaviour=behaviour,
        layer=chosen,
        reason=reason,
        peak=peak,
        relative=float(chooses[0][peak]),
        held_out=float(value),
        null_held_out=np.nan if null is None else float(controls.max()),
        rank_in_other_half=int((mean > mean[peak]).sum()) + 1,
        support=support,
        low=int(low),
        high=int(high),
        n=len(effects),
    )


def best_layers(measured: LayerEffects, key: str, names: Sequence[str]) -> pd.DataFrame:
    """One :func:`best_layer` per behaviour. The effects ``kl/own`` are judged beside the
    controls that were measured with them, those of any other ``key`` without."""
    rows = []
    for name in [n for n in names if n in measured.behaviours]:
        values, null = measured.of(key)[:, measured.behaviours.index(name)], None
        if key == "kl/own" and measured.controls:
            values, null = _with_controls(measured, PAIRED, name)
        rows.append(best_layer(values, name, measured.response_ids, null))
    return pd.DataFrame(rows, columns=list(BestLayer._fields))


def chosen_layers(
    best: pd.DataFrame, known: Mapping[str, int] | None, *, labels: LabelSet = PAPER
) -> dict[str, int]:
    """The steering layers: those of the registry for targets that the model has them for, else
    the chosen."""
    chosen = dict(zip(best["behaviour"], best["layer"].astype(int).tolist(), strict=True))
    own = {name: layer for name, layer in (known or {}).items() if name in labels.targets}
    both = chosen | own
    return {name: both[name] for name in labels.targets if name in both} if own else chosen


def reasons(best: pd.DataFrame) -> str:
    """Why each behaviour is steered at its layer, one line per behaviour."""
    lines = zip(best["behaviour"], best["layer"], best["reason"], strict=True)
    return "\n".join(f"{name}: layer {layer} ({reason})" for name, layer, reason in lines)


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


# --- agreement of objectives and position sets -------------------------------------------


def agreement(
    measured: LayerEffects, reference: str, names: Sequence[str], *, draws: int = 1000
) -> pd.DataFrame:
    """Rank correlation over the layers of every set's mean curve with that of ``reference``.

    Rows ``behaviour, set, value, low, high, n``. Both curves are of the ``n`` responses with
    effects in both sets; the central 95 % is over bootstrap samples of these responses, in
    which both curves are resampled together. A behaviour without effects in ``reference`` is
    left out; a value is NaN where no response has both, or a curve is flat.
    """
    rows = []
    base = measured.of(reference)
    others = [key for key in measured.effects if key.count("/") == 1 and key != reference]
    for name in [n for n in names if n in measured.behaviours]:
        place = measured.behaviours.index(name)
        if np.isnan(base[:, place]).any(1).all():
            continue
        for key in others:
            pair = np.stack([base[:, place], measured.of(key)[:, place]])
            both = pair[:, ~np.isnan(pair).any((0, 2))]
            rows.append((name, key, *_correlation(both, draws), both.shape[1]))
    return pd.DataFrame(rows, columns=["behaviour", "set", "value", "low", "high", "n"])


def _correlation(both: np.ndarray, draws: int) -> tuple[float, float, float]:
    """Spearman's correlation over the layers of the mean curves of two sets ``[2, R, L]``, and
    its bootstrap interval; NaN if one is flat or there are none."""
    n = both.shape[1]
    if not n:
        return (np.nan,) * 3
    weights = np.vstack([np.ones(n), _resampled(n, draws)]) / n
    first, second = (pd.DataFrame(weights @ one).rank(axis=1) for one in both)
    found = first.corrwith(second, axis=1)
    return found[0], *found[1:].quantile([0.025, 0.975])
