"""Span means against a naive loop, written from METHOD section 6: one plain forward with
``output_hidden_states``-free hooks for every response, one Python loop over its spans."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stllms import activations, means, vectors
from stllms.records import BEHAVIOURS, Response, TokenSpan

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"]


def response(number: int, prompt: list[int], output: list[int]) -> Response:
    return Response(
        task_id=f"task-{number}",
        category="mathematical logic",
        prompt_text="",
        prompt_ids=tuple(prompt),
        output_ids=tuple(output),
        text="",
        thinking="",
        thinking_start=0,
        answer="",
        closed=True,
        finished=True,
    )


def sample(n: int = 24, seed: int = 0) -> tuple[list[Response], list[list[TokenSpan]]]:
    """Random responses of different length, spans of 1 to 20 tokens, some at token 0."""
    draw = random.Random(seed)
    responses, spans = [], []
    for number in range(n):
        ids = [draw.randrange(256) for _ in range(draw.randrange(45, 90))]
        responses.append(response(number, ids[:5], ids[5:]))
        at, mine = draw.choice([0, 1, 5, 6]), []
        while at < 40:
            end = at + draw.randrange(1, 21)
            mine.append(TokenSpan(draw.choice(BEHAVIOURS), at, min(end, len(ids))))
            at = end + draw.randrange(0, 3)
        spans.append(mine)
    return responses, spans


def hidden_states(model, ids) -> torch.Tensor:
    """``h[l, t]`` of a plain forward, ``[L, T, D]`` float64."""
    kept = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, output: kept.append(output[0].double()))
        for layer in model.layers
    ]
    try:
        with torch.no_grad():
            model.hf(input_ids=torch.tensor([ids]))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(kept)


def naive(model, responses, spans):
    """(vectors by behaviour, response averages), every span by its own loop."""
    by_behaviour = {b: [] for b in BEHAVIOURS}
    overall = []
    for one, mine in zip(responses, spans, strict=True):
        h = hidden_states(model, [*one.prompt_ids, *one.output_ids])
        for span in mine:
            if span.start == 0:
                continue
            first, last = span.start - 1, min(span.end - 1, span.start + 10) - 1
            tokens = [h[:, t] for t in range(first, last + 1)]
            assert 1 <= len(tokens) <= 11
            by_behaviour[span.label].append(sum(tokens) / len(tokens))
        start, end = min(s.start for s in mine), max(s.end for s in mine)
        overall.append(h[:, start:end].mean(1))
    return by_behaviour, overall


@pytest.mark.parametrize("kind", FAMILIES)
def test_means_equal_the_naive_loop(tiny_model, kind):
    model = tiny_model(kind)
    responses, spans = sample(8)
    got = activations.collect(model, responses, spans, batch_size=3, progress=False)
    by_behaviour, overall = naive(model, responses, spans)
    assert got.counts.sum(0).tolist() == [len(by_behaviour[b]) for b in BEHAVIOURS]
    torch.testing.assert_close(got.overall(), sum(overall) / len(overall), atol=1e-4, rtol=1e-4)
    for b, name in enumerate(BEHAVIOURS):
        x = torch.stack(by_behaviour[name])
        torch.testing.assert_close(got.mean()[b], x.mean(0), atol=1e-4, rtol=1e-4)
        squares = got.squares.sum(0)[b]
        torch.testing.assert_close(squares, (x**2).sum(0), atol=1e-3, rtol=1e-4)


def test_batched_is_unbatched(tiny_llama):
    responses, spans = sample()
    options = {"keep": (1, 3), "progress": False}
    alone = activations.collect(tiny_llama, responses, spans, batch_size=1, **options)
    for size in (2, 7, 64):
        batched = activations.collect(tiny_llama, responses, spans, batch_size=size, **options)
        assert torch.equal(batched.counts, alone.counts)
        for name in ("sums", "squares", "overall_sums"):
            torch.testing.assert_close(
                getattr(batched, name), getattr(alone, name), atol=2e-5, rtol=1e-4
            )


def test_order_and_shards_do_not_matter(tiny_llama):
    responses, spans = sample()
    whole = activations.collect(tiny_llama, responses, spans, progress=False)
    back = activations.collect(tiny_llama, responses[::-1], spans[::-1], progress=False)
    shards = activations.collect(tiny_llama, responses[:9], spans[:9], progress=False).merge(
        activations.collect(tiny_llama, responses[9:], spans[9:], progress=False)
    )
    for other in (back, shards):
        assert torch.equal(other.counts, whole.counts)
        torch.testing.assert_close(other.sums, whole.sums, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(other.squares, whole.squares, atol=1e-4, rtol=1e-4)
        assert {name: other.ledger[name] for name in whole.ledger} == whole.ledger
        assert other.task_ids == whole.task_ids == tuple(sorted(r.task_id for r in responses))


def test_parts_follow_the_task_alone_and_halves_add_up(tiny_llama):
    responses, spans = sample()
    got = activations.collect(tiny_llama, responses, spans, progress=False)
    per_part = torch.zeros(means.PARTS, dtype=torch.int64)
    for one in responses:
        per_part[means.part_of(one.task_id)] += 1
    assert torch.equal(got.overall_counts, per_part)
    build, test = got.half("build"), got.half("test")
    assert torch.equal(build.counts + test.counts, got.counts)
    n_build = sum(means.is_build(one.task_id) for one in responses)
    assert int(build.overall_counts.sum()) == n_build == len(build.task_ids)
    assert {*build.task_ids, *test.task_ids} == {one.task_id for one in responses}


def test_the_test_half_is_projected_on_directions_of_the_build_half(tiny_llama):
    responses, spans = sample(40)
    got = activations.collect(
        tiny_llama, responses, spans, keep=range(4), batch_size=5, progress=False
    )
    n = len(got.projection_labels)
    assert n == int(got.half("test").counts.sum())
    # Samples follow the order of reading: the build half, then the test half.
    held_out, labels = got.samples[-n:], got.sample_labels[-n:]
    assert torch.equal(labels, got.projection_labels)
    build = got.half("build")
    directions = torch.nn.functional.normalize(build.mean() - build.overall(), dim=-1).float()
    want = torch.einsum("sld,nld->sln", held_out, directions)
    torch.testing.assert_close(got.projections, want, atol=1e-4, rtol=1e-4)
    result = means.separability(got, min_spans=5)
    assert torch.isfinite(result.auc).all()
    assert ((result.auc >= 0) & (result.auc <= 1)).all()


def test_samples_are_the_span_means(tiny_qwen2):
    responses, spans = sample(6)
    got = activations.collect(tiny_qwen2, responses, spans, keep=range(4), progress=False)
    one = activations.collect(tiny_qwen2, responses, spans, keep=(3, 1, 3), progress=False)
    assert one.sample_layers == (3, 1)
    assert torch.equal(one.samples, got.samples[:, [3, 1]])
    for b in range(len(BEHAVIOURS)):
        own = got.samples[got.sample_labels == b].double().sum(0)
        torch.testing.assert_close(own, got.sums.sum(0)[b], atol=1e-4, rtol=1e-4)
    assert vectors.estimate(got, "probe", min_spans=1).directions.shape == (6, 4, 32)


def test_text_after_the_last_span_is_not_read(tiny_llama):
    one = response(1, [1, 2], list(range(10, 40)))
    longer = replace(one, output_ids=(*one.output_ids, *range(60, 90)))
    spans = [[TokenSpan("deduction", 4, 20), TokenSpan("backtracking", 20, 31)]]
    a = activations.collect(tiny_llama, [one], spans, progress=False)
    b = activations.collect(tiny_llama, [longer], spans, progress=False)
    assert torch.equal(a.sums, b.sums)
    assert torch.equal(a.overall_sums, b.overall_sums)


def test_what_is_not_used_is_counted(tiny_llama):
    ids = list(range(30))
    responses = [response(0, ids[:2], ids[2:]), response(1, ids[:2], ids[2:])]
    spans = [
        [
            TokenSpan("deduction", 0, 3),
            TokenSpan("deduction", 3, 9),
            TokenSpan("summing", 9, 12),
        ],
        [],
    ]
    got = activations.collect(tiny_llama, responses, spans, progress=False)
    assert got.ledger == {
        "spans": 1,
        "spans at token 0": 1,
        "spans of other labels": 1,
        "responses": 1,
        "responses without spans": 1,
    }
    assert int(got.counts.sum()) == 1
    only_zero = activations.collect(
        tiny_llama, responses[:1], [[TokenSpan("deduction", 0, 3)]], progress=False
    )
    assert int(only_zero.counts.sum()) == 0
    assert int(only_zero.overall_counts.sum()) == 1


def test_no_responses_give_empty_means(tiny_llama):
    got = activations.collect(tiny_llama, [], [], progress=False)
    assert int(got.counts.sum()) == 0
    assert means.separability(got).behaviours == ()


@pytest.mark.parametrize("span", [(5, 5), (6, 5), (28, 31), (-1, 4)])
def test_bad_spans_are_named(tiny_llama, span):
    one = response(3, [1], list(range(29)))
    with pytest.raises(
        ValueError, match=r"response 'task-3': span .* of 'deduction' is empty or"
    ):
        activations.collect(
            tiny_llama, [one], [[TokenSpan("deduction", *span)]], progress=False
        )


def test_bad_arguments_are_named(tiny_llama):
    one = response(3, [1], list(range(29)))
    with pytest.raises(ValueError, match="1 responses but spans of 2"):
        activations.collect(tiny_llama, [one], [[], []], progress=False)
    spans = [[TokenSpan("deduction", 3, 9)]]
    with pytest.raises(ValueError, match=r"no layer 9 to keep: .* has layers 0 to 3"):
        activations.collect(tiny_llama, [one], spans, keep=[1, 9], progress=False)
    with pytest.raises(ValueError, match=r"\(4, 32\), expected \[N, L, D\] \(6, 4, 32\)"):
        activations.collect(
            tiny_llama, [one], spans, readout=torch.zeros(4, 32), progress=False
        )
    broken = torch.ones(6, 4, 32)
    broken[2, 3, 7] = float("nan")
    message = f"readout is not finite: {BEHAVIOURS[2]} at layer 3"
    with pytest.raises(ValueError, match=message):
        activations.collect(tiny_llama, [one], spans, readout=broken, progress=False)
    with pytest.raises(ValueError, match=r"'task-3' is given 2 times.*each response once"):
        activations.collect(tiny_llama, [one, one], spans * 2, progress=False)
    with pytest.raises(ValueError, match="batch_size should be at least 1"):
        activations.collect(tiny_llama, [one], spans, batch_size=0, progress=False)


def test_activations_that_are_not_finite_are_named_by_layer_and_response():
    model = tiny.model("llama")
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[77] = float("inf")
        model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    good = response(4, [1], list(range(29)))
    spans = [[TokenSpan("deduction", 3, 9)]]
    with pytest.raises(ValueError, match="layer 2, response 'task-4'"):
        activations.collect(model, [good], spans, progress=False)
    bad = replace(good, task_id="task-5", prompt_ids=(77,))
    with pytest.raises(ValueError, match="layer 0, response 'task-5'"):
        activations.collect(model, [bad], spans, progress=False)


def test_bfloat16_models_are_averaged_in_float32_and_summed_in_float64():
    """Against float64 averages of the very activations that were read, response by response."""
    model = tiny.model("llama", initializer_range=0.1)
    model.hf.to(torch.bfloat16)
    responses, spans = sample(6)
    read = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _m, _i, output: read.append(output[0].double()))
    got = activations.collect(model, responses, spans, batch_size=1, keep=[2], progress=False)
    order = sorted(
        range(6), key=lambda i: (not means.is_build(f"task-{i}"), -max(s.end for s in spans[i]))
    )
    want, overall = [], 0.0
    for turn, i in enumerate(order):
        h = torch.stack(read[4 * turn : 4 * turn + 4])
        used = [s for s in spans[i] if s.start]
        want += [h[:, s.start - 1 : min(s.end - 1, s.start + 10)].mean(1) for s in used]
        overall = overall + h[:, min(s.start for s in spans[i]) :].mean(1) / 6
    want = torch.stack(want)
    assert got.sums.dtype == got.squares.dtype == got.overall_sums.dtype == torch.float64
    torch.testing.assert_close(got.samples[:, 0].double(), want[:, 2], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.sums.sum((0, 1)), want.sum(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.overall(), overall, atol=1e-6, rtol=1e-5)


def test_a_layer_is_read_on_the_device_of_its_output():
    """Fake tensors refuse to meet across devices, as those of a model on several do."""
    with FakeTensorMode():
        h = torch.empty(2, 9, 4, device="cuda:1", dtype=torch.bfloat16)
        matrix, groups, units = torch.empty(2, 4, 9), torch.empty(3, 5), torch.empty(6, 4)
        place = torch.zeros(5, dtype=torch.long)
        found = activations._of_layer(h, matrix, place, groups, units)
        assert {str(x.device) for x in found} == {"cuda:1"}
        assert [tuple(x.shape) for x in found] == [(2, 4, 4), (5, 4), (3, 4), (3, 4), (5, 6)]


def test_shards_on_one_readout_separate_as_the_whole_does(tiny_llama):
    responses, spans = sample(40)
    whole = activations.collect(tiny_llama, responses, spans, progress=False)
    build = whole.half("build")
    readout = vectors.differences(build, "difference-of-means", range(build.n_layers))

    def shard(chosen, **options):
        rows = [i for i, one in enumerate(responses) if chosen(i, one)]
        mine = [responses[i] for i in rows], [spans[i] for i in rows]
        return activations.collect(tiny_llama, *mine, progress=False, **options)

    def built(_, one):
        return means.is_build(one.task_id)

    def held_out(_, one):
        return not means.is_build(one.task_id)

    shards = [
        [shard(lambda i, _, k=k: i % 3 == k, readout=readout) for k in range(3)],
        [shard(built), shard(held_out, readout=readout)],
        [shard(held_out, readout=readout), shard(built)],
        [shard(lambda *_: False), whole],
    ]
    want = means.separability(whole, min_spans=5)
    assert want.auc.std() > 0.01
    for first, *others in shards:
        merged = first
        for other in others:
            merged = merged.merge(other)
        assert merged.ledger == whole.ledger
        got = means.separability(merged, min_spans=5)
        assert got.behaviours == want.behaviours
        torch.testing.assert_close(got.auc, want.auc, atol=2e-3, rtol=0)
        torch.testing.assert_close(got.d_prime, want.d_prime, atol=1e-3, rtol=1e-3)
    apart = [shard(lambda i, _, k=k: i % 2 == k) for k in (0, 1)]
    for first, second in ((shard(built), shard(held_out)), apart):
        merged = first.merge(second)
        assert merged.ledger[means.NOT_PROJECTED] == merged.tested == whole.tested
        torch.testing.assert_close(merged.sums, whole.sums, atol=2e-5, rtol=1e-4)
        with pytest.raises(ValueError, match=r"0 of \d+ spans .* with the same readout="):
            means.separability(merged, min_spans=5)
