"""JSON of strangers and records from rows: whatever a text or a row holds, it is read, or
refused in one line that names the place."""

from __future__ import annotations

import json
import math
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stllms import labels, records
from stllms.records import Annotation, BadRow, PlacedSegment, Response, Span, Steered

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
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
RECORDS = [
    (RESPONSE, records.response_from_row),
    (ANNOTATION, records.annotation_from_row),
    (STEERED, records.steered_from_row),
]


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
    for value, expected in {0: 0.0, 7: 7.0, 0.25: 0.25}.items():
        assert records.amount(value) == expected
    for bad in (-1, -0.5, math.nan, math.inf, -math.inf, True, False, "1", None, [], 10**400):
        assert records.amount(bad) is None


def of_json(record) -> dict:
    return json.loads(json.dumps(records.to_row(record)))


@pytest.mark.parametrize(("record", "make"), RECORDS)
def test_a_record_comes_back_whole_and_each_field_is_checked(record, make):
    row = of_json(record)
    assert make(row) == make(row | {"extra": 1}) == record
    for name in {one.name for one in fields(record)} - {"audit"}:
        for change in ({}, {name: {"a": [1]} if name != "ledger" else [1]}):
            wrong = {key: value for key, value in row.items() if key != name} | change
            if name != "failed" or change:
                with pytest.raises(BadRow, match=name):
                    make(wrong)


@pytest.mark.parametrize(
    ("which", "path", "value"),
    [
        (0, ["output_ids", 1], True),
        (0, ["output_ids", 1], -3),
        (0, ["output_ids", 1], 3.0),
        (0, ["thinking_start"], -1),
        (0, ["closed"], 1),
        (1, ["segments", 0, "end"], "1"),
        (1, ["spans", 0], [1]),
        (1, ["failed"], False),
        (2, ["coefficient"], math.nan),
        (2, ["coefficient"], True),
        (2, ["response", "text"], None),
        (2, ["layer"], -2),
        (2, ["annotation", "ledger"], []),
    ],
)
def test_a_wrong_value_is_named_where_it_is(which, path, value):
    record, make = RECORDS[which]
    row = inner = of_json(record)
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    place = ".".join(map(str, path))
    with pytest.raises(BadRow, match=rf"^there\.jsonl, line 2: {place}: \w+ should be .*$"):
        records.from_rows([of_json(record), row], make, "there.jsonl")


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(RECORDS), st.data())
def test_whatever_a_row_holds_a_record_is_made_or_a_bad_row_raised(which, data):
    record, make = which
    row = of_json(record)
    names = data.draw(st.lists(st.sampled_from(sorted(row)), max_size=3))
    row |= {name: data.draw(VALUES) for name in names}
    try:
        made = make(row)
    except BadRow:
        return
    assert make(records.to_row(made)) == made


def test_the_labels_have_their_roles():
    paper = labels.PAPER
    assert set(paper.targets) < set(paper.names)
    assert set(paper.heatmap) == set(paper.names) - {"example-testing"}
    assert len({one.colour for one in paper.labels} | {labels.OTHER}) == 7
    assert labels.is_control("shuffled:0")
    for name in ("shuffled", "shuffled:", "shuffled:x", "backtracking:0", "none"):
        assert not labels.is_control(name)
