"""What is kept of activations: halves, merging, separability, and how exact directions from
it are. Collecting is tested with :mod:`stllms.activations`."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from test_vectors import NAMES, D, L, N, some_means

from stllms import artifacts, means, vectors

HALF = means.PARTS // 2


def test_halves_take_their_own_kept_spans_and_refuse_a_wrong_order():
    made, _ = some_means(spans=6)
    build, test = made.half("build"), made.half("test")
    n = 6 * N * means.PARTS // 2
    assert torch.equal(build.samples, made.samples[:n])
    assert torch.equal(test.samples, made.samples[n:])
    assert torch.equal(test.sample_labels, made.sample_labels[n:])
    mixed = replace(made, sample_labels=made.sample_labels.sort().values)
    with pytest.raises(ValueError, match="kept spans should be those of the build half"):
        mixed.half("test")


def test_separability_equals_counting_pairs():
    labels = torch.tensor([0] * 12 + [1] * 15 + [2] * 3)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(30, L, N, generator=generator) + 0.8 * (labels == 0)[:, None, None]
    values[3] = values[20]
    made = replace(some_means()[0], projections=values.contiguous(), projection_labels=labels)
    made.counts[means.PARTS // 2 :] = 0
    made.counts[-1] = torch.bincount(labels)
    result = means.separability(made)
    assert result.behaviours == NAMES[:2]
    x, y = values[:12, 1, 0].tolist(), values[12:, 1, 0].tolist()
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in x for b in y]
    assert float(result.auc[0, 1]) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    x, y = torch.tensor(x).double(), torch.tensor(y).double()
    want = (x.mean() - y.mean()) / ((x.var() + y.var()) / 2).sqrt()
    assert float(result.d_prime[0, 1]) == pytest.approx(float(want), abs=1e-5)


def test_merging_adds_and_refuses_strangers():
    a, _ = some_means(seed=0)
    b, _ = some_means(seed=1)
    both = a.merge(b)
    assert torch.equal(both.counts, a.counts + b.counts)
    torch.testing.assert_close(both.sums, a.sums + b.sums)
    for which in ("build", "test"):
        parts = [a.half(which).samples, b.half(which).samples]
        assert torch.equal(both.half(which).samples, torch.cat(parts))
    with pytest.raises(ValueError, match="model is 'm' and 'other'"):
        a.merge(replace(b, model="other"))
    with pytest.raises(ValueError, match="sums has shape"):
        a.merge(replace(b, sums=b.sums[:, :, :1]))
    with pytest.raises(ValueError, match="'build' or 'test'"):
        a.half("third")


def test_a_response_is_in_one_shard_only():
    a, b = (replace(some_means()[0], task_ids=ids) for ids in (("x", "z"), ("v", "y")))
    assert a.merge(b).task_ids == b.merge(a).task_ids == ("v", "x", "y", "z")
    with pytest.raises(ValueError, match="response 'x' is in both, one of 2; collect each in"):
        a.merge(b).merge(a)
    build, test = a.half("build"), a.half("test")
    assert [means.is_build(one) for one in build.task_ids] == [True] * len(build.task_ids)
    assert build.merge(test).task_ids == a.task_ids


def test_squares_follow_their_parts():
    a, b = (some_means(spans=5, seed=seed)[0] for seed in (0, 1))
    build, test = a.half("build"), a.half("test")
    torch.testing.assert_close(build.squares + test.squares, a.squares)
    assert not build.squares[HALF:].any()
    assert build.squares[:HALF].all()
    x = torch.cat([a.samples, b.samples]).double()
    labels = torch.cat([a.sample_labels, b.sample_labels])
    both = a.merge(b)
    for name in range(N):
        want = x[labels == name].square().sum(0)
        torch.testing.assert_close(both.squares.sum(0)[name], want, atol=1e-2, rtol=1e-5)
    errors = vectors.relative_error(both.half("test"))
    half = torch.cat([a.half("test").samples, b.half("test").samples]).double()
    half = half[torch.cat([a.half("test").sample_labels, b.half("test").sample_labels]) == 1]
    difference = (half.mean(0) - both.half("test").overall()).norm(dim=-1)
    want = (half.var(0) / len(half)).sum(-1).sqrt() / difference
    torch.testing.assert_close(errors[1], want.float(), atol=1e-4, rtol=1e-3)


def shard(build: int, test: int, *, projected: bool = True, readout: str = "", mark: int = 0):
    """A record of some spans in either half, its projections all ``mark``."""
    made = means.Means.zeros(NAMES, L, D, readout=readout)
    for part, n in ((0, build), (-1, test)):
        made.counts[part, 0] = n
        made.overall_counts[part] = int(n > 0)
    n = test if projected else 0
    return replace(
        made,
        projections=torch.full((n, L, N), float(mark)),
        projection_labels=torch.zeros(n, dtype=torch.int64),
    )


#: What shards have, and the readout and projections of all together; ``None``: dropped.
MERGED = {
    "one readout": (
        [shard(3, 4, readout="a", mark=1), shard(0, 2, readout="a", mark=2), shard(5, 0)],
        ("a", [1] * 4 + [2] * 2),
    ),
    "nothing else": ([shard(3, 4, mark=1), shard(0, 0), shard(0, 0)], ("", [1] * 4)),
    "no test half": ([shard(3, 0, readout="a"), shard(3, 0), shard(1, 0)], ("", [])),
    "a readout beside another": (
        [shard(3, 0, readout="b"), shard(2, 0, readout="c"), shard(0, 4, readout="a", mark=1)],
        ("a", [1] * 4),
    ),
    "two readouts": (
        [shard(3, 4, readout="a"), shard(3, 4, readout="b"), shard(0, 2, readout="a")],
        None,
    ),
    "each its own": ([shard(3, 4), shard(3, 4), shard(0, 0)], None),
    "its own, and more to build from": ([shard(3, 4), shard(3, 0), shard(0, 0)], None),
    "its own, and a readout": ([shard(3, 4), shard(3, 4, readout="a"), shard(1, 0)], None),
    "no readout": ([shard(3, 0), shard(0, 4, projected=False), shard(0, 0)], None),
    "no readout beside one": (
        [shard(0, 4, readout="a"), shard(0, 4, projected=False), shard(3, 0)],
        None,
    ),
}


@pytest.mark.parametrize("name", MERGED)
def test_projections_are_joined_on_one_readout_or_dropped_in_any_order(name):
    shards, want = MERGED[name]
    tested = sum(one.tested for one in shards)
    for a, b, c in permutations(shards):
        for got in (a.merge(b).merge(c), a.merge(b.merge(c))):
            assert got.tested == tested
            if want is None:
                assert got.projections.shape == (0, L, N)
                assert got.ledger == {means.NOT_PROJECTED: tested}
            else:
                readout, marks = want
                assert sorted(got.projections[:, 0, 0].tolist()) == marks
                assert got.ledger == {}
                assert got.readout == readout
            assert len(got.projection_labels) == len(got.projections)


def test_a_record_without_its_projections_does_not_separate():
    made = replace(shard(12, 12, projected=False))
    made.counts[-1, 1] = 12
    with pytest.raises(ValueError, match=r"0 of 24 .* all shards with the same readout"):
        means.separability(made)
    assert means.separability(made, min_spans=13).behaviours == ()


@pytest.mark.parametrize(("others", "names"), [(0, ()), (9, ()), (10, NAMES[:1])])
def test_a_behaviour_needs_enough_others_to_be_told_from(others, names):
    made = shard(12, 12 + others)
    made.counts[-1, :2] = torch.tensor([12, others])
    made.projection_labels[12:] = 1
    found = means.separability(made)
    assert found.behaviours == names
    assert found.auc.isfinite().all()


def test_a_digest_is_that_of_the_values():
    x = torch.randn(N, L, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert means.digest(x) == means.digest(x.float()) == means.digest(x.mT.contiguous().mT)
    assert means.digest(x) != means.digest(2 * x)


def test_files_keep_the_readout_and_others_are_refused(tmp_path):
    path = tmp_path / "means.safetensors"
    shard(3, 4, readout="a", mark=2).save(path)
    again = means.Means.load(path)
    assert again.readout == "a"
    assert again.projections.eq(2).all()
    tensors, metadata = artifacts.load_tensors(path)
    older = {name: value for name, value in metadata.items() if name != "task_ids"}
    artifacts.save_tensors(path, tensors, older)
    with pytest.raises(artifacts.BadFile, match="no span means of this version"):
        means.Means.load(path)
    tensors["squares"] = tensors["squares"].sum(0)
    artifacts.save_tensors(path, tensors, metadata)
    with pytest.raises(artifacts.BadFile, match=r"no span means .* squares \[3, 2, 16\]"):
        means.Means.load(path)
    artifacts.save_tensors(path, {"kl/own": torch.zeros(1)}, {})
    with pytest.raises(artifacts.BadFile, match="no span means of this version, but kl/own"):
        means.Means.load(path)


def of_halves(made, which):
    n = len(made.samples) // 2
    rows = {"whole": slice(None), "build": slice(n), "test": slice(n, None)}[which]
    return made.samples[rows].double(), made.sample_labels[rows]


@pytest.mark.parametrize("which", ["whole", "build", "test"])
def test_relative_error_is_the_standard_error_over_the_difference(which):
    made, _ = some_means(spans=7)
    part = made if which == "whole" else made.half(which)
    errors = vectors.relative_error(part)
    samples, labels = of_halves(made, which)
    for b in range(N):
        x = samples[labels == b]
        difference = (x.mean(0) - part.overall()).norm(dim=-1)
        want = (x.var(0) / len(x)).sum(-1).sqrt() / difference
        torch.testing.assert_close(errors[b], want.float(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("which", ["whole", "build"])
def test_the_error_by_part_is_a_jackknife_that_leaves_out_responses(which):
    made, _ = some_means(spans=7)
    part = made if which == "whole" else made.half(which)
    x = of_halves(made, which)[0].unflatten(0, (-1, N, 7))
    centres = x.mean((1, 2))
    found = []
    for out in range(len(x)):
        rest = [h for h in range(len(x)) if h != out]
        found.append(x[rest].mean((0, 2)) - centres[rest].mean(0))
    found = torch.stack(found)
    squared = ((found - found.mean(0)) ** 2).sum((0, -1)) * (len(x) - 1) / len(x)
    want = squared.sqrt() / (part.mean() - part.overall()).norm(dim=-1)
    got = vectors.relative_error(part, by="part")
    torch.testing.assert_close(got, want.float(), atol=1e-4, rtol=1e-3)


def simulated(signal: float, alike: float, seed: int, *, spans: int = 10, width: int = 400):
    """Means of one behaviour whose direction is known, ``[1, 1, width]``: ``signal`` is its
    length over that of the noise of the estimate, ``alike`` the share of a span's variance that
    all spans of its part have in common."""
    draw = np.random.default_rng(seed)
    truth = draw.standard_normal(width)
    truth /= np.linalg.norm(truth)
    made = means.Means.zeros(NAMES[:1], 1, width)
    total = spans * means.PARTS
    size = signal * np.sqrt(width * (alike / means.PARTS + (1 - alike) / total))
    for part in range(means.PARTS):
        common = np.sqrt(alike) * draw.standard_normal(width)
        own = np.sqrt(1 - alike) * draw.standard_normal((spans, width))
        x = torch.from_numpy(size * truth + common + own)
        made.counts[part, 0] = spans
        made.sums[part, 0, 0], made.squares[part, 0, 0] = x.sum(0), (x**2).sum(0)
        made.overall_counts[part] = 1
    estimate = made.mean()[0, 0].numpy()
    return made, float(estimate @ truth / np.linalg.norm(estimate))


@pytest.mark.parametrize("signal", [0.0, 0.3, 0.7, 1.0, 2.0, 5.0])
@pytest.mark.parametrize(("by", "alike"), [("span", 0.0), ("part", 0.0), ("part", 0.5)])
def test_the_expected_cosine_is_that_with_a_known_truth(signal, by, alike):
    runs = [simulated(signal, alike, seed) for seed in range(40)]
    errors = torch.stack([vectors.relative_error(made, by=by)[0, 0] for made, _ in runs])
    cosine = np.mean([found for _, found in runs])
    assert cosine == pytest.approx(signal / np.hypot(signal, 1), abs=0.02)
    # From the mean of e^2: one error of pure noise lies on either side of 1.
    expected = float(vectors.expected_cosine(errors.square().mean().sqrt()))
    assert expected == pytest.approx(cosine, abs=0.04 if signal >= 0.3 else 0.2)
    if signal == 0:
        assert errors.mean() == pytest.approx(1, abs=0.03)


def test_spans_that_are_alike_make_the_error_by_span_too_small():
    made, cosine = simulated(1.0, 0.5, 0)
    found = {by: float(vectors.relative_error(made, by=by)) for by in vectors.UNITS}
    assert found["span"] < 0.6 * found["part"]
    assert float(vectors.expected_cosine(torch.tensor(found["span"]))) > cosine + 0.1
    assert vectors.expected_cosine(torch.tensor([0.0, 0.6, 1.0, 3.0])).tolist() == (
        pytest.approx([1.0, 0.8, 0.0, 0.0])
    )


def test_precision_is_a_row_for_every_behaviour_at_its_layer():
    made, _ = some_means(spans=4)
    made.counts[:, 1] = 0
    table = vectors.precision(made, {NAMES[2]: 1, NAMES[1]: 1, NAMES[0]: 0, "backtracking": 0})
    assert table["behaviour"].tolist() == [NAMES[2], NAMES[0]]
    assert table["layer"].tolist() == [1, 0]
    assert table["spans"].tolist() == [4 * means.PARTS] * 2
    for by in vectors.UNITS:
        error = vectors.relative_error(made, by=by)[[2, 0], [1, 0]]
        assert table[f"error by {by}"].tolist() == pytest.approx(error.tolist())
        cosine = vectors.expected_cosine(error)
        assert table[f"cosine by {by}"].tolist() == pytest.approx(cosine.tolist())
    assert vectors.precision(made, {}).empty
    with pytest.raises(ValueError, match="by span or by part, not by 'token'"):
        vectors.relative_error(made, by="token")


def test_no_error_is_known_from_one_span_or_one_part():
    made, _ = some_means(spans=1)
    only = made.only(torch.eye(means.PARTS, dtype=torch.int64)[3])
    for by in vectors.UNITS:
        assert vectors.relative_error(only, by=by).isnan().all()
    made.counts[1:, 0] = 0
    for by in vectors.UNITS:
        unknown = vectors.relative_error(made, by=by).isnan().any(1)
        assert unknown.tolist() == [True, False, False]
