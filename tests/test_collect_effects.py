"""Layer effects of responses: what is collected, and the file it is cached in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from stllms import artifacts, attribution, effects, progress
from stllms.effects import LayerEffects
from stllms.provenance import StaleArtefact
from stllms.records import Annotation, Response, TokenSpan
from stllms.vectors import Controls, SteeringVectors, isotropic

NAMES = ("backtracking", "deduction")


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


def some_controls(vectors: SteeringVectors, n: int, seed: int = 1) -> Controls:
    names = tuple(f"shuffled:{k}" for k in range(n))
    return Controls(names, isotropic(vectors.overall, n, seed))


def test_controls_are_measured_at_the_positions_of_every_behaviour(tiny_llama, vectors, chains):
    controls = some_controls(vectors, 2)
    plain = attribution.collect(tiny_llama, *chains, vectors, progress=False)
    found = attribution.collect(tiny_llama, *chains, vectors, controls=controls, progress=False)
    new = {effects.PAIRED, *map(effects.null_key, controls.names)}
    assert set(found.effects) - set(plain.effects) == new
    for key in plain.effects:
        torch.testing.assert_close(
            found.effects[key], plain.effects[key], atol=1e-6, rtol=1e-4, equal_nan=True
        )
    for k, name in enumerate(controls.names):
        stand_in = replace(
            vectors, directions=controls.directions[k].expand_as(vectors.directions)
        )
        want = attribution.collect(
            tiny_llama, *chains, stand_in, objectives=["kl"], progress=False
        )
        torch.testing.assert_close(
            found.effects[effects.null_key(name)],
            want.effects["kl/own"],
            atol=1e-6,
            rtol=1e-4,
            equal_nan=True,
        )
    assert torch.equal(
        found.effects[effects.PAIRED].nan_to_num(), found.effects["kl/own"].nan_to_num()
    ), "at all positions, both"
    only = attribution.collect(
        tiny_llama, *chains, vectors, controls=controls, objectives=["published"],
        progress=False,
    )  # fmt: skip
    assert not only.effects.keys() & new, "the null is of the exact effect"


def test_effects_beside_other_controls_are_refused(collect, vectors, chains, tmp_path):
    path = tmp_path / "e.safetensors"
    controls = some_controls(vectors, 1, 1)
    collect(*chains, controls=controls, path=path)
    with pytest.raises(StaleArtefact, match="other directions or controls"):
        collect(*chains, controls=some_controls(vectors, 1, 2), path=path)
    with pytest.raises(StaleArtefact, match="other objectives or controls"):
        collect(*chains, controls=replace(controls, names=("covariance:0",)), path=path)


def many(n: int, spans: int) -> tuple[list[Response], list[Annotation]]:
    """Responses of different length, labels of both names in turn."""
    made = [response(f"r{i}", 30 + i) for i in range(n)]
    labels = [
        annotation(
            f"r{i}", *((NAMES[k % 2], 5 + 3 * k, 8 + 3 * k) for k in range(2 + i % spans))
        )
        for i in range(n)
    ]
    return made, labels


def test_a_sample_has_as_many_positions_as_asked_for_and_a_quarter_of_them_for_controls():
    pairs = effects.measurable(*many(12, 6))
    everything = effects.sample(pairs, NAMES, None)
    chosen = effects.sample(pairs, NAMES, 16, seed=1)
    for name in NAMES:
        for one, alone, (_, labels) in zip(chosen, everything, pairs, strict=True):
            assert alone["own"][name] == alone["controls"][name]
            starts = {s.start - 1 for s in labels.spans if s.label == name}
            assert set(alone["own"][name]) == starts
            assert set(one["own"][name]) <= starts
            assert set(one["controls"][name]) <= set(one["own"][name])
        for which, n in (("own", 16), ("others", 16), ("controls", 4)):
            sizes = [len(one[which][name]) for one in chosen]
            assert sum(sizes) == n, (name, which)
            there = [
                len(one[which if which != "controls" else "own"][name]) for one in everything
            ]
            # In turns: nobody has two more than one who had more to give.
            assert all(
                few >= most - 1 or few == own
                for few, own in zip(sizes, there, strict=True)
                for most in sizes
            )
    assert chosen != effects.sample(pairs, NAMES, 16, seed=2)
    assert chosen == effects.sample(pairs, NAMES, 16, seed=1)


def test_the_mean_over_samples_is_the_mean_over_all_positions():
    """Unbiased: over many seeds the mean over responses of their means is that of all."""
    pairs = effects.measurable(*many(6, 6))
    value = {t: float(t % 7) for t in range(200)}

    def mean(sampled):
        kept = [[value[t] for t in one["own"][NAMES[0]]] for one in sampled]
        return np.mean([np.mean(mine) for mine in kept if mine])

    want = mean(effects.sample(pairs, NAMES, None))
    for n in (3, 9):
        found = [mean(effects.sample(pairs, NAMES, n, seed=seed)) for seed in range(400)]
        assert abs(np.mean(found) - want) < 4 * np.std(found) / 400**0.5
        assert np.std(found) > 0


def test_effects_of_a_sample_are_means_over_its_positions(tiny_llama, vectors):
    made, labels = many(6, 6)
    controls = some_controls(vectors, 2)
    found = attribution.collect(
        tiny_llama, made, labels, vectors, targets=NAMES[:1], controls=controls,
        n_positions=8, seed=5, progress=False,
    )  # fmt: skip
    chosen = effects.sample(effects.measurable(made, labels), NAMES[:1], 8, seed=5)
    for row, (one, sampled) in enumerate(zip(made, chosen, strict=True)):
        ids = [*one.prompt_ids, *one.output_ids]
        wanted = {
            "kl/own": ("own", vectors.directions[:1]),
            "kl/others": ("others", vectors.directions[:1]),
            effects.PAIRED: ("controls", vectors.directions[:1]),
            effects.null_key("shuffled:1"): ("controls", controls.directions[1:]),
        }
        for key, (which, direction) in wanted.items():
            got, where = found.effects[key][row, 0], sampled[which][NAMES[0]]
            if not where:
                assert got.isnan().all()
                continue
            alone = attribution.layer_effects(tiny_llama, ids, where, direction)
            torch.testing.assert_close(got, alone[0].mean(-1), atol=1e-6, rtol=1e-4)
            assert found.effects[key][row, 1].isnan().all(), "deduction is no target"
    everywhere = attribution.collect(
        tiny_llama, made, labels, vectors, objectives=["published"], progress=False
    )
    for key in everywhere.effects:
        assert np.array_equal(found.of(key), everywhere.of(key), equal_nan=True), (
            "all positions"
        )
    assert found.ledger["positions a behaviour, own"] == 8
    assert found.ledger["positions a behaviour, controls"] == 2


def test_another_sample_is_refused_and_the_same_one_taken_up(collect, tmp_path, asked):
    made, labels = many(6, 6)
    path = tmp_path / "e.safetensors"
    collect(made, labels, n_positions=8, path=path)
    asked.clear()
    again = collect(made, labels, n_positions=8, path=path)
    assert not asked
    for options in ({"n_positions": 6}, {"n_positions": 8, "seed": 1}):
        assert not same(collect(made, labels, **options), again)
        with pytest.raises(StaleArtefact, match="other responses, spans or sample"):
            collect(made, labels, **options, path=path)


def test_rows_are_as_many_as_their_logits_fit_into_the_budget(tiny_llama, monkeypatch):
    monkeypatch.setattr(attribution, "BUDGET", 10 * 256 * 4 + 5)
    vocabulary = tiny_llama.hf.get_input_embeddings().weight.shape[0]
    assert attribution.rows_of(tiny_llama) == (10 * 256 * 4 + 5) // (4 * vocabulary)
    monkeypatch.setattr(attribution, "BUDGET", 1)
    assert attribution.rows_of(tiny_llama) == 1
    monkeypatch.setattr(attribution, "BUDGET", 2**40)
    assert attribution.rows_of(tiny_llama) == attribution.MAX_ROWS


def test_the_bar_counts_the_rows_that_are_patched(collect, vectors, monkeypatch, tmp_path):
    monkeypatch.setenv(progress.CHANNEL, str(tmp_path / "told"))
    made, labels = many(6, 6)
    options = {"n_positions": 8, "controls": some_controls(vectors, 3), "progress": True}
    collect(made, labels, **options)
    # Two behaviours, 8 own and 8 other positions, 2 with 3 controls, all layers; 6 gradients.
    rows = vectors.n_layers * 2 * (8 + 8 + 2 * 3) + 6
    told = progress.read(tmp_path / "told")
    assert (told.what, told.done, told.total) == ("layer effects", rows, rows)


def same(found: LayerEffects, want: LayerEffects) -> bool:
    """Bit for bit, fields and tables in one order."""
    keys = list(want.effects)
    return replace(found, effects={}) == replace(want, effects={}) and all(
        [list(found.effects) == keys]
        + [np.array_equal(found.of(k), want.of(k), equal_nan=True) for k in keys]
    )


@pytest.fixture
def collect(tiny_llama, vectors):
    """``collect(responses, annotations)`` with everything else as in the other tests."""

    def run(responses, annotations, vectors=vectors, model=tiny_llama, **options):
        options = {"progress": False, **options}
        return attribution.collect(model, responses, annotations, vectors, **options)

    return run


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """The length of every response that is measured from here on, once an objective."""
    lengths = []
    real = attribution.layer_effects

    def spy(model, ids, *args, **options):
        lengths.append(len(ids))
        return real(model, ids, *args, **options)

    monkeypatch.setattr(attribution, "layer_effects", spy)
    return lengths


def test_a_shorter_list_is_taken_up_and_ends_the_same(collect, chains, tmp_path, asked):
    made, spans = chains
    path = tmp_path / "layer_effects.safetensors"
    whole = collect(made, spans)
    collect(made[:1], spans[:1], path=path)
    asked.clear()
    resumed = collect(made, spans, path=path)
    assert set(asked) == {25}, "only b was measured again"
    assert same(resumed, whole)
    assert same(LayerEffects.load(path), whole)


def test_what_was_measured_before_a_stop_is_saved(collect, tmp_path, monkeypatch):
    monkeypatch.setattr(attribution, "SAVE_EVERY", 2)
    made = [response(f"r{n}", n) for n in (20, 21, 22, 23)]
    spans = [annotation(r.task_id, ("deduction", 5, 8)) for r in made]
    path = tmp_path / "e.safetensors"
    whole = collect(made, spans)
    broken = [*spans[:3], annotation("r23", ("deduction", 5, 99))]
    with pytest.raises(ValueError, match="r23"):
        collect(made, broken, path=path)
    assert LayerEffects.load(path).response_ids == ("r20", "r21")
    assert same(collect(made, spans, path=path), whole)
    assert same(LayerEffects.load(path), whole)


def test_a_file_with_more_responses_gives_its_first_ones_and_stays(
    collect, chains, tmp_path, asked
):
    made, spans = chains
    path = tmp_path / "e.safetensors"
    want = collect(made[:1], spans[:1])
    collect(made, spans, path=path)
    before = path.read_bytes()
    asked.clear()
    assert same(collect(made[:1], spans[:1], path=path), want)
    assert not asked
    assert path.read_bytes() == before


def other_work(case, made, spans, vectors):
    """Arguments of another collection with the same response ids."""
    first = made[0]
    ids = ((first.output_ids[0] + 1) % 200, *first.output_ids[1:])
    labels = [replace(span, label="backtracking") for span in spans[0].spans]
    changes = {
        "spans": {"annotations": [annotation("a", ("deduction", 9, 12)), *spans[1:]]},
        "labels": {"annotations": [replace(spans[0], spans=tuple(labels)), *spans[1:]]},
        "ids": {"responses": [replace(first, output_ids=ids), *made[1:]]},
        "order": {"responses": made[::-1], "annotations": spans[::-1]},
        "directions": {"vectors": replace(vectors, directions=2 * vectors.directions)},
        "behaviours": {"vectors": replace(vectors, behaviours=NAMES[::-1])},
        "objectives": {"objectives": ("kl",)},
    }
    return {"responses": made, "annotations": spans, **changes[case]}


@pytest.mark.parametrize(
    ("case", "named"),
    [
        *((case, "responses, spans or sample") for case in ("spans", "labels", "ids", "order")),
        ("directions", "directions"),
        ("behaviours", "behaviours"),
        ("objectives", "objectives"),
    ],
)
def test_a_file_of_other_work_is_refused_by_name_and_stays(
    collect, vectors, chains, tmp_path, case, named
):
    path = tmp_path / "e.safetensors"
    collect(*chains, path=path)
    before = path.read_bytes()
    with pytest.raises(StaleArtefact, match=rf"e\.safetensors was made with other .*{named}"):
        collect(**other_work(case, *chains, vectors), path=path)
    assert path.read_bytes() == before


def test_a_file_of_another_model_or_dtype_is_refused(collect, chains, tmp_path):
    path = tmp_path / "e.safetensors"
    collect(*chains, path=path)
    first = LayerEffects.load(path)
    other = tiny.model("llama", seed=1)
    other.name = first.model
    with pytest.raises(StaleArtefact, match="other weights:"):
        collect(*chains, model=other, path=path)
    other.hf.to(torch.bfloat16)
    with pytest.raises(StaleArtefact, match="dtype"):
        collect(*chains, model=other, path=path)


def test_a_file_that_holds_no_layer_effects_is_refused_and_stays(
    collect, vectors, chains, tmp_path
):
    path = tmp_path / "vectors.safetensors"
    vectors.save(path)
    before = path.read_bytes()
    with pytest.raises(artifacts.BadFile, match=r"vectors.safetensors: no layer effects, but"):
        collect(*chains, path=path)
    assert path.read_bytes() == before


def test_the_ledger_counts_what_is_not_measured(collect, chains, tmp_path):
    made, spans = chains
    path = tmp_path / "e.safetensors"
    assert collect(made[:1], spans[:1], path=path).ledger == {
        "responses": 1,
        "responses without a usable span": 0,
        "spans": 3,
        "spans at the first two tokens": 0,
        "positions a behaviour, own": 2,
        "positions a behaviour, others": 2,
        "positions a behaviour, controls": 2,
    }
    found = collect(made, spans, path=path)
    assert found.ledger == LayerEffects.load(path).ledger
    assert found.ledger == {
        "responses": 2,
        "responses without a usable span": 2,
        "spans": 5,
        "spans at the first two tokens": 2,
        "positions a behaviour, own": 2,
        "positions a behaviour, others": 3,
        "positions a behaviour, controls": 2,
    }


def test_passes_have_at_most_max_rows(collect, tiny_llama, chains):
    made, spans = chains
    rows = []
    handle = tiny_llama.final_norm.register_forward_pre_hook(
        lambda _module, inputs: rows.append(inputs[0].shape[1])
    )
    try:
        collect(made[:1], spans[:1], max_rows=2)
    finally:
        handle.remove()
    assert sorted(rows)[-2:] == [11, 11], "the response itself, once an objective"
    assert max(sorted(rows)[:-2]) == 2


def test_a_task_twice_is_refused(collect, chains):
    made, spans = chains
    with pytest.raises(ValueError, match="2 responses have task id b: give each task once"):
        collect([*made, made[1]], [*spans, spans[1]])


@pytest.mark.parametrize("objective", attribution.OBJECTIVES)
def test_effects_that_are_not_finite_name_their_response(collect, chains, objective):
    broken = tiny.model("llama")
    broken.hf.lm_head.weight.data[7] = float("nan")
    with pytest.raises(ValueError, match=f"^a: {objective} effects are not finite"):
        collect(*chains, model=broken, objectives=(objective,))


def test_lists_that_do_not_belong_together_are_refused(collect, chains):
    made, spans = chains
    with pytest.raises(ValueError, match="4 responses but 3 annotations"):
        collect(made, spans[:3])
    with pytest.raises(ValueError, match="annotation of b stands at the response of a"):
        collect(made[:2], spans[1::-1])


def test_a_run_without_any_usable_span_has_effects_of_no_response(
    tiny_llama, collect, chains, tmp_path
):
    made, spans = chains
    path = tmp_path / "e.safetensors"
    found = collect(made[2:], spans[2:], path=path)
    assert found.response_ids == ()
    assert found.of("kl/own").shape == (0, 2, tiny_llama.n_layers)
    assert LayerEffects.load(path).response_ids == ()
    assert effects.table({"kl/own": found.of("kl/own")}, NAMES)["mean"].isna().all()
