"""The decoding loop against a naive one: no cache, one row, one forward a token."""

from __future__ import annotations

import random
import warnings

import naive_sampling
import pytest
import tiny
import torch

from stllms import decode
from stllms.decode import Intervention, Row

LIMIT, TEMPERATURE, SEED = 14, 0.9, 3
ENDS = tuple(range(0, 20))


@pytest.fixture(scope="module", params=["qwen2", "llama", "mistral", "gemma2"])
def model(request):
    """A tiny model in float64, some of whose ordinary tokens end a chain, so that rows end.

    Gemma-2 stays in float32: its eager attention overflows on padding in float64.
    """
    built = tiny.model(request.param)
    if request.param != "gemma2":
        built.hf.double()
    built.eos_ids = (*built.eos_ids, *ENDS)
    return built


def rows(model, count: int = 15) -> list[Row]:
    """Rows of all lengths: plain, with one intervention, with two at two layers."""
    rng = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        ids = tuple(rng.randrange(40, 200) for _ in range(rng.randint(2, 12)))
        first, second = torch.randn(2, model.d_model, generator=generator)
        edits = (
            (),
            (Intervention(first, i % model.n_layers, 1.5),),
            (
                Intervention(first, 1, -0.7, where="generated"),
                Intervention(second, 3, 1.0, "ablate"),
            ),
        )[i % 3]
        made.append(Row(ids, f"task-{i}", edits))
    return made


def naive(model, row: Row) -> tuple[int, ...]:
    """METHOD section 8 word for word: the whole prefix again for every token, with hooks."""
    ids, prompt, written = list(row.prompt_ids), len(row.prompt_ids), []

    def hook(item: Intervention):
        def edit(_module, _inputs, output):
            vector = item.direction.to(output.dtype)
            if item.operation == "add":
                delta = (item.coefficient * vector).expand_as(output).clone()
            else:
                unit = vector / vector.norm()
                delta = -item.coefficient * (output @ unit)[..., None] * unit
            if item.where != "all":
                delta[:, :prompt] = 0
            return output + delta

        return edit

    for step in range(LIMIT):
        handles = [
            model.layers[item.layer].register_forward_hook(hook(item))
            for item in row.interventions
        ]
        with torch.no_grad():
            logits = model.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        for handle in handles:
            handle.remove()
        written.append(naive_sampling.draw(logits, TEMPERATURE, SEED, row.key, step))
        ids.append(written[-1])
        if written[-1] in model.eos_ids:
            break
    return tuple(written)


def run(model, chosen, size: int = 6, **changes) -> list[tuple[int, ...]]:
    options = {"max_new_tokens": LIMIT, "temperature": TEMPERATURE, "seed": SEED} | changes
    return [chain.ids for chain in decode.run(model, chosen, batch_size=size, **options)]


def test_a_mixed_refilled_batch_equals_the_naive_loop(model):
    chosen = rows(model)
    found = run(model, chosen)
    assert found == [naive(model, row) for row in chosen]
    lengths = {len(ids) for ids in found}
    assert len(lengths) > 2, "rows end at different times, so the batch was refilled"


def test_batch_size_and_order_do_not_matter(model):
    chosen = rows(model)
    found = run(model, chosen)
    assert run(model, chosen, size=1) == found
    assert run(model, chosen, size=64) == found
    assert run(model, chosen[::-1], size=4) == found[::-1]


def test_coefficient_zero_is_plain(model):
    plain = [Row(row.prompt_ids, row.key) for row in rows(model)]
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    zero = [Row(r.prompt_ids, r.key, (Intervention(vector, 1, 0.0),)) for r in plain]
    assert run(model, zero) == run(model, plain)
    strong = [Row(r.prompt_ids, r.key, (Intervention(vector, 1, 4.0),)) for r in plain]
    assert run(model, strong) != run(model, plain)


def test_plus_and_minus_of_one_vector_cancel(model):
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(2))
    both = (Intervention(vector, 2, 1.0), Intervention(vector, 2, -1.0))
    plain = [Row(row.prompt_ids, row.key) for row in rows(model)]
    assert run(model, [Row(r.prompt_ids, r.key, both) for r in plain]) == run(model, plain)


def test_greedy_ignores_seed_and_key(tiny_llama):
    ids = (50, 60, 70)
    found = run(tiny_llama, [Row(ids, "a"), Row(ids, "b")], temperature=0.0)
    assert found[0] == found[1] == run(tiny_llama, [Row(ids, "c")], temperature=0, seed=9)[0]


def test_thinking_only_stops_at_the_closing_tag(tiny_llama):
    """A vector that forces one token acts until that token is </think>, then no longer."""
    end = decode.think_end(tiny_llama)
    assert end > 0
    push = tiny_llama.unembedding()[end] * 1e3
    last = tiny_llama.n_layers - 1
    ids = (50, 60, 70)

    def write(*edits):
        return run(tiny_llama, [Row(ids, "a", edits)], temperature=0.0)[0]

    assert set(write(Intervention(push, last, 1.0))) == {end}
    generated = write(Intervention(push, last, 1.0, where="generated"))
    assert generated[0] == write()[0], "the prompt is not touched"
    assert set(generated[1:]) == {end}
    found = write(Intervention(push, last, 1.0, where="thinking"))
    assert found[:2] == generated[:2]
    assert end not in found[2:]


def test_ablation_leaves_nothing_along_the_direction():
    hidden = torch.randn(2, 3, 8, dtype=torch.float64)
    vector = torch.randn(2, 1, 8, dtype=torch.float64)
    after = hidden + decode.ablate(hidden, vector, torch.ones(2, 1, 1, dtype=torch.float64))
    assert torch.allclose((after * vector).sum(-1), torch.zeros(2, 3, dtype=torch.float64))
    nothing = decode.ablate(hidden, torch.zeros_like(vector), torch.ones(2, 1, 1))
    assert torch.equal(nothing, torch.zeros_like(hidden))


def test_memory_that_runs_out_halves_the_batch_and_says_so(tiny_llama, monkeypatch):
    calls = []
    real = decode._run

    def scarce(model, chosen, limit, size, *rest):
        calls.append(size)
        if size > 2:
            raise torch.OutOfMemoryError("no room")
        return real(model, chosen, limit, size, *rest)

    plain = run(tiny_llama, rows(tiny_llama, 4), size=8)
    monkeypatch.setattr(decode, "_run", scarce)
    with pytest.warns(UserWarning, match="out of memory: going on with batches of"):
        assert run(tiny_llama, rows(tiny_llama, 4), size=8) == plain
    assert calls == [8, 2], "four rows are one batch of 8 or of 4"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(tiny_llama, rows(tiny_llama, 4), size=8) == plain
    assert calls == [8, 2, 2], "what fitted is remembered"
    monkeypatch.setattr(tiny_llama, "fits", 2**31)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row((1,) * 600, "long"), "long: 600 prompt tokens and 14 new ones exceed"),
        (Row((1,), "a", (Intervention(torch.ones(32), 4, 1.0),)), "layers 0 to 3"),
        (Row((1,), "a", (Intervention(torch.ones(31), 1, 1.0),)), "width 31, .* has 32"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tiny_llama, row, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_llama, [row])


def test_thinking_alone_is_steered_only_where_it_has_an_end(tiny_llama, monkeypatch):
    edit = Intervention(torch.ones(32), 1, 1.0, where="thinking")
    monkeypatch.setattr(decode, "think_end", lambda model: -1)
    with pytest.raises(ValueError, match="no token </think>: where='thinking' would be"):
        run(tiny_llama, [Row((1,), "a", (edit,))])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operation": "push"}, "unknown operation 'push': add, ablate"),
        ({"where": "later"}, "unknown place 'later'"),
        ({"direction": torch.tensor([1.0, float("nan")])}, "finite vector"),
        ({"direction": torch.ones(2, 2)}, "finite vector"),
    ],
)
def test_interventions_that_make_no_sense_are_refused(arguments, message):
    values = {"direction": torch.ones(4), "layer": 0, "coefficient": 1.0} | arguments
    with pytest.raises(ValueError, match=message):
        Intervention(**values)
