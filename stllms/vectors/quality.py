"""How good directions are: separability, stability, precision, and what other ways of making
one give beside them.

What is measured on the *test* half of the responses is made from the *build* half
(:mod:`stllms.vectors.means`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from stllms import stats
from stllms.labels import CONTROLS
from stllms.vectors.estimators import differences
from stllms.vectors.means import HALVES, MIN_SPANS, PARTS, Means, random_halves

#: Estimators beside each other in :func:`table`, unless others are asked for.
ESTIMATORS: tuple[str, ...] = ("difference-of-means", "difference-from-others", "probe")
COLUMNS = ("behaviour", "layer", "direction", "quantity", "value", "low", "high")


# --- separability ------------------------------------------------------------------------


class Separability(NamedTuple):
    """How well the projection on a direction of the build half tells the spans of a behaviour
    from all others, on the spans of the test half: ``d_prime`` and ``auc``, ``[N, L]``."""

    behaviours: tuple[str, ...]
    d_prime: Tensor
    auc: Tensor


def separability(means: Means) -> Separability:
    """The d' and AUC of every behaviour and layer, held out.

    With projections ``x`` of the behaviour's own spans and ``y`` of all others, both of the
    test half: ``d' = (mean x - mean y) / sqrt((var x + var y) / 2)`` and ``AUC = P(x > y)``
    (ties count one half). Behaviours with fewer than :data:`MIN_SPANS` spans in either half,
    or fewer others to be told from, are left out, never NaN.
    """
    labels = means.projection_labels.numpy()
    build, test = (means.counts[half].sum(0) for half in HALVES.values())
    fewest = torch.stack([build, test, test.sum() - test]).amin(0)
    chosen = (fewest >= MIN_SPANS).nonzero().flatten().tolist()
    d_prime = np.zeros((len(chosen), means.n_layers))
    auc = np.zeros_like(d_prime)
    for row, b in enumerate(chosen):
        own = labels == b
        values = means.projections[:, :, b].numpy().astype(np.float64)
        x, y = values[own], values[~own]
        spread = np.sqrt((x.var(0, ddof=1) + y.var(0, ddof=1)) / 2)
        d_prime[row] = (x.mean(0) - y.mean(0)) / np.maximum(spread, 1e-30)
        auc[row] = stats.auc(values, own)
    names = tuple(means.behaviours[b] for b in chosen)
    return Separability(names, torch.from_numpy(d_prime).float(), torch.from_numpy(auc).float())


# --- stability and precision -------------------------------------------------------------


class Stability(NamedTuple):
    """Cosines between directions of disjoint responses, ``cosines [F, N, L]``; ``shares [F]``
    of the responses on the smaller side, ``counts [F, N]`` spans there."""

    shares: tuple[float, ...]
    counts: Tensor
    cosines: Tensor


def stability(means: Means) -> Stability:
    """Cosine of the direction from a share of the build half with that of the test half.

    Shares 1/8, 1/4 and 1/2 of all responses: the last is the split-half cosine, the growth
    shows whether more responses would help. The behaviours are those with a direction; NaN
    where one has fewer than :data:`MIN_SPANS` spans on either side.
    """
    rows = means.counts.sum(0) >= MIN_SPANS
    sizes = (PARTS // 8, PARTS // 4, PARTS // 2)
    counts = torch.stack([means.counts[:size].sum(0)[rows] for size in sizes])
    units = torch.stack([means.units(slice(size))[rows] for size in sizes])
    cosines = (units * means.units(HALVES["test"])[rows]).sum(-1)
    held_out = means.counts[HALVES["test"]].sum(0)[rows]
    cosines[torch.minimum(counts, held_out) < MIN_SPANS] = torch.nan
    return Stability(tuple(size / PARTS for size in sizes), counts, cosines.float())


def relative_errors(means: Means) -> dict[str, Tensor]:
    """Standard error ``e`` of ``mean[b][l] - overall[l]`` relative to its length, ``[N, L]``,
    by what is taken to vary independently.

    * ``"span"``: ``e^2 = sum_d var_d / n / ||mean - overall||^2`` from the second moments, as
      if spans were independent and ``overall`` known; too small where the spans of one
      response are alike.
    * ``"part"``: ``e^2 = (H - 1) / H * sum_h ||x_h - average x||^2 / ||mean - overall||^2``
      with ``x_h`` the difference without part ``h``, a jackknife (Tukey 1958): a response is
      wholly in or out, and ``overall`` varies too.

    NaN with fewer than two spans, or two parts.
    """
    n = means.counts.sum(0)[:, None, None].double()
    variance = (means.squares.sum(0) / n - means.mean() ** 2).clamp(min=0) / (n - 1)
    squared = {"span": variance.sum(-1), "part": _jackknife(means)}
    length = (means.mean() - means.overall()).norm(dim=-1)
    few = (n < 2).squeeze(-1)
    return {
        by: (error.sqrt() / length).masked_fill(few, torch.nan).float()
        for by, error in squared.items()
    }


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


def precision(means: Means, layers: Mapping[str, int]) -> pd.DataFrame:
    """How far directions are from those of unlimited data: ``error by`` each unit (relative)
    and the ``cosine by`` it to expect, one row per behaviour of ``layers`` (behaviour ->
    layer); those with fewer than :data:`MIN_SPANS` spans are left out."""
    errors = relative_errors(means)
    rows = []
    for name, layer in layers.items():
        b = means.behaviours.index(name)
        if (n := int(means.counts[:, b].sum())) >= MIN_SPANS:
            found = [error[b, layer] for error in errors.values()]
            numbers = [float(x) for e in found for x in (e, expected_cosine(e))]
            rows.append((name, layer, n, *numbers))
    columns = [f"{what} by {by}" for by in errors for what in ("error", "cosine")]
    return pd.DataFrame(rows, columns=["behaviour", "layer", "spans", *columns])


# --- beside other directions -------------------------------------------------------------


def table(
    means: Means,
    layers: Mapping[str, int],
    *,
    estimators: Sequence[str] = ESTIMATORS,
    draws: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """What every way of making a direction gives, at the layer where a behaviour is steered:
    one row per behaviour, direction and quantity. Behaviours with fewer than
    :data:`MIN_SPANS` spans in either half are left out.

    An AUC of .9 says little until one knows what a direction gives that means nothing. So
    ``estimators`` and the three kinds of control directions (:mod:`stllms.vectors.nulls`, drawn
    here from the span means) are made from the build half and measured on the test half:

    * ``AUC`` of the projection: a span of the behaviour lies further along it than another;
    * ``cosine`` with the difference of means of the test half. For the difference of means
      itself this is the split-half cosine ``r``: a yardstick for the others, no ceiling. Both
      its sides are noisy; a direction without noise would reach about ``sqrt(r)``;
    * ``length``: ``||mean - overall|| / ||overall||`` before rescaling, for means alone.

    Args:
        means: collected with ``keep=`` the layers asked for.
        layers: behaviour -> layer. Directions that have no other spans to compare with are
            left out.
        estimators: names of registered ones (:mod:`stllms.vectors.estimators`).
        draws: control directions of each kind; ``value`` is then their mean, ``low`` and
            ``high`` their central 95 %. Missing elsewhere.
        seed: of all of them.

    Raises:
        ValueError: an unknown estimator, or the span means of a layer were not kept.
    """
    build, test = means.half("build"), means.half("test")
    fewest = torch.minimum(build.counts.sum(0), test.counts.sum(0)).tolist()
    enough = [b for b, n in zip(means.behaviours, fewest, strict=True) if n >= MIN_SPANS]
    generator = torch.Generator().manual_seed(seed)
    rows: list[tuple] = []
    for layer in dict.fromkeys(at for b, at in layers.items() if b in enough):
        names = [b for b, at in layers.items() if at == layer and b in enough]
        estimated = {e: differences(build, e, [layer])[:, 0] for e in estimators}
        for name in names:
            b = means.behaviours.index(name)
            candidates = {e: raw[b, None] for e, raw in estimated.items() if raw[b].any()}
            candidates |= _controls(build, b, layer, draws, generator)
            for direction, raw in candidates.items():
                for quantity, values in _measure(direction, raw, test, b, layer).items():
                    rows.append((name, layer, direction, quantity, *_summary(values)))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _controls(
    build: Means, b: int, layer: int, draws: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """``[draws, D]`` of every kind, before rescaling."""
    x = build.at(layer)
    own, signs = _weights(build, b, draws, generator)
    noise = torch.randn(draws, build.width, generator=generator, dtype=torch.float64)
    shuffled = own @ x / own.sum(1, keepdim=True) - build.overall()[layer]
    return dict(zip(CONTROLS, (shuffled, signs @ (x - x.mean(0)), noise), strict=True))


def _weights(
    build: Means, b: int, draws: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``[draws, S]`` each: how much of a span counts as one of ``b`` in the shuffled controls,
    and its sign in those by covariance; made as a collection makes them."""
    if "pairs" in build.ledger:
        first = build.sample_labels == b
        pairs, place = build.sample_responses.unique(return_inverse=True)
        halves = [random_halves(len(pairs), draws, generator)[:, place] for _ in range(3)]
        swapped, *signs = halves
        return torch.where(first, 1 - swapped, swapped), 1 - 2 * torch.where(first, *signs)
    own = (_permuted(build, draws, generator) == b).double()
    signs = 1 - 2 * torch.randint(0, 2, own.shape, generator=generator).double()
    return own, signs


def _permuted(build: Means, draws: int, generator: torch.Generator) -> Tensor:
    """``[draws, S]``: the labels of the spans, permuted within each response. Spans lie in
    blocks of a response; random numbers below 1 on top of the block's number, sorted, permute
    each block within itself."""
    _, response = build.sample_responses.unique(return_inverse=True)
    blocks = response.argsort(stable=True)
    noise = torch.rand(draws, len(blocks), generator=generator, dtype=torch.float64)
    within = (noise + response[blocks]).argsort(1)
    labels = torch.empty(draws, len(blocks), dtype=torch.int64)
    labels[:, blocks] = build.sample_labels[blocks][within]
    return labels


def _measure(direction: str, raw: Tensor, test: Means, b: int, layer: int) -> dict[str, Tensor]:
    """The quantities of directions ``raw [K, D]`` on the test half, ``[K]`` each."""
    units = normalize(raw, dim=-1)
    own = (test.sample_labels == b).numpy()
    real = differences(test, "difference-of-means", [layer])[b, 0]
    found = {
        "AUC": torch.from_numpy(stats.auc((test.at(layer) @ units.T).numpy(), own)),
        "cosine": cosine_similarity(units, real[None], dim=-1),
    }
    if direction in ("difference-of-means", "shuffled"):
        found["length"] = raw.norm(dim=-1) / test.overall()[layer].norm()
    return found


def _summary(values: Tensor) -> tuple[float, float, float]:
    """Mean and central 95 % of draws; one value has no spread."""
    if len(values) == 1:
        return float(values[0]), float("nan"), float("nan")
    low, high = np.quantile(values.numpy(), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)
