"""The verbs: they give what the stages give, plain things stand for records, and bad input is
one line that says what to do."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from matplotlib import pyplot as plt

import stllms
from stllms import attribution, generation, steering
from stllms.config import RunConfig
from stllms.labels import LabelSet
from stllms.models import loading
from stllms.models.model import ModelError
from stllms.records import Annotation, PlacedSegment, Response, Task
from stllms.registry import model as registered
from stllms.registry import resolve, slug
from stllms.steering import Intervention
from stllms.vectors import activations, contrast, difference_of_means, nulls

OPTIONS = {"max_new_tokens": 12, "temperature": 0.8, "seed": 1, "progress": False}
QUIET = {"progress": False}
ASKED = ["What is good?", "What is so good?", "Why?"]
TWO = LabelSet.from_dict({"labels": {"vowel": "", "rest": ""}})


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def chains(model):
    return stllms.generate(model, ASKED, **OPTIONS)


def halves(text: str) -> list[tuple[str, int, int]]:
    """Every text in pieces of four characters, called in turn."""
    starts = range(0, len(text), 4)
    return [(TWO.names[i % 2], s, min(s + 4, len(text))) for i, s in enumerate(starts)]


@pytest.fixture(scope="module")
def labelled(chains):
    return stllms.annotate(chains, halves, labels=TWO)


@pytest.fixture(scope="module")
def vectors(model, chains, labelled):
    return stllms.train(model, chains, labelled, min_spans=1, **QUIET)


# --- import ------------------------------------------------------------------------------


def test_the_import_is_light_and_knows_its_verbs():
    code = (
        "import sys, stllms\n"
        "print(set(stllms.__all__) <= set(dir(stllms)))\n"
        "print([m for m in ('torch', 'numpy', 'pandas', 'yaml') if m in sys.modules])\n"
        "print(all(callable(getattr(stllms, name)) for name in stllms.__all__))\n"
        "from stllms import steer\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split("\n")[:3] == ["True", "[]", "True"], done.stderr


def test_what_is_no_verb_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'steeer'"):
        vars(stllms)["__getattr__"]("steeer")


# --- each verb beside its stage ----------------------------------------------------------


def test_texts_are_tasks_called_by_their_number(model, chains, tmp_path):
    own = [Task(str(n), "own", content) for n, content in enumerate(ASKED, 1)]
    assert chains == generation.responses(model, own, style="bare", **OPTIONS)
    path = tmp_path / "tasks.jsonl"
    rows = [{"id": task.id, "content": task.content} for task in own]
    path.write_text("\n".join(map(json.dumps, rows)))
    texts = [one.text for one in chains]
    for same in (own, path, str(path)):
        assert [one.text for one in stllms.generate(model, same, **OPTIONS)] == texts
    assert stllms.generate(model, ASKED[0], **OPTIONS)[0].text == texts[0]


def test_chats_templates_and_system_messages_are_what_the_model_gets(model):
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    (one,) = stllms.generate(model, [chat], **OPTIONS)
    (two,) = stllms.generate(model, ["Why?"], system="Be kind.", **OPTIONS)
    assert one.prompt_text == two.prompt_text
    assert one.prompt_text == "<|system|>Be kind.<|user|>Why?<|assistant|><think>\n"
    (three,) = stllms.generate(model, ["Why?"], prompts="Q: {question}", **OPTIONS)
    assert three.prompt_text == "<|user|>Q: Why?<|assistant|><think>\n"
    (four,) = stllms.generate(model, ["Why?"], prompts="raw", **OPTIONS)
    assert four.prompt_text == "Why?"


def test_train_gives_what_the_notebook_computes(model, chains, labelled, vectors):
    spans = [
        annotation.spans
        for annotation in (
            stllms.annotation.annotators.annotations(
                stllms.annotation.annotator(halves, labels=TWO), chains, model=model
            )
        )
    ]
    means = activations.collect(model, chains, spans, labels=TWO, progress=False)
    expected = difference_of_means(means, min_spans=1)
    assert vectors.behaviours == TWO.names
    torch.testing.assert_close(vectors.directions, expected.directions, rtol=0, atol=0)
    again = stllms.train(model, chains, list(labelled), labels=TWO, min_spans=1, **QUIET)
    torch.testing.assert_close(again.directions, expected.directions, rtol=0, atol=0)


def test_a_persons_spans_of_a_text_by_hand(model):
    """A token is a byte: ``[3, 7)`` and ``[7, 9)`` of ten; the rest has no label, and the first
    token no part in anything: the average is over tokens 2 to 9, a span of which has window 1.
    """
    text = "abcdefghij"
    found = stllms.train(model, [text], [[("x", 3, 7), ("y", 7, 9)]], min_spans=1, **QUIET)
    h = tiny.states(model, model.tokenizer(text)["input_ids"])
    overall = h[:, 2:].mean(1)
    for name, window in (("x", slice(2, 6)), ("y", slice(6, 8))):
        raw = h[:, window].mean(1) - overall
        expected = raw * (overall.norm(dim=-1) / raw.norm(dim=-1))[:, None]
        own = found.directions[found.index(name)]
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-4)
    assert found.behaviours == ("x", "y")
    assert found.unavailable == {}


def test_a_chain_of_a_file_is_read_with_its_tags(model, tmp_path):
    """``<think>`` is a token, so character 3 of the thinking is token 4 of the text."""
    path = tmp_path / "chains.jsonl"
    text = "<think>abcdefghij</think>k"
    path.write_text(json.dumps({"task_id": "a", "text": text}))
    found = stllms.train(model, path, [[("x", 3, 7)]], min_spans=1, **QUIET)
    h = tiny.states(model, model.tokenizer(text)["input_ids"])
    overall = h[:, 2:11].mean(1)
    raw = h[:, 3:7].mean(1) - overall
    expected = raw * (overall.norm(dim=-1) / raw.norm(dim=-1))[:, None]
    torch.testing.assert_close(found.directions[0], expected, rtol=1e-3, atol=1e-4)


def test_spans_of_a_chain_are_in_characters_of_its_thinking(model, chains, labelled):
    """The same places, once as annotations and once as a person's own list."""
    own = [halves(one.thinking) for one in chains]
    for given in (own, [[PlacedSegment(n, one.thinking[s:e], s, e) for n, s, e in spans]
                        for one, spans in zip(chains, own, strict=True)]):  # fmt: skip
        found = stllms.train(model, chains, given, min_spans=1, **QUIET)
        expected = stllms.train(model, chains, labelled, min_spans=1, **QUIET)
        torch.testing.assert_close(found.directions, expected.directions, rtol=0, atol=0)


def test_one_label_alone_is_compared_with_the_rest(model):
    texts = ["good morning to you all", "the weather is good, I said"]
    spans = [[("good", 0, 4)], [("good", 15, 19)]]
    found = stllms.train(
        model, texts, spans, min_spans=1, estimator="difference-from-others", **QUIET
    )
    assert found.behaviours == ("good",)
    assert found.collected.behaviours == ("good", "unlabelled")


@pytest.mark.parametrize("estimator", ["difference-from-others", "pca", "probe", "lda"])
def test_every_estimator_has_what_it_needs(model, chains, labelled, estimator):
    found = stllms.train(model, chains, labelled, estimator=estimator, min_spans=1, **QUIET)
    assert found.config["estimator"] == estimator
    assert found.directions.norm(dim=-1).min() > 0


def test_controls_are_made_of_what_was_collected(model, chains):
    pairs = [[(TWO.names[i % 2], i, i + 1) for i in range(9)] for _ in chains]
    found = stllms.train(model, chains, pairs, controls=2, **QUIET)
    made = nulls.control_directions(found.collected, "covariance", 2)
    assert made.directions.shape == (2, model.n_layers, model.d_model)


def test_contrast_keeps_the_positive_side(model, tmp_path):
    pairs = [(f"I love {word}", f"I hate {word}") for word in ("rain", "tea", "ice")]
    found = stllms.contrast(model, pairs, name="love", min_spans=3, **QUIET)
    given = [contrast.Pair(*pair, id=str(n)) for n, pair in enumerate(pairs, 1)]
    means = contrast.collect(model, given, name="love", controls=0, progress=False)
    expected = difference_of_means(means, min_spans=3)
    assert (found.behaviours, found.unavailable) == (("love",), {})
    torch.testing.assert_close(found.directions, expected.directions[:1], rtol=0, atol=0)
    rows = [dict(zip(("positive", "negative"), pair, strict=True)) for pair in pairs]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    for same in (path, str(path), rows):
        other = stllms.contrast(model, same, name="love", min_spans=3, **QUIET)
        torch.testing.assert_close(other.directions, found.directions, rtol=0, atol=0)


def test_steer_is_the_stage_with_a_vector_or_a_tensor(model, vectors, chains):
    push = Intervention(vectors.direction("vowel", 2), 2, 1.5)
    own = [Task(str(n), "own", content) for n, content in enumerate(ASKED, 1)]
    expected = steering.generate(model, own, [push] * 3, style="bare", **OPTIONS)
    for vector in (vectors["vowel"], vectors.direction("vowel", 2), push.direction.numpy()):
        found = stllms.steer(model, ASKED, vector, layer=2, coefficient=1.5, **OPTIONS)
        assert found == expected
    assert [a.text for a in expected] != [b.text for b in chains]


def test_steer_takes_one_vector_for_each_task(model, vectors, chains):
    some = [None, vectors["vowel"], vectors["rest"]]
    found = stllms.steer(model, ASKED, some, layer=2, coefficient=[1, 0, -2.0], **OPTIONS)
    last = stllms.steer(model, ASKED, vectors["rest"], layer=2, coefficient=-2, **OPTIONS)
    assert found == [chains[0], chains[1], last[2]]


def test_layer_effects_are_those_of_the_stage(model, chains, labelled, vectors):
    found = stllms.layer_effects(model, chains, labelled, vectors, n_positions=2, **QUIET)
    spans = stllms.annotation.annotators.annotations(
        stllms.annotation.annotator(halves, labels=TWO), chains, model=model
    )
    expected = attribution.collect(model, chains, spans, vectors, n_positions=2, progress=False)
    for key, values in expected.effects.items():
        np.testing.assert_array_equal(found.of(key), values.numpy())
    own = [halves(one.thinking) for one in chains]
    again = stllms.layer_effects(model, chains, own, vectors, n_positions=2, **QUIET)
    np.testing.assert_array_equal(again.of("kl/own"), found.of("kl/own"))


def annotated(task_id: str, *names: str) -> Annotation:
    segments = tuple(PlacedSegment(n, "ab", 2 * i, 2 * i + 2) for i, n in enumerate(names))
    return Annotation(task_id, "mine", segments, (), {"reader": ""})


def test_compare_pairs_the_tasks():
    """Fractions of ``vowel``: 1 and 1/2 beside 0 and 1/2, so the mean difference is 1/2."""
    first = [annotated("1", "vowel"), annotated("2", "vowel", "rest")]
    second = [annotated("2", "vowel", "rest"), annotated("1", "rest")]
    found = stllms.compare({"A": first, "B": second}, labels=TWO)
    rows = found.differences.set_index("behaviour")
    assert rows.loc["vowel", ["first", "second", "difference", "n"]].tolist() == [
        "A",
        "B",
        0.5,
        2,
    ]
    table = found.to_frame().set_index(["metric", "behaviour", "model"])["value"]
    assert table["segment fraction", "vowel", "A"] == 0.75
    assert table["segment count", "rest", "B"] == 1.0
    other = [annotated("3", "rest")]
    apart = stllms.compare({"A": first, "B": other}, labels=TWO)
    assert apart.differences.empty
    assert "not subtracted" in repr(apart)


# --- what comes back ---------------------------------------------------------------------


def test_results_say_what_they_are(chains, labelled, vectors):
    n = sum(len(one.output_ids) for one in chains)
    cut = sum(len(one.output_ids) == 12 for one in chains if not one.finished)
    assert repr(chains) == f"Chains(3 responses, {n} tokens, {cut} cut at the limit)"
    assert repr(chains[:1]).startswith("Chains(1 responses")
    counts = [len(halves(one.thinking)) for one in chains]
    assert f"{sum((c + 1) // 2 for c in counts)} vowel" in repr(labelled)
    never = stllms.annotate(["abcd"], halves, labels=TWO)
    assert repr(never) == "Labelled(1 chains; 1 vowel; never: rest)"
    assert labelled[1:].chains == list(chains[1:])
    assert "vowel" in repr(vectors)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_results_have_tables_pages_and_pictures(chains, labelled, vectors, model):
    effects = stllms.layer_effects(
        model, chains, labelled, vectors, targets=["vowel"], n_positions=2, **QUIET
    )
    both = stllms.compare({"A": labelled, "B": labelled})
    assert len(chains.to_frame()) == 3
    assert len(labelled.to_frame()) == sum(len(halves(one.thinking)) for one in chains)
    assert set(effects.to_frame()["set"]) == {*effects._sets()}
    for one in (chains, labelled, vectors, both):
        assert one._repr_html_().count("<") > 3
    before = dict(plt.rcParams)
    for one in (chains, labelled, vectors, both, effects):
        drawn = one.plot()
        axes = drawn[0] if isinstance(drawn, list) else drawn
        axes.figure.draw_without_rendering()
    assert dict(plt.rcParams) == before
    panels = effects.plot(labels=TWO)
    line = panels[0].lines[0].get_ydata()
    np.testing.assert_allclose(line, np.nanmean(effects.of("kl/own")[:, 0], axis=0), rtol=1e-5)
    assert "not measured" in [t.get_text() for t in panels[1].texts]
    plt.close("all")


def test_a_page_escapes_what_a_model_wrote(labelled):
    one = Response("1", "own", "<script>", (1,), (2,), "<b>x", "<b>x", 0, "", True, True)
    page = stllms.verbs.Chains([one])._repr_html_()
    assert "<script>" not in page
    assert "&lt;b&gt;x" in page


# --- models ------------------------------------------------------------------------------


def test_a_transformers_model_and_its_tokenizer():
    hf, tokenizer = tiny.hf_model(), tiny.tokenizer()
    loaded = stllms.load(hf, tokenizer)
    assert loaded.hf is hf
    assert loaded.name == "LlamaForCausalLM"
    assert stllms.load(loaded) is loaded


def test_a_registered_model_is_known_everywhere(capsys):
    name = "my-tiny"
    registered(name)(lambda: (tiny.hf_model(), tiny.tokenizer()))
    try:
        loaded = stllms.load(name, dtype="float64")
        assert (loaded.name, loaded.dtype) == (name, torch.float64)
        assert RunConfig(model=name).entry.source == "registered"
        assert slug(name) == name
        from stllms.app import cli

        cli.models.callback()
        assert any(line.split()[:3] == [name, "unknown", "registered"]
                   for line in capsys.readouterr().out.splitlines())  # fmt: skip
        with pytest.raises(ModelError, match="sets quantization, revision and device_map"):
            loading.load(name, revision="main")
        registered._known[name] = lambda: tiny.hf_model()
        with pytest.raises(ModelError, match="my-tiny: its loader should return"):
            loading.load(name)
    finally:
        registered._known.pop(name)
    with pytest.raises(ValueError, match="unknown model 'my-tiny'"):
        resolve(name)
    with pytest.raises(ValueError, match="already model 'tiny-thinker'"):
        registered("tiny-thinker")(lambda: None)


# --- bad input ---------------------------------------------------------------------------

PAIRS = [(f"I love {i}", f"I hate {i}") for i in range(3)]
TEXTS = ["good morning", "a good day"]
FAULTS = {
    "no tasks": (lambda m, v: stllms.generate(m, []), "there are no tasks"),
    "an empty task": (lambda m, v: stllms.generate(m, ["a", " "]), "task 2 is empty"),
    "a number": (lambda m, v: stllms.generate(m, [1]), "expected a text, a Task or a chat"),
    "a message": (
        lambda m, v: stllms.generate(m, [{"role": "user", "content": "a"}]),
        "is a message: a chat is a list",
    ),
    "a chat of nobody": (
        lambda m, v: stllms.generate(m, [[{"role": "me", "content": "a"}]]),
        "task 1, message 1, field 'role': 'me'",
    ),
    "no file": (lambda m, v: stllms.generate(m, "no.jsonl"), "no.jsonl: cannot be read"),
    "no question": (
        lambda m, v: stllms.generate(m, ["a"], prompts="Q: {quest}"),
        r"a template with \{question\} in it",
    ),
    "raw with system": (
        lambda m, v: stllms.generate(m, ["a"], prompts="raw", system="b"),
        "raw' has no place for a system message",
    ),
    "no tokens": (lambda m, v: stllms.generate(m, ["a"], max_new_tokens=0), "max_new_tokens"),
    "cold": (lambda m, v: stllms.generate(m, ["a"], temperature=-1), "temperature"),
    "a bare model": (
        lambda m, v: stllms.generate(m.hf, ["a"]),
        r"needs its tokenizer: load\(model, tokenizer\)",
    ),
    "no model": (lambda m, v: stllms.load(3), "int is no model"),
    "two tokenizers": (lambda m, v: stllms.load("tiny-thinker", m.tokenizer), "its own"),
    "no chains": (lambda m, v: stllms.annotate([], halves, labels=TWO), "there are no chains"),
    "an empty chain": (lambda m, v: stllms.annotate([""], halves), "chain 1 is empty"),
    "no annotator": (lambda m, v: stllms.annotate(["a"], "lexicl"), "did you mean lexical"),
    "a strange label": (
        lambda m, v: stllms.annotate(["abcd"], lambda text: [("vovel", 0, 2)], labels=TWO),
        "'vovel'.* is not among vowel, rest",
    ),
    "the same name": (
        lambda m, v: stllms.annotate(["a"], halves, labels=["Plan", "plan"]),
        "Plan and plan are the same name",
    ),
    "a name twice": (
        lambda m, v: stllms.annotate(["a"], halves, labels=["plan", "plan"]),
        "plan is there 2 times: drop one",
    ),
    "no label file": (
        lambda m, v: stllms.annotate(["a"], halves, labels="no.yaml"),
        "cannot read no.yaml",
    ),
    "lists of two lengths": (
        lambda m, v: stllms.train(m, TEXTS, [[("a", 0, 4)]]),
        "2 chains, but labels of 1",
    ),
    "offsets beyond": (
        lambda m, v: stllms.train(m, TEXTS, [[("a", 0, 4)], [("a", 2, 40)]]),
        r"\[2, 40\) is empty or outside the 10 characters",
    ),
    "a label not in the set": (
        lambda m, v: stllms.train(m, TEXTS, [[("vovel", 0, 4)], []], labels=TWO),
        "vovel.*did you mean vowel",
    ),
    "spans that are none": (
        lambda m, v: stllms.train(m, TEXTS, [[("a", 0, 4)], [3]]),
        "expected .label, start, end.",
    ),
    "nothing labelled": (lambda m, v: stllms.train(m, TEXTS, [[], []]), "nothing is labelled"),
    "both kinds": (
        lambda m, v: stllms.train(m, TEXTS, [[("a", 0, 4)], annotated("2", "a")]),
        "annotations of all chains, or spans of all",
    ),
    "another order": (
        lambda m, v: stllms.train(m, TEXTS, [annotated("2", "a"), annotated("1", "b")]),
        "annotation of 2 stands at the chain of 1",
    ),
    "one label": (
        lambda m, v: stllms.train(m, TEXTS, [annotated("1", "a"), annotated("2", "a")]),
        "a is the only label",
    ),
    "few spans": (
        lambda m, v: stllms.train(m, TEXTS, [[("a", 0, 4)], [("b", 2, 6)]], **QUIET),
        r"too few examples \(a 1, b 1\) of 10",
    ),
    "a label that never occurs": (
        lambda m, v: stllms.train(m, TEXTS, [[("a", 0, 4)], []], labels=["a", "b"], **QUIET),
        r"too few examples \(a 1, b 0\) of 10",
    ),
    "no estimator": (
        lambda m, v: stllms.contrast(m, PAIRS, estimator="pcs", min_spans=1, **QUIET),
        "did you mean pca",
    ),
    "no pairs": (lambda m, v: stllms.contrast(m, []), "there are no pairs"),
    "a side is missing": (
        lambda m, v: stllms.contrast(m, [{"positive": "a"}]),
        "there is no 'negative': a pair needs both",
    ),
    "an empty side": (lambda m, v: stllms.contrast(m, [("a", "")]), "negative is empty"),
    "few pairs": (
        lambda m, v: stllms.contrast(m, PAIRS, **QUIET),
        r"too few examples \(positive 3\) of 10",
    ),
    "all vectors": (
        lambda m, v: stllms.steer(m, ["a"], v, layer=1),
        r"choose one, vectors\['vowel'\] or \['rest'\]",
    ),
    "no vector": (lambda m, v: stllms.steer(m, ["a"], "vowel", layer=1), "str is no direction"),
    "more than the context": (
        lambda m, v: stllms.generate(m, ["a"]),
        "1000 new ones exceed the context of tiny-random-llama, 512 tokens: ask for fewer",
    ),
    "a text too long": (
        lambda m, v: stllms.train(m, ["a" * 600], [[("a", 0, 4)]]),
        "chain 1: 600 tokens, tiny-random-llama takes 512: cut it",
    ),
    "another name": (lambda m, v: stllms.steer(m, ["a"], v["vovel"], layer=1), "no direction"),
    "no layer": (
        lambda m, v: stllms.steer(m, ["a"], v["vowel"], layer=9),
        "9 is not in 0 .. 3",
    ),
    "another width": (
        lambda m, v: stllms.steer(m, ["a"], torch.ones(5), layer=1, max_new_tokens=2),
        "width 5.*has 32: it belongs to another model",
    ),
    "two vectors, one task": (
        lambda m, v: stllms.steer(m, ["a"], [v["vowel"]] * 2, layer=1),
        "a list of 2 for 1 tasks",
    ),
    "an infinite push": (
        lambda m, v: stllms.steer(m, ["a"], v["vowel"], layer=1, coefficient=float("inf")),
        "coefficient",
    ),
    "no operator": (
        lambda m, v: stllms.steer(m, ["a"], v["vowel"], layer=1, operation="ad"),
        "did you mean add",
    ),
    "compared with nothing": (lambda m, v: stllms.compare({"A": []}), "give two or more"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_one_line_and_writes_nothing(model, vectors, fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, said = FAULTS[fault]
    with pytest.raises(ValueError, match=said) as refused:
        call(model, vectors)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_label_with_few_spans_is_named_and_has_no_direction(model):
    texts = ["good morning to you", "the weather is good"]
    spans = [[("good", 0, 4), ("odd", 5, 12)], [("good", 15, 19)]]
    with pytest.warns(UserWarning, match=r"no direction of some labels \(odd 1\) of 2"):
        found = stllms.train(model, texts, spans, min_spans=2, **QUIET)
    assert found.behaviours == ("good",)
    with pytest.raises(ValueError, match="'odd' is unavailable: 1 spans, at least 2"):
        found["odd"]


def test_vectors_of_another_model_are_refused(vectors, chains, labelled):
    other = tiny.model(hidden_size=16, num_attention_heads=2, intermediate_size=16)
    with pytest.raises(ValueError, match="of another model"):
        stllms.layer_effects(other, chains, labelled, vectors)


def test_sets_that_differ_are_not_compared(labelled):
    other = stllms.annotate(["abcd"], lambda text: [("x", 0, 2)], labels=["x", "y"])
    with pytest.raises(ValueError, match="B has the labels x, y, expected vowel, rest"):
        stllms.compare({"A": labelled, "B": other})
