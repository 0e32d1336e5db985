"""Layer effects: one response against naive loops, written from the method, section 7, and
nothing else (a full forward pass per position, a hook per patch, no cache and no mask of our
own); many responses, stopped and resumed; curves and the choice of the layer."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from scipy.stats import binom, multinomial, spearmanr

from stllms.attribution import collecting, effects, patching
from stllms.attribution.effects import LayerEffects
from stllms.attribution.patching import layer_effects
from stllms.records import Annotation, Response, Span
from stllms.runs.files import BadFile, StaleArtefact, save_tensors
from stllms.vectors.directions import SteeringVectors
from stllms.vectors.means import is_build
from stllms.vectors.nulls import Controls, isotropic

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"]
POSITIONS = [1, 4, 11, 12, 25]
NAMES = ("backtracking", "deduction")
NAN = float("nan")
BUILD = [name for name in (f"r{i}" for i in range(99)) if is_build(name)]
TEST = [name for name in (f"r{i}" for i in range(99)) if not is_build(name)]


def ids(n: int = 27, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed))


def directions(model, n: int = 2, scale: float = 2.0, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, model.n_layers, model.d_model, generator=generator)


def next_token_logits(model, tokens, t, layer=None, vector=None):
    """Logits at ``t`` of a plain forward over ``tokens[: t + 1]``, with ``vector`` added to the
    output of ``layer`` at position ``t``."""

    def add(_module, _inputs, output):
        output = output.clone()
        output[0, t] += vector
        return output

    hooks = [] if layer is None else [model.layers[layer].register_forward_hook(add)]
    with torch.no_grad():
        logits = model.hf(input_ids=tokens[None, : t + 1]).logits[0, t].double()
    for hook in hooks:
        hook.remove()
    return logits


def naive_kl(model, tokens, positions, vectors):
    effects = torch.zeros(len(vectors), model.n_layers, len(positions), dtype=torch.float64)
    for p, t in enumerate(positions):
        clean = next_token_logits(model, tokens, t).log_softmax(0)
        for n in range(len(vectors)):
            for layer in range(model.n_layers):
                patched = next_token_logits(model, tokens, t, layer, vectors[n, layer])
                difference = clean - patched.log_softmax(0)
                effects[n, layer, p] = (clean.exp() * difference).sum()
    return effects


def naive_published(model, tokens, positions, vectors):
    """Through torch's own KL divergence, target given as log-probabilities, as published."""
    effects = torch.zeros(len(vectors), model.n_layers, len(positions), dtype=torch.float64)
    units = torch.nn.functional.normalize(vectors, dim=-1)
    for p, t in enumerate(positions):
        kept = []

        def keep(_module, _inputs, output, kept=kept):
            if not kept:
                output.requires_grad_(True)
            output.retain_grad()
            kept.append(output)

        handles = [layer.register_forward_hook(keep) for layer in model.layers]
        logits = model.hf(input_ids=tokens[None, : t + 1]).logits[0, t].float()
        for handle in handles:
            handle.remove()
        log_p = logits.log_softmax(0)
        divergence = torch.nn.functional.kl_div(log_p, log_p.detach(), reduction="none")
        divergence.mean().backward()
        for layer, output in enumerate(kept):
            effects[:, layer, p] = (units[:, layer] @ output.grad[0, t]).abs()
    return effects


@pytest.mark.parametrize("kind", FAMILIES)
def test_one_pass_equals_the_naive_loops(tiny_model, kind):
    model = tiny_model(kind)
    vectors = directions(model)
    fast = layer_effects(model, ids(), POSITIONS, vectors)
    slow = naive_kl(model, ids(), POSITIONS, vectors)
    assert fast.shape == (2, 4, len(POSITIONS))
    assert slow.max() > 1e-2, "the patches should matter"
    torch.testing.assert_close(fast.double(), slow, atol=1e-5, rtol=1e-4)
    fast = layer_effects(model, ids(), POSITIONS, vectors, objective="published")
    slow = naive_published(model, ids(), POSITIONS, vectors)
    assert slow.max() > 1e-6
    assert (fast - slow).norm() / slow.norm() < 1e-4


@pytest.mark.parametrize("rows", [1, 7])
def test_short_passes_have_at_most_max_rows_and_give_the_same(tiny_gemma2, rows):
    seen, vectors = [], directions(tiny_gemma2)
    whole = {
        objective: layer_effects(tiny_gemma2, ids(), POSITIONS, vectors, objective=objective)
        for objective in patching.OBJECTIVES
    }
    handle = tiny_gemma2.decoder.norm.register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0].shape[1])
    )
    try:
        for objective, want in whole.items():
            seen.clear()
            found = layer_effects(
                tiny_gemma2, ids(), POSITIONS, vectors, objective=objective, max_rows=rows
            )
            torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-4)
            response, *passes = seen
            assert response == max(POSITIONS), "the response, once"
            assert max(passes) <= rows
            patched = 0 if objective == "published" else 2 * tiny_gemma2.n_layers
            assert sum(passes) == len(POSITIONS) * (1 + patched)
    finally:
        handle.remove()


def test_positions_keep_their_order_and_nothing_else_matters_to_one(tiny_mistral):
    vectors = directions(tiny_mistral)
    together = layer_effects(tiny_mistral, ids(), [20, 3, 3], vectors)
    alone = layer_effects(tiny_mistral, ids()[:4], [3], vectors)
    for column in (1, 2):
        torch.testing.assert_close(together[:, :, [column]], alone, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(together[:, :, [0]], alone, rtol=0.1)


def test_exact_effects_grow_with_the_coefficient_and_published_ones_have_none(tiny_llama):
    vectors = directions(tiny_llama, scale=0.05)
    none, one, two = (
        layer_effects(tiny_llama, ids(), POSITIONS, vectors, coefficient=c)
        for c in (0.0, 1.0, 2.0)
    )
    assert none.max() < 1e-6
    # A small step has a quadratic effect: twice the vector, four times the divergence.
    assert 3.0 < (two.sum() / one.sum()) < 5.0
    short, long = (
        layer_effects(tiny_llama, ids(), POSITIONS, c * vectors, objective="published")
        for c in (1, 10)
    )
    torch.testing.assert_close(short, long)


def test_bfloat16_agrees_with_float32_and_stays_finite():
    exact, rounded = (tiny.model("llama", initializer_range=0.1) for _ in range(2))
    rounded.hf.to(torch.bfloat16)
    vectors = directions(exact)
    for objective in patching.OBJECTIVES:
        want = layer_effects(exact, ids(), POSITIONS, vectors, objective=objective)
        got = layer_effects(rounded, ids(), POSITIONS, vectors, objective=objective)
        assert got.dtype == torch.float32
        assert torch.isfinite(got).all()
        assert (got - want).norm() / want.norm() < 0.1
    model = tiny.model("llama")
    model.hf.lm_head.register_forward_hook(lambda _m, _i, logits: logits.bfloat16())
    fast = layer_effects(model, ids(), POSITIONS, vectors, objective="published")
    slow = naive_published(model, ids(), POSITIONS, vectors)
    assert (fast - slow).norm() / slow.norm() < 1e-3, "in float32 whatever the logits are"


def test_nothing_is_left_on_the_model(tiny_llama):
    before = next_token_logits(tiny_llama, ids(), 20)
    with pytest.raises(ValueError, match="positions"):
        layer_effects(tiny_llama, ids(), [99], directions(tiny_llama))
    for objective in patching.OBJECTIVES:
        layer_effects(tiny_llama, ids(), [20], directions(tiny_llama), objective=objective)
    torch.testing.assert_close(next_token_logits(tiny_llama, ids(), 20), before)
    assert all(parameter.grad is None for parameter in tiny_llama.hf.parameters())


def test_bad_input_is_refused_by_name(tiny_llama):
    vectors = directions(tiny_llama)
    broken = vectors.clone()
    broken[1, 2, 0] = NAN
    for message, change in (
        *(
            (rf"positions \[{t}\] are not in 1 .. 26", {"positions": [3, t]})
            for t in (0, -1, 27)
        ),
        ("no positions", {"positions": []}),
        ("whole numbers, not torch.float32", {"positions": [3.5]}),
        (r"\(2, 3, 32\).*\(N, 4, 32\)", {"directions": vectors[:, :3]}),
        ("direction 1 at layer 2 is not finite", {"directions": broken}),
        (r"ids run from 1 to 100000, .* has", {"input_ids": [1, 2, 3, 4, 100_000]}),
        ("objective 'kld'", {"objective": "kld"}),
        ("takes no coefficient", {"objective": "published", "coefficient": 2.0}),
    ):
        given = {"input_ids": ids(), "positions": [3], "directions": vectors, **change}
        with pytest.raises(ValueError, match=message):
            layer_effects(tiny_llama, **given)


def test_rows_are_as_many_as_their_logits_fit_into_the_budget(tiny_llama, monkeypatch):
    monkeypatch.setattr(patching, "BUDGET", 10 * 256 * 4 + 5)
    vocabulary = tiny_llama.hf.get_input_embeddings().weight.shape[0]
    assert patching.rows_of(tiny_llama) == (10 * 256 * 4 + 5) // (4 * vocabulary)
    monkeypatch.setattr(patching, "BUDGET", 1)
    assert patching.rows_of(tiny_llama) == 1
    monkeypatch.setattr(patching, "BUDGET", 2**40)
    assert patching.rows_of(tiny_llama) == patching.MAX_ROWS


# --- many responses --------------------------------------------------------------------------


def response(task: str, n: int = 30) -> Response:
    ids = torch.randint(0, 200, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    return Response(task, "c", "", tuple(ids[:4]), tuple(ids[4:]), "", "", 0, "", True, True)


def annotation(task: str, *spans: tuple[str, int, int]) -> Annotation:
    return Annotation(task, "hand", spans=tuple(Span(*span) for span in spans))


@pytest.fixture(scope="module")
def vectors(tiny_llama) -> SteeringVectors:
    made = directions(tiny_llama, scale=1.0)
    return SteeringVectors(NAMES, made, made, made[0], torch.tensor([9, 9]))


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


@pytest.fixture
def collect(tiny_llama, vectors):
    """``collect(responses, annotations)`` with everything else as in the other tests."""

    def run(responses, annotations, vectors=vectors, model=tiny_llama, **options):
        return collecting.collect(
            model, responses, annotations, vectors, progress=False, **options
        )

    return run


def same(found: LayerEffects, want: LayerEffects) -> bool:
    """Bit for bit, fields and tables in one order."""
    keys = list(want.effects)
    return replace(found, effects={}) == replace(want, effects={}) and all(
        [list(found.effects) == keys]
        + [np.array_equal(found.of(k), want.of(k), equal_nan=True) for k in keys]
    )


def some_controls(vectors: SteeringVectors, n: int, seed: int = 1) -> Controls:
    names = tuple(f"shuffled:{k}" for k in range(n))
    return Controls(names, isotropic(vectors.overall, n, seed))


def many(n: int, spans: int) -> tuple[list[Response], list[Annotation]]:
    """Responses of different length, labels of both names in turn."""
    made = [response(f"r{i}", 30 + i) for i in range(n)]
    places = [
        [(NAMES[k % 2], 5 + 3 * k, 8 + 3 * k) for k in range(2 + i % spans)] for i in range(n)
    ]
    return made, [annotation(f"r{i}", *mine) for i, mine in enumerate(places)]


def test_collected_effects_are_the_means_over_own_and_other_positions(
    tiny_llama, collect, vectors, chains, tmp_path
):
    found = collect(*chains)
    assert found.response_ids == ("a", "b"), "c has no span, d none with a prefix"
    assert found.ledger == {
        "responses": 2,
        "responses without a usable span": 2,
        "spans": 5,
        "spans at the first two tokens": 2,
        "positions a behaviour, own": 2,
        "positions a behaviour, others": 3,
        "positions a behaviour, controls": 2,
    }
    # (response, behaviour, set) -> the positions, from the method, section 7 by hand.
    positions = {
        (0, 0, "own"): [7],
        (0, 0, "others"): [4, 11],
        (0, 1, "own"): [4, 11],
        (0, 1, "others"): [7],
        (1, 0, "own"): [8],
        (1, 0, "others"): [4],
        (1, 1, "others"): [4, 8],
    }
    for objective in patching.OBJECTIVES:
        for (row, place, which), where in positions.items():
            ids = [*chains[0][row].prompt_ids, *chains[0][row].output_ids]
            one = vectors.directions[[place]]
            alone = layer_effects(tiny_llama, ids, where, one, objective=objective)
            got = found.effects[f"{objective}/{which}"][row, place]
            torch.testing.assert_close(got, alone[0].mean(-1), atol=1e-6, rtol=1e-4)
        assert found.effects[f"{objective}/own"][1, 1].isnan().all(), "b has no deduction"
    path = tmp_path / "e.safetensors"
    none = collect(*(given[2:] for given in chains), path=path)
    assert none.response_ids == LayerEffects.load(path).response_ids == ()
    assert none.of("kl/own").shape == (0, 2, tiny_llama.n_layers)
    assert effects.table({"kl/own": none.of("kl/own")}, NAMES)["mean"].isna().all()


def test_controls_are_measured_at_the_positions_of_every_behaviour(collect, vectors, chains):
    controls = some_controls(vectors, 2)
    plain = collect(*chains)
    found = collect(*chains, controls=controls)
    assert found.controls == [effects.null_key(name) for name in controls.names]
    assert set(found.effects) - set(plain.effects) == {effects.PAIRED, *found.controls}
    close = {"atol": 1e-6, "rtol": 1e-4, "equal_nan": True}
    for key, values in plain.effects.items():
        torch.testing.assert_close(found.effects[key], values, **close)
    for k, key in enumerate(found.controls):
        same = controls.directions[k].expand_as(vectors.directions)
        want = collect(*chains, vectors=replace(vectors, directions=same))
        torch.testing.assert_close(found.effects[key], want.effects["kl/own"], **close)
    paired, own = (found.of(key) for key in (effects.PAIRED, "kl/own"))
    assert np.array_equal(paired, own, equal_nan=True), "at all positions, both"


def test_own_and_other_positions_split_the_starts_of_all_spans():
    spans = [Span("deduction", s, 25) for s in (0, 1, 2, 2, 20)]
    spans += [Span("backtracking", 7, 9), Span("initializing", 3, 7)]
    assert collecting.positions(spans, "deduction") == [1, 19], "a token before them, once"
    assert collecting.positions(spans, "deduction", "others") == [2, 6]
    assert collecting.positions(spans, "uncertainty-estimation") == []


def test_a_sample_takes_turns_and_gives_a_quarter_to_the_controls():
    pairs = collecting.measurable(*many(12, 6))
    everything = collecting.sample(pairs, NAMES, None)
    chosen = collecting.sample(pairs, NAMES, 16, seed=1)
    for name in NAMES:
        for one, whole, (_, labels) in zip(chosen, everything, pairs, strict=True):
            starts = {s.start - 1 for s in labels.spans if s.label == name}
            assert set(whole["own"][name]) == set(whole["controls"][name]) == starts
            assert set(one["controls"][name]) <= set(one["own"][name]) <= starts
        for which, n in (("own", 16), ("others", 16), ("controls", 4)):
            sizes = np.array([len(one[which][name]) for one in chosen])
            there = np.array([len(one[which][name]) for one in everything])
            assert sizes.sum() == n, (name, which)
            fair = (sizes >= sizes.max() - 1) | (sizes == there)
            assert fair.all(), "nobody has two more than one who had more to give"
    assert chosen == collecting.sample(pairs, NAMES, 16, seed=1)
    assert chosen != collecting.sample(pairs, NAMES, 16, seed=2)


def test_the_mean_over_samples_is_the_mean_over_all_positions():
    """Unbiased: over many seeds the mean over responses of their means is that of all."""
    pairs = collecting.measurable(*many(6, 6))
    value = {t: float(t % 7) for t in range(200)}

    def mean(sampled):
        kept = [[value[t] for t in one["own"][NAMES[0]]] for one in sampled]
        return np.mean([np.mean(mine) for mine in kept if mine])

    want = mean(collecting.sample(pairs, NAMES, None))
    for n in (3, 9):
        found = [mean(collecting.sample(pairs, NAMES, n, seed=seed)) for seed in range(400)]
        assert abs(np.mean(found) - want) < 4 * np.std(found) / 400**0.5
        assert np.std(found) > 0


def test_effects_of_a_sample_are_means_over_its_positions(tiny_llama, collect, vectors):
    made, labels = many(6, 6)
    controls = some_controls(vectors, 2)
    options = {"targets": NAMES[:1], "controls": controls, "n_positions": 8, "seed": 5}
    found = collect(made, labels, **options)
    chosen = collecting.sample(collecting.measurable(made, labels), NAMES[:1], 8, seed=5)
    wanted = {
        "kl/own": ("own", vectors.directions[:1]),
        "kl/others": ("others", vectors.directions[:1]),
        effects.PAIRED: ("controls", vectors.directions[:1]),
        effects.null_key("shuffled:1"): ("controls", controls.directions[1:]),
    }
    for row, (one, sampled) in enumerate(zip(made, chosen, strict=True)):
        ids = [*one.prompt_ids, *one.output_ids]
        for key, (which, direction) in wanted.items():
            got, where = found.effects[key][row], sampled[which][NAMES[0]]
            assert got[1].isnan().all(), "deduction is no target"
            if not where:
                assert got[0].isnan().all()
                continue
            alone = layer_effects(tiny_llama, ids, where, direction)
            torch.testing.assert_close(got[0], alone[0].mean(-1), atol=1e-6, rtol=1e-4)
    everywhere = collect(made, labels)
    for key in ("published/own", "published/others"):
        assert np.array_equal(found.of(key), everywhere.of(key), equal_nan=True), key
    assert found.ledger["positions a behaviour, own"] == 8
    assert found.ledger["positions a behaviour, controls"] == 2
    assert effects.summary(found) == (
        "6 responses, up to 8 positions a behaviour; controls (2 shuffled) at up to 2 of them."
    )


def test_a_stopped_run_is_taken_up_and_ends_the_same(collect, vectors, tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "SAVE_EVERY", 2)
    work, path = many(5, 6), tmp_path / "e.safetensors"
    options = {"n_positions": 6, "controls": some_controls(vectors, 2)}
    whole = collect(*work, **options)
    real, read = collecting.layer_effects, []

    def stop(model, ids, *given, **more):
        read.append(len(ids))
        if len(read) == 4:
            raise KeyboardInterrupt
        return real(model, ids, *given, **more)

    monkeypatch.setattr(collecting, "layer_effects", stop)
    with pytest.raises(KeyboardInterrupt):
        collect(*work, **options, path=path)
    assert LayerEffects.load(path).response_ids == ("r0", "r1")
    assert same(collect(*work, **options, path=path), whole)
    assert read[4:] == [32, 33, 34], "only what was missing"
    assert same(LayerEffects.load(path), whole)
    assert same(collect(*work, **options, path=path), whole)
    assert len(read) == 7


def test_a_file_of_other_work_is_refused_by_name_and_stays(collect, vectors, chains, tmp_path):
    path = tmp_path / "e.safetensors"
    (first, *rest), (labelled, *others) = chains
    controls = some_controls(vectors, 1)
    rounded = tiny.model("llama")
    rounded.hf.to(torch.bfloat16)
    work = {"responses": chains[0], "annotations": chains[1], "n_positions": 2}
    work["controls"] = controls
    collect(**work, path=path)
    before = path.read_bytes()
    ids = ((first.output_ids[0] + 1) % 200, *first.output_ids[1:])
    spans = [replace(span, label="backtracking") for span in labelled.spans]
    for named, change in (
        ("responses", {"annotations": [annotation("a", ("deduction", 9, 12)), *others]}),
        ("responses", {"annotations": [replace(labelled, spans=tuple(spans)), *others]}),
        ("responses", {"responses": [replace(first, output_ids=ids), *rest]}),
        ("responses", {"responses": chains[0][::-1], "annotations": chains[1][::-1]}),
        ("responses", {"responses": [first], "annotations": [labelled]}),
        ("responses, spans or sample", {"n_positions": 1}),
        ("responses, spans or sample", {"seed": 1}),
        ("directions", {"vectors": replace(vectors, directions=2 * vectors.directions)}),
        ("behaviours", {"vectors": replace(vectors, behaviours=NAMES[::-1])}),
        ("directions", {"controls": replace(controls, directions=2 * controls.directions)}),
        ("controls", {"controls": replace(controls, names=("covariance:0",))}),
        ("weights", {"model": tiny.model("llama", seed=1)}),
        ("dtype", {"model": rounded}),
    ):
        with pytest.raises(StaleArtefact, match=rf"e\.safetensors was made with .*{named}"):
            collect(**{**work, **change}, path=path)
        assert path.read_bytes() == before
    vectors.save(path)
    before = path.read_bytes()
    with pytest.raises(BadFile, match=r"e\.safetensors: no layer effects, but"):
        collect(*chains, path=path)
    assert path.read_bytes() == before


def test_what_cannot_be_measured_is_refused_by_name(collect, chains):
    made, spans = chains
    for message, given, options in (
        ("4 responses but 3 annotations", (made, spans[:3]), {}),
        ("annotation of b stands at the response of a", (made[:2], spans[1::-1]), {}),
        ("2 responses have task id b", ([*made, made[1]], [*spans, spans[1]]), {}),
        ("no direction of 'humming'", chains, {"targets": ["humming"]}),
    ):
        with pytest.raises(ValueError, match=message):
            collect(*given, **options)
    broken = tiny.model("llama")
    broken.hf.lm_head.weight.data[7] = NAN
    with pytest.raises(ValueError, match=r"^a: published effects are not finite"):
        collect(*chains, model=broken)


# --- curves and layers -----------------------------------------------------------------------


def halves(build: int, test: int) -> list[str]:
    """Ids of responses: those of the build half first."""
    return [*BUILD[:build], *TEST[:test]]


def measured(ids=None, **values) -> LayerEffects:
    tensors = {key.replace("_", "/"): torch.as_tensor(v) for key, v in values.items()}
    n = len(next(iter(tensors.values())))
    return LayerEffects(tensors, tuple(ids or (f"t{i}" for i in range(n))), NAMES, "m")


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


def test_a_null_is_the_range_of_the_controls_carried_to_all_positions():
    """At the controls' positions the direction has 2 and the controls 1 and 3; at all positions
    it has 10: the controls, half and one and a half times it, would have 5 and 15 there."""
    own, everywhere = np.full((2, 2, 3), 2.0), np.full((2, 2, 3), 10.0)
    rows = effects.table({"kl/own": everywhere}, NAMES)
    none = effects.beside_nulls(rows, measured(kl_own=everywhere))
    assert none["null_low"].isna().all(), "none was measured"
    found = with_controls(own, [own / 2, own * 1.5], everywhere=everywhere)
    beside = effects.beside_nulls(rows, found)
    pd.testing.assert_frame_equal(beside[rows.columns], rows)
    assert beside["null_low"].tolist() == pytest.approx([5.0] * 6)
    assert beside["null_high"].tolist() == pytest.approx([15.0] * 6)
    others = {**found.effects, "kl/others": found.effects["kl/own"]}
    sets = effects.agreement(replace(found, effects=others), "kl/own", NAMES)
    assert set(sets["set"]) == {"kl/others"}, "a control is no set"


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
    values = np.array([[1.0, 10.0], [NAN, NAN], [3.0, 40.0]])[:, None].repeat(2, 1)
    rows = effects.table({"kl/own": values, "kl/others": values + 1}, NAMES)
    assert len(rows) == 2 * 2 * 2
    found = rows.set_index(["set", "behaviour"]).loc["kl/own", "deduction"]
    assert found["mean"].tolist() == [2.0, 25.0]
    assert found["sd"].tolist() == [1.0, 15.0], "the published band is of the population"
    assert found["n"].tolist() == [2, 2]
    assert found["layer"].tolist() == [0, 1]
    values = np.random.default_rng(1).normal(3.0, 2.0, size=(400, 1))
    band = effects.curve(values).iloc[0]
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert (band["low"], band["high"]) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=half / 10
    )


def test_the_best_layer_is_chosen_on_the_build_half_and_ranked_on_the_other():
    values = np.zeros((8, 4))
    values[:4] = [0, 1, 5, 2]  # the half that chooses
    values[4:] = [9, 1, 5, 2]  # the half that confirms
    ids = halves(4, 4)
    found = effects.best_layer(values, "backtracking", ids)
    assert (found.layer, found.rank_in_other_half, found.n) == (2, 2, 8)
    assert (found.relative, found.held_out) == (5, 5)
    assert (found.low, found.high) == (0, 2)
    assert 0.2 < found.support < 0.8
    assert "no controls" in found.reason
    back = effects.best_layer(values[::-1], "backtracking", ids[::-1])
    assert (back.layer, back.rank_in_other_half) == (2, 2), "the order says nothing"
    own, null = np.stack([values] * 2, axis=1), [np.tile([9.0, 1, 5, 0.1], (8, 2, 1))] * 3
    beside = with_controls(own, null, ids)
    assert effects.best_layers(beside, "kl/own", NAMES)["layer"].tolist() == [3, 3]
    others = replace(beside, effects={**beside.effects, "kl/others": beside.effects["kl/own"]})
    assert effects.best_layers(others, "kl/others", NAMES)["layer"].tolist() == [2, 2]


def test_support_is_the_share_of_bootstrap_samples_brute_force():
    values = np.random.default_rng(0).normal([0.0, 0.3, 0.2], size=(4, 3))
    found = effects.best_layer(values, "b", halves(2, 2), draws=20_000)
    # All 4 ** 4 samples of four responses.
    grid = np.array(np.meshgrid(*[range(4)] * 4)).reshape(4, -1).T
    peaks = values[grid].mean(1).argmax(1)
    assert found.support == pytest.approx((peaks == found.peak).mean(), abs=0.02)


def test_the_layer_is_the_best_beside_its_null_where_the_held_out_half_confirms_it():
    """The last layer moves most, and so does every control there."""
    own = np.tile([0.1, 0.6, 0.1, 9.0], (8, 1))
    null = np.stack([np.tile([0.1, 0.1, 0.1, 9.0 + k], (8, 1)) for k in range(5)])
    assert effects.best_layer(own, "backtracking", halves(4, 4)).layer == 3
    found = effects.best_layer(own, "backtracking", halves(4, 4), null)
    assert (found.layer, found.peak) == (1, 1)
    assert (found.relative, found.held_out) == pytest.approx((6.0, 6.0))
    assert found.null_held_out == pytest.approx(1.0)
    assert found.reason == (
        "stands out: layer 1 has 6.00 times the mean control on held-out responses, above all 5"
    )
    own = np.full((8, 5), 0.11)
    own[:4, 1] = 0.9  # of the build half alone
    null = np.full((4, 8, 5), 0.1)
    null[2, :, 1] = 0.2
    found = effects.best_layer(own, "b", halves(4, 4), null)
    assert (found.peak, found.layer) == (1, 2), "the middle layer of five"
    assert found.reason.startswith("no layer stands out: the best, 1, has 0.88 times")
    assert found.reason.endswith("and 1 of 4 controls do as much; default")
    own[4:, 1] = 0.21
    assert effects.best_layer(own, "b", halves(4, 4), null).layer == 1


def test_a_peak_that_resampling_moves_is_not_taken():
    """Of eight responses two make the peak at layer 3, two nearly one at 2, two nearly one at
    4. In samples with ``c``, ``d``, ``e`` draws of them 3 is the largest where ``c`` is at
    least 2, ``d`` and ``e``; without the layers 2 and 4 where ``c`` is at least 2.
    """
    own = np.tile([0.1, 1.0, 0.0, 0.0, 0.0], (8, 1))
    own[[0, 4], 3], own[[1, 5], 2], own[[2, 6], 4] = 4.2, 4.1, 4.15
    null = np.full((4, 8, 5), 0.1)
    found = effects.best_layer(own, "b", halves(4, 4), null, draws=20_000)
    expected = sum(
        multinomial.pmf([c, d, e, 8 - c - d - e], 8, [0.25] * 4)
        for c, d, e in itertools.product(range(9), repeat=3)
        if c >= max(2, d, e) and c + d + e <= 8
    )
    assert found.support == pytest.approx(expected, abs=0.02)
    assert expected < 0.5
    assert (found.peak, found.layer) == (3, 2), "the middle layer of five"
    assert found.reason.startswith("no layer is stable: the best, 3, has 10.50 times")
    own[:, [2, 4]] = 0.0
    found = effects.best_layer(own, "b", halves(4, 4), null, draws=20_000)
    assert found.support == pytest.approx(1 - binom.cdf(1, 8, 0.25), abs=0.02)
    assert (found.layer, found.reason[:10]) == (3, "stands out")


def test_directions_like_their_controls_stand_out_as_often_as_the_notebook_says():
    """Direction and K controls are exchangeable: one in K + 1 leaves the null by chance."""
    rng = np.random.default_rng(0)
    k, out, trials = 4, 0, 400
    for _ in range(trials):
        every = rng.lognormal(0, 0.5, size=(k + 1, 12, 6))
        found = effects.best_layer(every[0], "b", halves(6, 6), every[1:], draws=2)
        out += "above all" in found.reason
    chance = 1 / (k + 1)
    assert abs(out / trials - chance) < 4 * (chance * (1 - chance) / trials) ** 0.5


@pytest.mark.parametrize("halved", [(2, 1), (1, 2), (0, 9)])
def test_a_half_with_fewer_than_two_responses_chooses_no_layer(halved):
    n = sum(halved)
    ids = [*halves(*halved), *TEST[20:30], *BUILD[20:30]]
    values = np.vstack([np.ones((n, 3)), np.full((20, 3), NAN)])
    words = f"{halved[0]} responses with effects in the build half and {halved[1]} in the other"
    found = effects.best_layer(values, "backtracking", ids)
    assert found.reason == f"default: {words}, at least 2 needed in each"
    assert (found.layer, found.n) == (1, n), "the middle of three layers"
    both = np.stack([values, np.tile([1.0, 2.0, 0.5], (n + 20, 1))], axis=1)
    found = effects.best_layers(measured(ids, kl_own=both), "kl/own", ["other", *NAMES])
    assert found["behaviour"].tolist() == ["backtracking", "deduction"]
    assert found["layer"].tolist() == [1, 1]
    assert found["reason"].str.startswith("default").tolist() == [True, False]
    assert effects.chosen_layers(found, None) == dict.fromkeys(NAMES, 1)
    assert effects.chosen_layers(found, {"backtracking": 17}) == {"backtracking": 17}
    none = effects.best_layers(measured(ids, kl_own=both), "kl/own", ["humming"])
    assert effects.chosen_layers(none, None) == {}


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
    assert effects.agreement(made, "kl/own", ["deduction"]).columns[-1] == "n"


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


def labelled(*labels: str) -> Annotation:
    spans = tuple(Span(label, 5 * i + 2, 5 * i + 6) for i, label in enumerate(labels))
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


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 2, 3)])
def test_a_file_of_something_else_is_named(tmp_path, shape):
    path, effects = tmp_path / "vectors.safetensors", {"kl/own": torch.ones(shape)}
    fields = {**vars(measured(kl_own=torch.ones(2, 2, 3)))}
    del fields["effects"]
    if shape == (2, 2, 3):
        del fields["weights"]
    save_tensors(path, effects, fields)
    with pytest.raises(BadFile, match=r"vectors.safetensors: no layer effects, but kl/own"):
        LayerEffects.load(path)
