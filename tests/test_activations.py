"""Span means and control directions as they are collected from a model, against naive loops
written from the method, sections 6 and 13: one plain forward pass per response with hooks, one
Python loop over its spans. Stopped, resumed and short of memory, too."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize

from stllms.labels import CONTROLS, PAPER, is_control
from stllms.records import Response, Span
from stllms.runs.files import BadFile, StaleArtefact, load_tensors, save_tensors
from stllms.vectors import activations, directions, nulls, quality
from stllms.vectors.means import MIN_SPANS, Means, is_build, mark

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"]
K = 8


def response(number: int, prompt: list[int], output: list[int]) -> Response:
    ids = (tuple(prompt), tuple(output))
    return Response(f"task-{number}", "c", "", *ids, "", "", 0, "", True, True)


def sample(n: int = 24, seed: int = 0) -> tuple[list[Response], list[list[Span]]]:
    """Random responses of different length, spans of 1 to 20 tokens, some at token 0."""
    draw = random.Random(seed)
    responses, spans = [], []
    for number in range(n):
        ids = [draw.randrange(256) for _ in range(draw.randrange(45, 90))]
        responses.append(response(number, ids[:5], ids[5:]))
        at, mine = draw.choice([0, 1, 5, 6]), []
        while at < 40:
            end = at + draw.randrange(1, 21)
            mine.append(Span(draw.choice(PAPER.names), at, min(end, len(ids))))
            at = end + draw.randrange(0, 3)
        spans.append(mine)
    return responses, spans


def collect(*given, **options) -> Means:
    return activations.collect(*given, progress=False, **options)


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
    by_behaviour = {b: [] for b in PAPER.names}
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
    got = collect(model, responses, spans, batch_size=3)
    by_behaviour, overall = naive(model, responses, spans)
    assert got.counts.sum(0).tolist() == [len(by_behaviour[b]) for b in PAPER.names]
    torch.testing.assert_close(got.overall(), sum(overall) / len(overall), atol=1e-4, rtol=1e-4)
    for b, name in enumerate(PAPER.names):
        x = torch.stack(by_behaviour[name])
        torch.testing.assert_close(got.mean()[b], x.mean(0), atol=1e-4, rtol=1e-4)
        squares = got.squares.sum(0)[b]
        torch.testing.assert_close(squares, (x**2).sum(0), atol=1e-3, rtol=1e-4)


def test_batched_is_unbatched_and_the_order_does_not_matter(tiny_llama):
    responses, spans = sample()
    options = {"keep": (1, 3)}
    alone = collect(tiny_llama, responses, spans, batch_size=1, **options)
    others = [
        collect(tiny_llama, responses, spans, batch_size=size, **options) for size in (7, 64)
    ]
    others.append(collect(tiny_llama, responses[::-1], spans[::-1], **options))
    for other in others:
        assert torch.equal(other.counts, alone.counts)
        assert other.ledger == alone.ledger
        for name in ("sums", "squares", "overall_sums"):
            torch.testing.assert_close(
                getattr(other, name), getattr(alone, name), atol=2e-5, rtol=1e-4
            )


def test_the_test_half_is_projected_on_directions_of_the_build_half(tiny_llama):
    responses, spans = sample(40)
    got = collect(tiny_llama, responses, spans, keep=range(4), batch_size=5)
    n = len(got.projection_labels)
    assert n == int(got.half("test").counts.sum())
    # Samples follow the order of reading: the build half, then the test half.
    held_out, labels = got.samples[-n:], got.sample_labels[-n:]
    assert torch.equal(labels, got.projection_labels)
    build = got.half("build")
    directions = normalize(build.mean() - build.overall(), dim=-1).float()
    want = torch.einsum("sld,nld->sln", held_out, directions)
    torch.testing.assert_close(got.projections, want, atol=1e-4, rtol=1e-4)
    assert ((quality.separability(got).auc - 0.5).abs() < 0.5).all()


def test_samples_are_the_span_means(tiny_qwen2):
    responses, spans = sample(6)
    got = collect(tiny_qwen2, responses, spans, keep=range(4))
    one = collect(tiny_qwen2, responses, spans, keep=(3, 1, 3))
    assert one.sample_layers == (3, 1)
    assert torch.equal(one.samples, got.samples[:, [3, 1]])
    for b in range(len(PAPER.names)):
        own = got.samples[got.sample_labels == b].double().sum(0)
        torch.testing.assert_close(own, got.sums.sum(0)[b], atol=1e-4, rtol=1e-4)


def test_what_is_not_used_is_counted(tiny_llama):
    responses = [response(n, [0, 1], list(range(2, 30))) for n in range(2)]
    labels = (("deduction", 0, 3), ("deduction", 3, 9), ("summing", 9, 12))
    got = collect(tiny_llama, responses, [[Span(*label) for label in labels], []])
    assert got.ledger == {
        "spans": 1,
        "spans at token 0": 1,
        "spans of other labels": 1,
        "responses": 1,
        "responses without spans": 1,
    }
    assert int(got.counts.sum()) == 1
    unused = collect(tiny_llama, responses[:1], [[Span("deduction", 0, 3)]])
    assert int(unused.counts.sum()) == 0
    assert int(unused.overall_counts.sum()) == 1


def test_bad_arguments_are_named(tiny_llama):
    one = response(3, [1], list(range(29)))
    spans = [[Span("deduction", 3, 9)]]
    with pytest.raises(ValueError, match="1 responses but spans of 2"):
        collect(tiny_llama, [one], [[], []])
    with pytest.raises(ValueError, match=r"has 4 layers; asked to keep \(1, 9\)"):
        collect(tiny_llama, [one], spans, keep=[1, 9])
    with pytest.raises(ValueError, match="'task-3' is given 2 times"):
        collect(tiny_llama, [one, one], spans * 2)
    for bad in ((5, 5), (28, 31), (-1, 4)):
        with pytest.raises(ValueError, match=r"'task-3': span .* of 'deduction' is empty or"):
            collect(tiny_llama, [one], [[Span("deduction", *bad)]])


def test_activations_that_are_not_finite_are_named_by_layer_and_response():
    model = tiny.model("llama")
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[77] = float("inf")
        model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    good = response(4, [1], list(range(29)))
    spans = [[Span("deduction", 3, 9)]]
    with pytest.raises(ValueError, match="layer 2, response 'task-4'"):
        collect(model, [good], spans)
    bad = replace(good, task_id="task-5", prompt_ids=(77,))
    with pytest.raises(ValueError, match="layer 0, response 'task-5'"):
        collect(model, [bad], spans)


def test_bfloat16_models_are_averaged_in_float32_and_summed_in_float64():
    """Against float64 averages of the very activations that were read, response by response."""
    model = tiny.model("llama", initializer_range=0.1)
    model.hf.to(torch.bfloat16)
    responses, spans = sample(6)
    read = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _m, _i, output: read.append(output[0].double()))
    got = collect(model, responses, spans, batch_size=1, keep=[2])
    order = sorted(
        range(6), key=lambda i: (not is_build(f"task-{i}"), -max(s.end for s in spans[i]))
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
        place = torch.zeros(5, dtype=torch.long)
        matrix, groups, weights = torch.empty(2, 4, 9), torch.empty(3, 5), torch.empty(8, 5)
        units = torch.empty(6, 4)
        *found, sums = activations._of_layer(h, matrix, place, groups, weights, units)
        found += sums.values()
        assert {str(x.device) for x in found} == {"cuda:1"}
        shapes = [tuple(x.shape) for x in found]
        assert shapes == [(2, 4, 4), (5, 4), (3, 4), (3, 4), (8, 4), (5, 6)]


# --- stopped, or short of memory -------------------------------------------------------------


def stopped(monkeypatch, after: int, *given, **options) -> None:
    """Collects until ``after`` batches were read, then stops as a keyboard interrupt does."""
    read, seen = activations._add, []

    def add(*arguments):
        if len(seen) == after:
            raise KeyboardInterrupt
        seen.append(arguments)
        return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(activations, "SAVE_EVERY", 4)
        patch.setattr(activations, "_add", add)
        with pytest.raises(KeyboardInterrupt):
            collect(*given, **options)


@pytest.mark.parametrize(
    ("after", "half"), [(2, "build"), (4, "build"), (5, "test"), (8, "test")]
)
def test_a_stopped_collection_goes_on_bit_for_bit(
    tiny_llama, tmp_path, monkeypatch, after, half
):
    work = (tiny_llama, *sample())
    build = sum(is_build(one.task_id) for one in work[1])
    options = {"batch_size": 3, "keep": (1, 3), "controls": 4}
    whole = collect(*work, **options)
    path = tmp_path / "collecting.safetensors"
    stopped(monkeypatch, after, *work, path=path, **options)
    saved = load_tensors(path)[1]["done"]
    assert 0 < saved < len(work[1])
    assert (saved > build) == (half == "test")
    seen, read = [], activations._add
    monkeypatch.setattr(activations, "_add", lambda *a: seen.extend(a[1]) or read(*a))
    resumed = collect(*work, path=path, **options)
    assert len(seen) == len(work[1]) - saved
    for name, tensor in whole.tensors.items():
        assert torch.equal(getattr(resumed, name), tensor), name
    assert (resumed.config, resumed.ledger) == (whole.config, whole.ledger)
    assert not path.exists()


def test_a_collection_of_something_else_is_refused_by_name(tiny_model, tmp_path, monkeypatch):
    model = tiny_model("llama")
    responses, spans = sample()
    path = tmp_path / "collecting.safetensors"
    options = {"batch_size": 4, "path": path}
    stopped(monkeypatch, 3, model, responses, spans, **options)
    kept = path.read_bytes()

    other = [replace(responses[0], prompt_ids=(7,) * 5), *responses[1:]]
    *others, last = spans[0]
    label = next(name for name in PAPER.names if name != last.label)
    shorter = [[*others, replace(last, start=last.end - 1)], *spans[1:]]
    relabelled = [[*others, replace(last, label=label)], *spans[1:]]
    for named, given, changes in (
        ("model", (tiny_model("qwen2"), responses, spans), {}),
        ("responses, spans", (model, responses[1:], spans[1:]), {}),
        ("responses", (model, other, spans), {}),
        ("spans", (model, responses, relabelled), {}),
        ("spans", (model, responses, shorter), {}),
        ("keep", (model, responses, spans), {"keep": [2]}),
        ("number of controls, controls", (model, responses, spans), {"controls": 5}),
    ):
        with pytest.raises(StaleArtefact, match=f"made with other {named}: "):
            collect(*given, **options, **changes)
    assert path.read_bytes() == kept
    save_tensors(path, {"kl/own": torch.zeros(1)}, {})
    with pytest.raises(BadFile, match="no unfinished collection, but kl/own"):
        collect(model, responses, spans, **options)


def short_of_memory(model, most: int, where: str) -> list[int]:
    """Layer 1 runs out of memory for more than ``most`` rows; the rows of every try."""
    tried = []

    def hook(_module, _arguments, output):
        tried.append(len(output))
        if len(output) > most:
            raise torch.OutOfMemoryError(where)

    model.layers[1].register_forward_hook(hook)
    return tried


def test_out_of_memory_halves_the_batch_and_adds_nothing_twice():
    responses, spans = sample()
    want = collect(tiny.model("llama"), responses, spans, batch_size=2, keep=[2])
    model = tiny.model("llama")
    tried = short_of_memory(model, 2, "layer 1")
    with pytest.warns(UserWarning, match="out of memory: going on with batches of") as warned:
        got = collect(model, responses, spans, batch_size=8, keep=[2])
    assert [str(one.message).split()[-2] for one in warned] == ["4", "2"]
    assert tried[:3] == [8, 4, 2]
    assert model.fits == 2
    for name, tensor in want.tensors.items():
        assert torch.equal(getattr(got, name), tensor), name
    tried.clear()
    collect(model, responses, spans, batch_size=8)
    assert max(tried) == 2


def test_one_response_that_does_not_fit_is_out_of_memory():
    model = tiny.model("llama")
    short_of_memory(model, 0, "no room")
    with (
        pytest.warns(UserWarning, match="batches of 1 responses"),
        pytest.raises(torch.OutOfMemoryError, match="no room"),
    ):
        collect(model, *sample(), batch_size=2)


# --- control directions ----------------------------------------------------------------------


def span_means(model, responses, spans):
    """``[S, L, D]`` float64 of all spans with a token before them, the index of the response of
    each, the label of each; and the overall mean ``[L, D]``."""
    vectors_of, owners, labels = [], [], []
    overall = 0.0
    for row, (one, mine) in enumerate(zip(responses, spans, strict=True)):
        for span in mine:
            if span.start:
                alone, _ = naive(model, [one], [[span]])
                vectors_of += alone[span.label]
                owners.append(row)
                labels.append(span.label)
        overall = overall + naive(model, [one], [mine])[1][0] / len(responses)
    return torch.stack(vectors_of), owners, labels, overall


@pytest.fixture(scope="module")
def collected(tiny_llama):
    responses, spans = sample(40)
    made = collect(tiny_llama, responses, spans, controls=K, seed=3)
    return made, responses, spans


@pytest.fixture(scope="module")
def kept(tiny_llama, collected):
    return span_means(tiny_llama, *collected[1:])


@pytest.mark.parametrize("kind", nulls.MATCHED)
def test_controls_are_their_formula_over_the_spans_one_by_one(collected, kept, kind):
    """Shuffled: the directions' formula after a permutation of the labels within responses.
    Covariance: a signed sum of centred span means."""
    made, responses, _ = collected
    m, owners, labels, overall = kept
    rows = {row: [k for k, owner in enumerate(owners) if owner == row] for row in set(owners)}
    draws = {
        row: np.random.default_rng([3, mark(responses[row].task_id), nulls.MATCHED.index(kind)])
        for row in rows
    }
    found = nulls.controls(kind, made, K)
    for i in range(K):
        permuted, signs = list(labels), torch.zeros(len(m), dtype=torch.float64)
        for row, mine in rows.items():
            if kind == "covariance":
                signs[mine] = torch.from_numpy(1.0 - 2 * draws[row].integers(0, 2, len(mine)))
                continue
            shuffled = draws[row].permutation([PAPER.names.index(labels[k]) for k in mine])
            for k, label in zip(mine, shuffled, strict=True):
                permuted[k] = PAPER.names[label]
        if kind == "covariance":
            raw = sum(e * (x - m.mean(0)) for e, x in zip(signs, m, strict=True))
        else:
            target = PAPER.targets[i % 4]
            assert permuted.count(target) == labels.count(target)
            raw = m[torch.tensor([name == target for name in permuted])].mean(0) - overall
        want = (raw * (overall.norm(dim=-1) / raw.norm(dim=-1))[:, None]).float()
        torch.testing.assert_close(found[i], want, atol=1e-4, rtol=1e-3)


def test_covariance_directions_vary_as_the_span_means_do(collected, kept):
    """``E[d d']`` is the scatter of the span means (independent signs): along the unit
    direction in which spans vary most, a covariance control has on average that direction's
    share of the variance, an isotropic one ``1 / D``."""
    _, responses, spans = collected
    model = tiny.model("llama")
    made = collect(model, responses, spans, controls=400)
    raw = (made.signed - made.signs[:, None, None] * kept[0].mean(0))[:, 2]
    centred = (kept[0] - kept[0].mean(0))[:, 2]
    scatter = centred.T @ centred
    values, axes = torch.linalg.eigh(scatter)
    along = (raw @ axes[:, -1]) ** 2
    error = float(along.std() / 400**0.5)
    assert abs(float(along.mean() - values[-1])) < 4 * error
    share = values[-1] / values.sum()
    assert share > 3 / model.d_model, "spans differ along few dimensions"
    uniform = nulls.controls("isotropic", made, 400, seed=1)[:, 2].double()
    lying = (normalize(uniform, dim=-1) @ axes[:, -1]) ** 2
    assert abs(float(lying.mean()) - 1 / model.d_model) < 4 * float(lying.std() / 400**0.5)


def test_controls_depend_on_the_seed_and_the_response_alone(tiny_llama, collected):
    made, *work = collected
    turned = [given[::-1] for given in work]
    fewer = collect(tiny_llama, *turned, controls=3, seed=3, batch_size=5)
    other = collect(tiny_llama, *work, controls=3)
    for kind in nulls.MATCHED:
        few = nulls.controls(kind, fewer, 3)
        torch.testing.assert_close(few, nulls.controls(kind, made, 3), atol=1e-4, rtol=1e-3)
        assert not torch.allclose(few, nulls.controls(kind, other, 3), atol=1e-2)
    plain = collect(tiny_llama, *work)
    assert torch.equal(plain.sums, made.sums), "the means do not know of the controls"
    configs = [directions.difference_of_means(one).config for one in (plain, made)]
    assert configs[0] == configs[1]


def test_matched_controls_take_turns_and_survive_a_file(tmp_path, collected):
    made = collected[0]
    found = nulls.control_directions(made, "matched", 5)
    assert found.names == (
        "shuffled:0", "covariance:0", "shuffled:1", "covariance:1", "shuffled:2",
    )  # fmt: skip
    assert torch.equal(found.directions[3], nulls.controls("covariance", made, 2)[1])
    lengths = made.overall().float().norm(dim=-1)
    for kind in CONTROLS:
        drawn = nulls.controls(kind, made, K)
        torch.testing.assert_close(drawn.norm(dim=-1), lengths.expand(K, -1))
    assert all(is_control(name) for name in found.names)
    assert not any(map(is_control, ("backtracking", "none", "shuffled", "other:1")))
    path = tmp_path / "controls.safetensors"
    found.save(path)
    again = nulls.Controls.load(path)
    assert (again.names, again.config) == (found.names, found.config)
    assert torch.equal(again.directions, found.directions)
    assert again.first(2).names == found.names[:2]
    uniform = nulls.control_directions(made, "isotropic", 2, seed=5)
    assert torch.equal(uniform.directions, nulls.controls("isotropic", made, 2, seed=5))


def test_what_cannot_be_had_is_refused_by_name(tmp_path, collected):
    made, path = collected[0], tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="'random' are not one of shuffled, covariance, iso"):
        nulls.controls("random", made, 1)
    with pytest.raises(ValueError, match=f"9 shuffled controls asked for, {K} were collected"):
        nulls.controls("shuffled", made, 9)
    with pytest.raises(ValueError, match="0 were collected"):
        nulls.controls("covariance", made.half("build"), 1)
    save_tensors(path, {"kl/own": torch.zeros(1)}, {})
    with pytest.raises(BadFile, match="no control directions, but kl/own"):
        nulls.Controls.load(path)


def test_targets_are_the_steered_behaviours_with_spans_enough(tiny_llama, collected):
    made, responses, spans = collected
    assert made.config["controls"]["targets"] == list(PAPER.targets)
    renamed = [
        [replace(s, label="deduction") if s.label != "backtracking" else s for s in mine]
        for mine in spans
    ]
    few = collect(tiny_llama, responses, renamed, controls=2)
    assert few.config["controls"]["targets"] == ["backtracking"]
    none = collect(tiny_llama, responses[:1], spans[:1], controls=2)
    assert none.config["controls"]["targets"] == []
    assert len(nulls.control_directions(none, "matched", 2)) == 0
    with pytest.raises(ValueError, match=f"no behaviour has the {MIN_SPANS} spans"):
        nulls.controls("shuffled", none, 1)
