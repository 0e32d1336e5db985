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


def with_controls(own, null, ids=None, everywhere=None) -> LayerEffects:
    """Effects ``[R, N, L]`` of directions and ``[K, R, N, L]`` of controls at one sample of
    positions; those at all positions are ``everywhere``, the same unless said."""
    found = measured(ids, kl_own=np.asarray(own if everywhere is None else everywhere, float))
    chance = {
        effects.null_key(f"shuffled:{k}"): torch.as_tensor(np.asarray(one, float))
        for k, one in enumerate(null)
    }
    paired = {effects.PAIRED: torch.as_tensor(np.asarray(own, float))}
    return replace(found, effects={**found.effects, **paired, **chance})


def test_a_null_is_the_range_of_the_controls_means():
    values = np.ones((2, 2, 3))
    found = measured(kl_own=values)
    rows = effects.table({"kl/own": found.of("kl/own")}, NAMES)
    assert effects.beside_nulls(rows, found)["null_low"].isna().all(), "none was measured"
    found = with_controls(values, [values * (k + 1) for k in range(3)])
    beside = effects.beside_nulls(rows, found)
    pd.testing.assert_frame_equal(beside[rows.columns], rows)
    assert beside["null_low"].tolist() == pytest.approx([1.0] * 6)
    assert beside["null_high"].tolist() == pytest.approx([3.0] * 6)
    others = {**found.effects, "kl/others": found.effects["kl/own"]}
    sets = effects.agreement(replace(found, effects=others), "kl/own", NAMES)
    assert set(sets["set"]) == {"kl/others"}, "chance is no set"


def test_a_null_of_a_part_of_the_positions_is_carried_to_all_of_them():
    """At the controls' positions the direction has 2 and the controls 1 and 3; at all positions
    it has 10: the controls, half and one and a half times it, would have 5 and 15 there."""
    own, all_of_them = np.full((2, 2, 3), 2.0), np.full((2, 2, 3), 10.0)
    found = with_controls(own, [own / 2, own * 1.5], everywhere=all_of_them)
    rows = effects.table({"kl/own": found.of("kl/own")}, NAMES)
    beside = effects.beside_nulls(rows, found)
    assert beside["null_low"].tolist() == pytest.approx([5.0] * 6)
    assert beside["null_high"].tolist() == pytest.approx([15.0] * 6)


def test_relative_effects_are_of_the_responses_with_controls():
    gone = np.full((1, 2, 2), NAN)
    own = np.concatenate([[[[2.0, 8.0]] * 2, [[4.0, 8.0]] * 2], gone])
    null = [np.concatenate([np.full((2, 2, 2), v), gone]) for v in (1.0, 3.0)]
    found = effects.relative(with_controls(own, null), [*NAMES, "humming"])
    mine = found[found["behaviour"] == "deduction"]
    assert mine["mean"].tolist() == [3 / 2, 8 / 2], "the mean control has 2"
    assert (mine["null_low"].tolist(), mine["null_high"].tolist()) == ([0.5] * 2, [1.5] * 2)
    assert mine["n"].tolist() == [2, 2]
    assert mine["low"].tolist() == [1.0, 4.0], "the response with 2 drawn twice"
    assert mine["high"].tolist() == [2.0, 4.0]
    assert effects.relative(measured(kl_own=own), NAMES).empty


def test_an_interval_of_a_ratio_is_that_of_a_resample_of_both():
    rng = np.random.default_rng(0)
    common = rng.lognormal(0, 1.5, size=(60, 1, 1))
    own = 3 * common * rng.lognormal(0, 0.1, size=(60, 2, 1))
    null = [common * rng.lognormal(0, 0.1, size=(60, 2, 1)) for _ in range(4)]
    found = effects.relative(with_controls(own, null), NAMES[:1]).iloc[0]
    x, y = own[:, 0, 0], np.mean([one[:, 0, 0] for one in null], axis=0)
    # Delta method for a ratio of means, paired by response.
    error = np.std(x - x.mean() / y.mean() * y, ddof=1) / np.sqrt(60) / y.mean()
    assert found["mean"] == pytest.approx(x.mean() / y.mean())
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.2)
    apart = np.std(x, ddof=1) / np.sqrt(60) / y.mean()
    assert found["high"] - found["low"] < apart, "what both share cancels"


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
    assert (found.relative, found.held_out) == (5, 5)
    assert (found.low, found.high) == (0, 2)
    assert 0.2 < found.support < 0.8
    back = effects.best_layer(values[::-1], "backtracking", halves(4, 4)[::-1])
    assert (back.layer, back.rank_in_other_half) == (2, 2), "the order says nothing"
    assert "no controls" in found.reason


def test_support_is_whole_where_every_response_agrees():
    values = np.tile([0.0, 3.0, 1.0], (6, 1))
    values = np.vstack([values, np.full((2, 3), NAN)])
    found = effects.best_layer(values, "deduction", halves(3, 5))
    assert (found.layer, found.rank_in_other_half, found.support) == (1, 1, 1.0)
    assert (found.low, found.high, found.n) == (1, 1, 6)


def test_support_is_the_share_of_bootstrap_samples_brute_force():
    values = np.random.default_rng(0).normal([0.0, 0.3, 0.2], size=(4, 3))
    found = effects.best_layer(values, "b", halves(2, 2), draws=20_000)
    # All 4 ** 4 samples of four responses.
    grid = np.array(np.meshgrid(*[range(4)] * 4)).reshape(4, -1).T
    peaks = values[grid].mean(1).argmax(1)
    assert found.support == pytest.approx((peaks == found.peak).mean(), abs=0.02)


def test_the_layer_is_the_best_beside_its_null_and_not_the_one_with_the_largest_effect():
    """The last layer moves most, and so does every control there."""
    own = np.tile([0.1, 0.6, 0.1, 9.0], (8, 1))
    null = np.stack([np.tile([0.1, 0.1, 0.1, 9.0 + k], (8, 1)) for k in range(5)])
    alone = effects.best_layer(own, "backtracking", halves(4, 4))
    assert alone.layer == 3
    found = effects.best_layer(own, "backtracking", halves(4, 4), null)
    assert (found.layer, found.peak) == (1, 1)
    assert (found.relative, found.held_out) == pytest.approx((6.0, 6.0))
    assert found.null_held_out == pytest.approx(1.0)
    assert found.reason == (
        "stands out: layer 1 has 6.00 times the mean control on held-out responses, above all 5"
    )


def test_the_last_layer_may_be_chosen():
    own = np.tile([0.1, 0.1, 0.9], (8, 1))
    null = np.full((5, 8, 3), 0.1)
    assert effects.best_layer(own, "b", halves(4, 4), null).layer == 2


def test_a_layer_that_the_held_out_half_does_not_confirm_is_not_chosen():
    own = np.full((8, 5), 0.11)
    own[:4, 1] = 0.9  # of the build half alone
    null = np.full((4, 8, 5), 0.1)
    null[2, :, 1] = 0.2
    found = effects.best_layer(own, "b", halves(4, 4), null)
    assert (found.peak, found.layer) == (1, 2), "the middle layer of five"
    assert found.reason.startswith("no layer stands out: the best, 1, has 0.88 times")
    assert found.reason.endswith("and 1 of 4 controls do as much; default")
    confirmed = own.copy()
    confirmed[4:, 1] = 0.21
    assert effects.best_layer(confirmed, "b", halves(4, 4), null).layer == 1


def test_directions_like_their_controls_stand_out_as_often_as_the_notebook_says():
    """Direction and K controls are exchangeable: one in K + 1 leaves the null by chance."""
    rng = np.random.default_rng(0)
    k, out, trials = 4, 0, 400
    for _ in range(trials):
        every = rng.lognormal(0, 0.5, size=(k + 1, 12, 6))
        found = effects.best_layer(every[0], "b", halves(6, 6), every[1:], draws=2)
        out += found.reason.startswith("stands out")
    chance = 1 / (k + 1)
    assert abs(out / trials - chance) < 4 * (chance * (1 - chance) / trials) ** 0.5


@pytest.mark.parametrize("halved", [(2, 1), (1, 2), (9, 0), (0, 9)])
def test_a_half_with_fewer_than_two_responses_chooses_no_layer(halved):
    n = sum(halved)
    ids = [*halves(*halved), *TEST[20:30], *BUILD[20:30]]
    values = np.vstack([np.ones((n, 3)), np.full((20, 3), NAN)])
    words = f"{halved[0]} responses with effects in the build half and {halved[1]} in the other"
    found = effects.best_layer(values, "backtracking", ids)
    assert found.reason == f"default: {words}, at least 2 needed in each"
    assert (found.layer, found.n) == (1, n), "the middle of three layers"
    assert np.isnan(found.peak)
    both = np.stack([values, np.tile([1.0, 2.0, 0.5], (n + 20, 1))], axis=1)
    found = effects.best_layers(measured(ids, kl_own=both), "kl/own", ["other", *NAMES])
    assert found["behaviour"].tolist() == ["backtracking", "deduction"]
    assert found["layer"].tolist() == [1, 1]
    assert found["reason"].str.startswith("default").tolist() == [True, False]


def test_best_layers_know_the_halves_of_their_responses_and_their_controls():
    values = np.zeros((8, 2, 5))
    values[:4] = [0.1, 1, 5, 2, 4]
    values[4:] = [9, 1, 5, 2, 4]
    found = effects.best_layers(measured(halves(4, 4), kl_own=values), "kl/own", NAMES)
    assert found["layer"].tolist() == [2, 2]
    assert found["rank_in_other_half"].tolist() == [2, 2]
    null = [np.tile([9.0, 1, 1, 1, 0.1], (8, 2, 1))] * 3
    beside = with_controls(values, null, halves(4, 4))
    found = effects.best_layers(beside, "kl/own", NAMES)
    assert found["layer"].tolist() == [4, 4]
    others = replace(beside, effects={**beside.effects, "kl/others": beside.effects["kl/own"]})
    assert effects.best_layers(others, "kl/others", NAMES)["layer"].tolist() == [2, 2]
    with pytest.raises(ValueError, match="8 rows of effects but 7 response ids"):
        effects.best_layer(values[:, 0], "backtracking", halves(4, 3))


def test_a_behaviour_without_any_effect_is_steered_at_the_default():
    found = effects.best_layers(measured(kl_own=np.full((2, 2, 3), NAN)), "kl/own", NAMES)
    assert found["layer"].tolist() == [1, 1]
    assert effects.chosen_layers(found, None) == dict.fromkeys(NAMES, 1)
    none = effects.best_layers(measured(kl_own=np.ones((2, 2, 3))), "kl/own", ["humming"])
    assert none.empty
    assert "layer" in none.columns
    assert effects.chosen_layers(none, None) == {}


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
