"""Directions, control directions, and how good they are, from means that are made here; those
that are collected from a model are in :mod:`test_activations`."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from released_files import mean_vectors
from torch.nn.functional import cosine_similarity, normalize

from stllms import registry
from stllms.labels import CONTROLS, PAPER
from stllms.runs.files import BadFile, save_tensors
from stllms.vectors import directions, estimators, quality
from stllms.vectors.directions import SteeringVectors
from stllms.vectors.means import HALVES, PARTS, Means

N, L, D = 3, 2, 16
NAMES = PAPER.names[:N]
LAYERS = dict.fromkeys(NAMES, 1)


def some_means(*, spans: int = 40, signal: float = 3.0, seed: int = 0):
    """Means of ``spans`` random spans a behaviour and part, with a known direction each."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    truth = normalize(draw(N, L, D), dim=-1)
    x = 5 * draw(L, D) + signal * truth[:, None] + draw(PARTS, N, spans, L, D)
    made = replace(
        Means.zeros(NAMES, L, D, model="m", sample_layers=(0, 1)),
        counts=torch.full((PARTS, N), spans),
        sums=x.sum(2),
        squares=(x**2).sum(2),
        overall_sums=x.mean((1, 2)),
        overall_counts=torch.ones(PARTS, dtype=torch.int64),
        samples=x.flatten(0, 2).float(),
        sample_labels=torch.arange(N).repeat_interleave(spans).repeat(PARTS),
        sample_responses=torch.arange(PARTS).repeat_interleave(N * spans),
    )
    return made, truth


# --- directions ------------------------------------------------------------------------------


def test_directions_follow_the_formula():
    made, _ = some_means()
    sv = directions.difference_of_means(made)
    b, layer = 1, 1
    n = sum(int(made.counts[h, b]) for h in range(PARTS))
    mean = sum(made.sums[h, b, layer] for h in range(PARTS)) / n
    overall = sum(made.overall_sums[h, layer] for h in range(PARTS)) / PARTS
    want = (mean - overall) * math.dist(overall, [0] * D) / math.dist(mean, overall)
    torch.testing.assert_close(sv.direction(NAMES[b], layer), want.float())
    torch.testing.assert_close(sv.directions.norm(dim=-1), sv.overall.norm(dim=-1).expand(N, L))
    assert sv.counts.tolist() == [40 * PARTS] * N
    a, b = sv.directions[2, 1], sv.directions[0, 0]
    cosine = float(a @ b / (a.norm() * b.norm()))
    found = directions.cosines(sv, {NAMES[2]: 1, NAMES[0]: 0})
    torch.testing.assert_close(found, torch.tensor([[1.0, cosine], [cosine, 1.0]]))


@pytest.mark.parametrize("estimator", quality.ESTIMATORS)
def test_every_estimator_finds_what_was_put_in(estimator):
    made, truth = some_means()
    found = estimators.differences(made, estimator, range(L))
    contrast = normalize(truth - truth.mean(0), dim=-1)
    assert ((normalize(found, dim=-1) * contrast).sum(-1) > 0.85).all()
    if estimator == "difference-from-others":
        x, own = made.samples.double(), made.sample_labels == 2
        want = x[own].mean(0) - x[~own].mean(0)
        torch.testing.assert_close(found[2], want, atol=1e-5, rtol=1e-4)


def test_the_probe_is_at_the_minimum_of_its_loss():
    """In standardised coordinates, classes weighted equally; the bias is fitted here."""
    made, _ = some_means(spans=4, signal=1.0)
    x, y = made.samples[:, 1].double(), (made.sample_labels == 1).double()
    standard = (x - x.mean(0)) / x.std(0)
    weights = estimators.differences(made, "probe", [1])[1, 0] * x.std(0)
    weights, bias = weights.requires_grad_(True), torch.zeros(1, dtype=torch.float64)
    balance = torch.where(y > 0, 0.5 / y.sum(), 0.5 / (1 - y).sum())

    def loss():
        entropy = torch.nn.functional.binary_cross_entropy_with_logits
        each = entropy(standard @ weights + bias, y, reduction="none")
        return (balance * each).sum() + 0.005 * weights.square().sum()

    with torch.no_grad():
        for _ in range(60):  # the slope in the bias is 0.25 at most: descent
            excess = (balance * (torch.sigmoid(standard @ weights + bias) - y)).sum()
            bias -= excess
    (gradient,) = torch.autograd.grad(loss(), weights)
    assert gradient.norm() < 1e-5 < weights.norm()


def test_bad_requests_are_refused_by_name():
    made, _ = some_means()
    with pytest.raises(ValueError, match="no estimator 'mean'"):
        estimators.differences(made, "mean", [0])
    bare = replace(made, sample_layers=(0,), samples=made.samples[:, :1])
    with pytest.raises(ValueError, match=r"layer 1 are needed.*keep=\[1\].*at layers \[0\]"):
        quality.table(bare, LAYERS)
    with pytest.raises(ValueError, match="no response with spans"):
        directions.difference_of_means(Means.zeros(NAMES, L, D))
    made.sums[:, 2, 1] = made.counts[:, 2, None]
    made.overall_sums[:, 1] = 1
    with pytest.raises(ValueError, match=f"direction of {NAMES[2]} at layer 1 has length zero"):
        directions.difference_of_means(made)


def test_a_behaviour_with_few_spans_is_unavailable_and_never_nan():
    made, _ = some_means(spans=2)
    made.counts[:, 1], made.sums[:, 1] = 0, 0
    sv = directions.difference_of_means(made)
    assert sv.behaviours == (NAMES[0], NAMES[2])
    assert sv.unavailable == {NAMES[1]: 0}
    assert torch.isfinite(sv.directions).all()
    for name, layer, message in (
        ("deduction", 0, "'deduction' is unavailable: 0 spans, at least 10"),
        ("thinking", 0, "no direction of 'thinking'; there are initializing, adding"),
        (NAMES[0], 2, r"layer 2 is not in 0 \.\. 1"),
    ):
        with pytest.raises(ValueError, match=message):
            sv.direction(name, layer)
    nothing = directions.difference_of_means(some_means(spans=1)[0])
    assert nothing.behaviours == ()
    assert nothing.directions.shape == (0, L, D)


def test_broken_directions_are_named():
    sv = directions.difference_of_means(some_means()[0])
    broken = sv.directions.clone()
    broken[2, 0, 0] = float("nan")
    for change, message in (
        ({"directions": broken}, "adding-knowledge is not finite"),
        ({"directions": sv.directions[:2]}, r"shape \(3, 2, 16\) .* has \(2, 2, 16\)"),
        ({"directions": sv.directions.double()}, r"directions .* it has .* torch.float64"),
        ({"overall": sv.overall[0]}, r"with overall \[L, D\]"),
        ({"behaviours": NAMES[:1] * 3}, "given twice"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(sv, **change)


def test_saving_and_loading_is_bit_exact(tmp_path):
    path = tmp_path / "vectors.safetensors"
    sv = directions.difference_of_means(some_means()[0])
    sv.save(path)
    again = SteeringVectors.load(path)
    for name in ("directions", "means", "overall", "counts"):
        assert torch.equal(getattr(sv, name), getattr(again, name))
    assert (again.behaviours, again.model, again.config) == (sv.behaviours, "m", sv.config)
    save_tensors(path, {"kl/own": torch.zeros(1)}, {})
    with pytest.raises(BadFile, match=r"vectors.safetensors: no directions .* but kl/own"):
        SteeringVectors.load(path)


def load_published(tmp_path, content) -> SteeringVectors:
    torch.save(content, tmp_path / "mean_vectors_x.pt")
    return directions.load_published(tmp_path / "mean_vectors_x.pt")


def test_released_means_give_directions_by_the_formula(tmp_path):
    content = mean_vectors(summarizing=1, deduction=3)
    sv = load_published(tmp_path, content)
    assert (sv.left_out, sv.unavailable) == ({"summarizing": 1}, {"deduction": 3})
    assert (sv.model, sv.directions.shape) == ("x", (5, 28, 8))
    overall, mean = content["overall"]["mean"], content["backtracking"]["mean"]
    raw = (mean - overall).double()[17]
    want = raw * overall[17].double().norm() / raw.norm()
    torch.testing.assert_close(sv.direction("backtracking", 17), want.float())
    steering = {"backtracking": 17, "uncertainty-estimation": 18, "adding-knowledge": 18}
    layers = directions.heatmap_layers(sv, steering, PAPER.heatmap)
    assert layers == {b: steering.get(b, 17) for b in PAPER.heatmap if b != "deduction"}


GOOD = {"mean": torch.arange(6.0).reshape(2, 3), "count": 12}


def changed(value):
    """A good entry with another mean at layer 1."""
    mean = GOOD["mean"] + 1
    mean[1] = value
    return {**GOOD, "mean": mean}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected label"),
        ({"overall": torch.zeros(2)}, "expected label"),
        ({"deduction": GOOD}, "no 'overall'"),
        ({"overall": GOOD, "deduction": {**GOOD, "mean": torch.ones(3, 3)}}, "has shape"),
        ({"overall": changed(math.nan), "deduction": GOOD}, "deduction is not finite"),
        ({"overall": GOOD, "deduction": changed(GOOD["mean"][1])}, "layer 1 has length zero"),
    ],
)
def test_released_files_without_directions_are_named(tmp_path, content, message):
    with pytest.raises(BadFile, match=rf"mean_vectors_x\.pt: .*{message}"):
        load_published(tmp_path, content)


def test_max_cosine_equals_the_loop(monkeypatch):
    monkeypatch.setattr(directions, "ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(N, L, D, generator=generator)
    matrix = torch.randn(50, D, generator=generator)
    matrix[7] = 0
    best = directions.max_cosine(some, matrix)
    for n, layer in itertools.product(range(N), range(L)):
        d = some[n, layer]
        loop = [float(d @ m / (d.norm() * m.norm())) for m in matrix if m.norm() > 0]
        assert float(best[n, layer]) == pytest.approx(max(loop), abs=1e-6)


def test_steering_layers_are_the_models_own_or_the_middle_one():
    assert directions.steering_layers({"backtracking": 17}, 28) == {
        **dict.fromkeys(PAPER.targets, 14),
        "backtracking": 17,
    }
    assert directions.steering_layers(None, 28) == dict.fromkeys(PAPER.targets, 14)


# --- shipped ---------------------------------------------------------------------------------


def test_shipped_directions_are_of_the_shipped_weights(monkeypatch, tmp_path):
    sv = directions.load_shipped("tiny-thinker")
    assert sv.config["weights"] == directions.weights_of("tiny-thinker")
    assert not sv.unavailable
    assert directions.shipped("tiny-thinker")
    assert not directions.shipped("smollm2")
    monkeypatch.setattr(directions, "FIXTURES", tmp_path)
    (tmp_path / "tiny-thinker").mkdir()
    (tmp_path / "tiny-thinker" / "model.safetensors").write_bytes(b"retrained")
    sv.save(directions.shipped_file("tiny-thinker"))
    with pytest.raises(ValueError, match="other weights"):
        directions.load_shipped("tiny-thinker")


def test_the_steering_layers_of_the_fixture_are_those_of_its_sweep():
    """The layer at which the smaller of the rise with +1 and the fall with -1 is largest, among
    those that keep 9 of 10 chains well-formed; the last layer is left out by choice."""
    swept = pd.read_csv(directions.FIXTURES / "tiny-thinker.layer_sweep.csv")
    best = {}
    for name, rows in swept.groupby("behaviour"):
        smaller = {}
        for layer, two in rows.groupby("layer"):
            moved = (two["value"] - two["plain"]) * two["coefficient"]
            smaller[layer] = min(moved) if min(two["well-formed"]) >= 0.9 else -1
        del smaller[max(smaller)]
        best[name] = max(smaller, key=smaller.get)
    assert best == registry.TINY_THINKER_LAYERS
    weights = (directions.FIXTURES / "tiny-thinker").glob("*.safetensors")
    assert [path.name for path in weights] == ["model.safetensors"], "a loader takes them all"


# --- quality ---------------------------------------------------------------------------------


def test_separability_equals_counting_pairs():
    labels = torch.tensor([0] * 12 + [1] * 15 + [2] * 3)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(30, L, N, generator=generator) + 0.8 * (labels == 0)[:, None, None]
    values[3] = values[20]
    made = replace(some_means()[0], projections=values.contiguous(), projection_labels=labels)
    made.counts[PARTS // 2 :] = 0
    made.counts[-1] = torch.bincount(labels)
    result = quality.separability(made)
    assert result.behaviours == NAMES[:2]
    x, y = values[:12, 1, 0].tolist(), values[12:, 1, 0].tolist()
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in x for b in y]
    assert float(result.auc[0, 1]) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    x, y = torch.tensor(x).double(), torch.tensor(y).double()
    want = (x.mean() - y.mean()) / ((x.var() + y.var()) / 2).sqrt()
    assert float(result.d_prime[0, 1]) == pytest.approx(float(want), abs=1e-5)


@pytest.mark.parametrize(("others", "names"), [(0, ()), (9, ()), (10, NAMES[:1])])
def test_a_behaviour_needs_enough_others_to_be_told_from(others, names):
    made = Means.zeros(NAMES, L, D)
    made.counts[0, 0], made.counts[-1, 0], made.counts[-1, 1] = 12, 12, others
    labels = torch.tensor([0] * 12 + [1] * others)
    made = replace(made, projections=torch.zeros(len(labels), L, N), projection_labels=labels)
    found = quality.separability(made)
    assert found.behaviours == names
    assert found.auc.eq(0.5).all(), "ties"


def test_stability_grows_with_the_share_and_with_the_signal():
    made, _ = some_means(spans=12)
    strong = quality.stability(made)
    assert strong.shares == (0.125, 0.25, 0.5)
    assert strong.counts[:, 0].tolist() == [12, 24, 48]
    assert (strong.cosines.mean((1, 2)).diff() > 0).all()
    weak = quality.stability(some_means(spans=12, signal=0.1)[0])
    assert weak.cosines[-1].mean() < strong.cosines[-1].mean() - 0.3
    build, test = (directions.difference_of_means(made.half(h)).directions for h in HALVES)
    want = cosine_similarity(build.double(), test.double(), dim=-1)
    torch.testing.assert_close(strong.cosines[-1], want.float())


def test_a_share_with_too_few_spans_has_no_cosine():
    made, _ = some_means(spans=6)
    made.counts[0, 1], made.counts[1, 1] = 0, 9
    made.counts[PARTS // 2 :, 2] = 1
    result = quality.stability(made)
    assert result.counts.tolist() == [[6, 0, 6], [12, 9, 12], [24, 21, 24]]
    missing = result.cosines.isnan()
    assert missing.all(2).tolist() == missing.any(2).tolist()
    assert missing.all(2).tolist() == [[True] * 3, [False, True, True], [False, False, True]]


def test_relative_errors_are_over_the_difference_of_spans_and_of_parts_left_out():
    made = some_means(spans=7)[0].half("build")
    x = made.samples.double().unflatten(0, (PARTS // 2, N, 7))
    length = (x.mean((0, 2)) - x.mean((0, 1, 2))).norm(dim=-1)
    spans = x.transpose(0, 1).flatten(1, 2)
    error = (spans.var(1) / spans.shape[1]).sum(-1).sqrt()
    errors = quality.relative_errors(made)
    torch.testing.assert_close(errors["span"], (error / length).float(), atol=1e-4, rtol=1e-3)
    found = []
    for out in range(len(x)):
        rest = x[[h for h in range(len(x)) if h != out]]
        found.append(rest.mean((0, 2)) - rest.mean((0, 1, 2)))
    found = torch.stack(found)
    squared = ((found - found.mean(0)) ** 2).sum((0, -1)) * (len(x) - 1) / len(x)
    want = (squared.sqrt() / length).float()
    torch.testing.assert_close(errors["part"], want, atol=1e-4, rtol=1e-3)


def simulated(signal: float, alike: float, seed: int, *, spans: int = 10, width: int = 400):
    """Means of one behaviour whose direction is known, ``[1, 1, width]``: ``signal`` is its
    length over that of the noise of the estimate, ``alike`` the share of a span's variance that
    all spans of its part have in common."""
    draw = np.random.default_rng(seed)
    truth = draw.standard_normal(width)
    truth /= np.linalg.norm(truth)
    size = signal * np.sqrt(width * (alike / PARTS + (1 - alike) / (spans * PARTS)))
    common = np.sqrt(alike) * draw.standard_normal((PARTS, 1, width))
    own = np.sqrt(1 - alike) * draw.standard_normal((PARTS, spans, width))
    x = torch.from_numpy(size * truth + common + own)[:, None, :, None]
    made = replace(
        Means.zeros(NAMES[:1], 1, width),
        counts=torch.full((PARTS, 1), spans),
        sums=x.sum(2),
        squares=(x**2).sum(2),
        overall_counts=torch.ones(PARTS, dtype=torch.int64),
    )
    estimate = made.mean()[0, 0].numpy()
    return made, float(estimate @ truth / np.linalg.norm(estimate))


@pytest.mark.parametrize("signal", [0.0, 0.3, 1.0, 5.0])
@pytest.mark.parametrize(("by", "alike"), [("span", 0.0), ("part", 0.0), ("part", 0.5)])
def test_the_expected_cosine_is_that_with_a_known_truth(signal, by, alike):
    runs = [simulated(signal, alike, seed) for seed in range(40)]
    errors = torch.stack([quality.relative_errors(made)[by][0, 0] for made, _ in runs])
    cosine = np.mean([found for _, found in runs])
    assert cosine == pytest.approx(signal / np.hypot(signal, 1), abs=0.02)
    # From the mean of e^2: one error of pure noise lies on either side of 1.
    expected = float(quality.expected_cosine(errors.square().mean().sqrt()))
    assert expected == pytest.approx(cosine, abs=0.04 if signal >= 0.3 else 0.2)
    if signal == 0:
        assert errors.mean() == pytest.approx(1, abs=0.03)


def test_precision_is_a_row_for_every_behaviour_at_its_layer():
    made, _ = some_means(spans=4)
    made.counts[:, 1] = 0
    table = quality.precision(made, {NAMES[2]: 1, NAMES[1]: 1, NAMES[0]: 0})
    assert table["behaviour"].tolist() == [NAMES[2], NAMES[0]]
    assert table["layer"].tolist() == [1, 0]
    assert table["spans"].tolist() == [4 * PARTS] * 2
    for by, errors in quality.relative_errors(made).items():
        error = errors[[2, 0], [1, 0]]
        assert table[f"error by {by}"].tolist() == pytest.approx(error.tolist())
        cosine = (1 - error**2).sqrt()
        assert table[f"cosine by {by}"].tolist() == pytest.approx(cosine.tolist())


def test_no_error_is_known_from_one_span_or_one_part():
    made, _ = some_means(spans=1)
    for name in ("counts", "sums", "squares", "overall_sums", "overall_counts"):
        getattr(made, name)[1:] = 0
    assert all(found.isnan().all() for found in quality.relative_errors(made).values())
    made, _ = some_means(spans=1)
    made.counts[1:, 0] = 0
    for found in quality.relative_errors(made).values():
        assert found.isnan().any(1).tolist() == [True, False, False]


@pytest.mark.parametrize("signal", [3.0, 0.0])
def test_real_directions_stand_out_and_noise_does_not(signal):
    table = quality.table(some_means(signal=signal)[0], LAYERS, draws=50)
    assert tuple(table.columns) == quality.COLUMNS
    assert len(table) == len(NAMES) * (2 * len({*quality.ESTIMATORS, *CONTROLS}) + 2)
    drawn = table["direction"].isin(CONTROLS)
    assert table.loc[drawn, ["low", "high"]].notna().all(axis=None)
    assert table.loc[~drawn, ["low", "high"]].isna().all(axis=None)
    assert (table.loc[drawn, "low"] <= table.loc[drawn, "value"]).all()
    rows = table[table["quantity"] == "AUC"]
    auc = rows.pivot(index="behaviour", columns="direction", values="value")
    assert (auc[list(CONTROLS)] - 0.5).abs().max(axis=None) < 0.2
    own = auc[list(quality.ESTIMATORS)]
    if signal:
        assert (own > 0.95).all(axis=None)
        return
    assert (own - 0.5).abs().max(axis=None) < 0.15
    lengths = table[table["quantity"] == "length"].set_index(["behaviour", "direction"])
    for name in NAMES:
        real, null = (lengths.loc[(name, d)] for d in ("difference-of-means", "shuffled"))
        assert 0.8 * null["low"] < real["value"] < 1.2 * null["high"]


def test_numbers_equal_a_loop_over_spans():
    made, _ = some_means(spans=10, signal=1.0)
    found = quality.table(made, {NAMES[2]: 1}, draws=3)
    found = found.set_index(["direction", "quantity"])["value"]["difference-of-means"]
    ours, other = (
        directions.difference_of_means(made.half(h)).direction(NAMES[2], 1).double()
        for h in HALVES
    )
    cosine = float(ours @ other / (ours.norm() * other.norm()))
    assert found["cosine"] == pytest.approx(cosine, abs=1e-5)
    half = len(made.samples) // 2
    along = made.samples[half:, 1].double() @ ours
    x, y = (along[(made.sample_labels[half:] == 2) == own].tolist() for own in (True, False))
    area = np.mean([[(a > b) + (a == b) / 2 for b in y] for a in x])
    assert found["AUC"] == pytest.approx(area, abs=1e-3)
    build, test = (made.half(h) for h in HALVES)
    raw = build.mean()[2, 1] - build.overall()[1]
    length = float(raw.norm() / test.overall()[1].norm())
    assert found["length"] == pytest.approx(length, rel=1e-5)


def test_labels_are_permuted_within_responses_and_every_order_is_as_likely():
    made, _ = some_means(spans=1)
    # Two responses of three spans, interleaved; labels 0 1 2 and 0 0 1.
    mixed = replace(
        made,
        sample_responses=torch.tensor([7, 3, 7, 3, 7, 3]),
        sample_labels=torch.tensor([0, 0, 1, 0, 2, 1]),
    )
    drawn = quality._permuted(mixed, 6000, torch.Generator().manual_seed(0))
    first, second = (drawn[:, some].tolist() for some in ([0, 2, 4], [1, 3, 5]))
    often = Counter(map(tuple, first))
    assert set(often) == set(itertools.permutations([0, 1, 2]))
    assert max(abs(n - 1000) for n in often.values()) < 4 * (6000 * 5 / 36) ** 0.5
    assert set(map(tuple, second)) == {(0, 0, 1), (0, 1, 0), (1, 0, 0)}


def test_a_behaviour_alone_has_no_contrast_with_others():
    made, _ = some_means(spans=10)
    made.counts[:, 1:], made.sums[:, 1:] = 0, 0
    own = made.sample_labels == 0
    names = ("samples", "sample_labels", "sample_responses")
    made = replace(made, **{name: getattr(made, name)[own] for name in names})
    found = quality.table(made, LAYERS, draws=3)
    assert set(found["direction"]) == {"difference-of-means", *CONTROLS}
    assert found.loc[found["quantity"] == "AUC", "value"].isna().all()
    assert found.loc[found["quantity"] != "AUC", "value"].notna().all()
