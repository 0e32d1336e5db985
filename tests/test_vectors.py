"""Directions, control directions, and how good they are, from means that are made here; those
that are collected from a model are in :mod:`test_activations`."""

from __future__ import annotations

import itertools
import math
import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from released_files import mean_vectors
from torch.nn.functional import cosine_similarity, normalize

from stllms import registry
from stllms.labels import BEHAVIOURS, CONTROLS, HEATMAP, STEERED
from stllms.runs.files import BadFile, save_tensors
from stllms.vectors import directions, quality
from stllms.vectors.directions import SteeringVectors
from stllms.vectors.means import PARTS, Means

N, L, D = 3, 2, 16
NAMES = BEHAVIOURS[:N]
LAYERS = dict.fromkeys(NAMES, 1)


def some_means(*, spans: int = 40, signal: float = 3.0, seed: int = 0):
    """Means of ``spans`` random spans a behaviour and part, with a known direction each."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    truth = normalize(draw(N, L, D), dim=-1)
    centre = 5 * draw(L, D)
    made = Means.zeros(NAMES, L, D, model="m", sample_layers=(0, 1))
    samples, labels, owners = [], [], []
    for part in range(PARTS):
        for b in range(N):
            x = centre + signal * truth[b] + draw(spans, L, D)
            made.counts[part, b] = spans
            made.sums[part, b] = x.sum(0)
            made.squares[part, b] = (x**2).sum(0)
            samples.append(x)
            labels += [b] * spans
            owners += [part] * spans
        made.overall_sums[part] = made.sums[part].sum(0) / (N * spans)
        made.overall_counts[part] = 1
    kept = replace(
        made,
        samples=torch.cat(samples).float(),
        sample_labels=torch.tensor(labels),
        sample_responses=torch.tensor(owners),
    )
    return kept, truth


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
    assert sv.directions.dtype == torch.float32


@pytest.mark.parametrize("estimator", directions.ESTIMATORS)
def test_every_estimator_finds_what_was_put_in(estimator):
    made, truth = some_means()
    sv = directions.estimate(made, estimator)
    contrast = normalize(truth - truth.mean(0), dim=-1).float()
    found = normalize(sv.directions, dim=-1)
    assert ((found * contrast).sum(-1) > 0.85).all()
    torch.testing.assert_close(sv.directions.norm(dim=-1), sv.overall.norm(dim=-1).expand(N, L))
    assert sv.config["estimator"] == estimator


def test_difference_from_others_is_the_mean_of_the_rest():
    made, _ = some_means()
    sv = directions.estimate(made, "difference-from-others")
    x, labels = made.samples.double(), made.sample_labels
    raw = x[labels == 2].mean(0) - x[labels != 2].mean(0)
    want = normalize(raw, dim=-1)
    found = normalize(sv.directions[2].double(), dim=-1)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)


def test_the_probe_is_at_the_minimum_of_its_loss():
    """In standardised coordinates, classes weighted equally; the bias is fitted here."""
    made, _ = some_means(spans=4, signal=1.0)
    x, y = made.samples[:, 1].double(), (made.sample_labels == 1).double()
    standard = (x - x.mean(0)) / x.std(0)
    weights = directions.differences(made, "probe", [1])[1, 0] * x.std(0)
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
    with pytest.raises(ValueError, match="estimator 'mean' is not one of"):
        directions.estimate(made, "mean")
    bare = replace(made, sample_layers=(1,), samples=made.samples[:, 1:])
    with pytest.raises(ValueError, match=r"layer 0 are needed.*keep=\[0\].*at layers \[1\]"):
        directions.estimate(bare, "probe")
    with pytest.raises(ValueError, match=r"layer 1 are needed.*at layers \[0\]"):
        quality.table(replace(bare, sample_layers=(0,)), LAYERS)
    with pytest.raises(ValueError, match="no response with spans"):
        directions.difference_of_means(Means.zeros(NAMES, L, D))


def test_a_behaviour_with_few_spans_is_unavailable_and_never_nan():
    made, _ = some_means(spans=1)
    made.counts[:, 1] = 0
    made.sums[:, 1] = 0
    sv = directions.difference_of_means(made, min_spans=8)
    assert sv.behaviours == (NAMES[0], NAMES[2])
    assert sv.unavailable == {NAMES[1]: 0}
    assert torch.isfinite(sv.directions).all()
    with pytest.raises(KeyError, match="deduction' is unavailable: 0 spans, at least 8"):
        sv.direction("deduction", 0)
    with pytest.raises(KeyError, match="no direction of 'thinking'"):
        sv.direction("thinking", 0)
    with pytest.raises(IndexError, match=r"layer 2 is not in 0 \.\. 1"):
        sv.direction(NAMES[0], 2)
    nothing = directions.difference_of_means(made)
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


def alone(made: Means, *, others: int = 0) -> Means:
    """One behaviour, beside ``others`` spans of the next."""
    keep = torch.zeros(N, dtype=torch.int64)
    keep[0] = 1
    few = replace(made, counts=made.counts * keep, sums=made.sums * keep[:, None, None])
    few.counts[0, 1], few.sums[0, 1] = others, others * made.mean()[1]
    rows = (made.sample_labels == 1).cumsum(0).le(others) & (made.sample_labels == 1)
    rows |= made.sample_labels == 0
    names = ("samples", "sample_labels", "sample_responses")
    return replace(few, **{name: getattr(made, name)[rows] for name in names})


@pytest.mark.parametrize("estimator", directions.CONTRASTS)
@pytest.mark.parametrize("others", [0, 9, 10])
def test_a_contrast_needs_enough_others(estimator, others):
    made = alone(some_means()[0], others=others)
    sv = directions.estimate(made, estimator)
    assert directions.difference_of_means(made).behaviours[0] == NAMES[0]
    if others == 10:
        assert sv.behaviours == NAMES[:2]
        return
    assert sv.behaviours == ()
    assert sv.unavailable == {NAMES[0]: others, NAMES[1]: others, NAMES[2]: 0}
    message = f"unavailable: {others} spans, at least 10 are needed on either side"
    with pytest.raises(KeyError, match=message):
        sv.direction(NAMES[0], 0)
    if not others:
        assert not directions.differences(made, estimator, [1])[0].any()


def test_a_direction_of_length_zero_is_named_and_never_nan():
    made, _ = some_means()
    made.sums[:, 2, 1] = made.counts[:, 2, None]
    made.overall_sums[:, 1] = 1
    with pytest.raises(ValueError, match=f"direction of {NAMES[2]} at layer 1 has length zero"):
        directions.difference_of_means(made)


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


def test_cosines_take_each_direction_at_its_layer():
    made, _ = some_means()
    sv = directions.difference_of_means(made)
    table = directions.cosines(sv, {NAMES[2]: 1, NAMES[0]: 0})
    a, b = sv.directions[2, 1], sv.directions[0, 0]
    want = float(a @ b / (a.norm() * b.norm()))
    torch.testing.assert_close(table, torch.tensor([[1.0, want], [want, 1.0]]))


@pytest.fixture
def released(tmp_path):
    """``released(content)``: the directions of a file of this content."""

    def read(content):
        torch.save(content, tmp_path / "mean_vectors_x.pt")
        return directions.load_published(tmp_path / "mean_vectors_x.pt")

    return read


def test_released_means_give_directions_by_the_formula(released):
    content = mean_vectors(summarizing=1, deduction=3)
    sv = released(content)
    assert (sv.left_out, sv.unavailable) == ({"summarizing": 1}, {"deduction": 3})
    assert (sv.model, sv.directions.shape) == ("x", (5, 28, 8))
    overall, mean = content["overall"]["mean"], content["backtracking"]["mean"]
    raw = (mean - overall).double()[17]
    want = raw * overall[17].double().norm() / raw.norm()
    torch.testing.assert_close(sv.direction("backtracking", 17), want.float())
    steering = {"backtracking": 17, "uncertainty-estimation": 18, "adding-knowledge": 18}
    layers = directions.heatmap_layers(sv, steering, HEATMAP)
    assert layers == {b: steering.get(b, 17) for b in HEATMAP if b != "deduction"}


class _Code:
    def __reduce__(self):
        return (print, ("code was run",))


GOOD = {"mean": torch.arange(6.0).reshape(2, 3), "count": 12}


def changed(layer, value):
    """A good entry with another mean at a layer."""
    mean = GOOD["mean"] + 1
    mean[layer] = value
    return {**GOOD, "mean": mean}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected label"),
        ({"overall": torch.zeros(2)}, "expected label"),
        ({"deduction": GOOD}, "no 'overall'"),
        (
            {"overall": GOOD, "deduction": {**GOOD, "mean": torch.ones(3, 3)}},
            r"deduction has shape \(3, 3\).*\(2, 3\)",
        ),
        (
            {"overall": changed(1, math.nan), "deduction": GOOD},
            "direction of deduction is not finite",
        ),
        (
            {"overall": GOOD, "deduction": changed(1, math.inf)},
            "direction of deduction is not finite",
        ),
        (
            {"overall": GOOD, "deduction": changed(1, GOOD["mean"][1])},
            "direction of deduction at layer 1 has length zero",
        ),
    ],
)
def test_released_files_without_directions_are_named(released, content, message):
    with pytest.raises(BadFile, match=rf"mean_vectors_x\.pt: .*{message}"):
        released(content)


def test_a_released_file_with_code_in_it_is_refused(tmp_path, capsys):
    path = tmp_path / "mean_vectors_evil.pt"
    torch.save({"overall": _Code()}, path, pickle_module=pickle)
    with pytest.raises(BadFile, match="evil"):
        directions.load_published(path)
    assert capsys.readouterr().out == ""


def test_max_cosine_equals_the_loop_and_ignores_the_chunk():
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(N, L, D, generator=generator)
    matrix = torch.randn(50, D, generator=generator)
    matrix[7] = 0
    best = directions.max_cosine(some, matrix)
    for n in range(N):
        for layer in range(L):
            d = some[n, layer]
            loop = [float(d @ m / (d.norm() * m.norm())) for m in matrix if m.norm() > 0]
            assert float(best[n, layer]) == pytest.approx(max(loop), abs=1e-6)
    torch.testing.assert_close(directions.max_cosine(some, matrix, chunk=7), best)
    with pytest.raises(ValueError, match=r"\(3, 2, 16\).*\(50, 15\)"):
        directions.max_cosine(some, matrix[:, :15])


def test_steering_layers_are_the_models_own_or_the_middle_one():
    assert directions.steering_layers({"backtracking": 17}, 28) == {"backtracking": 17}
    assert directions.steering_layers(None, 28) == dict.fromkeys(STEERED, 14)


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
    strong = quality.stability(some_means(spans=6, signal=3.0)[0], min_spans=1)
    assert strong.shares == (0.125, 0.25, 0.5)
    assert strong.counts[:, 0].tolist() == [6, 12, 24]
    assert strong.cosines.shape == (3, N, L)
    assert (strong.cosines.mean((1, 2)).diff() > 0).all()
    weak = quality.stability(some_means(spans=6, signal=0.1)[0], min_spans=1)
    assert weak.cosines[-1].mean() < strong.cosines[-1].mean() - 0.3
    assert quality.stability(some_means(spans=6)[0], min_spans=1000).behaviours == ()


def test_a_share_with_too_few_spans_has_no_cosine():
    made, _ = some_means(spans=6)
    made.counts[0, 1], made.counts[1, 1] = 0, 9
    result = quality.stability(made)
    assert result.counts[:, :2].tolist() == [[6, 0], [12, 9], [24, 21]]
    missing = result.cosines.isnan()
    assert missing.all(2).tolist() == missing.any(2).tolist()
    assert missing.all(2).tolist() == [[True] * 3, [False, True, False], [False] * 3]


def test_stability_is_the_cosine_of_the_halves():
    made, _ = some_means(spans=6)
    build = directions.difference_of_means(made.half("build")).directions.double()
    test = directions.difference_of_means(made.half("test")).directions.double()
    want = cosine_similarity(build, test, dim=-1).float()
    torch.testing.assert_close(quality.stability(made).cosines[-1], want)


def of_halves(made, which):
    n = len(made.samples) // 2
    rows = {"whole": slice(None), "build": slice(n), "test": slice(n, None)}[which]
    return made.samples[rows].double(), made.sample_labels[rows]


@pytest.mark.parametrize("which", ["whole", "build", "test"])
def test_relative_error_is_the_standard_error_over_the_difference(which):
    made, _ = some_means(spans=7)
    part = made if which == "whole" else made.half(which)
    errors = quality.relative_error(part)
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
    got = quality.relative_error(part, by="part")
    torch.testing.assert_close(got, want.float(), atol=1e-4, rtol=1e-3)


def simulated(signal: float, alike: float, seed: int, *, spans: int = 10, width: int = 400):
    """Means of one behaviour whose direction is known, ``[1, 1, width]``: ``signal`` is its
    length over that of the noise of the estimate, ``alike`` the share of a span's variance that
    all spans of its part have in common."""
    draw = np.random.default_rng(seed)
    truth = draw.standard_normal(width)
    truth /= np.linalg.norm(truth)
    made = Means.zeros(NAMES[:1], 1, width)
    total = spans * PARTS
    size = signal * np.sqrt(width * (alike / PARTS + (1 - alike) / total))
    for part in range(PARTS):
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
    errors = torch.stack([quality.relative_error(made, by=by)[0, 0] for made, _ in runs])
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
    table = quality.precision(made, {NAMES[2]: 1, NAMES[1]: 1, NAMES[0]: 0, "backtracking": 0})
    assert table["behaviour"].tolist() == [NAMES[2], NAMES[0]]
    assert table["layer"].tolist() == [1, 0]
    assert table["spans"].tolist() == [4 * PARTS] * 2
    for by in quality.UNITS:
        error = quality.relative_error(made, by=by)[[2, 0], [1, 0]]
        assert table[f"error by {by}"].tolist() == pytest.approx(error.tolist())
        cosine = (1 - error**2).sqrt()
        assert table[f"cosine by {by}"].tolist() == pytest.approx(cosine.tolist())


def test_no_error_is_known_from_one_span_or_one_part():
    made, _ = some_means(spans=1)
    for name in ("counts", "sums", "squares", "overall_sums", "overall_counts"):
        getattr(made, name)[1:] = 0
    for by in quality.UNITS:
        assert quality.relative_error(made, by=by).isnan().all()
    made, _ = some_means(spans=1)
    made.counts[1:, 0] = 0
    for by in quality.UNITS:
        unknown = quality.relative_error(made, by=by).isnan().any(1)
        assert unknown.tolist() == [True, False, False]


def values(table, quantity):
    rows = table[table["quantity"] == quantity]
    return rows.pivot(index="behaviour", columns="direction", values="value")


def test_real_directions_stand_out_and_only_draws_have_intervals():
    made, _ = some_means(spans=40)
    table = quality.table(made, LAYERS, draws=50)
    assert tuple(table.columns) == quality.COLUMNS
    assert len(table) == len(NAMES) * (2 * len({*directions.ESTIMATORS, *CONTROLS}) + 2)
    drawn = table["direction"].isin(CONTROLS)
    assert table.loc[drawn, ["low", "high"]].notna().all(axis=None)
    assert table.loc[~drawn, ["low", "high"]].isna().all(axis=None)
    assert (table.loc[drawn, "low"] <= table.loc[drawn, "value"]).all()
    auc = values(table, "AUC")
    assert (auc[list(directions.ESTIMATORS)] > 0.95).all(axis=None)
    assert (auc[list(CONTROLS)] - 0.5).abs().max(axis=None) < 0.2


def test_pure_noise_stands_out_nowhere():
    made, _ = some_means(spans=40, signal=0.0)
    table = quality.table(made, LAYERS, draws=50)
    assert (values(table, "AUC") - 0.5).abs().max(axis=None) < 0.15
    lengths = table[table["quantity"] == "length"].set_index(["behaviour", "direction"])
    for name in NAMES:
        real, null = (lengths.loc[(name, d)] for d in ("difference-of-means", "shuffled"))
        assert 0.8 * null["low"] < real["value"] < 1.2 * null["high"]


def test_numbers_equal_a_loop_over_spans():
    made, _ = some_means(spans=10, signal=1.0)
    found = quality.table(made, {NAMES[2]: 1}, draws=3)
    found = found.set_index(["direction", "quantity"])["value"]
    build, test = (directions.difference_of_means(made.half(h)) for h in ("build", "test"))
    ours, other = build.direction(NAMES[2], 1).double(), test.direction(NAMES[2], 1).double()
    cosine = float(ours @ other / (ours.norm() * other.norm()))
    assert found["difference-of-means", "cosine"] == pytest.approx(cosine, abs=1e-5)
    half = PARTS // 2 * len(NAMES) * 10
    along = [float(x @ ours) for x in made.samples[half:, 1].double()]
    own = (made.sample_labels[half:] == 2).tolist()
    x, y = ([v for v, o in zip(along, own, strict=True) if o is w] for w in (True, False))
    area = np.mean([[(a > b) + (a == b) / 2 for b in y] for a in x])
    assert found["difference-of-means", "AUC"] == pytest.approx(area, abs=1e-3)
    overall = test.overall[1].double().norm()
    raw = made.half("build").mean()[2, 1] - made.half("build").overall()[1]
    length = float(raw.norm() / overall)
    assert found["difference-of-means", "length"] == pytest.approx(length, rel=1e-5)


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
    made = alone(made)
    found = quality.table(made, LAYERS, draws=3)
    assert set(found["direction"]) == {"difference-of-means", *CONTROLS}
    assert found.loc[found["quantity"] == "AUC", "value"].isna().all()
    assert found.loc[found["quantity"] != "AUC", "value"].notna().all()
