"""The annotators that need no API: one protocol, any text, and numbers that hold."""

import json
import time
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stllms import agreement, annotate, sentences, spans
from stllms.annotate import card, features, lexical, markup, offline, train
from stllms.records import BEHAVIOURS, Response, to_row

LOCAL = ("lexical", "offline")


def response(text, task_id="t"):
    return Response(task_id, "verbal logic", "", (), (), text, text, 0, "", True, True)


@pytest.fixture(scope="module")
def annotators():
    return {name: annotate.annotator(name) for name in LOCAL}


# --- the protocol --------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOCAL)
def test_one_annotation_a_response_in_the_same_order_with_a_ledger_that_adds_up(
    annotators, name
):
    texts = [
        "Okay, so I need a plan. Wait, no.\nIt is 3.5 m, e.g. a lot.",
        "",
        "  \n ",
        "中文。好！",
    ]
    responses = [response(text, str(i)) for i, text in enumerate(texts)]
    annotator = annotators[name]
    assert isinstance(annotator, annotate.Annotator)
    found = annotator.annotate(responses)
    assert [one.task_id for one in found] == ["0", "1", "2", "3"]
    assert {one.annotator for one in found} == {name}
    assert all(one.spans == () for one in found)
    assert spans.summarise(found).coverage == 1.0
    for one, text in zip(found, texts, strict=True):
        assert all(text[s.start : s.end] == s.text for s in one.segments)
        assert {s.label for s in one.segments} <= set(BEHAVIOURS)


@pytest.mark.parametrize("name", ["", "gpt-4", "openai:", "replay", "offline:x", "Lexical"])
def test_an_unknown_annotator_is_named_with_the_choices(name):
    with pytest.raises(ValueError, match=r"no annotator .*grammar, lexical, offline, openai:"):
        annotate.annotator(name)


def test_the_grammar_is_an_annotator_too():
    assert isinstance(annotate.annotator("grammar"), annotate.Annotator)


def test_a_reply_in_the_wire_format_becomes_an_annotation():
    reply = '[0. initializing]Okay, a plan.["end-section"] ["plan"]Go on.["end-section"] Bye.'
    found = annotate.from_markup(
        response("Okay, a plan. Go on. Left."), reply, "judge", usage=7
    )
    assert [(s.label, s.text) for s in found.segments] == [("initializing", "Okay, a plan.")]
    assert found.ledger["reasons"] == {markup.UNKNOWN: 1, markup.OUTSIDE: 1}
    assert found.ledger["characters"] == {"labelled": 11, markup.UNKNOWN: 5, spans.LEFT_OUT: 5}
    assert found.ledger["usage"] == 7
    old = annotate.from_markup(response("Okay."), reply, "judge", reader="published")
    assert old.segments == ()


# --- sentences and rules -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("It is 3.5 m. Two.", ["It is 3.5 m.", "Two."]),
        ("See e.g. Bob, etc. and so on. End.", ["See e.g. Bob, etc. and so on.", "End."]),
        ("1. First. Do it.\n2. **B**: x", ["1. First.", "Do it.", "2. **B**: x"]),
        ("Hmm... Wait! Is it? Yes.", ["Hmm...", "Wait!", "Is it?", "Yes."]),
        ('He said "Go." Then (so.) Next', ['He said "Go."', "Then (so.)", "Next"]),
        ("So \\[ a = b. C\n d \\] holds. Yes.", ["So \\[ a = b. C\n d \\] holds.", "Yes."]),
        ("No. 5 is it. No. It fails.", ["No. 5 is it.", "No.", "It fails."]),
        ("我想。好！", ["我想。", "好！"]),
        ("\n\n  \n", []),
    ],
)
def test_a_text_is_cut_where_a_reader_would(text, want):
    assert [text[start:end] for start, end in sentences.split(text)] == want


@settings(deadline=None)
@given(st.one_of(st.text(), st.text("aB. \n?!\\[]$1…*\"'中。", max_size=200)))
def test_sentences_hold_every_character_and_never_overlap(text):
    places = sentences.split(text)
    parts = [text[start:end] for start, end in places]
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(part and part == part.strip() for part in parts)
    assert all(a[1] <= b[0] for a, b in pairwise(places))


@pytest.mark.parametrize("piece", [".", " ", "\n ", "\\[", "a. ", "'", "[", "1"])
def test_splitting_and_reading_stay_linear_on_hostile_texts(piece):
    clock = time.process_time()
    sentences.split(piece * 20000)
    markup.read(piece * 20000)
    assert time.process_time() - clock < 2


@pytest.mark.parametrize(
    ("sentence", "want"),
    [
        ("Wait, that's not right.", "backtracking"),
        ("I'm not sure about this.", "uncertainty-estimation"),
        ("For example, take n = 3.", "example-testing"),
        ("I remember that water boils at 100 degrees.", "adding-knowledge"),
        ("So the answer is 4.", "deduction"),
    ],
)
def test_cue_words_name_the_behaviour(sentence, want):
    assert lexical.label(sentence, 7) == want


def test_the_first_sentence_is_initializing():
    assert lexical.label("Wait, what?", 0) == "initializing"


def test_neighbours_of_one_label_on_one_line_are_one_segment():
    text = "Go on. Go up.\nGo in. Go out."
    places = sentences.split(text)
    found = lexical.merged(text, places, ["deduction"] * 3 + ["backtracking"])
    assert [s.text for s in found] == ["Go on. Go up.", "Go in.", "Go out."]


# --- the trained annotator -----------------------------------------------------------------

CLASSIFIER = offline.Offline()


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=200))
def test_probabilities_add_up_on_any_text(text):
    places, found = CLASSIFIER.probabilities(text)
    assert found.shape == (len(places), 6)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    CLASSIFIER.annotate([response(text)])


def test_plain_sentences_get_the_label_they_ask_for():
    text = (
        "Okay, so I need to find the probability of two heads. "
        "I remember that a fair coin has probability 1/2. "
        "So, the probability is 1/2 times 1/2, which is 1/4. "
        "Hmm, I'm not sure whether that is right."
    )
    places, found = CLASSIFIER.probabilities(text)
    labels = [BEHAVIOURS[i] for i in CLASSIFIER.classifier.decide(found)]
    want = ["initializing", "adding-knowledge", "deduction", "uncertainty-estimation"]
    assert labels == want
    assert len(places) == 4
    ledger = CLASSIFIER.annotate([response(text)])[0].ledger
    assert sum(ledger["expected"].values()) == pytest.approx(1, abs=1e-3)
    assert len(ledger["probability"]) == ledger["placed"]


@pytest.mark.parametrize("bits", [features.BITS, features.BITS - 3])
def test_hashed_sums_equal_the_naive_loop(bits):
    text = "Okay, so 12 apples. Wait, no. Done."
    places = sentences.split(text)
    rows = features.of_chain(text, places)
    weights = np.random.default_rng(0).normal(size=(1 << bits, 6))
    naive = np.zeros((len(places), 6))
    for i in range(len(places)):
        for k in range(rows.start[i], rows.start[i + 1]):
            naive[i] += rows.value[k] * weights[rows.index[k] >> (features.BITS - bits)]
    np.testing.assert_allclose(rows.hashed(weights), naive, atol=1e-9)


def test_smoothing_equals_the_sum_over_all_label_sequences():
    """Forward-backward against every one of 6 ** 4 sequences."""
    scores = np.random.default_rng(0).normal(size=(4, 6))
    w = CLASSIFIER.classifier.arrays
    step = 0.2 * (w["log_transitions"] - w["log_prior"])
    naive = np.zeros((4, 6))
    for labels in product(range(6), repeat=4):
        log = sum(0.8 * scores[i, b] for i, b in enumerate(labels))
        log += sum(step[a, b] for a, b in pairwise(labels))
        for i, b in enumerate(labels):
            naive[i, b] += np.exp(log)
    naive /= naive.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(CLASSIFIER.classifier.smooth(scores), naive, rtol=1e-6)


def test_saved_weights_come_back_within_their_eight_bits(tmp_path):
    classifier = CLASSIFIER.classifier
    classifier.save(tmp_path / "again.npz")
    again = offline.Classifier.load(tmp_path / "again.npz")
    for name, array in classifier.arrays.items():
        step = np.abs(array).max(axis=0) / 127
        assert (np.abs(again.arrays[name] - array) <= step).all()
    assert (again.labels, again.correction) == (classifier.labels, classifier.correction)


def test_a_long_chain_is_annotated_in_seconds():
    text = "So, this is one more thing to think about, maybe. Wait, it is 12. " * 1500
    clock = time.process_time()
    found = CLASSIFIER.annotate([response(text)])[0]
    assert found.ledger["coverage"] == 1.0
    assert time.process_time() - clock < 20


def test_the_shipped_weights_are_small_and_hold_no_text():
    assert offline.WEIGHTS.stat().st_size <= 2_000_000
    with np.load(offline.WEIGHTS, allow_pickle=False) as stored:
        texts = [name for name in stored.files if stored[name].dtype.kind in "US"]
        assert texts == ["metadata"]
        metadata = json.loads(str(stored["metadata"]))
    assert set(metadata) == {"labels", "correction", "trained_on"}


def test_the_card_is_the_page_of_its_numbers_and_reaches_the_target():
    stem = offline.WEIGHTS.with_name("offline_card")
    numbers = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    assert numbers["kappa"] >= 0.45
    assert numbers["kappa"] > numbers["rules"]["kappa"] + 0.1
    assert card.page(numbers) == stem.with_suffix(".md").read_text(encoding="utf-8")
    assert numbers["trained_on"] == CLASSIFIER.classifier.metadata["trained_on"]
    table = np.array(numbers["confusion"])
    assert table.sum() == numbers["sentences"]
    assert agreement.kappa(table) == pytest.approx(numbers["kappa"], abs=1e-4)


def test_missing_or_foreign_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights at .*stllms\.annotate\.train"):
        annotate.annotator("offline", weights=tmp_path / "none.npz")
    other = tmp_path / "other.npz"
    np.savez(other, words=np.zeros((4, 6)))
    with pytest.raises(ValueError, match=r"has \(4, 0\) rows, expected \(131072, "):
        offline.Offline(other)


# --- training ------------------------------------------------------------------------------

CUE = {
    "initializing": "Okay, so I need to find {}.",
    "deduction": "So it must be {}.",
    "adding-knowledge": "I remember that {} is known.",
    "example-testing": "For example, suppose {}.",
    "uncertainty-estimation": "I'm not sure about {}.",
    "backtracking": "Wait, no, {} is wrong.",
}


def released_file(path, seed):
    """A comparison file in the released format, every sentence with its cue."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(10):
        labels = ["initializing", *rng.choice(BEHAVIOURS[1:], size=9)]
        parts = [CUE[label].format(f"x{rng.integers(99)}") for label in labels]
        marked = [f'["{a}"]{b}["end-section"]' for a, b in zip(labels, parts, strict=True)]
        rows.append(
            {"thinking_process": " ".join(parts), "annotated_response": "".join(marked)}
        )
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_training_learns_cues_and_writes_weights_and_card(tmp_path):
    pytest.importorskip("sklearn")
    files = [released_file(tmp_path / f"model{i}.json", i) for i in range(2)]
    out = tmp_path / "mine" / "own.npz"
    train.main(["--data", *map(str, files), "--out", str(out)])
    numbers = json.loads((tmp_path / "mine" / "own_card.json").read_text(encoding="utf-8"))
    assert numbers["kappa"] > 0.8
    assert numbers["sentences"] == 200
    chain = train.read_chains(files[0])[0]
    own = annotate.annotator("offline", weights=out)
    found = own.annotate([response(chain.text)])[0]
    truth = agreement.unit_labels(found, chain.text, "sentence")
    assert (truth == chain.truth).mean() >= 0.8


def test_held_out_predictions_know_neither_the_source_nor_the_question(monkeypatch):
    """Every training set of the cross-validation is disjoint from its test rows in both."""
    source = np.repeat([0, 1], 50)
    question = np.tile(np.repeat(np.arange(10), 5), 2)
    seen = []

    class Stub:
        def probabilities(self, rows):
            return np.full((len(rows), 6), 1 / 6)

    def record(matrix, truth, chain, weight):
        seen.append(matrix[:, 0].astype(int))
        return Stub()

    monkeypatch.setattr(train, "fit", record)
    monkeypatch.setattr(train, "as_features", lambda matrix: matrix)
    rows = np.arange(100.0)[:, None]
    chain = np.repeat(np.arange(20), 5)
    truth = np.zeros(100, dtype=int)
    found = train.cross_predict(rows, truth, source, question, chain, np.ones(100))
    assert np.isfinite(found).all()
    assert len(seen) == 10
    tests = [(s, f) for s in (0, 1) for f in range(5)]
    for used, (left_out, fold) in zip(seen, tests, strict=True):
        assert (source[used] != left_out).all()
        assert (question[used] % train.FOLDS != fold).all()
        assert len(used) == 40


def test_our_own_annotations_can_be_trained_on(tmp_path):
    texts = {"a": "Okay, go. Wait, no.", "b": "So be it."}
    chains = [response(text, key) for key, text in texts.items()]
    records = annotate.annotator("lexical").annotate(chains)
    records.append(spans.failed("x", "b", "lexical", "timed out"))
    for name, rows in (("responses", chains), ("annotations", records)):
        lines = "\n".join(json.dumps(to_row(row)) for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    found = train.read_chains(tmp_path / "annotations.jsonl")
    assert [chain.question for chain in found] == ["a", "b"]
    assert [BEHAVIOURS[i] for i in found[0].truth] == ["initializing", "backtracking"]


def test_files_that_hold_no_chains_are_named(tmp_path):
    path = tmp_path / "wrong.json"
    path.write_text('[{"text": "x"}]', encoding="utf-8")
    with pytest.raises(ValueError, match=r"wrong\.json: expected a list of chains"):
        train.read_chains(path)
