"""Responses from an API: what is thinking, what is closed, what is stored."""

from __future__ import annotations

from pathlib import Path

import pytest

from stllms.generation import prompts, remote
from stllms.models.api import Reply, Store
from stllms.records import Response, Task
from stllms.registry import ModelEntry, resolve

TASKS = [Task(f"task-{i}", "verbal logic", f"Question {i}?") for i in range(3)]


def ask(
    server, model: str, folder: Path, tasks=TASKS, failed=None, **options
) -> list[Response]:
    kind = options.pop("kind", "thinking")
    entry = options.pop("entry", ModelEntry(model, None, model, kind, api_id=model))
    given = {"max_new_tokens": 50, "retries": 1, "progress": False, **options}
    made, reasons = remote.responses(entry, tasks, folder=folder, base_url=server.url, **given)
    assert reasons == (failed or {})
    return made


def read(message: dict[str, str], finish: str) -> Response:
    body = {"choices": [{"message": message, "finish_reason": finish}]}
    return remote.to_response(TASKS[0], "q", Reply({"body": body}), "thinking")


@pytest.mark.parametrize("model", ["thinker", "router", "inline"])
def test_reasoning_in_its_own_field_or_inline_becomes_thinking(server, tmp_path, model):
    made = ask(server, model, tmp_path)
    for task, one in zip(TASKS, made, strict=True):
        assert (one.task_id, one.category) == (task.id, task.category)
        assert one.thinking == f"I think about: {task.content}"
        assert one.answer == f"My answer to: {task.content}"
        assert one.text.startswith(one.thinking, one.thinking_start)
        assert one.text.count("</think>") == 1
        assert (one.closed, one.finished) == (True, True)
        assert one.prompt_ids == one.output_ids == ()


@pytest.mark.parametrize("model", ["cut", "cut-inline"])
def test_reasoning_that_did_not_finish_is_not_closed(server, tmp_path, model):
    for one in ask(server, model, tmp_path):
        assert one.thinking.startswith("I think about: Question")
        assert one.text.startswith(one.thinking, one.thinking_start)
        assert "</think>" not in one.text
        assert (one.closed, one.finished, one.answer) == (False, False, "")


def test_a_reply_without_reasoning_is_the_thinking_of_an_instruct_model_only(
    server, tmp_path, capsys
):
    (one, *_) = ask(server, "instruct", tmp_path, kind="instruct")
    assert (one.thinking, one.answer, one.thinking_start) == (one.text, one.text, 0)
    assert "without reasoning" not in capsys.readouterr().out
    made = ask(server, "instruct", tmp_path / "other", kind="thinking")
    assert [(one.thinking, one.answer) for one in made] == [
        ("", f"My answer to: {task.content}") for task in TASKS
    ]
    assert all(remote.withheld(one, "thinking") for one in made)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("instruct: 3 of 3 chains of a thinking model came without reasoning")


@pytest.mark.parametrize(
    ("content", "thinking", "answer", "closed"),
    [
        ("because so\n</think>\n\n7", "because so", "7", True),
        ("<think>\n\n</think>\n\n7", "", "7", True),
        ("  <think>why</think>7 <think>", "why", "7 <think>", True),
    ],
)
def test_inline_tags_are_read_in_every_form(content, thinking, answer, closed):
    one = read({"content": content}, "stop")
    assert (one.thinking, one.answer, one.closed) == (thinking, answer, closed)
    assert one.text == content
    assert content.startswith(thinking, one.thinking_start)
    assert not remote.withheld(one, "thinking")


def test_reasoning_with_an_answer_cut_short_is_not_called_closed():
    one = read({"content": "The ans", "reasoning": "why"}, "length")
    assert (one.closed, one.finished, one.answer) == (False, False, "The ans")


def test_a_second_run_sends_nothing(server, tmp_path):
    first = ask(server, "thinker", tmp_path)
    assert ask(server, "thinker", tmp_path) == first
    assert server.total == 3
    ask(server, "thinker", tmp_path, temperature=0.7)
    assert server.total == 6, "other sampling, other request"


def test_a_failed_task_is_left_out_named_and_asked_again(server, tmp_path, capsys):
    tasks = [TASKS[0], Task("bad", "verbal logic", "An unlucky question?"), TASKS[1]]
    failed = {"bad": "HTTP 500: I do not like this one (2 attempts)"}
    for calls in (4, 6):
        made = ask(server, "picky", tmp_path, tasks, failed, kind="instruct")
        assert [one.task_id for one in made] == ["task-0", "task-1"]
        assert "1 of 3 tasks failed and are left out" in capsys.readouterr().out
        assert server.total == calls
    failed = {task.id: "empty reply (finish_reason stop)" for task in TASKS}
    assert ask(server, "silent", tmp_path / "empty", failed=failed) == []
    assert "empty reply" in capsys.readouterr().out


def test_what_is_sent_is_what_was_asked_for(server, tmp_path):
    ask(server, "thinker", tmp_path, TASKS[:1])
    ask(server, "instruct", tmp_path, TASKS[:1], kind="instruct")
    ask(server, "router", tmp_path, TASKS[:1], style="published")
    step_by_step = prompts.prompt("Question 0?", "instruct")
    assert server.texts == ["Question 0?", step_by_step, step_by_step]
    assert (server.fields["max_tokens"], server.fields["temperature"]) == (50, 0)
    assert Store(tmp_path).load().spent == 0.25, "the cost that the provider reports"


@pytest.mark.parametrize(
    ("name", "sent", "kind"),
    [
        ("deepseek-r1", "deepseek-reasoner", "thinking"),
        ("api:deepseek-reasoner", "deepseek-reasoner", "thinking"),
        ("api:deepseek/deepseek-r1", "deepseek/deepseek-r1", "thinking"),
        ("api:deepseek-r1", "deepseek-r1", "thinking"),  # of a server of one's own
        ("gpt-4o", "gpt-4o", "instruct"),
        ("api:somebody/new-model", "somebody/new-model", "unknown"),
    ],
)
def test_registry_names_and_api_ids_are_known(name, sent, kind):
    entry = resolve(name)
    assert (entry.api_id, entry.kind) == (sent, kind)


def test_a_switch_for_thinking_is_sent_and_part_of_what_was_asked(server, tmp_path, capsys):
    claude = {"model": "", "entry": resolve("claude-3.7-sonnet")}
    made = ask(server, folder=tmp_path, max_new_tokens=2000, **claude)
    assert [one.thinking for one in made] == [f"I think about: {t.content}" for t in TASKS]
    assert capsys.readouterr().out == ""
    for row in Store(tmp_path).load().lines:
        sent = {"reasoning": {"effort": "high"}, "temperature": 1}
        assert sent.items() <= row["identity"].items()
    with pytest.raises(ValueError, match=r"max_tokens_compare: 50, .*no less than 1025"):
        ask(server, folder=tmp_path, **claude)
    assert server.total == len(TASKS)
