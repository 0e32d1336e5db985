"""Other estimators and meaningless directions, measured as the real ones are."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_vectors import NAMES, some_means

from stllms import controls, means, vectors
from stllms.records import CONTROLS

LAYERS = dict.fromkeys(NAMES, 1)


def only(made, kept):
    """``made`` with some of its kept spans."""
    names = ("samples", "sample_labels", "sample_responses")
    return replace(made, **{name: getattr(made, name)[kept] for name in names})


def values(table, quantity):
    rows = table[table["quantity"] == quantity]
    return rows.pivot(index="behaviour", columns="direction", values="value")


def test_every_direction_has_its_numbers_and_only_draws_have_intervals():
    made, _ = some_means(spans=12)
    table = controls.table(made, LAYERS, draws=20)
    assert tuple(table.columns) == controls.COLUMNS
    assert set(table["direction"]) == {*vectors.ESTIMATORS, *CONTROLS}
    per_behaviour = 2 * len(set(table["direction"])) + 2
    assert len(table) == len(NAMES) * per_behaviour
    drawn = table["direction"].isin(CONTROLS)
    assert table.loc[drawn, ["low", "high"]].notna().all(axis=None)
    assert table.loc[~drawn, ["low", "high"]].isna().all(axis=None)
    assert (table.loc[drawn, "low"] <= table.loc[drawn, "value"]).all()


def test_real_directions_stand_out_and_meaningless_ones_do_not():
    made, _ = some_means(spans=40)
    auc = values(controls.table(made, LAYERS, draws=50), "AUC")
    assert (auc[list(vectors.ESTIMATORS)] > 0.95).all(axis=None)
    assert (auc[list(CONTROLS)] - 0.5).abs().max(axis=None) < 0.2


def test_pure_noise_stands_out_nowhere():
    made, _ = some_means(spans=40, signal=0.0)
    table = controls.table(made, LAYERS, draws=50)
    auc = values(table, "AUC")
    assert (auc - 0.5).abs().max(axis=None) < 0.15
    lengths = table[table["quantity"] == "length"].set_index(["behaviour", "direction"])
    for name in NAMES:
        real, null = (lengths.loc[(name, d)] for d in ("difference-of-means", "shuffled"))
        assert 0.8 * null["low"] < real["value"] < 1.2 * null["high"]


def test_numbers_equal_a_loop_over_spans():
    made, _ = some_means(spans=10, signal=1.0)
    found = controls.table(made, {NAMES[2]: 1}, draws=3)
    found = found.set_index(["direction", "quantity"])["value"]
    build, test = (vectors.difference_of_means(made.half(h)) for h in ("build", "test"))
    ours, other = build.direction(NAMES[2], 1).double(), test.direction(NAMES[2], 1).double()
    cosine = float(ours @ other / (ours.norm() * other.norm()))
    assert found["difference-of-means", "cosine"] == pytest.approx(cosine, abs=1e-5)
    half = means.PARTS // 2 * len(NAMES) * 10
    along = [float(x @ ours) for x in made.samples[half:, 1].double()]
    own = (made.sample_labels[half:] == 2).tolist()
    x, y = ([v for v, o in zip(along, own, strict=True) if o is w] for w in (True, False))
    area = np.mean([[(a > b) + (a == b) / 2 for b in y] for a in x])
    assert found["difference-of-means", "AUC"] == pytest.approx(area, abs=1e-3)
    overall = test.overall[1].double().norm()
    raw = made.half("build").mean()[2, 1] - made.half("build").overall()[1]
    length = float(raw.norm() / overall)
    assert found["difference-of-means", "length"] == pytest.approx(length, rel=1e-5)


def test_labels_are_permuted_within_responses_and_every_order_is_as_likely():
    made, _ = some_means(spans=1)
    # Two responses of three spans, interleaved; labels 0 1 2 and 0 0 1.
    mixed = replace(
        made,
        sample_responses=torch.tensor([7, 3, 7, 3, 7, 3]),
        sample_labels=torch.tensor([0, 0, 1, 0, 2, 1]),
    )
    drawn = controls._permuted(mixed, 6000, torch.Generator().manual_seed(0))
    first, second = (drawn[:, some].tolist() for some in ([0, 2, 4], [1, 3, 5]))
    often = Counter(map(tuple, first))
    assert set(often) == set(itertools.permutations([0, 1, 2]))
    assert max(abs(n - 1000) for n in often.values()) < 4 * (6000 * 5 / 36) ** 0.5
    assert set(map(tuple, second)) == {(0, 0, 1), (0, 1, 0), (1, 0, 0)}


def test_controls_of_a_response_a_span_cannot_be_shuffled():
    """Where every span is a response of its own, a permutation within responses moves nothing:
    a shuffled control is the direction itself."""
    made, _ = some_means(spans=4)
    alone = replace(made, sample_responses=torch.arange(len(made.samples)))
    build = alone.half("build")
    got = controls._controls(build, 1, 1, 5, torch.Generator().manual_seed(0))
    want = vectors.differences(build, "difference-of-means", [1])[1, 0]
    torch.testing.assert_close(got["shuffled"], want.expand(5, -1), atol=1e-5, rtol=1e-5)
    assert got["covariance"].shape == got["isotropic"].shape == (5, made.width)


def test_the_seed_gives_the_draws_and_few_spans_leave_a_behaviour_out():
    made, _ = some_means(spans=10)
    first, second = (controls.table(made, LAYERS, draws=5, seed=3) for _ in range(2))
    assert first.equals(second)
    made.counts[:, 1] = 0
    kept = made.sample_labels != 1
    fewer = only(made, kept)
    assert set(controls.table(fewer, LAYERS, draws=2)["behaviour"]) == {NAMES[0], NAMES[2]}
    assert controls.table(fewer, {"backtracking": 0}, draws=2).empty


def test_a_behaviour_alone_has_no_contrast_with_others():
    made, _ = some_means(spans=10)
    made.counts[:, 1:] = 0
    made.sums[:, 1:] = 0
    kept = made.sample_labels == 0
    made = only(made, kept)
    found = controls.table(made, LAYERS, draws=3)
    assert set(found["direction"]) == {"difference-of-means", *CONTROLS}
    assert found.loc[found["quantity"] == "AUC", "value"].isna().all()
    assert found.loc[found["quantity"] != "AUC", "value"].notna().all()


def test_layers_that_were_not_kept_are_named():
    made, _ = some_means(spans=10)
    only = replace(made, sample_layers=(0,), samples=made.samples[:, :1])
    with pytest.raises(ValueError, match=r"layers \[1\].*at layers \[0\]"):
        controls.table(only, LAYERS)


def test_areas_are_a_half_for_ties_and_missing_without_others():
    values = np.array([[0.0], [0.0], [0.0]])
    assert means.area(values, np.array([True, False, False])).tolist() == [0.5]
    assert np.isnan(means.area(values, np.array([True, True, True]))).all()
