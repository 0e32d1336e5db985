"""Intervals, tests and areas that every stage uses: on scipy and statsmodels."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Interval:
    """A mean with a percentile bootstrap interval over ``n`` units (tasks, responses)."""

    value: float
    low: float
    high: float
    n: int


def bootstrap(
    values: ArrayLike, *, draws: int = 4000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean and percentile bootstrap interval of values (Efron 1979); NaN is left out.

    No value at all gives NaN, one value an interval of no width.
    """
    from scipy import stats

    known = np.asarray(values, dtype=float)
    known = known[~np.isnan(known)]
    if len(known) < 2:
        value = float(known[0]) if len(known) else float("nan")
        return Interval(value, value, value, len(known))
    found = stats.bootstrap(
        (known,),
        np.mean,
        n_resamples=draws,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(known.mean()), float(found.low), float(found.high), len(known))


def resamples(names: Sequence[str], *, draws: int, seed: int) -> np.ndarray:
    """How often each unit is in each bootstrap sample, ``[draws, len(names)]``; rows sum to n.

    A function of the seed and of the set of names alone: in another order the columns are in
    that order, and a name has the same samples beside the same other names wherever it occurs.
    """
    order = sorted(names)
    key = hashlib.sha256(json.dumps(order).encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(key, "little")])
    n = len(order)
    if not n:
        return np.zeros((draws, 0), int)
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=draws)
    place = {name: i for i, name in enumerate(order)}
    return drawn[:, [place[name] for name in names]]


def sign_flip(differences: ArrayLike, *, draws: int = 9999, seed: int = 0) -> float:
    """Two-sided p-value that the mean of paired differences is zero, by flipping signs.

    Fisher's randomisation test: exact up to 13 pairs, else from ``draws`` random flips with
    the observed one counted in (Phipson and Smyth 2010). NaN is left out; no pair gives NaN.
    Not :func:`scipy.stats.permutation_test`, whose random flips are other ones, so that
    published p-values would change.
    """
    d = np.asarray(differences, dtype=float)
    d = d[~np.isnan(d)]
    if not len(d):
        return float("nan")
    # Equal means differ by rounding, which grows with the values.
    observed = abs(d.mean()) - 1e-12 * abs(d).max()
    exact = len(d) <= 13
    if exact:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(d))))
    else:
        signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(draws, len(d)))
    extreme = abs(signs @ d / len(d)) >= observed
    return float(extreme.mean() if exact else (extreme.sum() + 1) / (draws + 1))


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's step-down adjustment of p-values (Holm 1979); NaN stays NaN and is not counted."""
    from statsmodels.stats.multitest import multipletests

    p = np.asarray(p_values, dtype=float)
    known = ~np.isnan(p)
    adjusted = np.full_like(p, np.nan)
    if known.any():
        adjusted[known] = multipletests(p[known], method="holm")[1]
    return adjusted


def auc(values: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Area under the ROC curve ``P(x > y)``, ties one half, of every column.

    ``values [S, ...]`` and a mask ``own [S]`` of the units ``x``, all others being ``y``
    (Mann and Whitney 1947). NaN without one of the two.
    """
    from scipy import stats

    if own.all() or not own.any():
        return np.full(values.shape[1:], np.nan)
    found = stats.mannwhitneyu(values[own], values[~own], axis=0, method="asymptotic")
    return np.asarray(found.statistic / (own.sum() * (~own).sum()))
