"""Intervals and tests against other laws, enumeration and hand computation."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats as laws
from sklearn.metrics import roc_auc_score

from stllms import stats

# --- bootstrap ---------------------------------------------------------------------------


def test_ninety_five_percent_intervals_cover_the_mean_about_that_often():
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(300):
        found = stats.bootstrap(rng.exponential(size=40), draws=400)
        hits += found.low <= 1.0 <= found.high
    # A percentile bootstrap of a skewed law with 40 values covers a little less than nominal.
    assert 0.88 <= hits / 300 <= 0.98


def test_missing_values_take_no_part():
    found = stats.bootstrap([1.0, np.nan, 3.0])
    assert (found.value, found.n) == (2.0, 2)
    assert stats.bootstrap([4.0]) == stats.Interval(4.0, 4.0, 4.0, 1)
    nothing = stats.bootstrap([np.nan, np.nan])
    assert nothing.n == 0
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all()
    assert stats.sign_flip([0.1, np.nan, 0.2, 0.3]) == stats.sign_flip([0.1, 0.2, 0.3])
    assert np.isnan([stats.sign_flip([np.nan]), stats.sign_flip([])]).all()


# --- tests -------------------------------------------------------------------------------


def enumerated(differences: list[Fraction]) -> float:
    """Share of all sign patterns whose mean is as far from zero, in exact arithmetic."""
    observed = abs(sum(differences))
    patterns = itertools.product((1, -1), repeat=len(differences))
    sums = [abs(sum(s * d for s, d in zip(p, differences, strict=True))) for p in patterns]
    return sum(value >= observed for value in sums) / len(sums)


@pytest.mark.parametrize("scale", [1, 10**6, Fraction(1, 10**6)])
def test_sign_flips_of_few_pairs_are_enumerated_exactly_at_any_scale(scale):
    rng = np.random.default_rng(4)
    for n in (1, 2, 5, 9):
        # Tenths make ties that floating point breaks.
        values = [Fraction(int(k), 10) * scale for k in rng.integers(-7, 12, size=n)]
        assert stats.sign_flip([float(v) for v in values]) == enumerated(values)
        assert stats.sign_flip([-float(v) for v in values]) == enumerated(values), "two sides"


def test_sign_flips_of_many_pairs_agree_with_the_t_test_and_never_give_zero():
    shifted = np.random.default_rng(5).normal(0.3, 1, size=60)
    found = stats.sign_flip(shifted)
    assert found == pytest.approx(laws.ttest_1samp(shifted, 0).pvalue, abs=0.015)
    assert stats.sign_flip(-shifted) == found, "two sides"
    assert stats.sign_flip(np.full(40, 2.0), draws=2000) == 1 / 2001


def test_sign_flip_p_values_are_uniform_where_nothing_happens():
    rng = np.random.default_rng(6)
    p = [stats.sign_flip(rng.normal(size=16), draws=199, seed=i) for i in range(400)]
    assert 0.02 <= np.mean(np.array(p) <= 0.05) <= 0.085


def test_holm_by_hand():
    # Sorted .01 .02 .03 .04, factors 4 3 2 1: .04 .06 .06 .04 -> running maximum.
    found = stats.holm([0.04, 0.01, 0.03, 0.02])
    assert found == pytest.approx([0.06, 0.04, 0.06, 0.06])
    found = stats.holm([np.nan, 0.02, np.nan, 0.03])
    assert found == pytest.approx([np.nan, 0.04, np.nan, 0.04], nan_ok=True), "not counted"
    assert stats.holm([]).shape == (0,)


# --- samples of tasks ---------------------------------------------------------------------


def test_samples_are_drawn_with_replacement_and_belong_to_the_names():
    """Column means and covariances of multinomial counts: 1, and (1 - 1/n, -1/n)."""
    names = ["b", "a", "d", "c"]
    found = stats.resamples(names, draws=20_000, seed=1)
    assert (found.sum(1) == 4).all()
    assert found.mean(0) == pytest.approx([1] * 4, abs=0.03)
    covariance = np.cov(found.T)
    assert np.diag(covariance) == pytest.approx([3 / 4] * 4, abs=0.04)
    assert covariance[~np.eye(4, dtype=bool)] == pytest.approx([-1 / 4] * 12, abs=0.03)
    turned = stats.resamples(sorted(names), draws=20_000, seed=1)
    assert (found == turned[:, [1, 0, 3, 2]]).all()
    for other in (stats.resamples(names, draws=20_000, seed=2),
                  stats.resamples(["b", "a", "d", "e"], draws=20_000, seed=1)):  # fmt: skip
        assert (found != other).any()
    assert stats.resamples([], draws=3, seed=0).shape == (3, 0)


def test_the_interval_is_that_of_the_drawn_samples():
    """The committed numbers came from these draws."""
    values = np.random.default_rng(8).exponential(size=60)
    drawn = np.random.default_rng(5).integers(60, size=(4000, 60))
    low, high = np.quantile(values[drawn].mean(1), [0.05, 0.95])
    found = stats.bootstrap(values, level=0.9, seed=5)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)
    assert (found.value, found.n) == (pytest.approx(values.mean()), 60)


# --- areas --------------------------------------------------------------------------------


def test_areas_are_those_of_scikit_learn_with_ties_in_every_column():
    rng = np.random.default_rng(0)
    values, own = rng.integers(0, 9, (200, 2, 3)).astype(float), rng.random(200) < 0.3
    found = stats.auc(values, own)
    for place in np.ndindex(2, 3):
        expected = roc_auc_score(own, values[:, *place])
        assert found[place] == pytest.approx(expected, abs=1e-12)
    assert np.isnan(stats.auc(values, np.ones(200, bool))).all()
    assert np.isnan(stats.auc(values, np.zeros(200, bool))).all()
