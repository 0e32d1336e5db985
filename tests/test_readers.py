"""What others wrote: every reader raises the package's own error, in one line, with the place.

Each reader gets the same bad values: nesting that ends Python's stack, other types, missing
fields, costs that are none, numbers of thousands of digits, half surrogate pairs, NUL bytes.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stllms import records
from stllms.generation import prompts
from stllms.records import Annotation, BadRow, PlacedSegment, Response, Span, Steered
from stllms.runs.files import BadFile

DEEP = "[" * 2_500 + "]" * 2_500
#: Texts that are values of JSON, and not what any field wants; and texts that are none.
STRANGE = (
    *("null", "true", "7", "-1", "1.5", "1e999", "NaN", '"\\ud83d"', '"a\\u0000b"', "[]", "{}"),
    *(
        "[[[]]]",
        '{"a": {"b": 1}}',
        "9" * 5_000,
        DEEP,
        '{"a":' * 2_500,
        "[" * 2_500,
        "\x00",
        "{",
    ),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

RESPONSE = Response("t", "own", "Q <think>", (1, 2), (3, 4), "a", "a", 0, "", True, True)
ANNOTATION = Annotation(
    "t",
    "hand",
    (PlacedSegment("deduction", "a", 0, 1),),
    (Span("deduction", 2, 3),),
    {"placed": 1},
)
STEERED = Steered("t", "none", -1, 0.0, "add", RESPONSE, ANNOTATION)


def one_line(error: Exception, *words: str) -> None:
    said = str(error)
    assert len(said) < 800
    assert said.isprintable(), said
    for word in words:
        assert word in said


# --- JSON ---------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 50, 100, 101, 102, 900, 2_500, 100_000])
def test_nesting_is_refused_from_a_stated_depth_on(depth):
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        text = opening * depth + "1" + closing * depth
        if depth <= records.DEEPEST:
            assert records.loads(text) == json.loads(text)
        else:
            with pytest.raises(ValueError, match="nested deeper than 100 levels"):
                records.loads(text)


@given(st.text() | st.binary())
def test_a_text_that_is_no_json_is_a_value_error(text):
    try:
        records.loads(text)
    except ValueError:
        return


def test_an_amount_is_finite_and_not_negative_and_no_boolean():
    good = {0: 0.0, 7: 7.0, 0.25: 0.25}
    for value, expected in good.items():
        assert records.amount(value) == expected
    for bad in (-1, -0.5, math.nan, math.inf, -math.inf, True, False, "1", None, [], 10**400):
        assert records.amount(bad) is None


# --- records ------------------------------------------------------------------------------

RECORDS = [
    (RESPONSE, records.response_from_row),
    (ANNOTATION, records.annotation_from_row),
    (STEERED, records.steered_from_row),
]


def of_json(record) -> dict:
    return json.loads(json.dumps(records.to_row(record)))


@pytest.mark.parametrize(("record", "make"), RECORDS)
def test_a_record_comes_back_whole_and_each_field_is_checked(record, make):
    row = of_json(record)
    assert make(row) == record
    assert make(row | {"extra": 1}) == record
    for one in fields(record):
        if one.name not in ("failed", "audit"):
            lacking = {key: value for key, value in row.items() if key != one.name}
            with pytest.raises(BadRow, match=f"it lacks {one.name}"):
                make(lacking)
        if one.name != "audit":
            with pytest.raises(BadRow) as caught:
                make(row | {one.name: {"a": [1]} if one.name != "ledger" else [1]})
            one_line(caught.value, one.name)


@pytest.mark.parametrize(
    ("make", "record", "path", "value", "words"),
    [
        (records.response_from_row, RESPONSE, ["output_ids", 1], True, "output_ids[1]: a bool"),
        (records.response_from_row, RESPONSE, ["output_ids", 1], -3, "output_ids[1]: a num"),
        (
            records.response_from_row,
            RESPONSE,
            ["output_ids", 1],
            3.0,
            "output_ids[1]: a num",
        ),
        (records.response_from_row, RESPONSE, ["thinking_start"], -1, "thinking_start: a n"),
        (
            records.response_from_row,
            RESPONSE,
            ["closed"],
            1,
            "closed: a number (1), exp",
        ),
        (
            records.annotation_from_row,
            ANNOTATION,
            ["segments", 0, "end"],
            "1",
            "segments[0].end",
        ),
        (records.annotation_from_row, ANNOTATION, ["spans", 0], [1], "spans[0]: a list, expec"),
        (records.annotation_from_row, ANNOTATION, ["failed"], False, "failed: a boolean"),
        (records.steered_from_row, STEERED, ["coefficient"], math.nan, "coefficient: a number"),
        (records.steered_from_row, STEERED, ["coefficient"], True, "coefficient: a boolean"),
        (records.steered_from_row, STEERED, ["response", "text"], None, "response.text: null"),
        (records.steered_from_row, STEERED, ["layer"], -2, "layer: a number (-2)"),
        (records.steered_from_row, STEERED, ["annotation", "ledger"], [], "annotation.ledger"),
    ],
)
def test_a_wrong_value_is_named_where_it_is(make, record, path, value, words):
    row = of_json(record)
    *place, last = path
    inner = row
    for step in place:
        inner = inner[step]
    inner[last] = value
    with pytest.raises(BadRow) as caught:
        records.from_rows([of_json(record), row], make, "there.jsonl")
    one_line(caught.value, "there.jsonl, line 2: ", words)


@FUZZ
@given(st.sampled_from(RECORDS), st.data())
def test_whatever_a_row_holds_a_record_is_made_or_a_bad_row_raised(which, data):
    record, make = which
    row = of_json(record)
    names = data.draw(st.lists(st.sampled_from(sorted(row)), max_size=3))
    row |= {name: data.draw(VALUES) for name in names}
    try:
        made = make(row)
    except BadRow as error:
        one_line(error)
        return
    assert make(records.to_row(made)) == made


# --- a person's file ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a"])
@pytest.mark.parametrize("strange", STRANGE)
def test_a_persons_file_is_read_or_refused_in_one_line(tmp_path, name, strange):
    places, refused = [], 0
    for text in (strange, f'{{"text": {strange}}}', f'{{"text": "a", "task_id": {strange}}}'):
        content = f"[{text}]" if name.endswith("json") else f'{{"text": "a b."}}\n{text}'
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        try:
            made = prompts.read(str(path))
        except BadFile as error:
            one_line(error, str(path))
            places += re.findall(r"line 2|chain 1|no whole JSON", str(error))
            refused += 1
            continue
        for one in made:
            (one.task_id + one.text + one.thinking + one.answer).encode()  # can be stored
    assert len(places) == refused


@pytest.mark.parametrize("name", ["a\x00b", "~nobody-of-this-name/x", "x" * 5_000])
def test_a_name_that_no_file_can_have_is_refused(name):
    with pytest.raises(BadFile) as caught:
        prompts.read(name)
    assert "\n" not in str(caught.value)
