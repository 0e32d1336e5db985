"""Layer effects over responses: positions, the file, curves, the best layer, ranks.

Effects are per response, ``[R, N, L]`` (made by :func:`stllms.attribution.collect`), NaN where
a response has no position for a behaviour. Nothing here touches a model.

**Relative to the null.** Any vector of a direction's length changes the next token, the more so
the longer it is: the absolute curve grows with the layers. So the steering layer is chosen by
``mean effect / mean effect of the control directions``, both at the same positions.
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

from stllms import artifacts, metrics
from stllms.means import is_build, mark
from stllms.metrics import bootstrap
from stllms.provenance import StaleArtefact
from stllms.records import Annotation, Response, is_control
from stllms.vectors import default_layer

#: Whose spans the positions come from: the behaviour's (the text) or all others (published).
SETS: tuple[str, ...] = ("own", "others")
#: The exact effects of a behaviour at the positions where control directions are measured.
PAIRED = "kl/own/paired"
#: Of how many sampled positions one is measured with the control directions too.
CONTROL_SHARE = 4
#: Responses with a behaviour that each half needs to choose a layer, or to confirm it.
LEAST = 2
#: Positions of one response: set (``own``, ``others``, ``controls``) -> behaviour -> positions.
Sample = dict[str, dict[str, tuple[int, ...]]]


@dataclass(frozen=True)
class LayerEffects:
    """Per-response effects: ``effects["<objective>/<own or others>"]`` is ``[R, N, L]``.

    NaN where a response has no position of that kind. Keys are sorted, as a file has them: a
    run that was stopped and one that was not make the same tables. ``directions`` is a hash of
    those that were measured, ``dtype`` the model's, ``fingerprints`` holds the
    :func:`fingerprint` of every response, ``ledger`` is :func:`ledger_of` all that was given,
    ``weights`` the checksum of the model's (:attr:`stllms.models.Model.identity`). A file of an
    earlier version has none of the last four.
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
            metadata.get("weights", ""),
        )

    def resume(self, path: Path | None, wanted: Sequence[str]) -> LayerEffects:
        """What ``path`` holds of the work of ``self`` on the responses with the fingerprints
        ``wanted``; ``self`` where there is no file.

        It is the same work if model, directions, behaviours and keys are equal and the shorter
        of the two lists of fingerprints begins the longer one.

        Raises:
            StaleArtefact: effects of other work, naming what is another one; the file stays.
            BadFile: a file of something else than layer effects.
        """
        if path is None or not path.is_file():
            return self
        found = self.load(path)
        begun = found.fingerprints[: len(wanted)] == tuple(wanted)[: len(found.response_ids)]
        other = [name for name, value in self._work.items() if found._work[name] != value]
        other += [] if begun else ["responses, spans or sample of positions"]
        if other:
            raise StaleArtefact(
                f"{path.name} was made with other {', '.join(other)}: --fresh of its notebook "
                f"makes it again; or move {path} away"
            )
        return replace(found, ledger=self.ledger)

    @property
    def _work(self) -> dict[str, object]:
        """What the effects depend on besides the responses, by name."""
        return {
            "model": self.model,
            "weights": self.weights,
            "dtype": self.dtype,
            "directions or controls": self.directions,
            "behaviours": self.behaviours,
            "objectives or controls": tuple(self.effects),
        }


def null_key(control: str) -> str:
    """The key of a control direction's exact effects at own spans."""
    return f"kl/own/{control}"


def fingerprint(response: Response, annotation: Annotation, sampled: Sample) -> str:
    """A hash of all that the effects of one response depend on: task, ids, spans and the
    positions that are measured."""
    ids = [*response.prompt_ids, *response.output_ids]
    places = [(span.label, span.start, span.end) for span in annotation.spans]
    return sha256(repr((response.task_id, ids, places, sampled)).encode()).hexdigest()[:16]


def sample(
    pairs: Sequence[tuple[Response, Annotation]],
    names: Sequence[str],
    n: int | None,
    *,
    seed: int = 0,
) -> list[Sample]:
    """Where the exact effects of each response are measured: ``n`` positions a behaviour and
    set over all responses (``None``: all positions), and for control directions the first
    :data:`CONTROL_SHARE`-th of its own ones.

    Responses take turns in a seeded order, each giving one of its positions, drawn without
    replacement, a turn. So every response has one before any has two, and the mean over
    responses of a response's mean stays what is estimated, with the least variance for ``n``.
    """
    found: list[Sample] = [{which: {} for which in (*SETS, "controls")} for _ in pairs]
    for which in SETS:
        for name in names:
            turns = _turns(pairs, name, which, seed)
            _put(found, which, name, turns[:n])
            if which == "own":
                few = None if n is None else max(1, n // CONTROL_SHARE)
                _put(found, "controls", name, turns[:few])
    return found


def _turns(pairs, name: str, which: str, seed: int) -> list[tuple[int, int]]:
    """(response, position) in the order in which they are taken."""
    turns = []
    for place, (response, annotation) in enumerate(pairs):
        rng = np.random.default_rng([seed, mark(f"{which}/{name}/{response.task_id}")])
        order = rng.random()
        mine = rng.permutation(metrics.positions(annotation.spans, name, which))
        turns += [(turn, order, place, int(t)) for turn, t in enumerate(mine)]
    return [(place, t) for _, _, place, t in sorted(turns)]


def _put(found: list[Sample], which: str, name: str, turns: Sequence[tuple[int, int]]) -> None:
    for place, one in enumerate(found):
        one[which][name] = tuple(sorted(t for at, t in turns if at == place))


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


def said(measured: LayerEffects) -> str:
    """How many responses and positions the exact effects are from, in a sentence."""
    n, most, few = (
        measured.ledger.get(name, 0)
        for name in (
            "responses",
            "positions a behaviour, own",
            "positions a behaviour, controls",
        )
    )
    text = f"{n} responses, up to {most} positions a behaviour"
    names = [key.rpartition("/")[2].partition(":")[0] for key in controls_of(measured)]
    if not names:
        return f"{text}."
    kinds = " and ".join(f"{names.count(kind)} {kind}" for kind in dict.fromkeys(names))
    return f"{text}; controls ({kinds}) at up to {few} of them."


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
    the range of what the control directions do at the same layer.

    Controls are measured at a part of the positions. What each does there, relative to the
    behaviour's own effect at the same positions, is taken times the mean effect at all of them
    (a ratio estimate): both sides are then of the same positions.
    """
    null = relative(measured, measured.behaviours).set_index(["behaviour", "layer"])
    null = null[["mean", "null_low", "null_high"]].rename(columns={"mean": "times"})
    made = rows.join(null.astype(float), on=["behaviour", "layer"])
    for name in ("null_low", "null_high"):
        made[name] *= made["mean"] / made["times"]
    return made.drop(columns="times")


def relative(
    measured: LayerEffects, names: Sequence[str], *, draws: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Per behaviour and layer the mean exact effect over the mean of the controls' mean
    effects, at the positions where both were measured.

    Columns of :func:`table`, and ``null_low, null_high``: the smallest and largest control on
    the same scale. The interval is over bootstrap samples of the responses, in which direction
    and controls are resampled together. No rows, where no control was measured.
    """
    parts = []
    for name in [n for n in names if n in measured.behaviours and controls_of(measured)]:
        own, null = _beside(measured, name)
        curve, lines = _relative(own, null)
        samples = _relative(own, null, _samples(len(own), draws, seed))[0]
        nothing = np.full(len(curve), np.nan)
        edges = np.quantile(samples, [0.025, 0.975], axis=0) if len(own) else (nothing, nothing)
        columns = {
            "set": "relative", "behaviour": name, "layer": np.arange(len(curve)), "mean": curve,
            "low": edges[0], "high": edges[1], "sd": np.nan, "n": len(own),
            "null_low": lines.min(0), "null_high": lines.max(0),
        }  # fmt: skip
        parts.append(pd.DataFrame(columns))
    columns = ["set", "behaviour", "layer", "mean", "low", "high", "sd", "n"]
    columns += ["null_low", "null_high"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def controls_of(measured: LayerEffects) -> list[str]:
    """The keys of the control directions that were measured."""
    return [key for key in measured.effects if _is_null(key)]


def _is_null(key: str) -> bool:
    return is_control(key.rpartition("/")[2])


def _beside(measured: LayerEffects, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Effects of a direction ``[R, L]`` and of the controls ``[K, R, L]`` at the same positions
    of the responses that have any."""
    place = measured.behaviours.index(name)
    own = measured.of(PAIRED)[:, place]
    null = np.stack([measured.of(key)[:, place] for key in controls_of(measured)])
    known = ~np.isnan(own).any(1)
    return own[known].astype(float), null[:, known].astype(float)


def _samples(n: int, draws: int, seed: int) -> np.ndarray:
    """How often each of ``n`` responses is in each bootstrap sample, ``[draws, n]``."""
    if not n:
        return np.zeros((0, 0))
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)


def _relative(
    own: np.ndarray, null: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """``[..., L]`` of the direction and ``[K, ..., L]`` of the controls, each over the mean of
    the controls; ``weights [..., R]`` of the responses, all alike unless given."""
    weights = np.ones(len(own)) if weights is None else weights
    with np.errstate(invalid="ignore", divide="ignore"):
        each = weights @ null
        middle = each.mean(0)
        return (weights @ own) / middle, each / middle


@dataclass(frozen=True)
class BestLayer:
    """The layer to steer a behaviour at, and why.

    ``peak`` is the layer of the largest effect, relative to the controls where these were
    measured, on the responses from which directions are built (:func:`is_build`); ``relative``
    is its value there. The other half confirms it: ``held_out`` is the value there,
    ``null_held_out`` that of the strongest control, ``rank_in_other_half`` the peak's rank (1
    is the largest). ``layer`` is the peak if it is confirmed, else the default; ``reason`` says
    which in words. ``support`` is the share of bootstrap samples of all responses in which the
    peak is the largest, ``low`` and ``high`` the central 95 % of the largest layers in those
    samples, ``n`` the number of responses.
    """

    behaviour: str
    layer: int
    reason: str
    peak: float
    relative: float
    held_out: float
    null_held_out: float
    rank_in_other_half: float
    support: float
    low: float
    high: float
    n: int


def best_layer(
    effects: np.ndarray,
    behaviour: str,
    response_ids: Sequence[str],
    null: np.ndarray | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> BestLayer:
    """:class:`BestLayer` from effects ``[R, L]`` of the responses ``response_ids``, and those
    of ``K`` control directions ``null [K, R, L]`` at the same positions.

    With controls a layer stands out if the direction does more there than every one of them on
    the held-out half; a direction like the controls would do so in one of ``K + 1`` cases.
    Without, the largest effect is taken as it is. With fewer than :data:`LEAST` responses in
    a half nothing is chosen: the default layer (:func:`stllms.vectors.default_layer`).
    """
    effects, build, known = _known(effects, response_ids)
    default = default_layer(effects.shape[1])
    fewest = f"{build.sum()} responses with effects in the build half and {(~build).sum()} in "
    if min(build.sum(), (~build).sum()) < LEAST:
        reason = f"default: {fewest}the other, at least {LEAST} needed in each"
        return BestLayer(behaviour, default, reason, *[np.nan] * 8, len(effects))
    flat = np.ones((1, *effects.shape)) if null is None else null[:, known]
    chooses, confirms = (_relative(effects[half], flat[:, half]) for half in (build, ~build))
    peak = int(chooses[0].argmax())
    curve, controls = confirms[0], confirms[1][:, peak]
    peaks = _relative(effects, flat, _samples(len(effects), draws, seed))[0].argmax(-1)
    low, high = np.quantile(peaks, [0.025, 0.975], method="nearest")
    beyond = int((controls >= curve[peak]).sum())
    layer, reason = peak, "largest effect; no controls were measured for it"
    if null is not None:
        held = f"{curve[peak]:.2f} times the mean control on held-out responses"
        layer = default if beyond else peak
        reason = f"stands out: layer {peak} has {held}, above all {len(null)}"
        if beyond:
            reason = (
                f"no layer stands out: the best, {peak}, has {held}, and {beyond} of "
                f"{len(null)} controls do as much; default"
            )
    return BestLayer(
        behaviour=behaviour,
        layer=layer,
        reason=reason,
        peak=peak,
        relative=float(chooses[0][peak]),
        held_out=float(curve[peak]),
        null_held_out=np.nan if null is None else float(controls.max()),
        rank_in_other_half=rank(curve, peak),
        support=float((peaks == peak).mean()),
        low=int(low),
        high=int(high),
        n=len(effects),
    )


def _known(
    effects: np.ndarray, response_ids: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The effects there are, which of them are of the build half, and of which responses."""
    if len(effects) != len(response_ids):
        raise ValueError(f"{len(effects)} rows of effects but {len(response_ids)} response ids")
    known = ~np.isnan(effects).any(1)
    build = np.array([is_build(name) for name in response_ids], dtype=bool)
    return effects[known].astype(float), build[known], known


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
    others = [key for key in measured.effects if key.count("/") == 1 and key != reference]
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
    """A :func:`best_layer` a behaviour. The effects ``kl/own`` are judged beside the controls
    that were measured with them, those of any other ``key`` without."""
    keys = controls_of(measured) if key == "kl/own" else []
    values = measured.of(PAIRED if keys else key)
    rows = []
    for name in [n for n in names if n in measured.behaviours]:
        at = measured.behaviours.index(name)
        null = np.stack([measured.of(k)[:, at] for k in keys]) if keys else None
        rows.append(vars(best_layer(values[:, at], name, measured.response_ids, null)))
    return pd.DataFrame(rows, columns=list(BestLayer.__dataclass_fields__))


def chosen_layers(best: pd.DataFrame, known: Mapping[str, int] | None) -> dict[str, int]:
    """The steering layers: those of the registry where the model has them, else the chosen."""
    if known:
        return dict(known)
    return {row["behaviour"]: int(row["layer"]) for _, row in best.iterrows()}


def reasons(best: pd.DataFrame) -> str:
    """Why each behaviour is steered at its layer, a line a behaviour."""
    lines = zip(best["behaviour"], best["layer"], best["reason"], strict=True)
    return "\n".join(f"{name}: layer {layer} ({reason})" for name, layer, reason in lines)
