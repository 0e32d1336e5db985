"""What others wrote: every reader raises the package's own error, in one line, with the place.

Each reader gets the same bad values: nesting that ends Python's stack, other types, missing
fields, costs that are none, numbers of thousands of digits, half surrogate pairs, NUL bytes.
"""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stllms import foreign, records, sending
from stllms.annotate import markup, protocols
from stllms.annotate.replay import Replay
from stllms.annotate.train import read_chains
from stllms.provenance import BadFile
from stllms.records import Annotation, BadRow, PlacedSegment, Response, Steered, TokenSpan
from stllms.replies import FILE, Reply, Store

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
    (TokenSpan("deduction", 2, 3),),
    {"placed": 1},
)
STEERED = Steered("t", "none", -1, 0.0, "add", RESPONSE, ANNOTATION)
ROW = {
    "key": "k",
    "name": "t",
    "model": "m",
    "identity": {"protocol": "rewrite"},
    "about": {"shown": "s"},
    "status": "answered",
    "reason": None,
    "cost": 0.5,
    "body": {"choices": [{"message": {"content": '["deduction"]a["end-section"]'}}]},
}


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
        if depth <= foreign.DEEPEST:
            assert foreign.loads(text) == json.loads(text)
        else:
            with pytest.raises(ValueError, match="nested deeper than 100 levels"):
                foreign.loads(text)


@given(st.text() | st.binary())
def test_a_text_that_is_no_json_is_a_value_error(text):
    try:
        foreign.loads(text)
    except ValueError:
        return


def test_an_amount_is_finite_and_not_negative_and_no_boolean():
    good = {0: 0.0, 7: 7.0, 0.25: 0.25}
    for value, expected in good.items():
        assert foreign.amount(value) == expected
    for bad in (-1, -0.5, math.nan, math.inf, -math.inf, True, False, "1", None, [], 10**400):
        assert foreign.amount(bad) is None


# --- stored replies -----------------------------------------------------------------------


def stored(folder: Path, *lines: str) -> Path:
    folder.mkdir(exist_ok=True)
    text = "".join(f"{line}\n" for line in lines)
    (folder / FILE).write_bytes(text.encode("utf-8", "surrogatepass"))
    return folder


GOOD = json.dumps(ROW)


@pytest.mark.parametrize("strange", STRANGE)
def test_a_line_that_is_no_reply_is_named(tmp_path, strange):
    with pytest.raises(BadFile) as caught:
        Store(stored(tmp_path, GOOD, strange)).load()
    one_line(caught.value, str(tmp_path / FILE), "line 2: not a stored reply")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cost": -1}, "cost: -1, expected a finite number"),
        ({"cost": True}, "cost: True"),
        ({"cost": math.nan}, "cost: nan"),
        ({"cost": math.inf}, "cost: inf"),
        ({"cost": "0.5"}, "cost: 0.5"),
        ({"key": 7}, "key: a number, expected a text"),
        ({"name": None}, "name: null, expected a text"),
        ({"model": ["m"]}, "model: a list, expected a text"),
        ({"identity": "rewrite"}, "identity: a text, expected an object"),
        ({"identity": {"protocol": ["rewrite"]}}, "identity.protocol: a list"),
        ({"about": []}, "about: a list, expected an object"),
        ({"status": "good"}, "status: 'good', expected answered, unusable, failed"),
        ({"status": "failed"}, "reason: null, expected a text"),
    ],
)
def test_a_field_of_a_stored_reply_that_is_wrong_is_named(tmp_path, change, words):
    with pytest.raises(BadFile) as caught:
        Store(stored(tmp_path, GOOD, json.dumps(ROW | change))).load()
    one_line(caught.value, f"{tmp_path / FILE}, line 2", words)


@pytest.mark.parametrize("name", ["key", "name", "model", "identity", "status"])
def test_a_field_that_a_stored_reply_lacks_is_named(tmp_path, name):
    row = {key: value for key, value in ROW.items() if key != name}
    with pytest.raises(BadFile, match=f"line 1: not a stored reply .it lacks {name}"):
        Store(stored(tmp_path, json.dumps(row))).load()


def test_a_last_line_is_dropped_only_where_it_was_torn(tmp_path):
    """Half of a line is; a whole one that is no reply is somebody's, and is never cut off."""
    file = stored(tmp_path, GOOD) / FILE
    whole = file.read_bytes()
    file.write_bytes(whole + GOOD.encode()[:-9])
    assert len(Store(tmp_path).load().rows["k"]) == 1
    for other in (b'{"mine": 1}', b"[]"):
        file.write_bytes(whole + other)
        with pytest.raises(BadFile, match="line 2: not a stored reply"):
            Store(tmp_path).load()
        with pytest.raises(BadFile), Store(tmp_path).writing():
            pass
        assert file.read_bytes() == whole + other


@FUZZ
@given(st.dictionaries(st.sampled_from([*ROW, "other"]), VALUES))
def test_whatever_a_row_holds_the_store_names_its_line_or_takes_it(tmp_path, change):
    folder = stored(tmp_path / "fuzz", GOOD, json.dumps(ROW | change))
    try:
        store = Store(folder).load()
    except BadFile as error:
        one_line(error, "line 2")
        return
    assert math.isfinite(store.spent) or store.spent == math.inf
    for rows in store.rows.values():
        for row in rows:
            reply = Reply(row)
            assert isinstance(reply.content + reply.reasoning, str)
            assert reply.finish is None or reply.message is not None
    try:
        replay = Replay(folder)
    except ValueError as error:
        one_line(error, str(folder))
        return
    made = replay.annotate([RESPONSE])[0]
    assert made.failed is None or isinstance(made.failed, str)


def test_a_replayed_reply_without_what_the_judge_was_shown_is_named(tmp_path):
    for about in ({}, {"shown": 7}):
        folder = stored(tmp_path, GOOD, json.dumps(ROW | {"about": about}))
        with pytest.raises(BadFile) as caught:
            Replay(folder)
        one_line(caught.value, f"{folder / FILE}, line 2", "about.shown")


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


# --- training data ------------------------------------------------------------------------


@pytest.mark.parametrize("strange", STRANGE)
def test_training_data_names_its_bad_line(tmp_path, strange):
    (tmp_path / "responses.jsonl").write_text(json.dumps(of_json(RESPONSE)) + "\n")
    path = tmp_path / "annotations.jsonl"
    path.write_text(f"{json.dumps(of_json(ANNOTATION))}\n{strange}\n")
    with pytest.raises(ValueError, match=r"annotations\.jsonl, line 2") as caught:
        read_chains(path)
    assert isinstance(caught.value, BadFile | BadRow)
    one_line(caught.value)


# --- replies of a judge -------------------------------------------------------------------

MARKUP = st.lists(
    st.sampled_from(
        ["[", "]", '["deduction"]', '["end-section"]', "{", "}", '"', "1-2 deduction", ",", ":",
         "\ud83d", "\x00", "9" * 300, "[" * 2_500, " a ", "0. ", "\\", "labels"]
    ),
    max_size=12,
).map("".join)  # fmt: skip


def reply_of(content: str, pieces: object = 2) -> Reply:
    body = {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}
    return Reply(ROW | {"about": {"shown": "s", "pieces": pieces}, "body": body})


@FUZZ
@given(MARKUP | st.text(), st.sampled_from(sorted(protocols.PROTOCOLS)))
def test_whatever_a_judge_answers_its_chain_is_annotated_or_failed(content, name):
    protocol = protocols.PROTOCOLS[name]
    made = protocol.annotation(RESPONSE, [reply_of(content)], "openai:m")
    assert made.failed or made.segments
    json.dumps(records.to_row(made), ensure_ascii=False, allow_nan=False).encode()
    for reader in markup.READERS:
        for segment, _ in markup.read(content, reader=reader).pieces:
            assert isinstance(segment.text, str)


@pytest.mark.parametrize("content", ["[" * 2_500, DEEP, '{"labels": ' + DEEP + "}"])
def test_a_deep_reply_is_a_failed_chain_with_a_reason(content):
    made = protocols.PROTOCOLS["indexed"].annotation(RESPONSE, [reply_of(content)], "openai:m")
    assert made.failed.startswith("the judge labelled nothing")


@pytest.mark.parametrize("pieces", [None, "2", True, [2]])
def test_a_stored_reply_that_does_not_say_how_many_pieces_fails_its_chain(pieces):
    reply = reply_of('{"labels": ["1 deduction"]}', pieces)
    made = protocols.PROTOCOLS["indexed"].annotation(RESPONSE, [reply], "openai:m")
    assert "about.pieces" in made.failed


TARGET = sending.Target("m", "http://127.0.0.1:1/v1", None, None)


@FUZZ
@given(st.sampled_from(STRANGE) | VALUES.map(json.dumps), st.sampled_from([200, 400, 429, 500]))
def test_whatever_a_server_answers_is_an_outcome_that_can_be_stored(tmp_path, text, status):
    outcome = sending.read_answer(text, status, {}, TARGET)
    assert outcome.reason is not None
    assert "\n" not in outcome.reason
    row = ROW | {"status": "failed", "reason": outcome.reason, "cost": None}
    row |= {"body": outcome.body}
    folder = tmp_path / "fuzz"
    folder.mkdir(exist_ok=True)
    with Store(folder).writing() as store:
        store.append(row)
    assert Store(folder).load().rows["k"]


@pytest.mark.parametrize(
    "usage",
    [
        *({"cost": cost} for cost in (-1, True, 1e999, math.nan, "1")),
        *({"prompt_tokens": n, "completion_tokens": 1} for n in (True, -5, 10**400, "7", None)),
        *([], 7, None),
    ],
)
def test_a_cost_that_is_none_is_not_counted(usage):
    from stllms.providers import Price

    assert sending.cost_of(usage, Price(1.0, 1.0)) is None
