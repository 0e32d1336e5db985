"""Layer effects over responses: the file, curves, the best layer and agreement."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from stllms import artifacts, effects, tables
from stllms.effects import LayerEffects
from stllms.means import is_build
from stllms.records import Annotation, TokenSpan

NAN = float("nan")
NAMES = ("backtracking", "deduction")
BUILD = [name for name in (f"r{i}" for i in range(99)) if is_build(name)]
TEST = [name for name in (f"r{i}" for i in range(99)) if not is_build(name)]


def halves(build: int, test: int) -> list[str]:
    """Ids of responses: those of the build half first."""
    return [*BUILD[:build], *TEST[:test]]


def measured(ids=None, **values) -> LayerEffects:
    tensors = {key.replace("_", "/"): torch.as_tensor(v) for key, v in values.items()}
    n = len(next(iter(tensors.values())))
    return LayerEffects(tensors, tuple(ids or (f"t{i}" for i in range(n))), NAMES, "m")


# --- curves and layers -------------------------------------------------------------------


def test_a_null_is_the_range_of_the_random_directions_means():
    values = np.ones((2, 2, 3))
    found = measured(kl_own=values)
    rows = effects.table({"kl/own": found.of("kl/own")}, NAMES)
    assert effects.beside_nulls(rows, found)["null_low"].isna().all(), "none was measured"
    chance = {effects.null_key(k): torch.as_tensor(values * (k + 1)) for k in range(3)}
    chance[effects.null_key(2)][:, 1, 2] = NAN
    found = replace(found, effects={**found.effects, **chance})
    beside = effects.beside_nulls(rows, found)
    pd.testing.assert_frame_equal(beside[rows.columns], rows)
    assert beside["null_low"].tolist() == [1.0] * 6
    assert beside["null_high"].tolist() == [3.0] * 5 + [2.0]
    others = {**found.effects, "kl/others": found.effects["kl/own"]}
    sets = effects.agreement(replace(found, effects=others), "kl/own", NAMES)
    assert set(sets["set"]) == {"kl/others"}, "chance is no set"


def test_a_curve_averages_responses_and_leaves_out_those_without_the_behaviour():
    values = np.array([[1.0, 10.0], [NAN, NAN], [3.0, 40.0]])
    found = effects.curve(values)
    assert found["mean"].tolist() == [2.0, 25.0]
    assert found["sd"].tolist() == [1.0, 15.0], "the published band is of the population"
    assert found["n"].tolist() == [2, 2]
    assert found["layer"].tolist() == [0, 1]


def test_the_band_of_a_curve_is_a_95_percent_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=(400, 1))
    found = effects.curve(values).iloc[0]
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert found["low"] == pytest.approx(values.mean() - half, abs=half / 10)
    assert found["high"] == pytest.approx(values.mean() + half, abs=half / 10)


def test_a_curve_of_nothing_is_missing_and_not_zero():
    found = effects.curve(np.full((3, 2), NAN))
    assert found[["mean", "low", "high", "sd"]].isna().all().all()
    assert found["n"].tolist() == [0, 0]


def test_the_table_holds_every_set_behaviour_and_layer():
    values = np.arange(12.0).reshape(2, 2, 3)
    found = effects.table({"kl/own": values, "kl/others": values + 1}, NAMES)
    assert len(found) == 2 * 2 * 3
    cell = found.set_index(["set", "behaviour", "layer"]).loc["kl/others", "deduction", 2]
    assert cell["mean"].item() == (values[0, 1, 2] + values[1, 1, 2]) / 2 + 1


def test_the_best_layer_is_chosen_on_the_build_half_and_ranked_on_the_other():
    values = np.zeros((8, 4))
    values[:4] = [0, 1, 5, 2]  # the half that chooses
    values[4:] = [9, 1, 5, 2]  # the half that confirms
    found = effects.best_layer(values, "backtracking", halves(4, 4))
    assert (found.layer, found.rank_in_other_half, found.n) == (2, 2, 8)
    assert (found.low, found.high) == (0, 2)
    assert 0.2 < found.support < 0.8
    back = effects.best_layer(values[::-1], "backtracking", halves(4, 4)[::-1])
    assert (back.layer, back.rank_in_other_half) == (2, 2), "the order says nothing"


def test_support_is_whole_where_every_response_agrees():
    values = np.tile([0.0, 3.0, 1.0], (6, 1))
    values = np.vstack([values, np.full((2, 3), NAN)])
    found = effects.best_layer(values, "deduction", halves(3, 5))
    assert found == effects.BestLayer("deduction", 1, 1, 1.0, 1, 1, 6)


def test_support_is_the_share_of_bootstrap_samples_brute_force():
    values = np.random.default_rng(0).normal([0.0, 0.3, 0.2], size=(4, 3))
    found = effects.best_layer(values, "b", halves(2, 2), draws=20_000)
    # All 4 ** 4 samples of four responses.
    grid = np.array(np.meshgrid(*[range(4)] * 4)).reshape(4, -1).T
    peaks = values[grid].mean(1).argmax(1)
    assert found.support == pytest.approx((peaks == found.layer).mean(), abs=0.02)


@pytest.mark.parametrize("halved", [(2, 1), (1, 2), (9, 0), (0, 9)])
def test_a_half_with_fewer_than_two_responses_chooses_no_layer(halved):
    n = sum(halved)
    ids = [*halves(*halved), *TEST[20:30], *BUILD[20:30]]
    values = np.vstack([np.ones((n, 3)), np.full((20, 3), NAN)])
    words = f"backtracking: {halved[0]} responses .* build half and {halved[1]} in the other"
    with pytest.raises(ValueError, match=words):
        effects.best_layer(values, "backtracking", ids)
    both = np.stack([values, np.tile([1.0, 2.0, 9.0], (n + 20, 1))], axis=1)
    found = effects.best_layers(measured(ids, kl_own=both), "kl/own", ["other", *NAMES])
    assert found["behaviour"].tolist() == ["deduction"]
    assert found["layer"].tolist() == [1], "the last layer is no candidate"


def test_best_layers_know_the_halves_of_their_responses():
    values = np.zeros((8, 2, 5))
    values[:4] = [0, 1, 5, 2, 99]
    values[4:] = [9, 1, 5, 2, 99]
    found = effects.best_layers(measured(halves(4, 4), kl_own=values), "kl/own", NAMES)
    assert found["layer"].tolist() == [2, 2]
    assert found["rank_in_other_half"].tolist() == [2, 2]
    with pytest.raises(ValueError, match="8 rows of effects but 7 response ids"):
        effects.best_layer(values[:, 0], "backtracking", halves(4, 3))


def test_no_best_layer_leaves_a_table_with_its_columns():
    found = effects.best_layers(measured(kl_own=np.full((2, 2, 3), NAN)), "kl/own", NAMES)
    assert found.empty
    assert "layer" in found.columns
    assert effects.chosen_layers(found, None) == {}


def test_ranks_begin_at_one_and_ties_share_the_better_rank():
    values = np.array([5.0, 7.0, 5.0, 1.0])
    assert [effects.rank(values, layer) for layer in range(4)] == [2, 1, 2, 4]


def test_rank_correlation_is_spearmans_and_missing_for_flat_curves():
    assert effects.rank_correlation([1, 2, 3, 4], [10, 20, 25, 99]) == pytest.approx(1)
    # Ranks 1 2 3 4 and 2 1 4 3: 1 - 6 * 4 / (4 * 15).
    assert effects.rank_correlation([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)
    assert np.isnan(effects.rank_correlation([1, 2, 3], [5, 5, 5]))
    assert np.isnan(effects.rank_correlation([1, 2, 3], [NAN, 5, 5]))


@pytest.mark.filterwarnings("error")
def test_agreement_is_with_the_reference_and_leaves_out_what_has_no_effects():
    up, down = [0.0, 1.0, 2.0], [2.0, 1.0, 0.0]
    gone = [NAN] * 3
    made = measured(
        kl_own=np.array([[up, gone]] * 2),
        kl_others=np.array([[down, up]] * 2),
        published_own=np.array([[gone, up]] * 2),
        published_others=np.array([[[1.0] * 3, up]] * 2),
    )
    found = effects.agreement(made, "kl/own", [*NAMES, "humming"])
    assert found["behaviour"].tolist() == ["backtracking"] * 3
    assert found["set"].tolist() == ["kl/others", "published/others", "published/own"]
    assert found["n"].tolist() == [2, 2, 0]
    assert found.loc[0, ["value", "low", "high"]].tolist() == pytest.approx([-1, -1, -1])
    assert found.loc[1:, ["value", "low", "high"]].isna().all().all(), "flat, and unknown"
    shown = tables.intervals(found, ["behaviour"], "set")
    assert shown.loc["backtracking", "kl/others"] == "-1.00 (-1.00 to -1.00)"
    assert effects.agreement(made, "kl/own", ["deduction"]).columns[-1] == "n"
    with pytest.raises(KeyError, match="no effects 'kld' were measured"):
        effects.agreement(made, "kld", NAMES)


def test_agreement_is_of_the_responses_that_both_curves_have():
    draw = np.random.default_rng(2).normal(size=(2, 4, 5))
    gone = np.full((1, 5), NAN)
    own = np.vstack([draw[0], 100 * draw[1, :1], gone])
    others = np.vstack([draw[1], gone, 100 * draw[0, :1]])
    made = measured(kl_own=own[:, None], kl_others=others[:, None])
    found = effects.agreement(made, "kl/own", NAMES[:1], draws=20_000).iloc[0]
    assert found["n"] == 4
    assert found["value"] == pytest.approx(spearmanr(*draw.mean(1)).statistic)
    # All 4 ** 4 samples of four responses, both curves of the same ones.
    grid = np.array(np.meshgrid(*[range(4)] * 4)).reshape(4, -1).T
    values = [spearmanr(*draw[:, sample].mean(1)).statistic for sample in grid]
    low, high = np.quantile(values, [0.025, 0.975])
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.11)


def test_curves_that_agree_in_every_sample_agree_without_doubt():
    values = np.random.default_rng(3).normal(size=(9, 1, 4))
    made = measured(kl_own=values, kl_others=2 * values + 1)
    found = effects.agreement(made, "kl/own", NAMES[:1])
    assert found[["value", "low", "high"]].to_numpy().ravel().tolist() == pytest.approx([1] * 3)


def labelled(*labels: str) -> Annotation:
    spans = tuple(TokenSpan(label, 5 * i + 2, 5 * i + 6) for i, label in enumerate(labels))
    return Annotation("t", "a", spans=spans)


def test_more_responses_are_measured_until_a_rare_behaviour_was_seen_often_enough():
    common, rare = labelled("deduction", "deduction"), labelled("deduction", "backtracking")
    chains = [common, common, rare, common, rare, common]
    names = ("deduction", "backtracking")
    assert effects.how_many(chains, names, least=2, each=1) == 3
    assert effects.how_many(chains, names, least=2, each=2) == 5, "a chain counts once"
    assert effects.how_many(chains, names, least=2, each=3) == 6, "all, if never enough"
    assert effects.how_many(chains, ("deduction",), least=4, each=2) == 4
    assert effects.how_many(chains, (), least=4) == 4
    assert effects.how_many(chains[:1], names) == 1


def test_effects_that_were_not_measured_are_named():
    found = measured(kl_own=np.zeros((2, 2, 3)))
    with pytest.raises(
        KeyError, match="no effects 'kl/others' were measured; there are kl/own"
    ):
        found.of("kl/others")


def test_layers_of_the_registry_win_over_the_measured_ones():
    best = pd.DataFrame([{"behaviour": "backtracking", "layer": 3}])
    assert effects.chosen_layers(best, {"backtracking": 17}) == {"backtracking": 17}
    assert effects.chosen_layers(best, None) == {"backtracking": 3}


def test_effects_survive_a_file_bit_for_bit(tmp_path):
    before = measured(kl_own=np.array([[[0.1, NAN]] * 2]), kl_others=np.ones((1, 2, 2)))
    before = replace(
        before, directions="d", dtype="f", fingerprints=("p",), ledger={"responses": 1}
    )
    before.save(tmp_path / "e.safetensors")
    after = LayerEffects.load(tmp_path / "e.safetensors")
    assert replace(after, effects={}) == replace(before, effects={})
    for key, tensor in before.effects.items():
        assert np.array_equal(after.of(key), tensor.numpy(), equal_nan=True)


def test_a_file_of_an_earlier_version_is_read(tmp_path):
    path = tmp_path / "e.safetensors"
    metadata = {"response_ids": ["t0"], "behaviours": NAMES, "model": "m", "directions": "d"}
    artifacts.save_tensors(path, {"kl/own": torch.ones(1, 2, 3)}, metadata)
    found = LayerEffects.load(path)
    assert found.of("kl/own").tolist() == np.ones((1, 2, 3)).tolist()
    assert (found.response_ids, found.directions, found.fingerprints) == (("t0",), "d", ())


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        (
            {"directions": torch.ones(2, 3, 4)},
            {"behaviours": NAMES, "model": "m"},
            "directions",
        ),
        ({"kl/own": torch.ones(2, 2, 3)}, {"response_ids": ["t"]}, "no layer effects"),
        (
            {"kl/own": torch.ones(2, 2, 3)},
            {"response_ids": ["t0"], "behaviours": NAMES, "model": "m"},
            r"kl/own has shape \(2, 2, 3\), expected \(1, 2\)",
        ),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path, tensors, metadata, words):
    path = tmp_path / "vectors.safetensors"
    artifacts.save_tensors(path, tensors, metadata)
    with pytest.raises(artifacts.BadFile, match=f"vectors.safetensors: .*{words}"):
        LayerEffects.load(path)
