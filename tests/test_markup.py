"""The reader of the markup: every form a judge writes, and any text at all."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stllms import annotate
from stllms.annotate import markup
from stllms.records import BEHAVIOURS, Segment


def pairs(text, **options):
    return [(s.label, s.text) for s in markup.read(text, **options).segments]


@pytest.mark.parametrize(
    "tag",
    [
        '["adding-knowledge"]',
        "[adding-knowledge]",
        '["2. adding-knowledge"]',
        "[2. adding-knowledge]",
        "[ Adding Knowledge ]",
        "[ADDING_KNOWLEDGE]",
        "['adding-knowledge']",
        "[“adding-knowledge”]",
        '[\\"adding-knowledge\\"]',
        '[2. "adding-knowledge"]',
        "[**adding-knowledge**]",
        "[2) adding knowledge]",
    ],
)
@pytest.mark.parametrize(
    "close", ['["end-section"]', "[end-section]", "[End Section]", "[/adding-knowledge]", ""]
)
def test_every_form_of_tag_opens_a_section(tag, close):
    assert pairs(f"{tag} Water boils at 100. {close}") == [
        ("adding-knowledge", "Water boils at 100.")
    ]


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
    assert reading.segments == (Segment("deduction", text),)
    assert reading.rejected == ()


def test_a_missing_closing_tag_ends_at_the_next_section():
    text = '["deduction"] One. ["backtracking"] Two. ["end-section"] [deduction] Three.'
    reading = markup.read(text)
    assert [s.text for s in reading.segments] == ["One.", "Two.", "Three."]
    assert reading.forms["unclosed"] == 2


def test_a_section_inside_another_gives_its_rest_back_to_the_outer_one():
    text = '["deduction"] A ["backtracking"] B ["end-section"] C ["end-section"]'
    reading = markup.read(text)
    assert pairs(text) == [("deduction", "A"), ("backtracking", "B"), ("deduction", "C")]
    assert reading.rejected == ()


def test_what_is_rejected_keeps_its_text_and_says_why():
    text = 'Here it is:\n["planning"] P ["end-section"] stray ["deduction"] D ["end-section"]'
    text += '["backtracking"]["end-section"] Done.'
    reading = markup.read(text)
    assert reading.segments == (Segment("deduction", "D"),)
    assert reading.rejected == (
        (Segment("", "Here it is:"), markup.OUTSIDE),
        (Segment("planning", "P"), markup.UNKNOWN),
        (Segment("", "stray"), markup.OUTSIDE),
        (Segment("backtracking", ""), markup.EMPTY),
        (Segment("", "Done."), markup.OUTSIDE),
    )


def test_the_published_reader_wants_quotes_and_closing_tags_and_keeps_unknown_labels():
    text = '["deduction"]A["end-section"] [deduction]B[end-section] ["plan"]C["end-section"]'
    assert pairs(text, reader="published") == [("deduction", "A"), ("plan", "C")]


def test_the_counting_reader_ignores_closing_tags_and_numbered_forms():
    text = (
        '["deduction"]A [backtracking]B["end-section"] [1. deduction]C ["Deduction"] ["plan"]'
    )
    labels = [s.label for s in markup.read(text, reader="published-counts").segments]
    assert labels == ["deduction", "backtracking"]


def test_an_unknown_reader_is_named_with_the_choices():
    with pytest.raises(ValueError, match=r"no reader 'strict'.*published-counts"):
        markup.read("", reader="strict")


_OTHERS = ("0. ", "[1. backtracking]", "/", "\\", "\n", " ", "f[0]", "“", '["plan"]', "_", "中")
FRAGMENTS = st.sampled_from(
    [
        "[",
        "]",
        '["',
        '"]',
        "end-section",
        '["end-section"]',
        "deduction",
        '["deduction"]',
        *_OTHERS,
    ]
)


@settings(deadline=None)
@given(st.one_of(st.text(), st.lists(FRAGMENTS, max_size=40).map("".join)))
@example("[" * 5000)
@example('["' + " " * 5000)
@example('["deduction"]' * 500)
def test_no_text_raises_and_only_known_labels_pass(text):
    for reader in markup.READERS:
        reading = markup.read(text, reader=reader)
        assert all(isinstance(s.text, str) for s in reading.segments)
        if reader != "published":
            assert {s.label for s in reading.segments} <= set(BEHAVIOURS)
    assert annotate.parse(text) == list(markup.read(text).segments)


@settings(deadline=None)
@given(st.lists(FRAGMENTS, max_size=40).map("".join))
def test_every_word_of_a_reply_is_in_a_piece_or_in_a_tag(text):
    """What the tolerant reader returns, plus the tags, is the reply: nothing is dropped."""
    read = sum(len("".join(s.text.split())) for s, _ in markup.read(text).pieces)
    tags = sum(len("".join(text[m.start : m.end].split())) for m in markup._marks(text))
    assert read + tags == len("".join(text.split()))


PARTS = st.lists(
    st.tuples(st.sampled_from(BEHAVIOURS), st.text("abc .,()=0", min_size=1).map(str.strip)),
    max_size=8,
).map(lambda parts: [(label, text) for label, text in parts if text])


@settings(deadline=None)
@given(PARTS, st.data())
def test_what_is_written_in_any_form_is_read_back(parts, data):
    written = ""
    for label, text in parts:
        name = data.draw(st.sampled_from([label, label.upper(), label.replace("-", " ")]))
        number = data.draw(st.sampled_from(["", "0. ", "5. "]))
        quote = data.draw(st.sampled_from(["", '"']))
        close = data.draw(st.sampled_from(['["end-section"]', "[end-section]", ""]))
        written += f"[{quote}{number}{name}{quote}]{text}{close}\n"
    assert pairs(written) == parts


def test_the_counting_reader_equals_the_stored_counts_of_every_released_chain(published):
    files = sorted(published.glob("reasoning_comparison_*.json"))
    assert len(files) == 5
    chains = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]
    assert len(chains) == 500
    for row in chains:
        segments = markup.read(row["annotated_response"], reader="published-counts").segments
        counts = dict.fromkeys(BEHAVIOURS, 0)
        for segment in segments:
            counts[segment.label] += 1
        assert counts == row["label_counts"]
