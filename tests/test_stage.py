"""Annotations of a run: what is stored, what is made again, what stays in the file."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from stllms.annotate import stage
from stllms.artifacts import Rows
from stllms.config import RunConfig
from stllms.records import (
    STEERED_KEY,
    Annotation,
    PlacedSegment,
    Response,
    Steered,
    TokenSpan,
    to_row,
)


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


def response(model, task: str, thinking: str = "So it is.") -> Response:
    prompt_text, prompt_ids = model.prompt_ids("?")
    text = f"{thinking}\n</think>\n\nyes"
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return Response(
        task, "c", prompt_text, prompt_ids, tuple(ids), text, thinking, 0, "yes", True, True
    )


@pytest.fixture
def chains(tiny_llama) -> list[Response]:
    return [response(tiny_llama, task) for task in "abcd"]


@pytest.fixture
def store(tmp_path) -> Rows:
    return Rows(tmp_path / "annotations.jsonl", stage.KEY)


def stored_keys(store: Rows) -> list[tuple[str, str]]:
    lines = store.path.read_text().splitlines()
    return [(row["task_id"], row["annotator"]) for row in map(json.loads, lines)]


def test_every_response_gets_its_annotation_in_order_with_spans_in_the_used_ids(
    tiny_llama, chains, store
):
    found = stage.annotations(Counting(), chains, model=tiny_llama, store=store)
    assert [one.task_id for one in found] == list("abcd")
    # One byte a token: the nine characters of the thinking are the first nine output tokens.
    first = len(chains[0].prompt_ids)
    assert found[0].spans == (TokenSpan("deduction", first, first + 9),)
    assert stage.load(store, "counting") == found


def test_without_a_model_or_ids_there_are_no_spans(tiny_llama, chains):
    assert stage.annotations(Counting(), chains[:1])[0].spans == ()
    through_an_api = [replace(chains[0], prompt_ids=(), output_ids=())]
    assert stage.annotations(Counting(), through_an_api, model=tiny_llama)[0].spans == ()


def test_what_is_stored_is_not_annotated_again(tiny_llama, chains, store):
    stage.annotations(Counting(), chains[:2], model=tiny_llama, store=store)
    before = store.path.read_bytes()
    second = Counting()
    stage.annotations(second, chains[:2], model=tiny_llama, store=store)
    assert second.asked == []
    assert store.path.read_bytes() == before
    stage.annotations(second, chains, model=tiny_llama, store=store)
    assert second.asked == ["c", "d"]
    assert [task for task, _ in stored_keys(store)] == list("abcd")


def test_failed_chains_are_tried_again_and_good_ones_are_not(tiny_llama, chains, store):
    first = stage.annotations(Counting(failing=("b",)), chains, model=tiny_llama, store=store)
    assert [one.failed for one in first] == [None, "no reply", None, None]
    second = Counting()
    found = stage.annotations(second, chains, model=tiny_llama, store=store)
    assert second.asked == ["b"]
    assert all(one.failed is None for one in found)
    assert stage.load(store, "counting") == found


def test_other_annotators_and_other_chains_stay_in_the_file(tiny_llama, chains, store):
    stage.annotations(Counting("other"), chains[:2], model=tiny_llama, store=store)
    stage.annotations(Counting(), chains[2:], model=tiny_llama, store=store)
    stage.annotations(Counting(), chains[:1], model=tiny_llama, store=store)
    assert sorted(stored_keys(store)) == [
        ("a", "counting"),
        ("a", "other"),
        ("b", "other"),
        ("c", "counting"),
        ("d", "counting"),
    ]
    assert [one.task_id for one in stage.load(store, "other")] == ["a", "b"]


def test_the_file_of_a_resumed_run_equals_that_of_an_uninterrupted_one(
    tiny_llama, chains, store, tmp_path
):
    whole = Rows(tmp_path / "whole.jsonl", stage.KEY)
    stage.annotations(Counting(), chains, model=tiny_llama, store=whole)
    stage.annotations(Counting(), chains[1:3], model=tiny_llama, store=store)
    stage.annotations(Counting(), chains, model=tiny_llama, store=store)
    assert store.path.read_bytes() == whole.path.read_bytes()


def test_an_annotator_that_loses_a_chain_is_noticed(chains, store):
    lossy = Counting()
    lossy.annotate = lambda responses: Counting.annotate(lossy, responses[:-1])
    with pytest.raises(ValueError, match="shorter"):
        stage.annotations(lossy, chains, store=store)
    assert not store.path.exists()


# --- steered chains ----------------------------------------------------------------------


@pytest.fixture
def steered(tiny_llama) -> list[Steered]:
    arms = [("none", -1, 0.0), ("backtracking", 2, 1.0), ("backtracking", 2, -1.0)]
    return [
        Steered(task, *arm, "add", response(tiny_llama, task, f"So {task} is {arm[2]}"))
        for task in "ab"
        for arm in arms
    ]


@pytest.fixture
def steered_store(tmp_path, steered) -> Rows:
    rows = Rows(tmp_path / "steered.jsonl", STEERED_KEY)
    rows.bind({"seed": 0})
    rows.append([to_row(one) for one in steered])
    return rows


def test_chains_of_one_task_get_each_their_own_annotation(tiny_llama, steered, steered_store):
    found = stage.steered(Counting(), steered, model=tiny_llama, store=steered_store)
    assert [one.key for one in found] == [one.key for one in steered]
    for one in found:
        assert one.annotation.segments[0].text == one.response.thinking
        span = one.annotation.spans[0]
        assert span.end - span.start == len(one.response.thinking)
    assert [row["annotation"] is None for row in steered_store.load()] == [False] * 6


def test_steered_chains_are_annotated_once_by_each_annotator(
    tiny_llama, steered, steered_store
):
    done = stage.steered(Counting(), steered, model=tiny_llama, store=steered_store)
    before = steered_store.path.read_bytes()
    again = Counting()
    assert stage.steered(again, done, model=tiny_llama, store=steered_store) == done
    assert again.asked == []
    assert steered_store.path.read_bytes() == before
    other = Counting("other")
    found = stage.steered(other, done, model=tiny_llama, store=steered_store)
    assert len(other.asked) == 6
    assert {one.annotation.annotator for one in found} == {"other"}


def test_annotating_some_of_the_steered_chains_keeps_the_others(
    tiny_llama, steered, steered_store
):
    stage.steered(Counting(), steered[2:4], model=tiny_llama, store=steered_store)
    rows = {tuple(row[k] for k in STEERED_KEY): row for row in steered_store.load()}
    assert set(rows) == {one.key for one in steered}
    annotated = {key for key, row in rows.items() if row["annotation"] is not None}
    assert annotated == {one.key for one in steered[2:4]}


# --- the annotator of a run and the table --------------------------------------------------


def test_a_run_has_the_annotator_of_its_configuration(tmp_path):
    assert stage.for_run(RunConfig()).name == "grammar"
    assert stage.for_run(RunConfig(model="r1-distill-qwen-1.5b")).name == "offline"
    judge = stage.for_run(
        RunConfig(
            model="r1-distill-qwen-1.5b",
            judge="openai:some-judge",
            base_url="http://localhost:1/v1",
            results=str(tmp_path),
        )
    )
    assert judge.name == "openai:some-judge"


def test_the_table_has_a_row_a_segment():
    segments = (
        PlacedSegment("deduction", "So", 0, 2),
        PlacedSegment("backtracking", "No", 3, 5),
    )
    found = stage.table([Annotation("a", "x", segments), Annotation("b", "x")])
    assert found.to_dict("list") == {
        "task_id": ["a", "a"],
        "label": ["deduction", "backtracking"],
        "start": [0, 3],
        "end": [2, 5],
        "text": ["So", "No"],
    }
    assert stage.table([]).columns.tolist() == ["task_id", "label", "start", "end", "text"]
