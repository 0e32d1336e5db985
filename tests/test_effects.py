"""Layer effects over responses: curves, the best layer, agreement, and their collection."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from stllms import attribution, effects
from stllms.effects import LayerEffects
from stllms.records import Annotation, Response, TokenSpan
from stllms.vectors import SteeringVectors

NAN = float("nan")
NAMES = ("backtracking", "deduction")


def measured(**values) -> LayerEffects:
    tensors = {key.replace("_", "/"): torch.as_tensor(v) for key, v in values.items()}
    ids = tuple(f"t{i}" for i in range(len(next(iter(tensors.values())))))
    return LayerEffects(tensors, ids, NAMES, "m")


# --- curves and layers -------------------------------------------------------------------


def test_a_curve_averages_responses_and_leaves_out_those_without_the_behaviour():
    values = np.array([[1.0, 10.0], [NAN, NAN], [3.0, 40.0]])
    found = effects.curve(values)
    assert found["mean"].tolist() == [2.0, 25.0]
    assert found["sd"].tolist() == [1.0, 15.0], "the published band is of the population"
    assert found["n"].tolist() == [2, 2]
    assert found["layer"].tolist() == [0, 1]
    assert (found["low"] <= found["mean"]).all()
    assert (found["mean"] <= found["high"]).all()


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


def test_the_best_layer_is_chosen_on_one_half_and_ranked_on_the_other():
    values = np.zeros((8, 4))
    values[::2] = [0, 1, 5, 2]  # the half that chooses
    values[1::2] = [9, 1, 5, 2]  # the half that confirms
    found = effects.best_layer(values, "backtracking")
    assert (found.layer, found.rank_in_other_half, found.n) == (2, 2, 8)
    assert (found.low, found.high) == (0, 2)
    assert 0.2 < found.support < 0.8


def test_support_is_whole_where_every_response_agrees():
    values = np.tile([0.0, 3.0, 1.0], (6, 1))
    found = effects.best_layer(np.vstack([values, np.full((2, 3), NAN)]), "deduction")
    assert found == effects.BestLayer("deduction", 1, 1, 1.0, 1, 1, 6)


def test_support_is_the_share_of_bootstrap_samples_brute_force():
    values = np.random.default_rng(0).normal([0.0, 0.3, 0.2], size=(4, 3))
    found = effects.best_layer(values, "b", draws=20_000)
    # All 4 ** 4 samples of four responses.
    grid = np.array(np.meshgrid(*[range(4)] * 4)).reshape(4, -1).T
    peaks = values[grid].mean(1).argmax(1)
    assert found.support == pytest.approx((peaks == found.layer).mean(), abs=0.02)


def test_fewer_than_four_responses_choose_no_layer():
    values = np.vstack([np.ones((3, 3)), np.full((9, 3), NAN)])
    with pytest.raises(ValueError, match="backtracking: 3 responses"):
        effects.best_layer(values, "backtracking")
    both = np.stack([values, np.tile([1.0, 2.0, 9.0], (12, 1))], axis=1)
    found = effects.best_layers(measured(kl_own=both), "kl/own", ["other", *NAMES])
    assert found["behaviour"].tolist() == ["deduction"]
    assert found["layer"].tolist() == [1], "the last layer is no candidate"


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
    found = effects.agreement(
        measured(
            kl_own=np.array([[up, gone]] * 2),
            kl_others=np.array([[down, up]] * 2),
            published_own=np.array([[gone, up]] * 2),
        ),
        "kl/own",
        [*NAMES, "humming"],
    )
    assert found["behaviour"].tolist() == ["backtracking"]
    assert found["kl/others"].item() == pytest.approx(-1)
    assert np.isnan(found["published/own"].item())
    assert "kl/own" not in found.columns


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
    before.save(tmp_path / "e.safetensors")
    after = LayerEffects.load(tmp_path / "e.safetensors")
    assert replace(after, effects={}) == replace(before, effects={})
    for key, tensor in before.effects.items():
        assert np.array_equal(after.of(key), tensor.numpy(), equal_nan=True)


# --- collect -----------------------------------------------------------------------------


def response(task: str, n: int = 30) -> Response:
    ids = torch.randint(0, 200, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    return Response(task, "c", "", tuple(ids[:4]), tuple(ids[4:]), "", "", 0, "", True, True)


def annotation(task: str, *spans: tuple[str, int, int]) -> Annotation:
    return Annotation(task, "hand", spans=tuple(TokenSpan(*span) for span in spans))


@pytest.fixture
def vectors(tiny_llama) -> SteeringVectors:
    shape = (2, tiny_llama.n_layers, tiny_llama.d_model)
    directions = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return SteeringVectors(NAMES, directions, directions, directions[0], torch.tensor([9, 9]))


@pytest.fixture
def chains() -> tuple[list[Response], list[Annotation]]:
    made = [response("a"), response("b", 25), response("c", 28), response("d", 20)]
    spans = [
        annotation("a", ("deduction", 5, 8), ("backtracking", 8, 12), ("deduction", 12, 20)),
        annotation("b", ("initializing", 5, 9), ("backtracking", 9, 11)),
        annotation("c"),
        annotation("d", ("deduction", 0, 4), ("deduction", 1, 5)),
    ]
    return made, spans


def test_collected_effects_are_the_means_over_own_and_other_positions(
    tiny_llama, vectors, chains
):
    found = attribution.collect(tiny_llama, *chains, vectors, progress=False)
    assert found.response_ids == ("a", "b"), "c has no span, d none with a prefix"
    assert set(found.effects) == {f"{o}/{s}" for o in ("kl", "published") for s in effects.SETS}
    ids = {r.task_id: [*r.prompt_ids, *r.output_ids] for r in chains[0]}
    # (response, behaviour, set) -> the positions, from METHOD section 7 by hand.
    positions = {
        (0, 0, "own"): [7],
        (0, 0, "others"): [4, 11],
        (0, 1, "own"): [4, 11],
        (0, 1, "others"): [7],
        (1, 0, "own"): [8],
        (1, 0, "others"): [4],
        (1, 1, "others"): [4, 8],
    }
    for objective in attribution.OBJECTIVES:
        for (row, place, which), where in positions.items():
            alone = attribution.layer_effects(
                tiny_llama,
                ids[found.response_ids[row]],
                where,
                vectors.directions[place : place + 1],
                objective=objective,
            )
            got = found.effects[f"{objective}/{which}"][row, place]
            torch.testing.assert_close(got, alone[0].mean(-1), atol=1e-6, rtol=1e-4)
        assert found.effects[f"{objective}/own"][1, 1].isnan().all(), "b has no deduction"


def test_a_stopped_collection_is_taken_up_and_ends_the_same(
    tiny_llama, vectors, chains, tmp_path, monkeypatch
):
    made, spans = chains
    whole = attribution.collect(tiny_llama, made, spans, vectors, progress=False)
    path = tmp_path / "layer_effects.safetensors"
    attribution.collect(tiny_llama, made[:1], spans[:1], vectors, path=path, progress=False)
    asked = []
    real = attribution.layer_effects
    monkeypatch.setattr(
        attribution, "layer_effects", lambda *a, **k: asked.append(a[1]) or real(*a, **k)
    )
    resumed = attribution.collect(tiny_llama, made, spans, vectors, path=path, progress=False)
    assert {len(ids) for ids in asked} == {25}, "only b was measured again"
    for again in (resumed, LayerEffects.load(path)):
        assert again.response_ids == whole.response_ids
        assert list(again.effects) == list(whole.effects), "tables of one order"
        for key, tensor in whole.effects.items():
            assert np.array_equal(again.of(key), tensor.numpy(), equal_nan=True)


def test_a_file_of_other_work_is_not_taken_up(tiny_llama, vectors, chains, tmp_path):
    made, spans = chains
    path = tmp_path / "e.safetensors"
    attribution.collect(tiny_llama, made, spans, vectors, path=path, progress=False)
    longer = replace(vectors, directions=2 * vectors.directions)
    fresh = attribution.collect(tiny_llama, made, spans, longer, progress=False)
    again = attribution.collect(tiny_llama, made, spans, longer, path=path, progress=False)
    torch.testing.assert_close(again.effects["kl/own"], fresh.effects["kl/own"], equal_nan=True)
    turned = replace(vectors, behaviours=NAMES[::-1])
    found = attribution.collect(tiny_llama, made, spans, turned, path=path, progress=False)
    assert found.behaviours == NAMES[::-1]
    back = attribution.collect(
        tiny_llama, made[1::-1], spans[1::-1], turned, path=path, progress=False
    )
    assert back.response_ids == ("b", "a")


def test_lists_that_do_not_belong_together_are_refused(tiny_llama, vectors, chains):
    made, spans = chains
    with pytest.raises(ValueError, match="4 responses but 3 annotations"):
        attribution.collect(tiny_llama, made, spans[:3], vectors, progress=False)
    with pytest.raises(ValueError, match="annotation of b stands at the response of a"):
        attribution.collect(tiny_llama, made[:2], spans[1::-1], vectors, progress=False)


def test_a_run_without_any_usable_span_has_effects_of_no_response(
    tiny_llama, vectors, chains, tmp_path
):
    made, spans = chains
    path = tmp_path / "e.safetensors"
    found = attribution.collect(
        tiny_llama, made[2:], spans[2:], vectors, path=path, progress=False
    )
    assert found.response_ids == ()
    assert found.of("kl/own").shape == (0, 2, tiny_llama.n_layers)
    assert LayerEffects.load(path).response_ids == ()
    assert effects.table({"kl/own": found.of("kl/own")}, NAMES)["mean"].isna().all()
