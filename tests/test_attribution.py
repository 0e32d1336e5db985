"""Layer effects against naive loops, written from METHOD section 7 and nothing else: a full
forward for every position, a hook for every patch, no cache and no mask of our own."""

from __future__ import annotations

import pytest
import tiny
import torch

from stllms import attribution

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"]
POSITIONS = [1, 4, 11, 12, 25]


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

    hook = None if layer is None else model.layers[layer].register_forward_hook(add)
    try:
        with torch.no_grad():
            return model.hf(input_ids=tokens[None, : t + 1]).logits[0, t].double()
    finally:
        if hook is not None:
            hook.remove()


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
    for p, t in enumerate(positions):
        kept = {}

        def keep(layer, kept=kept):
            def hook(_module, _inputs, output):
                if layer == 0:
                    output.requires_grad_(True)
                output.retain_grad()
                kept[layer] = output

            return hook

        handles = [m.register_forward_hook(keep(i)) for i, m in enumerate(model.layers)]
        try:
            logits = model.hf(input_ids=tokens[None, : t + 1]).logits[0, t].float()
        finally:
            for handle in handles:
                handle.remove()
        log_p = logits.log_softmax(0)
        divergence = torch.nn.functional.kl_div(log_p, log_p.detach(), reduction="none")
        divergence.mean().backward()
        for layer in range(model.n_layers):
            gradient = kept[layer].grad[0, t]
            for n in range(len(vectors)):
                unit = vectors[n, layer] / vectors[n, layer].norm()
                effects[n, layer, p] = (unit @ gradient).abs()
    return effects


@pytest.mark.parametrize("kind", FAMILIES)
def test_exact_effects_equal_naive_patching(tiny_model, kind):
    model = tiny_model(kind)
    vectors = directions(model)
    fast = attribution.layer_effects(model, ids(), POSITIONS, vectors)
    slow = naive_kl(model, ids(), POSITIONS, vectors)
    assert fast.shape == (2, 4, len(POSITIONS))
    assert slow.max() > 1e-2, "the patches should matter"
    torch.testing.assert_close(fast.double(), slow, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_published_objective_equals_the_naive_loop(tiny_model, kind):
    model = tiny_model(kind)
    vectors = directions(model)
    fast = attribution.layer_effects(model, ids(), POSITIONS, vectors, objective="published")
    slow = naive_published(model, ids(), POSITIONS, vectors)
    assert slow.max() > 1e-6
    assert (fast - slow).norm() / slow.norm() < 1e-4


@pytest.mark.parametrize("objective", ["kl", "published"])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_results_do_not_depend_on_the_chunk_size(tiny_gemma2, objective, rows):
    model, vectors = tiny_gemma2, directions(tiny_gemma2)
    whole = attribution.layer_effects(model, ids(), POSITIONS, vectors, objective=objective)
    chunked = attribution.layer_effects(
        model, ids(), POSITIONS, vectors, objective=objective, max_rows=rows
    )
    torch.testing.assert_close(chunked, whole, atol=1e-6, rtol=1e-4)


def test_short_passes_have_at_most_max_rows(tiny_gemma2):
    rows = []
    handle = tiny_gemma2.final_norm.register_forward_pre_hook(
        lambda _module, inputs: rows.append(inputs[0].shape[1])
    )
    vectors = directions(tiny_gemma2)
    try:
        attribution.layer_effects(tiny_gemma2, ids(), POSITIONS, vectors, max_rows=7)
    finally:
        handle.remove()
    response, *passes = rows
    assert response == max(POSITIONS), "the response, once"
    assert max(passes) == 7
    clean, patched = len(POSITIONS), len(POSITIONS) * 2 * tiny_gemma2.n_layers
    assert sum(passes) == clean + patched


def test_positions_are_independent_of_each_other_and_keep_their_order(tiny_qwen2):
    vectors = directions(tiny_qwen2)
    together = attribution.layer_effects(tiny_qwen2, ids(), [20, 3, 3], vectors)
    alone = attribution.layer_effects(tiny_qwen2, ids(), [3], vectors)
    torch.testing.assert_close(together[:, :, 1:2], alone, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(together[:, :, 2:], alone, atol=1e-6, rtol=1e-4)


def test_later_tokens_cannot_matter(tiny_mistral):
    vectors = directions(tiny_mistral)
    long = attribution.layer_effects(tiny_mistral, ids(), [5, 9], vectors)
    short = attribution.layer_effects(tiny_mistral, ids()[:10], [5, 9], vectors)
    torch.testing.assert_close(long, short)


def test_zero_coefficient_has_no_effect_and_more_has_more(tiny_llama):
    vectors = directions(tiny_llama, scale=0.05)
    none, one, two = (
        attribution.layer_effects(tiny_llama, ids(), POSITIONS, vectors, coefficient=c)
        for c in (0.0, 1.0, 2.0)
    )
    assert none.max() < 1e-6
    # A small step has a quadratic effect: twice the vector, four times the divergence.
    assert 3.0 < (two.sum() / one.sum()) < 5.0


def test_published_effects_ignore_the_length_of_the_directions(tiny_llama):
    vectors = directions(tiny_llama)
    one = attribution.layer_effects(
        tiny_llama, ids(), POSITIONS, vectors, objective="published"
    )
    ten = attribution.layer_effects(
        tiny_llama, ids(), POSITIONS, 10 * vectors, objective="published"
    )
    torch.testing.assert_close(one, ten)


def test_bfloat16_agrees_with_float32_and_stays_finite():
    exact = tiny.model("llama", initializer_range=0.1)
    rounded = tiny.model("llama", initializer_range=0.1)
    rounded.hf.to(torch.bfloat16)
    vectors = directions(exact)
    for objective in attribution.OBJECTIVES:
        want = attribution.layer_effects(exact, ids(), POSITIONS, vectors, objective=objective)
        got = attribution.layer_effects(rounded, ids(), POSITIONS, vectors, objective=objective)
        assert got.dtype == torch.float32
        assert torch.isfinite(got).all()
        assert (got - want).norm() / want.norm() < 0.1


def test_the_published_objective_is_taken_in_float32_whatever_the_logits_are():
    model = tiny.model("llama")
    model.hf.lm_head.register_forward_hook(lambda _m, _i, logits: logits.bfloat16())
    vectors = directions(model)
    fast = attribution.layer_effects(model, ids(), POSITIONS, vectors, objective="published")
    slow = naive_published(model, ids(), POSITIONS, vectors)
    assert (fast - slow).norm() / slow.norm() < 1e-3


def test_nothing_is_left_on_the_model(tiny_llama):
    before = next_token_logits(tiny_llama, ids(), 20)
    with pytest.raises(ValueError, match="positions"):
        attribution.layer_effects(tiny_llama, ids(), [99], directions(tiny_llama))
    for objective in attribution.OBJECTIVES:
        attribution.layer_effects(
            tiny_llama, ids(), [20], directions(tiny_llama), objective=objective
        )
    torch.testing.assert_close(next_token_logits(tiny_llama, ids(), 20), before)
    assert all(parameter.grad is None for parameter in tiny_llama.hf.parameters())


@pytest.mark.parametrize("bad", [0, -1, 27, 99])
def test_positions_outside_the_response_are_named(tiny_llama, bad):
    with pytest.raises(ValueError, match=rf"positions \[{bad}\] are not in 1 .. 26"):
        attribution.layer_effects(tiny_llama, ids(), [3, bad], directions(tiny_llama))


def test_bad_input_is_refused_by_name(tiny_llama):
    vectors = directions(tiny_llama)

    def effects(positions=(3,), directions=vectors, **options):
        return attribution.layer_effects(tiny_llama, ids(), positions, directions, **options)

    with pytest.raises(ValueError, match="no positions"):
        effects(positions=[])
    with pytest.raises(ValueError, match=r"\(2, 3, 32\).*\(N, 4, 32\)"):
        effects(directions=vectors[:, :3])
    with pytest.raises(ValueError, match=r"whole numbers, not torch.float32"):
        effects(positions=[3.5])
    with pytest.raises(ValueError, match=r"ids run from 1 to 100000, .* has"):
        attribution.layer_effects(tiny_llama, [1, 2, 100_000], [1], vectors)
    with pytest.raises(ValueError, match="objective 'kld'"):
        effects(objective="kld")
    with pytest.raises(ValueError, match="takes no coefficient"):
        effects(objective="published", coefficient=2.0)
    with pytest.raises(ValueError, match="max_rows"):
        effects(max_rows=0)
    broken = vectors.clone()
    broken[1, 2, 0] = float("nan")
    with pytest.raises(ValueError, match="direction 1 at layer 2 is not finite"):
        effects(directions=broken)
