"""Annotation: any markup, any text; places, tokens, coverage; annotators, store, agreement."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import response

from stllms import annotation
from stllms.annotation import agreement, annotators, markup, offline, placing, sentences
from stllms.annotation.annotators import annotator
from stllms.generation import prompts
from stllms.labels import PAPER
from stllms.records import (
    STEERED_KEY,
    Annotation,
    PlacedSegment,
    Response,
    Segment,
    Span,
    Steered,
    Task,
    to_row,
)
from stllms.runs.store import Rows


def solid(text):
    return len("".join(text.split()))


# --- markup ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "take f[0] and a[i] of x[n-1]",
        r"then \[ x^2 + y^2 \] holds",
        "fill in the [blank] with [Noun1] or [something]",
        "[0 cos -sin] is a row, [1, 2, 3] a list",
        'x = ["apple"] and d["key"] and m["a"]["b"]',
        "see [3. 5] and [0.]",
        "unclosed [deduction and ]deduction[",
    ],
)
def test_brackets_that_hold_no_label_are_text(text):
    reading = markup.read(f'["deduction"] {text} ["end-section"]')
    assert reading.pieces == ((Segment("deduction", text), None),)


def test_what_is_rejected_keeps_its_text_and_says_why():
    text = 'Here it is:\n["planning"] P ["end-section"] stray ["deduction"] D ["end-section"]'
    text += '["backtracking"]["end-section"] Done.'
    assert markup.read(text).pieces == (
        (Segment("", "Here it is:"), markup.OUTSIDE),
        (Segment("planning", "P"), markup.UNKNOWN),
        (Segment("", "stray"), markup.OUTSIDE),
        (Segment("deduction", "D"), None),
        (Segment("backtracking", ""), markup.EMPTY),
        (Segment("", "Done."), markup.OUTSIDE),
    )


@pytest.mark.parametrize(
    ("reader", "text", "expected"),
    [  # a section ends where the next begins, and goes on after one inside it
        ("tolerant", "[deduction] 1 [backtracking] 2 [end-section] [deduction] 3", "d1 b2 d3"),
        ("tolerant", "[deduction]A[backtracking]B[end-section]C[end-section]", "dA bB dC"),
        ("tolerant", '[deduction]x\n["apple"] y [backtracking]z', 'dx\n["apple"] y bz'),
        ("published", '["deduction"]A["end-section"][deduction]B["end-section"]', "dA"),
        ("published", '["plan"]C["end-section"] [1. deduction]D["end-section"]', "pC"),
        ("published-counts", '["deduction"]A [backtracking]B["end-section"]', "dA bB"),
        ("published-counts", '[1. deduction]C ["Deduction"] ["plan"]', ""),
    ],
)
def test_sections_as_each_reader_takes_them(reader, text, expected):
    segments = markup.read(text, reader=reader).segments
    assert " ".join(s.label[0] + s.text for s in segments) == expected


def test_an_unknown_reader_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"no reader 'strict'.*published-counts"):
        markup.read("", reader="strict")


FRAGMENTS = st.sampled_from(
    ["[", "]", '["', '"]', "end-section", '["end-section"]', "deduction", '["deduction"]',
     "0. ", "[1. backtracking]", "/", "\\", "\n", " ", "f[0]", "“", '["plan"]', "_", "中"]
)  # fmt: skip


@settings(deadline=None)
@given(st.one_of(st.text(), st.lists(FRAGMENTS, max_size=40).map("".join)))
@example("[" * 5000)
@example('["' + " " * 5000)
@example('["deduction"]' * 500)
def test_no_text_raises_only_known_labels_pass_and_every_word_is_kept(text):
    for reader in markup.READERS:
        reading = markup.read(text, reader=reader)
        assert all(isinstance(s.text, str) for s in reading.segments)
        if reader != "published":
            assert {s.label for s in reading.segments} <= set(PAPER.names)
    assert annotation.parse(text) == list(markup.read(text).segments)
    read = sum(solid(s.text) for s, _ in markup.read(text).pieces)
    tags = sum(solid(text[m.start : m.end]) for m in markup._marks(text))
    assert read + tags == solid(text), "what is returned, plus the tags, is the reply"


PARTS = st.lists(
    st.tuples(st.sampled_from(PAPER.names), st.text("abc .,()=0", min_size=1).map(str.strip)),
    max_size=8,
).map(lambda parts: [(label, text) for label, text in parts if text])


@settings(deadline=None)
@given(PARTS, st.data())
def test_what_is_written_in_any_form_is_read_back(parts, data):
    written = ""
    for label, text in parts:
        names = (label, label.upper(), label.replace("-", " "), label.replace("-", "_").title())
        name = data.draw(st.sampled_from(names))
        number = data.draw(st.sampled_from(["", "0. ", "2) ", "5."]))
        outer = data.draw(st.sampled_from(["", '"', "'", "**", '\\"', "“", " "]))
        inner = data.draw(st.sampled_from(["", '"'])) if len(outer) < 2 else ""
        closings = ('["end-section"]', "[end-section]", "[End Section]", f"[/{label}]", "")
        close = data.draw(st.sampled_from(closings))
        written += f"[{outer}{number}{inner}{name}{inner}{outer}]{text}{close}\n"
    assert [(s.label, s.text) for s in annotation.parse(written)] == parts


def test_a_reply_in_the_wire_format_is_placed_and_what_is_not_is_counted():
    reply = '[0. initializing]Okay, a plan.["end-section"] ["plan"]Go on.["end-section"] Bye.'
    text = "Okay, a plan. Go on. Left."
    found = markup.align(reply, text)
    assert [(s.label, s.text) for s in found.placed] == [("initializing", "Okay, a plan.")]
    assert [reason for _, reason in found.rejected] == [markup.UNKNOWN, markup.OUTSIDE]
    assert found.characters == {
        "labelled": solid("Okay, a plan."),
        markup.UNKNOWN: solid("Go on."),
        placing.LEFT_OUT: solid("Left."),
    }
    published = '["deduction"]wait["end-section"]'
    assert markup.align(published, "Wait. wait", reader="published").placed[0].start == 6
    assert markup.align(published, "Wait. wait").placed[0].start == 0


# --- placing -----------------------------------------------------------------------------

TEXT = "Okay, I need a plan. Wait, that fails. So 2 + 2 = 4. Wait, that fails. Done."


def deduction(*texts):
    return [Segment("deduction", text) for text in texts]


def test_repeated_sentences_go_to_their_own_occurrence_or_as_published_to_the_first():
    parts = deduction("So 2 + 2 = 4.", "Wait, that fails.", "Done.")
    found = placing.align(parts, TEXT)
    places = [TEXT.index("So"), TEXT.rindex("Wait"), TEXT.index("Done")]
    assert [s.start for s in found.placed] == places
    assert found.ambiguous == 1
    found = placing.align(
        [*parts[1:], *deduction("wait, that fails.")], TEXT, method="published"
    )
    assert [s.start for s in found.placed] == [TEXT.index("Wait"), TEXT.index("Done")]
    assert [reason for _, reason in found.rejected] == [placing.NOT_FOUND]


LEFT_OUT = "Wait, no. Hm. Wait, that fails. Right. So it is 4. Good. Done."
LONG = "The cat sat on the mat. " + "Birds sang all day. " * 20 + "The dog ran off."


@pytest.mark.parametrize(
    ("text", "returned", "placed"),
    [
        (TEXT, ["Okay,  I need\na plan."], ["Okay, I need a plan."]),
        (TEXT, ["okay I need a plan"], ["Okay, I need a plan"]),
        (TEXT, ["Okay, I really need a good plan."], ["Okay, I need a plan."]),
        (TEXT, ["Okay, I need plan."], ["Okay, I need a plan."]),
        ("Ah. It isn’t “so” – no. End.", ['It isn\'t "so" - no.'], ["It isn’t “so” – no."]),
        # equal words do not pull a part over what the judge left out
        (LEFT_OUT, ["Wait, that fails.", "So it is 4."], ["Wait, that fails.", "So it is 4."]),
        # nor a run of words over much of the text, nor shared words what was invented
        (LONG, ["The cat sat on the mat. The dog ran off."], [LONG[:23]]),
        (LONG, ["The cat sat on the mat.", "A whale swam by the isle."], [LONG[:23]]),
    ],
)
def test_an_altered_text_is_placed_where_it_came_from(text, returned, placed):
    found = placing.align(deduction(*returned), text)
    assert [s.text for s in found.placed] == placed
    rejected = [(segment, placing.NOT_FOUND) for segment in deduction(*returned[len(placed) :])]
    assert list(found.rejected) == rejected


def test_endless_digits_align_although_the_judge_wrote_more_of_them():
    text = "It is about 0." + "0" * 4000
    found = placing.align(deduction("It is about 0." + "0" * 60000), text)
    assert found.coverage > 0.99


def test_an_empty_text_and_an_empty_segment_are_no_errors_and_bad_arguments_are():
    assert placing.align([], "").coverage == 1.0
    found = placing.align(deduction("", "x"), "")
    assert [reason for _, reason in found.rejected] == [placing.EMPTY, placing.NOT_FOUND]
    assert placing.align([], "word").characters == {"labelled": 0, placing.LEFT_OUT: 4}
    with pytest.raises(ValueError, match=r"no alignment 'exact'.*tolerant, published"):
        placing.align([], "", method="exact")


WORDS = st.lists(
    st.sampled_from(["so", "Wait,", "x=2", "中文", "“a”", "1.5", "\n"]), max_size=30
).map(" ".join)


@settings(deadline=None)
@given(WORDS, st.lists(WORDS, max_size=6))
def test_every_character_is_accounted_for_and_places_are_in_order(text, parts):
    for method in placing.METHODS:
        found = placing.align(deduction(*parts), text, method=method)
        assert sum(found.characters.values()) == found.total == solid(text)
        assert len(found.placed) + len(found.rejected) == len(parts)
        assert all(text[s.start : s.end] == s.text for s in found.placed)
    found = placing.align(deduction(*parts), text)
    assert all(a.end <= b.start for a, b in pairwise(found.placed))


# --- tokens ------------------------------------------------------------------------------


@st.composite
def cut_texts(draw):
    """A text, segments that do not overlap, and tokens that cover all of it."""
    text = draw(st.text("ab. \n", min_size=1, max_size=40))
    cuts = st.lists(st.integers(0, len(text)), max_size=12).map(sorted)
    edges, ends = draw(cuts), [*draw(cuts), len(text)]
    placed = [
        PlacedSegment("deduction", text[start:end], start, end)
        for start, end in zip(edges[::2], edges[1::2], strict=False)
    ]
    return text, placed, list(zip([0, *ends[:-1]], ends, strict=True))


def test_segments_own_the_tokens_that_begin_in_them():
    text, parts = "Ab cd. Ef", deduction("Ab cd.", "Ef")
    # prompt, tag, "Ab", " cd", ".", " ", "Ef", tag
    offsets = [[0, 0], [-9, -1], [0, 2], [2, 5], [5, 6], [6, 7], [7, 9], [9, 9]]
    aligned = annotation.align(parts, text, offsets)
    assert aligned.spans == (Span("deduction", 2, 5), Span("deduction", 6, 7))
    aligned = annotation.align(deduction("A", "."), "A.")
    one = placing.with_spans(placing.annotation(aligned, "t", "x"), [[0, 2]], "A.")
    assert one.spans == (Span("deduction", 0, 1),)
    assert one.ledger.items() >= {"spans": 1, "without_token": 1}.items()


@settings(deadline=None)
@given(cut_texts())
def test_token_spans_equal_the_naive_restatement_and_never_overlap(drawn):
    text, placed, offsets = drawn
    naive = []
    for segment in placed:
        mine = []
        for t, (start, end) in enumerate(offsets):
            first = next((i for i in range(start, end) if not text[i].isspace()), -1)
            if segment.start <= first < segment.end:
                mine.append(t)
        if mine:
            naive.append(Span(segment.label, mine[0], mine[-1] + 1))
    found = placing.token_spans(placed, offsets, text)
    assert found == tuple(naive)
    assert all(a.end <= b.start for a, b in pairwise(found))


def test_spans_outside_their_response_are_refused_by_name():
    one = replace(response("a"), prompt_ids=(1, 2), output_ids=(3,))
    placing.check(one, [Span("deduction", 0, 3)])
    for bad in (Span("deduction", 2, 2), Span("deduction", 2, 4), Span("deduction", -1, 1)):
        with pytest.raises(ValueError, match=r"response 't': span .* outside its 3 tokens"):
            placing.check(one, [bad])


# --- the coverage of a run ---------------------------------------------------------------


def test_the_coverage_of_a_run_counts_failed_chains():
    one = placing.annotation(placing.align(deduction("Done."), "Done. Or not."), "a", "judge")
    two = placing.failed("Four", "b", "judge", "timed out after 60 s")
    summary = placing.summarise([one, two])
    assert summary.characters == {"labelled": 5, placing.LEFT_OUT: 6, "failed": 4}
    assert (summary.total, summary.coverage) == (15, pytest.approx(5 / 15))
    assert (summary.chains, summary.failed) == (2, 1)
    assert [row["failed"] for row in summary.rows] == [None, "timed out after 60 s"]
    assert [row["coverage"] for row in summary.rows] == [pytest.approx(5 / 11), 0]
    assert placing.summarise([]).chains == 0


# --- the released chains -----------------------------------------------------------------


def test_the_released_chains_are_counted_as_stored_and_covered(published):
    """Coverage: 95 % for thinking models, or within a point of what the judge returned. The
    published method places 74 % of one of the two that lose most (method, section 4)."""
    files = sorted(published.glob("reasoning_comparison_*.json"))
    assert len(files) == 5
    for file in files:
        total = labelled = returned = as_published = 0
        for row in json.loads(file.read_text(encoding="utf-8")):
            text, reply = row["thinking_process"], row["annotated_response"]
            counts = dict.fromkeys(PAPER.names, 0)
            for segment in markup.read(reply, reader="published-counts").segments:
                counts[segment.label] += 1
            assert counts == row["label_counts"]
            segments = markup.parse(reply)
            found = placing.align(segments, text)
            total += found.total
            labelled += found.characters["labelled"]
            returned += min(found.total, sum(solid(segment.text) for segment in segments))
            old = markup.align(reply, text, reader="published")
            as_published += old.characters["labelled"]
        least = 0.95 if "deepseek" in file.name else returned / total - 0.01
        assert labelled / total >= least, file.name
        if "qwen-14b" in file.name and "deepseek" in file.name:
            assert round(as_published / total, 2) == 0.74


# --- sentences and cue words -------------------------------------------------------------


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
    ("sentence", "index", "want"),
    [
        ("Wait, that's not right.", 7, "backtracking"),
        ("I'm not sure about this.", 7, "uncertainty-estimation"),
        ("For example, take n = 3.", 7, "example-testing"),
        ("I remember that water boils at 100 degrees.", 7, "adding-knowledge"),
        ("So the answer is 4.", 7, "deduction"),
        ("Wait, what?", 0, "initializing"),
        ("The question is what x is.", 2, "initializing"),
        ("The question is what x is.", 9, "deduction"),
    ],
)
def test_cue_words_name_the_behaviour(sentence, index, want):
    assert sentences.label(sentence, index) == want


def test_neighbours_of_one_label_on_one_line_are_one_segment():
    text = "Go on. Go up.\nGo in. Go out."
    labels = ["deduction"] * 3 + ["backtracking"]
    found = sentences.segments(text, sentences.split(text), labels)
    assert [s.text for s in found] == ["Go on. Go up.", "Go in.", "Go out."]


# --- annotators --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lexical", "offline"])
def test_one_annotation_per_response_in_the_same_order_with_all_text_labelled(name):
    texts = ["Okay, so I plan. Wait, no.\nIt is 3.5 m, e.g. a lot.", "", " \n ", "中文。好！"]
    made = annotator(name)
    assert isinstance(made, annotation.Annotator)
    found = made.annotate([response(text, str(i)) for i, text in enumerate(texts)])
    assert [(one.task_id, one.annotator) for one in found] == [(n, name) for n in "0123"]
    assert placing.summarise(found).coverage == 1.0
    for one, text in zip(found, texts, strict=True):
        assert one.spans == ()
        assert all(text[s.start : s.end] == s.text for s in one.segments)
        assert {s.label for s in one.segments} <= set(PAPER.names)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", r"no annotator ''; there are grammar, lexical, offline, openai, replay"),
        ("gpt-4:x", "no annotator 'gpt-4'; there are grammar"),
        ("Lexical", r"no annotator 'Lexical' \(did you mean lexical\?\)"),
        ("openai:", "MODEL is missing; expected openai:MODEL"),
        ("openai", "MODEL is missing; expected openai:MODEL"),
        ("replay", "FOLDER is missing; expected replay:FOLDER"),
        ("offline:", "WEIGHTS is missing; expected offline:WEIGHTS"),
        ("offline:x", "no weights at x"),
        ("lexical:x", "lexical takes nothing behind a colon"),
    ],
)
def test_an_annotator_that_is_none_is_named_with_what_is_wrong(name, said):
    with pytest.raises(ValueError, match=said):
        annotator(name)


# --- the trained annotator ---------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    return offline.Offline()


@settings(max_examples=30, deadline=None)
@given(text=st.text(max_size=200))
def test_probabilities_add_up_on_any_text(trained, text):
    places = sentences.split(text)
    found = trained.classifier.probabilities(offline.of_chain(text, places))
    assert found.shape == (len(places), 6)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    trained.annotate([response(text)])


def test_plain_sentences_get_the_label_they_ask_for(trained):
    text = (
        "Okay, so I need to find the probability of two heads. "
        "I remember that a fair coin has probability 1/2. "
        "So, the probability is 1/2 times 1/2, which is 1/4. "
        "Hmm, I'm not sure whether that is right."
    )
    found = trained.annotate([response(text)])[0]
    labels = ["initializing", "adding-knowledge", "deduction", "uncertainty-estimation"]
    assert [s.label for s in found.segments] == labels
    assert sum(found.ledger["expected"].values()) == pytest.approx(1, abs=1e-3)
    assert len(found.ledger["probability"]) == 4


@pytest.mark.parametrize("bits", [offline.BITS, offline.BITS - 3])
def test_hashed_sums_equal_the_naive_loop(bits):
    text = "Okay, so 12 apples. Wait, no. Done."
    rows = offline.of_chain(text, sentences.split(text))
    weights = np.random.default_rng(0).normal(size=(1 << bits, 6))
    naive = np.zeros((3, 6))
    for i in range(3):
        for k in range(rows.start[i], rows.start[i + 1]):
            naive[i] += rows.value[k] * weights[rows.index[k] >> (offline.BITS - bits)]
    np.testing.assert_allclose(rows.hashed(weights), naive, atol=1e-9)


def test_smoothing_equals_the_sum_over_all_label_sequences(trained):
    """Forward-backward against every one of 6 ** 4 sequences."""
    scores = np.random.default_rng(0).normal(size=(4, 6))
    w = trained.classifier.arrays
    step = 0.2 * (w["log_transitions"] - w["log_prior"])
    naive = np.zeros((4, 6))
    for labels in product(range(6), repeat=4):
        log = sum(0.8 * scores[i, b] for i, b in enumerate(labels))
        log += sum(step[a, b] for a, b in pairwise(labels))
        for i, b in enumerate(labels):
            naive[i, b] += np.exp(log)
    naive /= naive.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(trained.classifier.smooth(scores), naive, rtol=1e-6)


def test_the_shipped_weights_are_small_and_hold_no_text():
    assert offline.WEIGHTS.stat().st_size <= 2_000_000
    with np.load(offline.WEIGHTS, allow_pickle=False) as stored:
        texts = [name for name in stored.files if stored[name].dtype.kind in "US"]
        assert texts == ["metadata"]
        metadata = json.loads(str(stored["metadata"]))
    assert set(metadata) == {"labels", "correction", "trained_on"}


def test_missing_or_foreign_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no weights at .*none\.npz"):
        annotator("offline", weights=tmp_path / "none.npz")
    other = tmp_path / "other.npz"
    np.savez(other, words=np.zeros((4, 6)))
    with pytest.raises(ValueError, match=r"has \(4, 0\) rows, expected \(131072, "):
        offline.Offline(other)


# --- annotations of a run: what is stored, made again, left in the file ------------------


class Counting:
    """Labels the whole of a chain as one deduction, and remembers what it was asked."""

    def __init__(self, name: str = "counting", failing: tuple[str, ...] = ()) -> None:
        self.name, self.failing, self.asked = name, failing, []

    def annotate(self, responses):
        self.asked += [response.task_id for response in responses]
        return [self._one(response) for response in responses]

    def _one(self, response):
        if response.task_id in self.failing:
            return Annotation(response.task_id, self.name, failed="no reply")
        text = response.thinking
        segment = PlacedSegment("deduction", text, 0, len(text))
        return Annotation(response.task_id, self.name, (segment,), ledger={"coverage": 1.0})


def written(model, task_id: str, thinking: str = "So it is.") -> Response:
    """What a model wrote, with its ids: one byte a token."""
    task = Task(task_id, "c", "?")
    ids = model.tokenizer(f"{thinking}\n</think>\n\nyes", add_special_tokens=False)["input_ids"]
    return prompts.response(model, task, prompts.opening(model, task), ids)


@pytest.fixture
def chains(tiny_llama) -> list[Response]:
    return [written(tiny_llama, task) for task in "abcd"]


@pytest.fixture
def store(tmp_path) -> Rows:
    return Rows(tmp_path / "annotations.jsonl", annotators.KEY)


@pytest.fixture
def annotate(tiny_llama, store):
    """``annotate(who, chains)`` with the model and the store of the test."""

    def run(who, chains, store=store):
        return annotators.annotations(who, chains, model=tiny_llama, store=store)

    return run


def test_only_what_is_missing_or_failed_is_annotated_in_order_with_spans(
    annotate, chains, store
):
    failing = annotate(Counting(failing=("b",)), chains[:2])
    assert [one.failed for one in failing] == [None, "no reply"]
    second, third = Counting(), Counting()
    found = annotate(second, chains)
    assert second.asked == ["b", "c", "d"]
    assert [(one.task_id, one.failed) for one in found] == [(task, None) for task in "abcd"]
    first = len(chains[0].prompt_ids)  # the nine characters of the thinking follow it
    assert {one.spans for one in found} == {(Span("deduction", first, first + 9),)}
    assert annotators.load(store, "counting") == found
    before = store.path.read_bytes()
    assert annotate(third, chains) == found
    assert third.asked == []
    assert store.path.read_bytes() == before


def test_without_a_model_or_ids_there_are_no_spans(tiny_llama, chains):
    assert annotators.annotations(Counting(), chains[:1])[0].spans == ()
    api = [replace(chains[0], prompt_ids=(), output_ids=())]
    assert annotators.annotations(Counting(), api, model=tiny_llama)[0].spans == ()


def test_other_annotators_and_other_chains_stay_and_the_rest_is_as_uninterrupted(
    annotate, chains, store, tmp_path
):
    whole = Rows(tmp_path / "whole.jsonl", annotators.KEY)
    annotate(Counting(), chains, whole)
    annotate(Counting(), chains[1:3])
    annotate(Counting(), chains)
    assert store.path.read_bytes() == whole.path.read_bytes()
    annotate(Counting("other"), chains[:2])
    annotate(Counting(), chains[:1])
    assert [one.task_id for one in annotators.load(store, "other")] == ["a", "b"]
    assert sorted(one.task_id for one in annotators.load(store, "counting")) == list("abcd")


def test_labels_of_another_chain_are_refused(annotate, chains):
    annotate(Counting(), chains)
    changed = [replace(chains[0], thinking="No."), *chains[1:]]
    with pytest.raises(ValueError, match="labels another chain of task a"):
        annotate(Counting(), changed)


def test_steered_chains_are_annotated_once_by_each_annotator_and_the_others_kept(
    tiny_llama, tmp_path
):
    conditions = [("none", -1, 0.0), ("backtracking", 2, 1.0), ("backtracking", 2, -1.0)]
    steered = [
        Steered(task, *how, "add", written(tiny_llama, task, f"So {task} is {how[2]}"))
        for task in "ab"
        for how in conditions
    ]
    store = Rows(tmp_path / "steered.jsonl", STEERED_KEY)
    store.bind({"seed": 0})
    store.append([to_row(one) for one in steered])
    options = {"model": tiny_llama, "store": store}
    annotators.steered(Counting(), steered[2:4], **options)
    annotated = {key: row["annotation"] is not None for key, row in store.by_key().items()}
    assert annotated == {one.key: one in steered[2:4] for one in steered}
    done = annotators.steered(Counting(), steered, **options)
    assert [one.key for one in done] == [one.key for one in steered]
    for one in done:
        assert one.annotation.segments[0].text == one.response.thinking
        span = one.annotation.spans[0]
        assert span.end - span.start == len(one.response.thinking)
    before = store.path.read_bytes()
    again, other = Counting(), Counting("other")
    assert annotators.steered(again, done, **options) == done
    assert again.asked == []
    assert store.path.read_bytes() == before
    found = annotators.steered(other, done, **options)
    assert len(other.asked) == 6
    assert {one.annotation.annotator for one in found} == {"other"}


def test_the_table_has_a_row_per_segment():
    segments = PlacedSegment("deduction", "So", 0, 2), PlacedSegment("backtracking", "No", 3, 5)
    found = annotators.table([Annotation("a", "x", segments), Annotation("b", "x")])
    assert found.columns.tolist() == ["task_id", "label", "start", "end", "text"]
    assert found.to_numpy().tolist() == [
        ["a", "deduction", 0, 2, "So"],
        ["a", "backtracking", 3, 5, "No"],
    ]
    assert annotators.table([]).columns.tolist() == found.columns.tolist()


# --- agreement ---------------------------------------------------------------------------

SAID = "One two. Wait, three. Four."


def labelled(text, parts, who="a", task_id="t"):
    """An annotation from ``(label, text of the part)`` in order."""
    placed, at = [], 0
    for label, part in parts:
        start = text.index(part, at)
        at = start + len(part)
        placed.append(PlacedSegment(label, part, start, at))
    return placing.annotation(placing.place(placed, text), task_id, who)


def agreed(*annotated):
    return agreement.compare(*annotated, rng=np.random.default_rng(0))


def test_agreement_is_over_characters_that_are_not_white_space():
    one = labelled(SAID, [("deduction", "One two."), ("backtracking", "Wait, three. Four.")])
    parts = [("deduction", "One two. Wait, three."), ("backtracking", "Four.")]
    compared = agreed([one], [labelled(SAID, parts, "b")], [response(SAID)])
    by_chance = (7 / 23) * (18 / 23) + (16 / 23) * (5 / 23)
    kinds = ("difference", "kappa")
    values = dict.fromkeys((f"{x}, {kind}" for kind in kinds for x in PAPER.names), math.nan)
    values |= {"deduction, difference": 11 / 23, "backtracking, difference": -11 / 23}
    values |= {"accuracy": 12 / 23, "compared": 1}
    values["kappa"] = (12 / 23 - by_chance) / (1 - by_chance)
    values |= {"deduction, kappa": values["kappa"], "backtracking, kappa": values["kappa"]}
    report = agreement.report([compared])
    assert set(report["annotator"]) == {"b"}
    assert dict(zip(report["quantity"], report["value"], strict=True)) == pytest.approx(
        values, nan_ok=True
    ), "of two labels, each has the kappa of both"
    assert agreement.report([]).empty
    table = agreement.confusions([compared])
    assert list(table.columns) == ["annotator", "label", *PAPER.names]
    assert table["label"].tolist() == list(PAPER.names)
    given = table.set_index("label").loc["backtracking"]
    assert given[["deduction", "backtracking"]].tolist() == pytest.approx([11 / 16, 5 / 16])
    never = table.loc[~table["label"].isin(["deduction", "backtracking"]), list(PAPER.names)]
    assert never.isna().to_numpy().all(), "labels that were never given"


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=50))
def test_kappa_equals_that_of_scikit_learn(drawn):
    metrics = pytest.importorskip("sklearn.metrics")
    first, second = np.array(drawn).T
    table = metrics.confusion_matrix(first, second, labels=range(3))
    found = agreement.kappa(table)
    if len(set(first) | set(second)) == 1:
        assert math.isnan(found)
    else:
        want = metrics.cohen_kappa_score(first, second, labels=range(3))
        assert found == pytest.approx(want, abs=1e-12)


def test_unrelated_annotators_have_a_kappa_around_zero_inside_its_interval():
    rng = np.random.default_rng(1)
    text = " ".join(f"S{i}." for i in range(100, 120))
    drawn = [
        [
            labelled(
                text, [(PAPER.names[rng.integers(3)], p) for p in text.split()], who, str(i)
            )
            for i in range(30)
        ]
        for who in "ab"
    ]
    found = agreed(*drawn, [response(text, str(i)) for i in range(30)])
    kappa, low, high = found.quantities["kappa"]
    assert abs(kappa) < 0.1
    assert low < kappa < high


def test_failed_and_empty_chains_are_left_out_and_counted():
    good = [labelled(SAID, [("deduction", SAID)], task_id=task) for task in "tu"]
    failed = placing.failed(SAID, "u", "b", "timed out")
    found = agreed(good, [good[0], failed], [response(SAID), response(SAID, "u")])
    assert found.quantities["compared"][0] == pytest.approx(0.5)
    assert math.isnan(agreed([], [], []).quantities["kappa"][0])


def test_annotations_of_other_responses_are_refused():
    good = labelled(SAID, [("deduction", SAID)])
    for first in ([good, good], [Annotation("x", "a")]):
        with pytest.raises(ValueError, match="annotations are not those of the 1 responses"):
            agreed(first, [good], [response(SAID)])


def test_annotators_are_measured_against_the_truth_where_there_is_one():
    truth = ("grammar", "offline", "lexical")
    assert agreement.annotators("grammar", embedded=True) == truth
    assert agreement.annotators("openai:m", embedded=True) == (*truth, "openai:m")
    assert agreement.annotators("openai:m", embedded=False) == ("openai:m", "lexical")
    assert agreement.annotators("lexical", embedded=False) == ("lexical", "offline")
