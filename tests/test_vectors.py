"""Directions: the formula, the released vectors, estimators, nulls and stability."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest
import torch
from matplotlib import pyplot as plt

from stllms import artifacts, means, plots, probes, tables, vectors
from stllms.records import BEHAVIOURS, HEATMAP

N, L, D = 3, 2, 16
NAMES = BEHAVIOURS[:N]


def some_means(*, spans: int = 40, signal: float = 3.0, seed: int = 0):
    """Means of ``spans`` random spans a behaviour and part, with a known direction each."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    truth = torch.nn.functional.normalize(draw(N, L, D), dim=-1)
    centre = 5 * draw(L, D)
    made = means.Means.zeros(NAMES, L, D, model="m", sample_layers=(0, 1))
    samples, labels, owners = [], [], []
    for part in range(means.PARTS):
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


def test_directions_follow_the_formula():
    made, _ = some_means()
    sv = vectors.difference_of_means(made)
    b, layer = 1, 1
    n = sum(int(made.counts[h, b]) for h in range(means.PARTS))
    mean = sum(made.sums[h, b, layer] for h in range(means.PARTS)) / n
    overall = sum(made.overall_sums[h, layer] for h in range(means.PARTS)) / means.PARTS
    want = (mean - overall) * math.dist(overall, [0] * D) / math.dist(mean, overall)
    torch.testing.assert_close(sv.direction(NAMES[b], layer), want.float())
    torch.testing.assert_close(sv.directions.norm(dim=-1), sv.overall.norm(dim=-1).expand(N, L))
    assert sv.counts.tolist() == [40 * means.PARTS] * N
    assert sv.directions.dtype == torch.float32


@pytest.mark.parametrize("estimator", vectors.ESTIMATORS)
def test_every_estimator_finds_what_was_put_in(estimator):
    made, truth = some_means()
    sv = vectors.estimate(made, estimator)
    contrast = torch.nn.functional.normalize(truth - truth.mean(0), dim=-1).float()
    found = torch.nn.functional.normalize(sv.directions, dim=-1)
    assert ((found * contrast).sum(-1) > 0.85).all()
    torch.testing.assert_close(sv.directions.norm(dim=-1), sv.overall.norm(dim=-1).expand(N, L))
    assert sv.config["estimator"] == estimator


def test_difference_from_others_is_the_mean_of_the_rest():
    made, _ = some_means()
    sv = vectors.estimate(made, "difference-from-others")
    x, labels = made.samples.double(), made.sample_labels
    raw = x[labels == 2].mean(0) - x[labels != 2].mean(0)
    want = torch.nn.functional.normalize(raw, dim=-1)
    found = torch.nn.functional.normalize(sv.directions[2].double(), dim=-1)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)


def test_probe_is_at_the_minimum_of_its_loss():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    y = (x[:, 0] + torch.randn(60, generator=generator, dtype=torch.float64) > 0.5).double()
    weights = probes.fit(x, y[:, None], penalty=0.1)[0].requires_grad_(True)
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([bias], max_iter=200, tolerance_grad=1e-12)
    balance = torch.where(y > 0, 0.5 / y.sum(), 0.5 / (1 - y).sum())

    def loss():
        entropy = torch.nn.functional.binary_cross_entropy_with_logits
        each = entropy(x @ weights + bias, y, reduction="none")
        return (balance * each).sum() + 0.05 * weights.square().sum()

    def closure():
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)
    (gradient,) = torch.autograd.grad(loss(), weights)
    assert gradient.norm() < 1e-6


def test_bad_requests_are_refused_by_name():
    made, _ = some_means()
    with pytest.raises(ValueError, match="estimator 'mean' is not one of"):
        vectors.estimate(made, "mean")
    bare = replace(made, sample_layers=(), samples=torch.zeros(0, 0, D))
    with pytest.raises(ValueError, match=r"layers \[0, 1\].*keep=\[0, 1\].*at layers \[\]"):
        vectors.estimate(bare, "probe")
    empty = means.Means.zeros(NAMES, L, D)
    with pytest.raises(ValueError, match="no response with spans"):
        vectors.difference_of_means(empty)


def test_an_estimator_at_some_layers_is_the_estimator_there():
    made, _ = some_means()
    for name in vectors.ESTIMATORS:
        whole = vectors.differences(made, name, range(L))
        assert whole.shape == (N, L, D)
        torch.testing.assert_close(vectors.differences(made, name, [1]), whole[:, 1:])
    only = replace(made, sample_layers=(1,), samples=made.samples[:, 1:])
    with pytest.raises(ValueError, match=r"layers \[0\].*kept, at layers \[1\]"):
        vectors.differences(only, "probe", [0])


def test_a_behaviour_with_few_spans_is_unavailable_and_never_nan():
    made, _ = some_means(spans=1)
    made.counts[:, 1] = 0
    made.sums[:, 1] = 0
    sv = vectors.difference_of_means(made, min_spans=8)
    assert sv.behaviours == (NAMES[0], NAMES[2])
    assert sv.unavailable == {NAMES[1]: 0}
    assert torch.isfinite(sv.directions).all()
    with pytest.raises(KeyError, match="deduction' is unavailable: 0 spans, at least 8"):
        sv.direction("deduction", 0)
    with pytest.raises(KeyError, match="no direction of 'thinking'"):
        sv.direction("thinking", 0)
    with pytest.raises(IndexError, match=r"layer 2 is not in 0 \.\. 1"):
        sv.direction(NAMES[0], 2)
    nothing = vectors.difference_of_means(made)
    assert nothing.behaviours == ()
    assert nothing.directions.shape == (0, L, D)


def test_broken_directions_are_named():
    made, _ = some_means()
    sv = vectors.difference_of_means(made)
    broken = sv.directions.clone()
    broken[2, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite: adding-knowledge"):
        replace(sv, directions=broken)
    with pytest.raises(ValueError, match=r"shape \(3, 2, 16\), it has \(2, 2, 16\)"):
        replace(sv, directions=sv.directions[:2])
    with pytest.raises(ValueError, match=r"means should .* \(3, 2, 16\), it has \(2, 16\)"):
        replace(sv, means=sv.overall)
    with pytest.raises(ValueError, match=r"overall should .* \[L, D\], it has \(16,\)"):
        replace(sv, overall=sv.overall[0])


def alone(made: means.Means, *, others: int = 0) -> means.Means:
    """One behaviour, beside ``others`` spans of the next."""
    keep = torch.zeros(N, dtype=torch.int64)
    keep[0] = 1
    few = replace(made, counts=made.counts * keep, sums=made.sums * keep[:, None, None])
    few.counts[0, 1], few.sums[0, 1] = others, others * made.mean()[1]
    rows = (made.sample_labels == 1).cumsum(0).le(others) & (made.sample_labels == 1)
    rows |= made.sample_labels == 0
    names = ("samples", "sample_labels", "sample_responses")
    return replace(few, **{name: getattr(made, name)[rows] for name in names})


@pytest.mark.parametrize("estimator", vectors.CONTRASTS)
@pytest.mark.parametrize("others", [0, 9])
def test_a_contrast_with_too_few_others_is_unavailable(estimator, others):
    made = alone(some_means()[0], others=others)
    sv = vectors.estimate(made, estimator)
    assert sv.behaviours == ()
    assert sv.unavailable == {NAMES[0]: others, NAMES[1]: others, NAMES[2]: 0}
    message = (
        f"{NAMES[0]}' is unavailable: {others} spans, at least 10 are needed on either side"
    )
    with pytest.raises(KeyError, match=message):
        sv.direction(NAMES[0], 0)
    assert vectors.difference_of_means(made).behaviours == (NAMES[0],)
    if not others:
        assert not vectors.differences(made, estimator, [1])[0].any()


@pytest.mark.parametrize("estimator", vectors.CONTRASTS)
def test_a_contrast_with_enough_others_has_a_direction(estimator):
    assert (
        vectors.estimate(alone(some_means()[0], others=10), estimator).behaviours == NAMES[:2]
    )


def test_a_direction_of_length_zero_is_named_and_never_nan():
    made, _ = some_means()
    made.sums[:, 2, 1] = made.counts[:, 2, None]
    made.overall_sums[:, 1] = 1
    with pytest.raises(ValueError, match=f"direction of {NAMES[2]} at layer 1 has length zero"):
        vectors.difference_of_means(made)


def test_saving_and_loading_is_bit_exact(tmp_path):
    made, _ = some_means()
    made = replace(made, task_ids=("a", "b"))
    sv = vectors.difference_of_means(made)
    sv.save(tmp_path / "vectors.safetensors")
    again = vectors.SteeringVectors.load(tmp_path / "vectors.safetensors")
    for name in ("directions", "means", "overall", "counts"):
        assert torch.equal(getattr(sv, name), getattr(again, name))
    assert (again.behaviours, again.model, again.config) == (sv.behaviours, "m", sv.config)
    made.save(tmp_path / "means.safetensors")
    back = means.Means.load(tmp_path / "means.safetensors")
    assert all(torch.equal(getattr(made, name), getattr(back, name)) for name in means.TENSORS)
    assert all(getattr(back, name) == getattr(made, name) for name in means.METADATA)


def test_cosines_take_each_direction_at_its_layer():
    made, _ = some_means()
    sv = vectors.difference_of_means(made)
    table = vectors.cosines(sv, {NAMES[2]: 1, NAMES[0]: 0})
    a, b = sv.directions[2, 1], sv.directions[0, 0]
    want = float(a @ b / (a.norm() * b.norm()))
    torch.testing.assert_close(table, torch.tensor([[1.0, want], [want, 1.0]]))


def test_released_vectors_give_the_published_heatmap(published):
    file = published / "mean_vectors_deepseek-r1-distill-qwen-1.5b.pt"
    sv = vectors.load_published(file)
    assert sv.left_out == {"summarizing": 1}
    assert sv.unavailable == {}
    assert sv.directions.shape == (6, 28, 1536)
    steering = {"backtracking": 17, "uncertainty-estimation": 18, "adding-knowledge": 18}
    layers = vectors.heatmap_layers(sv, steering, HEATMAP)
    assert list(layers.values()) == [17, 17, 18, 18, 17]
    table = vectors.cosines(sv, layers)
    rows, columns = torch.triu_indices(5, 5, offset=1)
    printed = [0.36, 0.32, 0.28, 0.17, 0.64, 0.33, 0.60, 0.19, 0.51, 0.45]
    assert [round(x, 2) for x in table[rows, columns].double().tolist()] == printed
    lengths = sv.overall.norm(dim=-1)
    assert [round(float(lengths[layer])) for layer in (0, -1)] == [15, 232]


class _Code:
    def __reduce__(self):
        return (print, ("code was run",))


def test_a_released_file_with_code_in_it_is_refused(tmp_path, capsys):
    path = tmp_path / "mean_vectors_evil.pt"
    torch.save({"overall": _Code()}, path, pickle_module=pickle)
    with pytest.raises(artifacts.BadFile, match="evil"):
        vectors.load_published(path)
    assert capsys.readouterr().out == ""


def test_released_files_of_another_structure_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    for content, message in (
        ([1, 2], "expected label"),
        ({"overall": torch.zeros(2)}, "expected label"),
        ({"deduction": {"mean": torch.zeros(2, 3), "count": 12}}, "no 'overall'"),
    ):
        torch.save(content, path)
        with pytest.raises(artifacts.BadFile, match=message):
            vectors.load_published(path)


def test_released_means_of_another_shape_are_named_with_both(tmp_path):
    path = tmp_path / "mean_vectors_x.pt"
    entry = {"mean": torch.randn(2, 3), "count": 12}
    torch.save({"overall": entry, "deduction": {**entry, "mean": torch.randn(3, 3)}}, path)
    with pytest.raises(artifacts.BadFile, match=r"deduction has shape \(3, 3\).*\(2, 3\)"):
        vectors.load_published(path)


@pytest.mark.parametrize(
    ("label", "value", "message"),
    [
        ("overall", float("nan"), "mean of overall is not finite"),
        ("deduction", float("inf"), "mean of deduction is not finite"),
        ("deduction", None, "direction of deduction at layer 1 has length zero"),
    ],
)
def test_released_means_without_a_direction_are_named_with_the_file(
    tmp_path, label, value, message
):
    path = tmp_path / "mean_vectors_x.pt"
    content = {b: {"mean": torch.randn(2, 3), "count": 12} for b in ("overall", "deduction")}
    last = content["overall"]["mean"][1].clone() if value is None else value
    content[label]["mean"][1] = last
    torch.save(content, path)
    with pytest.raises(artifacts.BadFile, match=rf"mean_vectors_x.pt: .*{message}"):
        vectors.load_published(path)


def test_a_released_file_without_enough_spans_has_no_direction(tmp_path):
    path = tmp_path / "mean_vectors_x.pt"
    entry = {"mean": torch.randn(2, 3), "count": 3}
    torch.save({"overall": entry, "deduction": entry}, path)
    sv = vectors.load_published(path)
    assert sv.behaviours == ()
    assert sv.directions.shape == (0, 2, 3)
    assert sv.unavailable["deduction"] == 3


def test_a_file_of_other_tensors_is_no_file_of_directions(tmp_path):
    path = tmp_path / "layer_effects.safetensors"
    artifacts.save_tensors(path, {"kl/own": torch.zeros(1)}, {})
    with pytest.raises(artifacts.BadFile, match=r"layer_effects.*but kl/own"):
        vectors.SteeringVectors.load(path)


def test_max_cosine_equals_the_loop_and_ignores_the_chunk():
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(N, L, D, generator=generator)
    matrix = torch.randn(50, D, generator=generator)
    matrix[7] = 0
    best = vectors.max_cosine(directions, matrix)
    for n in range(N):
        for layer in range(L):
            d = directions[n, layer]
            loop = [float(d @ m / (d.norm() * m.norm())) for m in matrix if m.norm() > 0]
            assert float(best[n, layer]) == pytest.approx(max(loop), abs=1e-6)
    torch.testing.assert_close(vectors.max_cosine(directions, matrix, chunk=7), best)
    with pytest.raises(ValueError, match=r"\(3, 2, 16\).*\(50, 15\)"):
        vectors.max_cosine(directions, matrix[:, :15])


def test_isotropic_directions_have_the_length_of_the_real_ones():
    made, _ = some_means()
    overall = vectors.difference_of_means(made).overall
    drawn = vectors.isotropic(overall, 5, seed=1)
    assert drawn.shape == (5, L, D)
    torch.testing.assert_close(drawn.norm(dim=-1), overall.norm(dim=-1).expand(5, L))
    assert torch.equal(drawn, vectors.isotropic(overall, 5, seed=1))
    assert not torch.equal(drawn, vectors.isotropic(overall, 5, seed=2))


def test_stability_grows_with_the_share_and_with_the_signal():
    strong = vectors.stability(some_means(spans=6, signal=3.0)[0], min_spans=1)
    assert strong.shares == (0.125, 0.25, 0.5)
    assert strong.counts[:, 0].tolist() == [6, 12, 24]
    assert strong.cosines.shape == (3, N, L)
    assert (strong.cosines.mean((1, 2)).diff() > 0).all()
    weak = vectors.stability(some_means(spans=6, signal=0.1)[0], min_spans=1)
    assert weak.cosines[-1].mean() < strong.cosines[-1].mean() - 0.3
    assert vectors.stability(some_means(spans=6)[0], min_spans=1000).behaviours == ()


def test_a_share_with_too_few_spans_has_no_cosine():
    made, _ = some_means(spans=6)
    made.counts[0, 1], made.counts[1, 1] = 0, 9
    result = vectors.stability(made)
    assert result.counts[:, :2].tolist() == [[6, 0], [12, 9], [24, 21]]
    missing = result.cosines.isnan()
    assert missing.all(2).tolist() == missing.any(2).tolist()
    assert missing.all(2).tolist() == [[True] * 3, [False, True, False], [False] * 3]
    assert tables.growth(result, 1)["cosine"].isna().sum() == 4
    _, axes = plt.subplots()
    plots.growth(axes, tables.growth(result, 1))
    assert len(axes.lines) == N
    axes.figure.canvas.draw()


def test_stability_is_the_cosine_of_the_halves():
    made, _ = some_means(spans=6)
    build = vectors.difference_of_means(made.half("build")).directions.double()
    test = vectors.difference_of_means(made.half("test")).directions.double()
    want = torch.nn.functional.cosine_similarity(build, test, dim=-1).float()
    torch.testing.assert_close(vectors.stability(made).cosines[-1], want)
