"""A direction read along a text, against hidden states that transformers gives."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from stllms.records import Response, Span
from stllms.vectors import SteeringVectors, reading

TEXT = "Wait, is 5 > 3? Yes."


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def vectors(model):
    torch.manual_seed(3)
    shape = (2, model.n_layers, model.d_model)
    return SteeringVectors(
        ("a", "b"),
        torch.randn(shape),
        torch.randn(shape),
        torch.randn(shape[1:]),
        torch.tensor([10, 10]),
    )


def naive(model, ids, vectors, behaviour, layer):
    """Hidden states by transformers (behind every layer but the last), one token at a time."""
    out = model.hf(torch.tensor([ids]), output_hidden_states=True)
    direction = vectors.direction(behaviour, layer)
    values = []
    for h in out.hidden_states[layer + 1][0]:
        along = torch.dot(h - vectors.overall[layer], direction) / direction.norm()
        values.append(float(along / vectors.overall[layer].norm()))
    logp = out.logits[0].log_softmax(-1)
    surprise = [np.nan] + [-float(logp[t, i]) for t, i in enumerate(ids[1:])]
    return values, surprise


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_reading_is_the_projection_in_coefficients(kind, vectors):
    model = tiny.model(kind)
    found = reading.read(model, TEXT, vectors, "b", 2)
    ids = model.tokenizer(TEXT)["input_ids"]
    values, surprise = naive(model, ids, vectors, "b", 2)
    np.testing.assert_allclose(found.values, values, atol=1e-5)
    np.testing.assert_allclose(found.surprise, surprise, atol=1e-4)
    assert "".join(found.tokens) == TEXT
    assert list(found.to_frame().columns) == ["token", "value", "surprise"]


def test_adding_a_direction_raises_its_reading_by_the_coefficient(model, vectors):
    """In coefficients: an intervention at the layer moves every reading by exactly ``c``."""
    scaled = (
        vectors.directions
        * (vectors.overall.norm(dim=-1) / vectors.directions.norm(dim=-1))[..., None]
    )
    scaled = SteeringVectors(
        vectors.behaviours, scaled, vectors.means, vectors.overall, vectors.counts
    )
    before = reading.read(model, TEXT, scaled, "a", 1).values

    def push(_module, _inputs, output):
        return output + 0.7 * scaled.direction("a", 1)

    handle = model.layers[1].mlp.register_forward_hook(push)  # added to the stream
    try:
        after = reading.read(model, TEXT, scaled, "a", 1).values
    finally:
        handle.remove()
    np.testing.assert_allclose(after - before, 0.7, atol=1e-4)


def test_the_page_escapes_tokens_and_tells_value_and_surprise(model, vectors):
    page = reading.read(model, TEXT, vectors, "a", 0)._repr_html_()
    assert "<span" in page
    assert "&gt;" in page
    assert "nats" in page
    assert "5 > 3" not in page


def test_a_text_must_fit(model, vectors):
    with pytest.raises(ValueError, match="0 tokens; a text has 1 to 512"):
        reading.read(model, "", vectors, "a", 0)
    with pytest.raises(ValueError, match="no direction of 'c'"):
        reading.read(model, TEXT, vectors, "c", 0)


def response(model, text, task_id):
    ids = tuple(model.tokenizer(text)["input_ids"])
    return Response(
        task_id, "c", text[:3], ids[:3], ids[3:], text[3:], text[3:], 0, "", True, True
    )


def test_onset_is_the_mean_over_responses_of_readings_around_starts(model, vectors):
    texts = ["Is it 4? Wait, no. 5.", "Hm. Wait, let me see it."]
    responses = [response(model, text, str(i)) for i, text in enumerate(texts)]
    spans = [[Span("a", 4, 7), Span("b", 9, 18)], [Span("a", 2, 20), Span("a", 21, 23)]]
    table = reading.onset(
        model, responses, spans, vectors, {"a": 1}, before=3, after=4, progress=False
    )
    ids = [[*one.prompt_ids, *one.output_ids] for one in responses]
    along = [naive(model, one, vectors, "a", 1)[0] for one in ids]
    expected = {
        ("own", -3): [along[0][1], along[1][18]],  # the span at 2 has no token 3 before it
        ("own", 0): [along[0][4], (along[1][2] + along[1][21]) / 2],
        ("own", 2): [along[0][6], along[1][4]],  # the last span has two tokens
        ("own", 3): [along[1][5]],  # the first span has three
        ("others", 0): [along[0][9]],
    }
    found = table.set_index(["of", "offset"])
    for key, values in expected.items():
        assert found.loc[key, "value"] == pytest.approx(np.mean(values), abs=1e-5), key
        assert found.loc[key, "n"] == len(values)
    assert set(table["offset"]) == set(range(-3, 4))


def test_words_are_what_the_head_gives_behind_the_norm(model, vectors):
    direction = vectors.direction("a", 3)
    table = reading.words(model, direction, k=4)
    norm = model.hf.model.norm
    scaled = (
        direction / (direction.square().mean() + norm.variance_epsilon).sqrt() * norm.weight
    )
    logits = model.hf.lm_head.weight @ scaled
    best = logits.argsort(descending=True)
    expected = [model.tokenizer.decode([i]) for i in [*best[:4], *best[-4:]]]
    assert list(table["token"]) == expected
    assert list(table["side"]) == ["raised"] * 4 + ["lowered"] * 4
    assert table["logit"][0] == pytest.approx(float((logits - logits.mean()).max()), abs=1e-4)
