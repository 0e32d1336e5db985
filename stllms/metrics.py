"""The named fractions, position sets, coherence, intervals and tests.

Two different shares go by "fraction" in the published scripts; here they have names:

* **token fraction** (steering, METHOD section 8): the share of a behaviour's tokens among the
  tokens of the four steered behaviours;
* **segment fraction** (comparison, section 9): the share of a label's segments among all six.

A chain without any segment has no fraction. It is set apart as NaN (``empty="apart"``, the
default) or counts as zeros (``"published"``); a chain with segments but none of the four
steered behaviours has token fractions of zero. A chain whose annotation failed is unknown:
always NaN.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stllms.records import BEHAVIOURS, STEERED, Annotation, TokenSpan

EMPTY = ("apart", "published")


def token_fractions(
    annotations: Sequence[Annotation],
    behaviours: Sequence[str] = STEERED,
    *,
    empty: str = "apart",
) -> np.ndarray:
    """Token fraction of every behaviour in every chain, ``[chains, N]``.

    Needs annotations with token spans. Raises ``ValueError`` for an unknown ``empty``.
    """
    sizes = np.array(
        [
            [sum(s.end - s.start for s in a.spans if s.label == b) for b in behaviours]
            for a in annotations
        ],
        dtype=float,
    ).reshape(len(annotations), len(behaviours))
    shares = _share(sizes, [bool(a.spans) for a in annotations], empty)
    shares[[a.failed is not None for a in annotations]] = np.nan
    return shares


def segment_counts(
    annotations: Sequence[Annotation], behaviours: Sequence[str] = BEHAVIOURS
) -> np.ndarray:
    """Segments of every behaviour in every chain, ``[chains, N]``."""
    counted = [Counter(segment.label for segment in a.segments) for a in annotations]
    return np.array([[c[b] for b in behaviours] for c in counted], dtype=float).reshape(
        len(annotations), len(behaviours)
    )


def segment_fractions(counts: np.ndarray, *, empty: str = "apart") -> np.ndarray:
    """Segment fractions from counts, ``[chains, N]`` -> ``[chains, N]``."""
    return _share(np.asarray(counts, dtype=float), np.asarray(counts).sum(1) > 0, empty)


def _share(sizes: np.ndarray, present, empty: str) -> np.ndarray:
    if empty not in EMPTY:
        raise ValueError(f"unknown treatment of empty chains {empty!r}: {', '.join(EMPTY)}")
    total = sizes.sum(1, keepdims=True)
    shares = np.divide(sizes, total, out=np.zeros_like(sizes), where=total > 0)
    if empty == "apart":
        shares[~np.asarray(present, dtype=bool)] = np.nan
    return shares


def positions(spans: Sequence[TokenSpan], behaviour: str, which: str = "own") -> list[int]:
    """Positions ``t = s - 1`` before span starts, in order, each once (METHOD, section 7).

    ``"own"``: the spans of ``behaviour`` (the text of the paper); ``"others"``: those of all
    other behaviours (``"published"`` is the same). A span at ``s <= 1`` has no earlier position
    with a prefix and is left out.
    """
    if which not in ("own", "others", "published"):
        raise ValueError(f"unknown position set {which!r}: own, others or published")
    wanted = which == "own"
    return sorted(
        {s.start - 1 for s in spans if (s.label == behaviour) == wanted and s.start > 1}
    )


@dataclass(frozen=True)
class Coherence:
    """Signs of broken text: ``loops`` is the share of word 4-grams that occurred before in the
    text; ``compression`` its size after zlib over the size before (low: repeats)."""

    loops: float
    compression: float


def coherence(text: str) -> Coherence:
    """:class:`Coherence` of a text; ``(0, 1)`` for one that is too short to repeat itself."""
    words = text.split()
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    raw = text.encode()
    loops = 1 - len(set(grams)) / len(grams) if grams else 0.0
    return Coherence(loops, min(1.0, len(zlib.compress(raw, 9)) / len(raw)) if raw else 1.0)


@dataclass(frozen=True)
class Interval:
    """A mean with a percentile bootstrap interval over ``n`` units (tasks, responses)."""

    value: float
    low: float
    high: float
    n: int


def bootstrap(values, *, draws: int = 4000, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean and percentile bootstrap interval of values, NaN left out.

    Efron 1979. No value at all gives NaN, one value an interval of no width.
    """
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if not len(values):
        return Interval(np.nan, np.nan, np.nan, 0)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(draws, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high), len(values))


def resamples(names: Sequence[str], *, draws: int, seed: int) -> np.ndarray:
    """How often each unit is in each bootstrap sample, ``[draws, len(names)]``; rows sum to n.

    A function of the seed and of the set of names alone: in another order the columns are in
    that order, and a name has the same samples beside the same other names wherever it occurs.
    """
    order = sorted(names)
    key = hashlib.sha256(json.dumps(order).encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(key, "little")])
    n = len(order)
    drawn = (
        rng.multinomial(n, np.full(n, 1 / n), size=draws) if n else np.zeros((draws, 0), int)
    )
    place = {name: column for column, name in enumerate(order)}
    return drawn[:, [place[name] for name in names]]


def sign_flip(differences, *, draws: int = 9999, seed: int = 0) -> float:
    """Two-sided p-value that the mean of paired differences is zero, by flipping signs.

    Fisher's randomisation test: exact up to 13 pairs, else from ``draws`` random flips with
    the observed one counted in (Phipson and Smyth 2010). NaN left out; no pair gives NaN.
    """
    d = np.asarray(differences, dtype=float)
    d = d[~np.isnan(d)]
    if not len(d):
        return float("nan")
    # Equal means differ by rounding, which grows with the values.
    observed = abs(d.mean()) - 1e-12 * abs(d).max()
    if len(d) <= 13:
        signs = 1 - 2 * ((np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1)
        return float((abs(signs @ d / len(d)) >= observed).mean())
    rng = np.random.default_rng(seed)
    hits = sum(
        int((abs(rng.choice((-1.0, 1.0), size=(part, len(d))) @ d / len(d)) >= observed).sum())
        for part in [1000] * (draws // 1000) + [draws % 1000]
    )
    return (hits + 1) / (draws + 1)


def holm(p_values) -> np.ndarray:
    """Holm's step-down adjustment of p-values (Holm 1979); NaN stays NaN and is not counted."""
    p = np.asarray(p_values, dtype=float)
    adjusted = np.full_like(p, np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    factors = len(order) - np.arange(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * factors))
    return adjusted
