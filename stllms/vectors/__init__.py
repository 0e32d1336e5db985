"""Directions of behaviours: difference of means, rescaled; cosines, controls and stability.

METHOD, section 6, with the mean over spans ``mean[b][l]`` and the mean over responses
``overall[l]``::

    direction[b][l] = (mean[b][l] - overall[l]) * ||overall[l]|| / ||mean[b][l] - overall[l]||

so that coefficient 1 adds a vector as long as the average residual at that layer. Every
estimator below is rescaled in the same way. A behaviour with fewer than
:data:`~stllms.means.MIN_SPANS` spans has no direction: it is not among ``.behaviours`` but in
``.unavailable``, so that no NaN ever reaches a figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from stllms import artifacts, released
from stllms.means import MIN_SPANS, PARTS, Means
from stllms.probes import logistic_directions
from stllms.records import BEHAVIOURS, CONTROLS, STEERED

ESTIMATORS: tuple[str, ...] = ("difference-of-means", "difference-from-others", "probe")
#: Those that need enough spans of other behaviours, too.
CONTRASTS: tuple[str, ...] = ("difference-from-others", "probe")
#: The kinds of the default controls, in turn.
MATCHED: tuple[str, ...] = ("shuffled", "covariance")
#: What may vary independently of what, for :func:`relative_error`.
UNITS: tuple[str, ...] = ("span", "part")


@dataclass(frozen=True)
class SteeringVectors:
    """Directions of ``N`` behaviours at ``L`` layers.

    ``directions`` and ``means`` ``[N, L, D]``, ``overall [L, D]``, float32; ``counts [N]``
    spans; ``unavailable``: behaviours with too few spans, and how many (on the rarer side of a
    contrast); ``left_out``: labels of a released file that are no behaviours, and their spans.
    """

    behaviours: tuple[str, ...]
    directions: Tensor
    means: Tensor
    overall: Tensor
    counts: Tensor
    model: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    unavailable: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.overall.ndim != 2:
            found = tuple(self.overall.shape)
            raise ValueError(f"overall should have shape [L, D], it has {found}")
        whole = (len(self.behaviours), *self.overall.shape)
        for name, shape in {"directions": whole, "means": whole, "counts": whole[:1]}.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ValueError(f"{name} should have shape {shape}, it has {found}")
        rows = zip(self.behaviours, self.directions, strict=True)
        broken = [name for name, row in rows if not row.isfinite().all()]
        if broken:
            raise ValueError(f"directions are not finite: {', '.join(broken)}")

    @property
    def n_layers(self) -> int:
        return self.overall.shape[0]

    def index(self, behaviour: str) -> int:
        """The row of a behaviour.

        Raises:
            KeyError: naming the spans it had, or the behaviours there are.
        """
        if behaviour in self.behaviours:
            return self.behaviours.index(behaviour)
        if behaviour in self.unavailable:
            sides = " on either side" if self.config.get("estimator") in CONTRASTS else ""
            raise KeyError(
                f"{behaviour!r} is unavailable: {self.unavailable[behaviour]} spans, "
                f"at least {self.config.get('min_spans', MIN_SPANS)} are needed{sides}"
            )
        raise KeyError(f"no direction of {behaviour!r}; there are {', '.join(self.behaviours)}")

    def direction(self, behaviour: str, layer: int) -> Tensor:
        """The direction of a behaviour at a layer, ``[D]``."""
        row = self.index(behaviour)
        if not 0 <= layer < self.n_layers:
            raise IndexError(f"layer {layer} is not in 0 .. {self.n_layers - 1}")
        return self.directions[row, layer]

    def save(self, path: str | Path) -> None:
        """Write as safetensors, everything that is no tensor in its metadata."""
        tensors = ("directions", "means", "overall", "counts")
        rest = ("behaviours", "model", "config", "unavailable", "left_out")
        artifacts.save_tensors(
            path,
            {name: getattr(self, name) for name in tensors},
            {name: getattr(self, name) for name in rest},
        )

    @classmethod
    def load(cls, path: str | Path) -> SteeringVectors:
        """The inverse of :meth:`save`, bit for bit; ``BadFile`` for a file of other tensors."""
        tensors, metadata = artifacts.load_tensors(path)
        if "behaviours" not in metadata or "directions" not in tensors:
            found = ", ".join(sorted(tensors))
            raise artifacts.BadFile(f"{path}: no directions of behaviours, but {found}")
        _check_stored(path, tensors, metadata)
        try:
            return cls(**tensors, **{**metadata, "behaviours": tuple(metadata["behaviours"])})
        except ValueError as error:  # shapes that differ, values that are not finite
            raise artifacts.BadFile(f"{path}: {error}") from None


def _check_stored(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Refuses a file that is not as :meth:`SteeringVectors.save` writes it: other names, or
    values of another kind; ``BadFile`` names the first."""
    kinds = {"behaviours": list, "model": str, "config": dict, "unavailable": dict}
    kinds["left_out"] = dict
    floats = dict.fromkeys(("directions", "means", "overall"), torch.float32)
    dtypes = {**floats, "counts": torch.int64}
    wrong = [name for name in dtypes if name not in tensors]
    wrong += [n for n, one in tensors.items() if n not in dtypes or one.dtype != dtypes[n]]
    wrong += [n for n, v in metadata.items() if not isinstance(v, kinds.get(n, ()))]
    names = metadata["behaviours"] if "behaviours" not in wrong else []
    if not all(isinstance(name, str) for name in names) or len({*map(str, names)}) < len(names):
        wrong.append("behaviours")
    for what in ("unavailable", "left_out"):
        counts = metadata.get(what, {}) if what not in wrong else {}
        wrong += [what for n in counts.values() if type(n) is not int][:1]
    if wrong:
        raise artifacts.BadFile(f"{path}: not written by stllms ({', '.join(wrong)})")


def difference_of_means(means: Means, *, min_spans: int = MIN_SPANS) -> SteeringVectors:
    """The paper's directions (formula above) from collected means."""
    return estimate(means, "difference-of-means", min_spans=min_spans)


def estimate(
    means: Means, estimator: str = "difference-of-means", *, min_spans: int = MIN_SPANS
) -> SteeringVectors:
    """Directions by a named estimator, all rescaled to ``||overall[l]||``. The last two need
    ``min_spans`` spans of other behaviours as well.

    * ``"difference-of-means"``: ``mean[b] - overall`` (the paper, METHOD section 6).
    * ``"difference-from-others"``: ``mean[b] - mean of the spans of all other behaviours``, as
      in contrastive activation addition (Rimsky et al. 2023, arXiv 2312.06681).
    * ``"probe"``: normal of a logistic regression of "span of b" on the span mean (Alain and
      Bengio 2016, arXiv 1610.01644; :mod:`stllms.probes`). It needs the span means themselves:
      ``activations.collect(..., keep=range(n_layers))``.

    Raises:
        ValueError: unknown estimator, no spans at all, nothing kept for the probe, or a
            direction of length zero.
    """
    counts = means.counts.sum(0)
    others = counts.sum() - counts
    fewest = torch.minimum(counts, others) if estimator in CONTRASTS else counts
    rows = [b for b in range(len(means.behaviours)) if int(fewest[b]) >= min_spans]
    mean, overall = means.mean(), means.overall()
    raw = differences(means, estimator, range(means.n_layers))
    names = means.behaviours
    available = tuple(names[b] for b in rows)
    return SteeringVectors(
        behaviours=available,
        directions=rescale(raw[rows], overall, available).float(),
        means=mean[rows].float(),
        overall=overall.float(),
        counts=counts[rows],
        model=means.model,
        config={
            **{name: value for name, value in means.config.items() if name != "controls"},
            "estimator": estimator,
            "min_spans": min_spans,
        },
        unavailable={names[b]: int(fewest[b]) for b in range(len(names)) if b not in rows},
    )


def differences(means: Means, estimator: str, layers: Sequence[int]) -> Tensor:
    """What :func:`estimate` rescales, ``[N, len(layers), D]`` float64; zero where there are no
    other spans to compare with. Its errors, too."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator {estimator!r} is not one of {', '.join(ESTIMATORS)}")
    layers = list(layers)
    if estimator == "probe":
        return logistic_directions(means, layers)
    mean = means.mean()[:, layers]
    if estimator == "difference-of-means":
        return mean - means.overall()[layers]
    counts = means.counts.sum(0)
    others = (counts.sum() - counts)[:, None, None]
    sums = means.sums[:, :, layers]
    rest = (sums.sum((0, 1)) - sums.sum(0)) / others.clamp(min=1)
    return torch.where(others > 0, mean - rest, 0.0)


def rescale(raw: Tensor, overall: Tensor, names: Sequence[Any]) -> Tensor:
    """``raw * ||overall|| / ||raw||`` over the last dimension; ``[N, L, D]``, ``[L, D]``.
    ``ValueError`` for a direction of length zero, by its name (``names [N]``) and layer."""
    lengths = raw.norm(dim=-1, keepdim=True)
    for row, layer, _ in (lengths == 0).nonzero().tolist():
        raise ValueError(f"direction of {names[row]} at layer {layer} has length zero")
    return raw * (overall.norm(dim=-1, keepdim=True) / lengths)


def load_published(path: str | Path, *, min_spans: int = MIN_SPANS) -> SteeringVectors:
    """Directions from a released ``mean_vectors_*.pt``: label -> ``{"mean": [L, D], "count"}``.

    Read with ``weights_only=True``: a file with code in it is refused. Means are used as they
    are; labels that are no behaviour are reported in ``.left_out``.

    Raises:
        artifacts.BadFile: missing, unsafe, of another structure, not finite or of length zero.
    """
    content = artifacts.load_torch(path)
    if not isinstance(content, Mapping):
        raise artifacts.BadFile(f"{path}: expected label -> {{'mean': [L, D], 'count': n}}")
    for label, entry in content.items():
        if not isinstance(label, str) or not _is_entry(entry):
            raise artifacts.BadFile(
                f"{path}: expected label -> {{'mean': [L, D], 'count': n}} at {label!r}"
            )
    if "overall" not in content:
        raise artifacts.BadFile(f"{path}: there is no 'overall' among {sorted(content)}")
    overall = content["overall"]["mean"].double()
    found = {label: int(entry["count"]) for label, entry in content.items()}
    known = [b for b in BEHAVIOURS if b in content]
    names = [b for b in known if found[b] >= min_spans]
    for b in ("overall", *names):
        found_shape, shape = (tuple(content[x]["mean"].shape) for x in (b, "overall"))
        if found_shape != shape:
            raise artifacts.BadFile(
                f"{path}: the mean of {b} has shape {found_shape}, that of 'overall' {shape}"
            )
        if not content[b]["mean"].float().isfinite().all():
            raise artifacts.BadFile(f"{path}: the mean of {b} is not finite")
    mean = torch.stack([overall, *(content[b]["mean"].double() for b in names)])[1:]
    try:
        directions = rescale(mean - overall, overall, names)
    except ValueError as error:
        raise artifacts.BadFile(f"{path}: {error}") from None
    return SteeringVectors(
        behaviours=tuple(names),
        directions=directions.float(),
        means=mean.float(),
        overall=overall.float(),
        counts=torch.tensor([found[b] for b in names]),
        model=Path(path).stem.removeprefix("mean_vectors_"),
        config={"source": Path(path).name, "min_spans": min_spans},
        unavailable={b: found.get(b, 0) for b in BEHAVIOURS if b not in names},
        left_out={k: n for k, n in found.items() if k not in (*BEHAVIOURS, "overall")},
    )


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, Mapping)
        and isinstance(entry.get("mean"), Tensor)
        and released.is_plain(entry["mean"])
        and entry["mean"].ndim == 2
        and entry["mean"].numel() > 0
        and type(entry.get("count")) is int
        and 0 <= entry["count"] < 2**63
    )


def cosines(steering_vectors: SteeringVectors, layers: Mapping[str, int]) -> Tensor:
    """Cosine similarity between directions, each at its own layer: ``[N, N]``.

    Rows and columns are the keys of ``layers`` in their order: behaviour -> layer.
    """
    rows = [steering_vectors.direction(b, layer) for b, layer in layers.items()]
    if not rows:
        return torch.zeros(0, 0)
    units = torch.nn.functional.normalize(torch.stack(rows).double(), dim=-1)
    return (units @ units.T).float()


def heatmap_layers(
    steering_vectors: SteeringVectors,
    steering_layers: Mapping[str, int],
    labels: Sequence[str],
) -> dict[str, int]:
    """The layer of each label for :func:`cosines`: its steering layer, that of backtracking
    for a label without one (METHOD, section 10); unavailable labels are left out."""
    default = steering_layers["backtracking"]
    available = [b for b in labels if b in steering_vectors.behaviours]
    return {b: steering_layers.get(b, default) for b in available}


def steering_layers(published: Mapping[str, int] | None, n_layers: int) -> dict[str, int]:
    """The layer each behaviour is steered at: the model's own (METHOD, section 8), else the
    middle layer for all, until layer effects choose one, and where they choose none."""
    return dict(published) if published else dict.fromkeys(STEERED, default_layer(n_layers))


def default_layer(n_layers: int) -> int:
    """The layer to steer at where nothing speaks for another one: the middle one."""
    return n_layers // 2


def max_cosine(directions: Tensor, matrix: Tensor, *, chunk: int = 16384) -> Tensor:
    """Largest cosine between a direction and any row of an (un)embedding, per layer.

    ``directions [N, L, D]``, ``matrix [V, D]`` -> ``[N, L]``; ``chunk`` rows of the matrix at a
    time. Rows of zeros (padding of the vocabulary) count as cosine 0.
    """
    mine, other = tuple(directions.shape), tuple(matrix.shape)
    if mine[-1] != other[-1]:
        raise ValueError(f"directions {mine} and matrix {other} differ in their last dimension")
    units = torch.nn.functional.normalize(directions.float(), dim=-1)
    best = torch.full(units.shape[:-1], -1.0)
    for rows in matrix.split(chunk):
        rows = torch.nn.functional.normalize(rows.float(), dim=-1)
        best = torch.maximum(best, (units @ rows.T).amax(-1))
    return best


def isotropic(overall: Tensor, n: int, seed: int) -> Tensor:
    """``n`` directions a layer, uniform on the sphere, as long as ``overall [L, D]`` there:
    ``[n, L, D]``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, *overall.shape, generator=generator)
    return rescale(noise.double(), overall.double(), range(n)).float()


def controls(kind: str, means: Means, n: int, *, seed: int = 0) -> Tensor:
    """``n`` control directions of a kind, as long as the behaviours' at each layer:
    ``[n, L, D]`` float32. They mean nothing, and each kind asks its own question of an effect
    (METHOD, section 13):

    * ``"shuffled"``: the formula above for one target behaviour, after the labels of the spans
      were permuted within each response. Would any spans of the same responses do as well?
      What all spans have in common against the whole text stays in these directions.
    * ``"covariance"``: ``sum_i e_i (m_i - m)`` over all span means ``m_i`` and their average
      ``m``, with independent random signs ``e_i``. Would any direction do along which spans
      differ?
    * ``"isotropic"``: uniform on the sphere. Would any vector of that length do? A weak
      opponent: of ``D`` dimensions few matter to the model, and it lies mostly in the others.

    Args:
        means: collected with ``controls=n`` or more (:func:`stllms.activations.collect`); the
            seed of the first two kinds is that of the collection.
        seed: of ``"isotropic"``.

    Raises:
        ValueError: another kind, fewer collected than asked for, or no span to make one from.
    """
    if kind not in CONTROLS:
        raise ValueError(f"controls {kind!r} are not one of {', '.join(CONTROLS)}")
    overall = means.overall()
    if kind == "isotropic":
        return isotropic(overall, n, seed)
    if n > len(means.signs):
        raise ValueError(
            f"{n} {kind} controls asked for, {len(means.signs)} were collected: collect "
            f"activations with controls={n}"
        )
    if kind == "shuffled":
        counts = dict(zip(means.behaviours, means.counts.sum(0).tolist(), strict=True))
        targets = means.config["controls"]["targets"]
        if not targets:
            raise ValueError(
                f"no behaviour has the {MIN_SPANS} spans that a shuffled control needs: label "
                "more responses"
            )
        spans = torch.tensor([counts[targets[i % len(targets)]] for i in range(n)])
        raw = means.shuffled[:n] / spans.clamp(min=1)[:, None, None] - overall
    else:
        middle = means.sums.sum((0, 1)) / means.counts.sum().clamp(min=1)
        raw = means.signed[:n] - means.signs[:n, None, None] * middle
    return rescale(raw, overall, [f"{kind}:{i}" for i in range(n)]).float()


@dataclass(frozen=True)
class Controls:
    """The control directions of a run: ``names [K]`` such as ``"shuffled:0"``, ``directions
    [K, L, D]`` float32, and in ``config`` how they were made."""

    names: tuple[str, ...]
    directions: Tensor
    config: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def first(self, n: int) -> Controls:
        """The first ``n``, or all if there are fewer; kinds alternate in a run's file."""
        return replace(self, names=self.names[:n], directions=self.directions[:n])

    def save(self, path: str | Path) -> None:
        """Write as safetensors, names and configuration in its metadata."""
        metadata = {"controls": self.names, "config": self.config}
        artifacts.save_tensors(path, {"directions": self.directions}, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Controls:
        """The inverse of :meth:`save`; ``BadFile`` for a file of something else, or for none
        (a run of an earlier version has none: its notebook 02 makes it)."""
        if not Path(path).is_file():
            raise artifacts.BadFile(
                f"{path}: there are no control directions, which notebook 02 makes in this "
                "version: execute it again"
            )
        tensors, metadata = artifacts.load_tensors(path)
        names = tuple(metadata.get("controls", ()))
        if set(tensors) != {"directions"} or len(names) != len(tensors["directions"]):
            found = ", ".join(sorted(tensors))
            raise artifacts.BadFile(f"{path}: no control directions, but {found}")
        return cls(names, tensors["directions"], metadata["config"])


def control_directions(means: Means, kind: str, n: int, *, seed: int = 0) -> Controls:
    """``n`` control directions of a run. ``kind`` is one of :func:`controls`, or ``"matched"``:
    shuffled and covariance in turn, so that any first few are of both. None, where no
    behaviour has spans enough for a direction: there is nothing to compare them with."""
    if not means.config.get("controls", {"targets": True})["targets"]:
        n = 0
    kinds = MATCHED if kind == "matched" else (kind,)
    each = [len(range(place, n, len(kinds))) for place in range(len(kinds))]
    made = [controls(k, means, m, seed=seed) for k, m in zip(kinds, each, strict=True) if m]
    names = [(kinds[i % len(kinds)], i // len(kinds)) for i in range(n)]
    rows = [made[i % len(kinds)][i // len(kinds)] for i in range(n)]
    directions = torch.stack(rows) if rows else torch.zeros(0, means.n_layers, means.width)
    return Controls(
        tuple(f"{name}:{i}" for name, i in names),
        directions,
        {"kind": kind, "seed": seed, **means.config.get("controls", {})},
    )


@dataclass(frozen=True)
class Stability:
    """Cosines between directions of disjoint responses, ``cosines [F, N, L]``; ``shares [F]``
    of the responses on the smaller side, ``counts [F, N]`` spans there."""

    behaviours: tuple[str, ...]
    shares: tuple[float, ...]
    counts: Tensor
    cosines: Tensor


def stability(means: Means, *, min_spans: int = MIN_SPANS) -> Stability:
    """Cosine of the direction from a share of the build half with that of the test half.

    Shares 1/8, 1/4 and 1/2 of all responses: the last is the split-half cosine, the growth
    shows whether more responses would help. Behaviours with fewer than ``min_spans`` spans in
    either half are left out; so is a share with fewer spans of one: its cosine is NaN.
    """
    half = PARTS // 2
    enough = torch.minimum(means.counts[:half].sum(0), means.counts[half:].sum(0)) >= min_spans
    rows = enough.nonzero().flatten().tolist()
    held_out = _units(means, slice(half, None), rows)
    sizes = (half // 4, half // 2, half)
    counts = torch.stack([means.counts[:size].sum(0)[rows] for size in sizes])
    units = torch.stack([_units(means, slice(size), rows) for size in sizes])
    cosines = (units * held_out).sum(-1)
    cosines[counts < min_spans] = torch.nan
    return Stability(
        tuple(means.behaviours[b] for b in rows),
        tuple(size / PARTS for size in sizes),
        counts,
        cosines.float(),
    )


def _units(means: Means, parts: slice, rows: list[int]) -> Tensor:
    """Unit differences of means from some parts, ``[rows, L, D]`` float64."""
    if not int(means.overall_counts[parts].sum()):
        return torch.zeros(len(rows), means.n_layers, means.width, dtype=torch.float64)
    raw = means.mean(parts)[rows] - means.overall(parts)
    return torch.nn.functional.normalize(raw, dim=-1)


def relative_error(means: Means, *, by: str = "span") -> Tensor:
    """Standard error ``e`` of ``mean[b][l] - overall[l]`` relative to its length, ``[N, L]``.

    * ``by="span"``: ``e^2 = sum_d var_d / n / ||mean - overall||^2`` from the second moments,
      as if spans were independent and ``overall`` known; too small where the spans of one
      response are alike.
    * ``by="part"``: ``e^2 = (H - 1) / H * sum_h ||x_h - average x||^2 / ||mean - overall||^2``
      with ``x_h`` the difference without part ``h``, a jackknife (Tukey 1958): a response is
      wholly in or out, and ``overall`` varies too.

    NaN with fewer than two spans, or two parts; ``ValueError`` for another unit.
    """
    if by not in UNITS:
        raise ValueError(f"an error is by {' or by '.join(UNITS)}, not by {by!r}")
    n = means.counts.sum(0)[:, None, None].double()
    mean = means.mean()
    if by == "part":
        squared = _jackknife(means)
    else:
        variance = (means.squares.sum(0) / n - mean**2).clamp(min=0) / (n - 1)
        squared = variance.sum(-1)
    squared[n[:, 0, 0] < 2] = torch.nan
    return (squared.sqrt() / (mean - means.overall()).norm(dim=-1)).float()


def _jackknife(means: Means) -> Tensor:
    """Squared standard error of differences of means, leaving out a part each: ``[N, L]``."""
    parts = means.overall_counts.nonzero().flatten().tolist()
    h = len(parts)
    if h < 2:
        return means.sums.new_full(means.sums.shape[1:3], torch.nan)
    rest = [[part for part in parts if part != out] for out in parts]
    found = torch.stack([means.mean(some) - means.overall(some) for some in rest])
    return (found - found.mean(0)).square().sum((0, -1)) * (h - 1) / h


def expected_cosine(error: Tensor) -> Tensor:
    """Cosine with the direction of unlimited data to expect at a relative error ``e``.

    Noise over many dimensions is about orthogonal to ``d``: the estimate ``x = d + noise`` has
    ``||x||^2 = ||d||^2 + ||noise||^2``, where ``||noise||^2`` is about ``e^2 ||x||^2``. So
    ``cos(x, d) = ||d|| / ||x|| = sqrt(1 - e^2)``; zero where ``e > 1``: noise alone is longer.
    """
    return (1 - error.square()).clamp(min=0).sqrt()


def precision(
    means: Means, layers: Mapping[str, int], *, min_spans: int = MIN_SPANS
) -> pd.DataFrame:
    """How far directions are from those of unlimited data: ``error by`` each unit (relative)
    and the ``cosine by`` it to expect, a row a behaviour of ``layers`` (behaviour -> layer);
    those with fewer than ``min_spans`` spans are left out."""
    errors = {by: relative_error(means, by=by) for by in UNITS}
    counts = dict(zip(means.behaviours, means.counts.sum(0).tolist(), strict=True))
    made = []
    for name, layer in layers.items():
        if counts.get(name, 0) >= min_spans:
            found = [errors[by][means.behaviours.index(name), layer] for by in UNITS]
            numbers = [float(x) for e in found for x in (e, expected_cosine(e))]
            made.append((name, layer, counts[name], *numbers))
    columns = [f"{what} by {by}" for by in UNITS for what in ("error", "cosine")]
    return pd.DataFrame(made, columns=["behaviour", "layer", "spans", *columns])
