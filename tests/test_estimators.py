"""Estimators against other paths (numpy, closed forms, planted directions), and what is done
with their vectors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from torch.nn.functional import cosine_similarity, normalize

from stllms import registry
from stllms.attribution import effects
from stllms.labels import PAPER, LabelSet
from stllms.records import Annotation, Response, Span, Steered, Task
from stllms.steering import conditions, dose, measures
from stllms.vectors import activations, contrast, directions, estimators, nulls, quality
from stllms.vectors.means import Means

P, L, D = 40, 2, 12
OWN = LabelSet.from_dict(
    {"labels": {"planning": "", "doubt": "", "filler": ""}, "targets": ["planning", "doubt"]}
)


def pair_means(*, signal: float = 3.0, seed: int = 0) -> tuple[Means, torch.Tensor, np.ndarray]:
    """Means of ``P`` pairs that differ along a planted axis of each layer by a random amount,
    in noise that is ten times larger along the first coordinate; the axis, the read-outs."""
    rng = np.random.default_rng(seed)
    axis = rng.normal(size=(L, D))
    axis /= np.linalg.norm(axis, axis=-1, keepdims=True)
    noise = rng.normal(size=(P, 2, L, D)) * np.r_[10.0, np.ones(D - 1)]
    shared = 3 * rng.normal(size=(P, 1, L, D))
    sides = np.array([0.5, -0.5])[None, :, None, None] * rng.uniform(1, 3, (P, 1, 1, 1))
    values = 5 + shared + 0.3 * noise + signal * sides * axis
    values = torch.from_numpy(values).float()
    ids = sorted((str(i) for i in range(P)), key=lambda one: not contrast.is_build(one))
    config = {"position": "last", "controls": {"seed": 0, "targets": ["mine"]}}
    names = ("mine", contrast.OTHER_SIDE)
    made = contrast._means(values, ids, names, "m", config, controls=4)
    return made, torch.from_numpy(axis), values.double().numpy()


def test_the_axis_of_pairs_is_the_first_one_of_their_differences():
    means, _, values = pair_means()
    found = estimators.differences(means, "pca", range(L))
    for layer in range(L):
        halves = (values[:, 0, layer] - values[:, 1, layer]) / 2
        first = np.linalg.eigh(halves.T @ halves)[1][:, -1]
        first *= np.sign(halves.mean(0) @ first)
        np.testing.assert_allclose(found[0, layer].numpy(), first, atol=1e-5)
        np.testing.assert_allclose(found[1, layer].numpy(), -first, atol=1e-5)
    flipped = replace(means, sample_labels=1 - means.sample_labels)
    assert torch.allclose(estimators.differences(flipped, "pca", range(L))[1], found[0])


def test_the_axis_of_spans_is_about_the_mean_of_their_response():
    generator = torch.Generator().manual_seed(0)
    u = normalize(torch.randn(D, generator=generator), dim=0)
    response = torch.arange(30).repeat_interleave(4)
    label = torch.tensor([0, 1, 1, 1]).repeat(30)
    x = 50 * torch.randn(30, 1, D, generator=generator).expand(-1, 4, -1).flatten(0, 1)
    x = x + 2.0 * (label == 0)[:, None] * u + 0.2 * torch.randn(120, D, generator=generator)
    bare = Means.zeros(("a", "b", "c"), 1, D, sample_layers=(0,))
    made = replace(bare, samples=x[:, None], sample_labels=label, sample_responses=response)
    found = estimators.differences(made, "pca", [0])[:, 0]
    assert float(found[0] @ u.double()) > 0.99, "whatever sets the responses apart"
    assert not found[2].any(), "no span of c"
    alone = replace(made, sample_responses=torch.arange(120))
    assert not estimators.differences(alone, "pca", [0]).any(), "nothing beside it"


def shrunk(x: np.ndarray) -> np.ndarray:
    """Ledoit and Wolf (2004), section 3.3, of standardised coordinates, scaled back."""
    scale = x.std(0)
    z = (x - x.mean(0)) / scale
    n, d = z.shape
    s = z.T @ z / n
    middle = np.trace(s) / d
    spread = ((s - middle * np.eye(d)) ** 2).sum() / d
    error = sum(((np.outer(row, row) - s) ** 2).sum() / d for row in z) / n**2
    share = min(error, spread) / spread
    made = share * middle * np.eye(d) + (1 - share) * s
    return scale[:, None] * made * scale


def test_the_whitened_difference_is_that_of_the_papers():
    means, axis, values = pair_means()
    found = estimators.differences(means, "lda", range(L))
    plain = estimators.differences(means, "difference-of-means", range(L))
    for layer in range(L):
        own, other = values[:, 0, layer], values[:, 1, layer]
        within = (shrunk(own) + shrunk(other)) / 2
        expected = np.linalg.pinv(within) @ (own.mean(0) - other.mean(0))
        np.testing.assert_allclose(found[0, layer].numpy(), expected, rtol=1e-4, atol=1e-6)
    truth = cosine_similarity(torch.stack([found[0], plain[0]]), axis, dim=-1)
    assert (truth > 0.3).all()


@pytest.mark.parametrize("name", list(registry.estimator))
def test_every_estimator_makes_vectors_of_pairs_with_tables_and_nulls(name):
    means, axis, _ = pair_means(signal=8.0)
    sv = directions.estimate(means, name)
    assert sv.config["estimator"] == name
    assert sv.counts.tolist() == [P, P], "pairs, not sides"
    torch.testing.assert_close(sv.directions.norm(dim=-1)[0], sv.overall.norm(dim=-1))
    assert (cosine_similarity(sv["mine"].directions.double(), axis, dim=-1) > 0.5).all()
    assert directions.estimate(means, name, min_spans=P + 1).unavailable == {
        "mine": P,
        "other": P,
    }
    rows = quality.table(means, {"mine": 1}, estimators=[name], draws=20)
    rows = rows[rows["direction"] == name].set_index("quantity")["value"]
    held_out, test = means.half("build"), means.half("test")
    a, b = (estimators.differences(half, e, [1])[0, 0] for half, e in
            ((held_out, name), (test, "difference-of-means")))  # fmt: skip
    assert rows["cosine"] == pytest.approx(float(cosine_similarity(a, b, dim=0)))
    assert rows["AUC"] > 0.8
    assert len(nulls.control_directions(means, "matched", 4)) == 4


def test_an_estimator_of_ones_own_is_used_and_checked():
    means, _, _ = pair_means()
    try:
        registry.estimator("first")(lambda made, layers: torch.eye(D)[:2, None].repeat(1, 2, 1))
        sv = directions.estimate(means, "first")
        assert float(sv["mine"].at(1)[0]) == pytest.approx(float(sv.overall[1].norm()))
        registry.estimator("flat")(lambda made, layers: torch.ones(2, D))
        with pytest.raises(ValueError, match=r"'flat' gave \(2, 12\), expected .*\(2, 2, 12\)"):
            directions.estimate(means, "flat")
        registry.estimator("nan")(lambda made, layers: torch.full((2, 2, D), torch.nan))
        with pytest.raises(ValueError, match="not finite for mine"):
            directions.estimate(means, "nan")
    finally:
        for name in ("first", "flat", "nan"):
            registry.estimator._known.pop(name, None)
    with pytest.raises(ValueError, match=r"no estimator 'prob' \(did you mean probe\?\)"):
        directions.estimate(means, "prob")
    with pytest.raises(ValueError, match="min_spans should be at least 1"):
        directions.estimate(means, min_spans=0)


def test_vectors_are_taken_shown_and_tabled():
    means, _, _ = pair_means()
    sv = directions.difference_of_means(means)
    assert torch.equal(sv["other"].at(1), sv.direction("other", 1))
    assert list(sv) == ["mine", "other"]
    only = sv.only(["other"])
    assert (only.behaviours, only.directions.shape) == (("other",), (1, L, D))
    assert torch.equal(only.directions[0], sv.directions[1])
    with pytest.raises(ValueError, match="give a list of names"):
        sv.only("other")
    with pytest.raises(ValueError, match="no direction of 'love'; there are mine, other"):
        sv["love"]
    assert "mine, other; 2 layers of 12" in repr(sv)
    few = replace(sv, unavailable={"<b>": 3})
    assert "&lt;b&gt; (unavailable)" in few._repr_html_()
    assert "<b> (3 spans)" in repr(few)
    frame = sv.to_frame()
    row = frame[(frame["behaviour"] == "mine") & (frame["layer"] == 1)].iloc[0]
    length = (means.mean()[0, 1] - means.overall()[1]).norm() / means.overall()[1].norm()
    assert (row["spans"], row["length"]) == (P, pytest.approx(float(length), rel=1e-5))
    texts = {text.get_text() for text in sv.plot(1).texts}
    assert "-1.00" in texts, "the sides of a pair are opposite"


# --- labels of one's own -----------------------------------------------------------------


def test_means_are_of_the_labels_that_are_given():
    model = tiny.model()
    ids = tuple(model.tokenizer("Let us plan this, or not.")["input_ids"])
    chains = [
        Response(f"t{i}", "c", "", ids[:3], ids[3:], "", "", 0, "", True, True)
        for i in range(12)
    ]
    spans = [[Span("planning", 4, 9), Span("filler", 9, 14), Span("backtracking", 14, 18)]] * 12
    found = activations.collect(
        model, chains, spans, labels=OWN, controls=2, batch_size=4, progress=False
    )
    assert found.behaviours == OWN.names
    assert found.counts.sum(0).tolist() == [12, 0, 12]
    assert found.ledger["spans of other labels"] == 12
    assert found.config["controls"]["targets"] == ["planning"]
    sv = directions.difference_of_means(found)
    assert sv.unavailable == {"doubt": 0}
    layers = directions.steering_layers({"backtracking": 3}, 4, OWN)
    assert layers == {"planning": 2, "doubt": 2}, "nothing of labels that are not there"
    assert directions.heatmap_layers(sv, {"planning": 1}, OWN.names) == {
        "planning": 1,
        "filler": 1,
    }
    every = conditions.conditions(sv, layers, (1.0,), OWN)
    assert [one.direction for one in every] == ["none", "planning"]
    swept = conditions.sweep_conditions(sv, (0, 1.0), None, OWN)
    assert [one.layer for one in swept] == [-1, 0, 1, 2, 3]
    with pytest.raises(ValueError, match="'planning' is none of the labels 'paper'"):
        conditions.conditions(sv, layers, (1.0,))
    with pytest.raises(ValueError, match=r"x\.pt: 'planning' is none of the labels 'paper'"):
        conditions.check(sv, model, "x.pt", PAPER)
    conditions.check(sv, model, labels=OWN)


def test_the_chosen_layers_are_of_the_labels():
    best = effects.best_layers(
        effects.LayerEffects({"kl/own": torch.ones(0, 2, 4)}, (), OWN.targets, "m", ""),
        "kl/own", OWN.targets,
    )  # fmt: skip
    known = {"backtracking": 3}
    assert effects.chosen_layers(best, known, labels=OWN) == {"planning": 2, "doubt": 2}
    known = {"backtracking": 3, "doubt": 0}
    assert effects.chosen_layers(best, known, labels=OWN) == {"planning": 2, "doubt": 0}


def steered(task: str, direction: str, tokens: int, coefficient: float = 1.0) -> Steered:
    """A chain with ``tokens`` of planning and ten of filler."""
    made = Annotation(
        task, "hand",
        spans=(Span("planning", 5, 5 + tokens), Span("filler", 20, 30)),
        ledger={"coverage": 1.0},
    )  # fmt: skip
    text = "so " * tokens
    response = Response(task, "c", "", (), (1,) * 30, text, text, 0, "4", True, True)
    if direction == "none":
        return Steered(task, "none", -1, 0.0, "add", response, made)
    return Steered(task, direction, 2, coefficient, "add", response, made)


TASKS = [Task(f"t{i}", "c", "?") for i in range(4)]
CHAINS = [
    one
    for task in TASKS
    for one in (steered(task.id, "none", 10), steered(task.id, "planning", 15))
]


def test_measures_follow_the_targets_and_what_never_occurs_has_none():
    rows = measures.table(measures.measure(CHAINS, TASKS, labels=OWN))
    bars = measures.bars(rows, labels=OWN).set_index(["behaviour", "mode"])["value"]
    assert bars["planning", "plain"] == 1.0, "of the tokens of targets, filler is none"
    assert bars["doubt"].isna().all()
    changes = measures.changes(rows, labels=OWN).loc["planning"]
    assert changes[["planning", "filler"]].tolist() == pytest.approx([0.1, -0.1])
    assert np.isnan(changes["doubt"])
    assert not set(rows["behaviour"]) & set(PAPER.names)
    assert set(dose.table(rows, labels=OWN)["steered"]) == {"planning"}
    assert dose.summary(rows, labels=OWN)["behaviour"].tolist() == ["planning"] * 2
    limits = {"loops": 0.01}
    assert dose.warning(rows, limits, labels=OWN).startswith("planning +1 breaks the text")
    assert dose.suggested(rows, "planning", 1, limits, labels=OWN) is None


def test_a_metric_of_ones_own_is_a_column_and_rows_in_every_table():
    registry.metric("words")(lambda response, made, task: len(response.thinking.split()))
    try:
        measured = measures.measure(CHAINS, TASKS, labels=OWN)
        assert measured["words"].tolist() == [10.0, 15.0] * 4
        rows = measures.table(measured)
        own = rows[rows["metric"] == "words"].set_index("direction")["value"]
        assert own.to_dict() == {"none": 10.0, "planning": 15.0}
        assert dose.side_effects(rows)["words"].tolist() == [10.0, 15.0]
        assert "words" in set(dose.table(rows, labels=OWN)["metric"])
        assert set(dose.broken(rows, {"words": 2}, labels=OWN)) == {("planning", 1.0)}
        registry.metric._known["words"] = lambda response, made, task: "many"
        with pytest.raises(ValueError, match="metric 'words' gave 'many' for task t0"):
            measures.measure(CHAINS, TASKS, labels=OWN)
        registry.metric("tokens")(len)
        with pytest.raises(ValueError, match="metric 'tokens': choose another name"):
            measures.measure(CHAINS, TASKS, labels=OWN)
    finally:
        for name in ("words", "tokens"):
            registry.metric._known.pop(name, None)
    assert "words" not in measures.measure(CHAINS, TASKS, labels=OWN)
