"""Control directions against a naive restatement of METHOD, section 13, which keeps every span
mean, and against what must hold of random directions whatever they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from test_activations import naive, response, sample

from stllms import activations, artifacts, means, records, vectors
from stllms.records import BEHAVIOURS, STEERED, TokenSpan

K = 8


@pytest.fixture(scope="module")
def collected(tiny_llama):
    responses, spans = sample(40)
    made = activations.collect(tiny_llama, responses, spans, controls=K, seed=3, progress=False)
    return made, responses, spans


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
def kept(tiny_llama, collected):
    return span_means(tiny_llama, *collected[1:])


def generator(responses, row: int, kind: int) -> np.random.Generator:
    return np.random.default_rng([3, means.mark(responses[row].task_id), kind])


def rescaled(raw, overall):
    return (raw * (overall.norm(dim=-1) / raw.norm(dim=-1))[:, None]).float()


def test_shuffled_controls_are_the_formula_after_a_permutation_within_responses(
    collected, kept
):
    made, responses, _ = collected
    m, owners, labels, overall = kept
    draws = {row: generator(responses, row, 0) for row in set(owners)}
    found = vectors.controls("shuffled", made, K)
    for i in range(K):
        permuted = list(labels)
        for row in sorted(set(owners)):
            mine = [place for place, owner in enumerate(owners) if owner == row]
            shuffled = draws[row].permutation([BEHAVIOURS.index(labels[p]) for p in mine])
            for place, label in zip(mine, shuffled, strict=True):
                permuted[place] = BEHAVIOURS[label]
        target = STEERED[i % 4]
        assert permuted.count(target) == labels.count(target)
        chosen = torch.tensor([name == target for name in permuted])
        raw = m[chosen].mean(0) - overall
        torch.testing.assert_close(found[i], rescaled(raw, overall), atol=1e-4, rtol=1e-3)


def test_covariance_controls_are_signed_sums_of_centred_span_means(collected, kept):
    made, responses, _ = collected
    m, owners, _, overall = kept
    draws = {row: generator(responses, row, 1) for row in set(owners)}
    found = vectors.controls("covariance", made, K)
    for i in range(K):
        signs = torch.zeros(len(m), dtype=torch.float64)
        for row in sorted(set(owners)):
            mine = [place for place, owner in enumerate(owners) if owner == row]
            signs[mine] = torch.from_numpy(1.0 - 2 * draws[row].integers(0, 2, len(mine)))
        raw = sum(e * (x - m.mean(0)) for e, x in zip(signs, m, strict=True))
        torch.testing.assert_close(found[i], rescaled(raw, overall), atol=1e-4, rtol=1e-3)


def test_covariance_directions_vary_as_the_span_means_do(collected, kept):
    """``E[d d']`` is the scatter of the span means (independent signs): along the unit
    direction in which spans vary most, a covariance control has on average that direction's
    share of the variance, an isotropic one ``1 / D``."""
    _, responses, spans = collected
    model = tiny.model("llama")
    made = activations.collect(model, responses, spans, controls=400, progress=False)
    raw = (made.signed - made.signs[:, None, None] * kept[0].mean(0))[:, 2]
    centred = (kept[0] - kept[0].mean(0))[:, 2]
    scatter = centred.T @ centred
    values, axes = torch.linalg.eigh(scatter)
    along = (raw @ axes[:, -1]) ** 2
    error = float(along.std() / 400**0.5)
    assert abs(float(along.mean() - values[-1])) < 4 * error
    share = values[-1] / values.sum()
    assert share > 3 / model.d_model, "spans differ along few dimensions"
    uniform = vectors.controls("isotropic", made, 400, seed=1)[:, 2].double()
    lying = (torch.nn.functional.normalize(uniform, dim=-1) @ axes[:, -1]) ** 2
    assert abs(float(lying.mean()) - 1 / model.d_model) < 4 * float(lying.std() / 400**0.5)


def share_inside(directions, space):
    """Share of the squared length of ``[K, D]`` in the row space of ``space [k, D]``."""
    _, values, basis = torch.linalg.svd(space, full_matrices=False)
    basis = basis[values > 1e-4 * values[0]]
    units = torch.nn.functional.normalize(directions.double(), dim=-1)
    return (units @ basis.T).square().sum(-1), len(basis)


def test_matched_controls_lie_where_span_means_differ_and_isotropic_ones_hardly(tiny_qwen2):
    responses, spans = sample(4, seed=5)
    options = {"controls": K, "targets": STEERED, "progress": False}
    made = activations.collect(tiny_qwen2, responses, spans, **options)
    m, _, labels, overall = span_means(tiny_qwen2, responses, spans)
    present = [i for i in range(K) if STEERED[i % 4] in labels]
    centred = (m - m.mean(0))[:, 1]
    inside, k = share_inside(vectors.controls("covariance", made, K)[:, 1], centred)
    width = tiny_qwen2.d_model
    assert k < 0.8 * width, "fewer spans than dimensions"
    assert (inside > 0.999).all()
    common = torch.cat([centred, (m.mean(0) - overall)[None, 1]])
    shuffled = vectors.controls("shuffled", made, K)[present, 1]
    assert present
    assert (share_inside(shuffled, common)[0] > 0.999).all(), "and what all spans share"
    uniform = vectors.controls("isotropic", made, 500)[:, 1]
    found = share_inside(uniform, centred)[0]
    # A squared length inside k of D dimensions is Beta(k / 2, (D - k) / 2).
    sd = (2 * k * (width - k) / (width**2 * (width + 2))) ** 0.5
    assert abs(float(found.mean()) - k / width) < 4 * sd / 500**0.5


def test_a_permutation_favours_no_span(tiny_llama):
    ids = list(range(60))
    spans = [
        TokenSpan(("deduction", "backtracking")[k < 2], 5 * k + 1, 5 * k + 5) for k in range(8)
    ]
    jobs, _ = activations._jobs([response(0, ids[:2], ids[2:])], [spans], BEHAVIOURS)
    job = activations._weighted(jobs[0], 3000, [BEHAVIOURS.index("backtracking")], 0)
    assert (job.weights[:3000].sum(1) == 2).all(), "as many spans as before"
    often = job.weights[:3000].mean(0)
    assert np.abs(often - 2 / 8).max() < 4 * (0.25 * 0.75 / 3000) ** 0.5
    signs = job.weights[3000:]
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert np.abs(signs.mean(0)).max() < 4 / 3000**0.5
    assert np.abs(np.corrcoef(signs.T)[np.triu_indices(8, 1)]).max() < 5 / 3000**0.5


def test_controls_depend_on_the_seed_and_the_response_alone(tiny_llama, collected):
    made, responses, spans = collected
    fewer = activations.collect(
        tiny_llama, responses[::-1], spans[::-1], controls=3, seed=3, batch_size=5,
        progress=False,
    )  # fmt: skip
    other = activations.collect(tiny_llama, responses, spans, controls=3, progress=False)
    for kind in vectors.MATCHED:
        few = vectors.controls(kind, fewer, 3)
        torch.testing.assert_close(few, vectors.controls(kind, made, 3), atol=1e-4, rtol=1e-3)
        assert not torch.allclose(few, vectors.controls(kind, other, 3), atol=1e-2)
    plain = activations.collect(tiny_llama, responses, spans, progress=False)
    assert torch.equal(plain.sums, made.sums), "the means do not know of the controls"
    assert vectors.difference_of_means(plain).config == vectors.difference_of_means(made).config


def test_shards_add_up_and_refuse_other_draws(tiny_llama, collected):
    made, responses, spans = collected
    options = {"controls": K, "seed": 3, "targets": STEERED, "progress": False}
    first, second = (
        activations.collect(tiny_llama, responses[some], spans[some], **options)
        for some in (slice(15), slice(15, None))
    )
    both = first.merge(second)
    assert torch.equal(both.signs, made.signs)
    for kind in vectors.MATCHED:
        torch.testing.assert_close(
            vectors.controls(kind, both, K),
            vectors.controls(kind, made, K),
            atol=1e-4,
            rtol=1e-3,
        )
    strange = activations.collect(
        tiny_llama, responses[15:], spans[15:], **{**options, "seed": 4}
    )
    with pytest.raises(ValueError, match="cannot merge means: config is"):
        first.merge(strange)
    fewer = activations.collect(
        tiny_llama, responses[15:], spans[15:], **{**options, "controls": 2}
    )
    with pytest.raises(ValueError, match="shuffled has shape"):
        first.merge(fewer)


def test_a_stopped_collection_goes_on_with_its_controls(tmp_path, monkeypatch):
    responses, spans = sample()
    model = tiny.model("llama")
    options = {"controls": 4, "batch_size": 2, "progress": False}
    whole = activations.collect(model, responses, spans, **options)
    path = tmp_path / "collecting.safetensors"
    monkeypatch.setattr(activations, "SAVE_EVERY", 4)
    real, calls = activations._add, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(activations, "_add", stop)
    with pytest.raises(KeyboardInterrupt):
        activations.collect(model, responses, spans, path=path, **options)
    monkeypatch.setattr(activations, "_add", real)
    with pytest.raises(ValueError, match="number of controls was 4 and is now 5"):
        activations.collect(model, responses, spans, path=path, **{**options, "controls": 5})
    resumed = activations.collect(model, responses, spans, path=path, **options)
    for name in ("shuffled", "signed", "signs", "sums"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name)), name


def test_every_control_is_as_long_as_a_direction(collected):
    made = collected[0]
    for kind in records.CONTROLS:
        lengths = vectors.controls(kind, made, K).norm(dim=-1)
        torch.testing.assert_close(lengths, made.overall().float().norm(dim=-1).expand(K, -1))


def test_matched_controls_take_turns_and_survive_a_file(tmp_path, collected):
    made = collected[0]
    found = vectors.control_directions(made, "matched", 5)
    assert found.names == (
        "shuffled:0", "covariance:0", "shuffled:1", "covariance:1", "shuffled:2",
    )  # fmt: skip
    assert torch.equal(found.directions[3], vectors.controls("covariance", made, 2)[1])
    assert all(records.is_control(name) for name in found.names)
    assert not any(map(records.is_control, ("backtracking", "none", "shuffled", "other:1")))
    path = tmp_path / "controls.safetensors"
    found.save(path)
    again = vectors.Controls.load(path)
    assert (again.names, again.config) == (found.names, found.config)
    assert torch.equal(again.directions, found.directions)
    assert again.first(2).names == found.names[:2]
    uniform = vectors.control_directions(made, "isotropic", 2, seed=5)
    assert torch.equal(uniform.directions, vectors.controls("isotropic", made, 2, seed=5))


def test_what_cannot_be_had_is_refused_by_name(tmp_path, tiny_llama, collected):
    made, responses, spans = collected
    with pytest.raises(ValueError, match="'random' are not one of shuffled, covariance, iso"):
        vectors.controls("random", made, 1)
    with pytest.raises(ValueError, match=f"9 shuffled controls asked for, {K} were collected"):
        vectors.controls("shuffled", made, 9)
    with pytest.raises(ValueError, match="0 were collected"):
        vectors.controls("covariance", made.half("build"), 1)
    with pytest.raises(
        artifacts.BadFile, match=r"no control directions, which notebook 02 makes"
    ):
        vectors.Controls.load(tmp_path / "controls.safetensors")
    artifacts.save_tensors(tmp_path / "x.safetensors", {"kl/own": torch.zeros(1)}, {})
    with pytest.raises(artifacts.BadFile, match="no control directions, but kl/own"):
        vectors.Controls.load(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"targets \['humming'\]: expected at least one of"):
        activations.collect(
            tiny_llama, responses, spans, controls=1, targets=["humming"], progress=False
        )
    with pytest.raises(ValueError, match="controls should be at least 0, it is -1"):
        activations.collect(tiny_llama, responses, spans, controls=-1, progress=False)


def test_targets_are_the_steered_behaviours_with_spans_enough(tiny_llama, collected):
    made, responses, spans = collected
    assert made.config["controls"]["targets"] == list(STEERED)
    renamed = [
        [replace(s, label="deduction") if s.label != "backtracking" else s for s in mine]
        for mine in spans
    ]
    few = activations.collect(tiny_llama, responses, renamed, controls=2, progress=False)
    assert few.config["controls"]["targets"] == ["backtracking"]
    none = activations.collect(tiny_llama, responses[:1], spans[:1], controls=2, progress=False)
    assert none.config["controls"]["targets"] == []
    assert len(vectors.control_directions(none, "matched", 2)) == 0
    with pytest.raises(ValueError, match=f"no behaviour has the {means.MIN_SPANS} spans"):
        vectors.controls("shuffled", none, 1)
