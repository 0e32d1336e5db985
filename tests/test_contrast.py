"""Contrast pairs: read-outs against hidden states of transformers, and one other library."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch

from stllms.vectors import contrast, difference_of_means, nulls, quality
from stllms.vectors.contrast import Pair
from stllms.vectors.means import Means, is_build

WORDS = ("rain", "sun", "tea", "bread", "ice", "wool", "sand", "salt", "corn", "rust")


def pairs(n: int = 24) -> list[Pair]:
    """Long sides and short ones, so that batches are padded."""
    found = []
    for i in range(n):
        word = WORDS[i % len(WORDS)] + "!" * (i % 5)
        found.append(Pair(f"I really love {word}", f"I hate {word} {i}", id=f"p{i}"))
    return found


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_directions_are_the_difference_of_the_sides(kind):
    model = tiny.model(kind)
    means = contrast.collect(model, pairs(), name="love", progress=False)
    found = difference_of_means(means)
    sides = [
        torch.stack(
            [
                tiny.states(model, model.tokenizer(getattr(p, s))["input_ids"])[:, -1]
                for p in pairs()
            ]
        ).mean(0)
        for s in ("positive", "negative")
    ]
    difference, overall = sides[0] - sides[1], (sides[0] + sides[1]) / 2
    expected = difference * (overall.norm(dim=-1) / difference.norm(dim=-1))[:, None]
    own = found.directions[found.index("love")]
    torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-4)
    assert found.counts.tolist() == [24, 24]


@pytest.mark.parametrize(
    ("position", "tokens"),
    [("last", slice(21, 22)), ("mean", slice(12, 22)), ("span", slice(14, 18))],
)
def test_positions_read_the_tokens_they_name(position, tokens):
    """A token is a byte here: the prompt has 12, the side 10; the span of the bytes 3 to 6
    (tokens 15 to 17 of the sequence, and the one before them, without the last)."""
    model = tiny.model()
    pair = Pair("abcdefghij", "0123456789", "I like what ", (3, 7), (3, 7))
    means = contrast.collect(model, [pair], position=position, progress=False)
    ids = model.tokenizer("I like what abcdefghij")["input_ids"]
    expected = tiny.states(model, ids)[:, tokens].mean(1)
    torch.testing.assert_close(means.samples[0], expected, rtol=1e-4, atol=1e-5)


def test_batches_do_not_matter():
    model = tiny.model()
    one, many = (
        contrast.collect(model, pairs(), batch_size=size, progress=False) for size in (1, 7)
    )
    torch.testing.assert_close(one.sums, many.sums, rtol=1e-4, atol=1e-4)
    assert torch.equal(one.counts, many.counts)


def test_halves_are_split_by_the_pair_and_the_tables_of_spans_are_there():
    model = tiny.model()
    some = pairs(60)
    means = contrast.collect(model, some, name="love", controls=4, progress=False)
    n_build = sum(is_build(pair.id) for pair in some)
    assert means.half("build").counts.sum(0).tolist() == [n_build, n_build]
    found = quality.separability(means)
    test = [pair for pair in some if not is_build(pair.id)]
    build = [pair for pair in some if is_build(pair.id)]

    def side(part, name, layer):
        own = [model.tokenizer(getattr(pair, name))["input_ids"] for pair in part]
        return torch.stack([tiny.states(model, ids)[layer, -1] for ids in own])

    layer = 2
    unit = side(build, "positive", layer).mean(0) - side(build, "negative", layer).mean(0)
    x, y = (side(test, name, layer) @ unit for name in ("positive", "negative"))
    auc = (x[:, None] > y[None]).float().mean()
    assert float(found.auc[0, layer]) == pytest.approx(float(auc), abs=0.01)
    table = quality.table(means, {"love": layer}, draws=20)
    assert {"AUC", "cosine"} <= set(table["quantity"])


def test_shuffled_controls_swap_the_sides_of_half_of_the_pairs():
    """The mean of one side of each pair less the midpoint: of four pairs each control is one of
    the 6 such sums with two pairs swapped."""
    model = tiny.model()
    some = pairs(4)
    means = contrast.collect(model, some, controls=12, progress=False)
    half = (means.samples[0::2] - means.samples[1::2]).double() / 2  # [P, L, D]
    signs = np.array(np.meshgrid(*[[-1, 1]] * 4)).reshape(4, -1)
    signs = signs[:, signs.sum(0) == 0]
    possible = torch.einsum("ps,pld->sld", torch.tensor(signs).double(), half)
    overall = means.overall()
    seen = set()
    for control in means.shuffled:
        raw = control - 4 * overall
        gaps = (possible - raw).flatten(1).norm(dim=-1)
        assert gaps.min() < 1e-3
        seen.add(int(gaps.argmin()))
    assert len(seen) > 3
    signed = means.signed - means.signs[:, None, None] * overall
    assert not torch.allclose(signed, torch.zeros_like(signed), atol=1e-3)
    lengths = nulls.controls("shuffled", means, 12).norm(dim=-1)
    torch.testing.assert_close(lengths, overall.norm(dim=-1).float().expand_as(lengths))


WIDTH = 256
#: Mean of ``|cos|`` of a fixed direction with one that is uniform on the sphere.
CHANCE = np.sqrt(2 / (np.pi * WIDTH))


def synthetic(n: int, noise: float) -> tuple[torch.Tensor, list[str]]:
    """Read-outs of pairs whose sides differ by one vector, and by noise that is as long as it,
    times ``noise``, in the difference and in the midpoint of each; the build half first."""
    generator = torch.Generator().manual_seed(n)
    shared = torch.randn(WIDTH, generator=generator)
    other, middle = noise * torch.randn(2, n, WIDTH, generator=generator)
    values = torch.stack([middle + shared + other, middle - shared - other], 1)
    ids = sorted((f"p{i}" for i in range(n)), key=lambda one: not is_build(one))
    return values[:, :, None], ids


def means_of(values: torch.Tensor, ids: list[str], controls: int) -> Means:
    config = {"position": "last", "controls": {"seed": 1, "targets": ["love"]}}
    return contrast._means(values, ids, ("love", "other"), "none", config, controls)


@pytest.mark.parametrize("n", [24, 25])
def test_what_all_pairs_share_cancels(n):
    means = means_of(*synthetic(n, noise=0.0), 20)
    length = float((means.mean()[0] - means.overall()).norm())
    raw = means.shuffled / n - means.overall()
    assert float(raw.norm(dim=-1).max()) < 1e-6 * length
    assert float(means.signed.norm(dim=-1).max()) < 1e-6 * length
    assert not means.signs.any()


@pytest.mark.parametrize("kind", nulls.MATCHED)
@pytest.mark.parametrize("n", [35, 144, 576])
def test_controls_hold_no_more_of_the_direction_than_of_any_other(n, kind):
    """The signs on each side sum to zero, so a control does not depend on the direction and is,
    with this noise, uniform on the sphere: the mean of ``|cos|`` is ``sqrt(2 / (pi D))``. With
    a coin for each pair it would be that of ``|z| / sqrt(z^2 + 1)``, z normal, about one half
    whatever the number of pairs."""
    values, ids = synthetic(n, noise=1.0)
    means = means_of(values, ids, 200)
    controls = nulls.controls(kind, means, 200)[:, 0]
    direction = difference_of_means(means).direction("love", 0)
    cosines = torch.cosine_similarity(controls, direction[None])
    assert float(cosines.abs().mean()) == pytest.approx(CHANCE, rel=0.25)
    assert len(controls.unique(dim=0)) == 200


@pytest.mark.parametrize("kind", nulls.MATCHED)
def test_the_nulls_of_the_table_are_balanced_too(kind):
    values, ids = synthetic(144, noise=1.0)
    table = quality.table(means_of(values, ids, 0), {"love": 0}, draws=400)
    null = table[table["direction"] == kind].set_index("quantity").loc["cosine"]
    assert abs(null["value"]) < 0.03
    assert null["high"] == pytest.approx(1.96 / np.sqrt(WIDTH), rel=0.25)
    assert null["low"] == pytest.approx(-1.96 / np.sqrt(WIDTH), rel=0.25)


def test_the_order_of_the_pairs_does_not_matter_to_their_controls():
    values, ids = synthetic(40, noise=1.0)
    n_build = sum(map(is_build, ids))
    turned = [*reversed(range(n_build)), *range(n_build, 40)]
    one = means_of(values, ids, 3)
    other = means_of(values[turned], [ids[i] for i in turned], 5)
    torch.testing.assert_close(one.shuffled, other.shuffled[:3])
    torch.testing.assert_close(one.signed, other.signed[:3])


def test_chats_go_through_the_template():
    model = tiny.model()
    sides = [[{"role": "user", "content": text}] for text in ("Be kind.", "Be rude.")]
    means = contrast.collect(model, [Pair(*sides)], progress=False)
    ids = model.prompt_ids(sides[0])[1]
    torch.testing.assert_close(
        means.samples[0], tiny.states(model, ids)[:, -1], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            '{"positive": "a"}',
            "line 1: pair 1: there is no 'negative': a pair needs both sides",
        ),
        ('{"positive": "a", "negative": " "}', "negative is empty"),
        ('{"positive": "a", "negative": "a"}', "both sides are the same"),
        ('{"positive": "a", "negative": "b", "neg": 1}', "unknown field 'neg'"),
        (
            '{"positive": "a", "negative": "b", "positive_span": [0, 2]}',
            r"\[0, 2\] is no range",
        ),
        ('["a", "b", "c"]', "expected two texts"),
        ("{", "line 1"),
        ("", "holds no pair"),
    ],
)
def test_files_that_are_refused(tmp_path, line, said):
    path = tmp_path / "pairs.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=said) as refused:
        contrast.read_pairs(path)
    assert "\n" not in str(refused.value)


def test_a_file_gives_its_pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"positive": "a", "negative": "b"}, {"positive": "c", "negative": "d", "id": "x"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert contrast.read_pairs(path) == [Pair("a", "b", id="1"), Pair("c", "d", id="x")]


def test_what_cannot_be_collected_is_refused():
    model = tiny.model()
    with pytest.raises(ValueError, match="there are no pairs"):
        contrast.collect(model, [])
    with pytest.raises(ValueError, match="more than once: x"):
        contrast.collect(model, [Pair("a", "b", id="x"), Pair("c", "d", id="x")])
    with pytest.raises(ValueError, match="position 'first' is not one of last, mean, span"):
        contrast.collect(model, pairs(), position="first")
    with pytest.raises(ValueError, match="'span' needs a positive_span"):
        contrast.collect(model, pairs(), position="span")
    with pytest.raises(ValueError, match="positive has 600 tokens"):
        contrast.collect(model, [Pair("a" * 600, "b")])


def test_steering_vectors_gives_the_same_direction():
    """The package of that name: last token of both texts, mean difference."""
    peer = pytest.importorskip("steering_vectors")
    model = tiny.model()
    means = contrast.collect(model, pairs(), name="love", progress=False)
    own = difference_of_means(means).directions[0]
    samples = [
        peer.SteeringVectorTrainingSample(positive_str=p.positive, negative_str=p.negative)
        for p in pairs()
    ]
    theirs = peer.train_steering_vector(model.hf, model.tokenizer, samples, read_token_index=-1)
    for layer, vector in theirs.layer_activations.items():
        cosine = torch.nn.functional.cosine_similarity(own[layer], vector.float(), dim=0)
        assert cosine > 0.999, layer
