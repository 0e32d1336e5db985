"""The metrics against METHOD's sentences, hand computation and brute force."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from stllms import metrics
from stllms.records import BEHAVIOURS, STEERED, Annotation, PlacedSegment, TokenSpan


def annotation(*spans: tuple[str, int, int], task: str = "t", failed: str | None = None):
    """Token spans, and a segment of the same label for each."""
    return Annotation(
        task,
        "hand",
        segments=tuple(PlacedSegment(label, "x", s, e) for label, s, e in spans),
        spans=tuple(TokenSpan(*span) for span in spans),
        failed=failed,
    )


# --- fractions ---------------------------------------------------------------------------


def test_token_fractions_count_tokens_among_the_four_steered_behaviours_only():
    one = annotation(
        ("initializing", 3, 40),
        ("backtracking", 40, 46),
        ("deduction", 46, 90),
        ("adding-knowledge", 90, 92),
        ("backtracking", 95, 99),
    )
    found = metrics.token_fractions([one])
    assert found.shape == (1, 4)
    # 10 tokens of backtracking, 2 of adding-knowledge: those of the two others do not count.
    assert dict(zip(STEERED, found[0], strict=True)) == {
        "backtracking": 10 / 12,
        "uncertainty-estimation": 0.0,
        "example-testing": 0.0,
        "adding-knowledge": 2 / 12,
    }


def test_a_chain_with_segments_but_none_of_the_four_counts_as_zeros_in_both_treatments():
    only_deduction = annotation(("deduction", 5, 9))
    for empty in metrics.EMPTY:
        assert metrics.token_fractions([only_deduction], empty=empty).tolist() == [[0.0] * 4]


def test_a_chain_without_segments_is_apart_by_default_and_zero_as_published():
    chains = [annotation(("backtracking", 5, 9)), annotation()]
    assert np.isnan(metrics.token_fractions(chains)[1]).all()
    published = metrics.token_fractions(chains, empty="published")
    assert published[1].tolist() == [0.0] * 4
    # The average over tasks is where the two differ: 1 of one chain, 1/2 of two.
    assert np.nanmean(metrics.token_fractions(chains)[:, 0]) == 1.0
    assert published[:, 0].mean() == 0.5


def test_a_failed_annotation_is_unknown_in_both_treatments():
    for empty in metrics.EMPTY:
        found = metrics.token_fractions([annotation(failed="no reply")], empty=empty)
        assert np.isnan(found).all()


def test_segment_counts_and_fractions_are_over_all_six_labels():
    one = annotation(
        ("initializing", 1, 2),
        ("deduction", 2, 9),
        ("deduction", 9, 10),
        ("backtracking", 10, 11),
    )
    counts = metrics.segment_counts([one, annotation()])
    assert counts.tolist() == [[1, 2, 0, 0, 0, 1], [0] * 6]
    shares = metrics.segment_fractions(counts)
    assert shares[0].tolist() == [0.25, 0.5, 0, 0, 0, 0.25]
    assert np.isnan(shares[1]).all()
    assert metrics.segment_fractions(counts, empty="published")[1].tolist() == [0.0] * 6


def test_unknown_labels_are_no_part_of_any_fraction():
    one = annotation(("humming", 1, 50), ("backtracking", 50, 52))
    assert metrics.token_fractions([one])[0].tolist() == [1.0, 0, 0, 0]
    assert metrics.segment_counts([one])[0].sum() == 1


def test_no_chain_at_all_gives_arrays_of_the_right_shape():
    assert metrics.token_fractions([]).shape == (0, 4)
    assert metrics.segment_counts([]).shape == (0, len(BEHAVIOURS))
    assert metrics.segment_fractions(np.zeros((0, 6))).shape == (0, 6)


def test_an_unknown_treatment_of_empty_chains_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'zero'.*apart, published"):
        metrics.token_fractions([annotation()], empty="zero")


# --- positions ---------------------------------------------------------------------------


def test_own_and_other_positions_split_the_starts_of_all_spans():
    spans = [
        TokenSpan("deduction", 20, 25),
        TokenSpan("backtracking", 7, 9),
        TokenSpan("backtracking", 30, 31),
        TokenSpan("initializing", 3, 7),
    ]
    assert metrics.positions(spans, "backtracking") == [6, 29]
    assert metrics.positions(spans, "backtracking", "others") == [2, 19]
    assert metrics.positions(spans, "backtracking", "published") == [2, 19]
    assert metrics.positions(spans, "uncertainty-estimation") == []


def test_positions_need_a_token_before_them_and_occur_once():
    spans = [TokenSpan("deduction", s, 9) for s in (0, 1, 2, 2)]
    assert metrics.positions(spans, "deduction") == [1]
    with pytest.raises(ValueError, match=r"'mine'.*own, others"):
        metrics.positions(spans, "deduction", "mine")


# --- coherence ---------------------------------------------------------------------------


def test_loops_are_the_share_of_four_grams_seen_before():
    # "a b c d" three times: 9 four-grams, the first 4 are new.
    assert metrics.coherence("a b c d " * 3).loops == pytest.approx(1 - 4 / 9)
    assert metrics.coherence("one two three four five six").loops == 0.0


def test_repetition_compresses_and_short_texts_have_no_signs():
    prose = "The tank gains six cups and loses two an hour, so four are added; twice four is 8."
    assert metrics.coherence("wait, no. " * 60).compression < 0.1
    assert metrics.coherence(prose).compression > 0.7
    for text in ("", "yes", "so it is"):
        assert metrics.coherence(text) == metrics.Coherence(0.0, 1.0)


# --- bootstrap ---------------------------------------------------------------------------


def test_the_bootstrap_interval_approaches_that_of_the_normal_law():
    values = np.random.default_rng(1).normal(3, 2, size=400)
    found = metrics.bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)
    assert found.n == 400


def test_ninety_five_percent_intervals_cover_the_mean_about_that_often():
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(300):
        found = metrics.bootstrap(rng.exponential(size=40), draws=400)
        hits += found.low <= 1.0 <= found.high
    # A percentile bootstrap of a skewed law with 40 values covers a little less than nominal.
    assert 0.88 <= hits / 300 <= 0.98


def test_wider_levels_give_wider_intervals_and_the_seed_decides():
    values = np.random.default_rng(3).normal(size=30)
    narrow, wide = (metrics.bootstrap(values, level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high
    assert metrics.bootstrap(values, seed=5) == metrics.bootstrap(values, seed=5)
    assert metrics.bootstrap(values, seed=5) != metrics.bootstrap(values, seed=6)


def test_missing_values_take_no_part_in_the_bootstrap():
    found = metrics.bootstrap([1.0, np.nan, 3.0])
    assert (found.value, found.n) == (2.0, 2)
    assert metrics.bootstrap([4.0]) == metrics.Interval(4.0, 4.0, 4.0, 1)
    nothing = metrics.bootstrap([np.nan, np.nan])
    assert nothing.n == 0
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all()


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
        assert metrics.sign_flip([float(v) for v in values]) == enumerated(values)


def test_the_observed_signs_and_their_mirror_image_always_count():
    rng = np.random.default_rng(7)
    found = [metrics.sign_flip(rng.normal(size=9) * 1e5) for _ in range(600)]
    assert min(found) >= 2 / 2**9


def test_sign_flip_of_five_equal_differences_is_two_in_thirty_two():
    assert metrics.sign_flip([0.3] * 5) == 2 / 32
    assert metrics.sign_flip([-0.3] * 5) == 2 / 32
    assert metrics.sign_flip([0.0] * 5) == 1.0


def test_sign_flips_of_many_pairs_agree_with_the_t_test_and_never_give_zero():
    rng = np.random.default_rng(5)
    shifted = rng.normal(0.3, 1, size=60)
    sampled = metrics.sign_flip(shifted)
    assert sampled == pytest.approx(stats.ttest_1samp(shifted, 0).pvalue, abs=0.015)
    assert metrics.sign_flip(np.full(40, 2.0)) == 1 / 10_000
    assert metrics.sign_flip(np.full(40, 2.0), draws=2000) == 1 / 2001


def test_sign_flip_p_values_are_uniform_where_nothing_happens():
    rng = np.random.default_rng(6)
    p = [metrics.sign_flip(rng.normal(size=16), draws=199, seed=i) for i in range(400)]
    assert 0.02 <= np.mean(np.array(p) <= 0.05) <= 0.085


def test_sign_flip_leaves_missing_pairs_out():
    assert metrics.sign_flip([0.1, np.nan, 0.2, 0.3]) == metrics.sign_flip([0.1, 0.2, 0.3])
    assert np.isnan(metrics.sign_flip([np.nan]))
    assert np.isnan(metrics.sign_flip([]))


def test_holm_by_hand():
    # Sorted .01 .02 .03 .04, factors 4 3 2 1: .04 .06 .06 .04 -> running maximum.
    found = metrics.holm([0.04, 0.01, 0.03, 0.02])
    assert found == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert metrics.holm([0.5, 0.9]).tolist() == [1.0, 1.0]


def test_holm_does_not_count_what_is_missing():
    found = metrics.holm([np.nan, 0.02, np.nan, 0.03])
    assert np.isnan(found[[0, 2]]).all()
    assert found[[1, 3]] == pytest.approx([0.04, 0.04])
    assert metrics.holm([]).shape == (0,)


# --- samples of tasks ---------------------------------------------------------------------


def test_samples_are_drawn_with_replacement_and_belong_to_the_names():
    """Column means and covariances of multinomial counts: 1, and (1 - 1/n, -1/n)."""
    names = ["b", "a", "d", "c"]
    found = metrics.resamples(names, draws=20_000, seed=1)
    assert (found.sum(1) == 4).all()
    assert found.mean(0) == pytest.approx([1] * 4, abs=0.03)
    covariance = np.cov(found.T)
    assert np.diag(covariance) == pytest.approx([3 / 4] * 4, abs=0.04)
    assert covariance[~np.eye(4, dtype=bool)] == pytest.approx([-1 / 4] * 12, abs=0.03)
    turned = metrics.resamples(sorted(names), draws=20_000, seed=1)
    assert (found == turned[:, [1, 0, 3, 2]]).all()
    for other in (metrics.resamples(names, draws=20_000, seed=2),
                  metrics.resamples(["b", "a", "d", "e"], draws=20_000, seed=1)):  # fmt: skip
        assert (found != other).any()
    assert metrics.resamples([], draws=3, seed=0).shape == (3, 0)
