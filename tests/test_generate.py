"""Prompts, responses, resume: generation and steering share these."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from stllms import artifacts, generate, models, prompts, registry, steering
from stllms.records import Response, Task, to_row
from stllms.vectors import Controls

OPTIONS = {"max_new_tokens": 12, "temperature": 0.8, "seed": 1, "progress": False}


@pytest.fixture
def asked():
    return [Task(f"t{i}", "own", "What is " + "so " * i + "good?") for i in range(7)]


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("a b\n</think>\n\nyes", True, ("a b", 0, "yes", True)),
        ("\n a b", True, ("a b", 2, "", False)),
        ("<think>\na</think>b", False, ("a", 8, "b", True)),
        ("no tags ", False, ("no tags", 0, "no tags", True)),
        ("</think>b", True, ("", 0, "b", True)),
        ("a</think>b</think>c", True, ("a", 0, "b</think>c", True)),
        ("", True, ("", 0, "", False)),
        # Opened in the prompt and again in the text: nothing of the thinking is lost.
        ("a <think> b</think>c", True, ("a <think> b", 0, "c", True)),
        ("<think>\na</think>b", True, ("a", 8, "b", True)),
        (" <think>\n<think> a", True, ("a", 17, "", False)),
        ("a <think> b", True, ("a <think> b", 0, "", False)),
        ("x <think> a <think> b", False, ("a <think> b", 10, "", False)),
        ("Sure. <think>a</think>b", False, ("a", 13, "b", True)),
        ("<think>a<think>b</think>c</think>d", False, ("a<think>b", 7, "c</think>d", True)),
        ("<think></think>a <think>b</think>", False, ("", 7, "a <think>b</think>", True)),
        # A closing tag first says that the thinking was opened before the text.
        ("a</think>b<think>c", False, ("a", 0, "b<think>c", True)),
    ],
)
def test_split_finds_the_thinking_and_where_it_starts(text, opened, expected):
    found = prompts.split(text, opened=opened)
    assert found == expected
    assert text[found[1] : found[1] + len(found[0])] == found[0]


CLOSE = prompts.CLOSE
TAGS = re.compile(r"</?think>")
PIECES = st.sampled_from(["<think>", "</think>", "<", "think>", "/", " ", "\n", "a", "b.", "é"])


def visible(*texts: str) -> str:
    """The characters that are neither white space nor of a tag."""
    return "".join("".join(TAGS.sub("", text).split()) for text in texts)


@given(st.lists(PIECES, max_size=14).map("".join), st.booleans())
def test_no_character_outside_the_tags_is_lost(text, opened):
    thinking, start, answer, closed = prompts.split(text, opened=opened)
    one = response(text, prompt="Q <think>\n" if opened else "Q ")
    one = replace(one, thinking=thinking, thinking_start=start, answer=answer)
    assert text.startswith(thinking, start)
    assert thinking == thinking.strip()
    if opened or TAGS.search(text):
        assert visible(prompts.before(one), thinking, answer) == visible(text)
        assert closed == (CLOSE in text)
    else:  # thinks aloud: all of it is both
        assert visible(thinking) == visible(answer) == visible(text)
    assert CLOSE not in thinking
    assert not opened or not prompts.before(one)


def response(text: str, prompt: str = "Q <think>\n") -> Response:
    thinking, start, answer, closed = prompts.split(text, opened="<think>" in prompt)
    made = ("t", "own", prompt, (), (), text, thinking, start, answer, closed, True)
    return Response(*made)


def test_the_summary_counts_responses_that_use_a_tag_twice_or_write_before_it():
    made = [
        response("a</think>b"),
        response("<think>a</think>b"),
        response("a <think> b"),
        response("a</think>b</think>"),
        response("Sure. <think>a</think>b", prompt="Q"),
        response("no tags", prompt="Q"),
    ]
    counts = generate.summary(made)
    assert counts["<think> again"] == 2
    assert counts["</think> again"] == 1
    assert counts["text before <think>"] == 1
    assert generate.summary([])["<think> again"] == 0


@pytest.mark.parametrize("name", ["tiny-thinker", "smollm2"])
@pytest.mark.parametrize(
    "text",
    [
        "First a. <think> Wait, <think> b.</think> So c.</think> d",
        "<think>\n<think> é a, b",
        "Sure! <think>\n a b </think> c",
    ],
)
def test_offsets_find_the_thinking_in_a_text_with_tags_twice(name, text):
    """Every character of the thinking that a model wrote is covered, none outside it."""
    if missing := registry.missing_packages(name):
        pytest.skip(f"not installed: {', '.join(missing)}")
    model = models.load(name)
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    task = Task("t", "own", "Q?")
    one = prompts.response(model, task, ("Q <think>\n", [0]), ids)
    whole = model.decode(ids)
    assert one.text == whole
    ranges = model.offsets_of(one)
    covered = {i for start, end in ranges if start >= 0 for i in range(start, end)}
    assert covered == set(range(len(one.thinking)))
    assert whole[one.thinking_start :].startswith(one.thinking)
    assert visible(one.thinking, one.answer) == visible(whole)


def test_only_instruct_models_are_asked_to_think_step_by_step():
    assert prompts.prompt("Why?", "thinking") == "Why?"
    assert "step by step" in prompts.prompt("Why?", "instruct")
    assert "step by step" in prompts.prompt("Why?", "thinking", "published")
    with pytest.raises(ValueError, match="unknown prompt style 'other'"):
        prompts.prompt("Why?", "thinking", "other")


def test_kind_is_the_registrys_or_the_templates(tiny_llama):
    assert prompts.kind_of(tiny_llama) == "thinking"
    plain = tiny.model("llama")
    plain.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert prompts.kind_of(plain) == "instruct"


def test_responses_hold_the_ids_that_were_used(tiny_llama, asked):
    found = generate.responses(tiny_llama, asked, **OPTIONS)
    for task, one in zip(asked, found, strict=True):
        assert one.task_id == task.id
        assert one.prompt_ids == tiny_llama.prompt_ids(task.content)[1]
        assert one.text == tiny_llama.decode(one.output_ids)
        assert one.text[one.thinking_start :].startswith(one.thinking)
        assert one.finished == (one.output_ids[-1] in tiny_llama.eos_ids)
        assert one.finished or len(one.output_ids) == OPTIONS["max_new_tokens"]


def test_a_truncated_chain_is_marked(tiny_llama, asked):
    found = generate.responses(tiny_llama, asked, **(OPTIONS | {"max_new_tokens": 1}))
    assert not any(one.closed or one.finished for one in found if one.output_ids[0] > 3)
    counts = generate.summary(found)
    assert counts["truncated"] == sum(not one.finished for one in found)
    assert counts["longest output"] == 1


def test_twice_the_same_task_is_refused(tiny_llama, asked):
    with pytest.raises(ValueError, match="more than once: t0"):
        generate.responses(tiny_llama, [*asked, asked[0]], **OPTIONS)


def test_a_killed_run_resumes_to_the_same_bytes(tiny_llama, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "CHUNK", 3)
    whole = artifacts.Rows(tmp_path / "whole.jsonl")
    generate.responses(tiny_llama, asked, store=whole, **OPTIONS)
    content = whole.path.read_bytes()
    lines = content.splitlines(keepends=True)
    for kept, torn in [(0, b""), (1, b""), (3, lines[3][:20]), (5, lines[5][:-1])]:
        cut = tiny.killed(whole, f"cut-{kept}.jsonl", b"".join(lines[:kept]) + torn)
        generate.responses(tiny_llama, asked, store=cut, **OPTIONS)
        assert cut.path.read_bytes() == content


def test_nothing_is_decoded_that_is_there(tiny_llama, asked, tmp_path, monkeypatch):
    store = artifacts.Rows(tmp_path / "r.jsonl")
    first = generate.responses(tiny_llama, asked, store=store, **OPTIONS)
    monkeypatch.setattr(generate.decode, "run", None)
    assert generate.responses(tiny_llama, asked, store=store, **OPTIONS) == first
    assert generate.read(store) == first


def test_retokenised_responses_keep_their_text(tiny_llama, asked):
    made = generate.responses(tiny_llama, asked, **OPTIONS)
    assert prompts.as_used(tiny_llama, made, "generated") == made
    for one in prompts.as_used(tiny_llama, made, "published"):
        assert tiny_llama.decode(one.output_ids) == one.text


# -- steering --------------------------------------------------------------------------------


def test_steered_rows_equal_the_same_rows_alone(tiny_llama, asked):
    """Coefficient 0 is plain, and a mixed batch changes no row of it."""
    vector = torch.randn(tiny_llama.d_model, generator=torch.Generator().manual_seed(0))
    plain = generate.responses(tiny_llama, asked, **OPTIONS)
    zero = [steering.Intervention(vector, 1, 0.0)] * len(asked)
    assert steering.generate(tiny_llama, asked, zero, **OPTIONS) == plain
    strong = steering.Intervention(vector, 1, 3.0)
    edits = [None, strong, [strong]] * 2 + [None]
    mixed = steering.generate(tiny_llama, asked, edits, **OPTIONS)
    alone = steering.generate(tiny_llama, asked[1:2], [strong], **OPTIONS)
    assert mixed[0] == plain[0]
    assert mixed[1] == alone[0] != plain[1]
    with pytest.raises(ValueError, match="7 tasks but 1 interventions"):
        steering.generate(tiny_llama, asked, [None], **OPTIONS)


@pytest.fixture
def steering_vectors(tiny_llama):
    from stllms.vectors import SteeringVectors

    shape = (2, tiny_llama.n_layers, tiny_llama.d_model)
    directions = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return SteeringVectors(
        ("deduction", "backtracking"),
        directions,
        directions,
        directions[0],
        torch.tensor([20, 30]),
        unavailable={"example-testing": 2},
    )


def test_arms_name_what_exists(steering_vectors):
    layers = {"backtracking": 2, "example-testing": 1}
    arms = steering.arms(steering_vectors, layers, (-1, 0, 1))
    assert [(a.direction, a.coefficient) for a in arms] == [
        ("none", 0.0),
        ("backtracking", -1.0),
        ("backtracking", 1.0),
    ]
    with pytest.raises(ValueError, match="no direction for 'dreaming'; there are: deduction"):
        steering.arms(steering_vectors, {"dreaming": 1}, (1,))
    with pytest.raises(ValueError, match="no layer 9 in the vectors; they have layers 0 to 3"):
        steering.arms(steering_vectors, {"backtracking": 9}, (1,))


def test_a_sweep_has_its_controls_at_every_layer(steering_vectors):
    controls = Controls(("shuffled:0", "covariance:0"), 2 * steering_vectors.directions)
    arms = steering.sweep_arms(steering_vectors, (-2, -1, 0, 1), controls)
    bare = steering.sweep_arms(steering_vectors, (-2, -1, 0, 1))
    added = [arm for arm in arms if arm.direction in controls.names]
    keys = [arm.key("t") for arm in arms if arm.direction not in controls.names]
    assert keys == [arm.key("t") for arm in bare]
    places = [(arm.direction, arm.layer, arm.coefficient) for arm in added]
    layers = range(steering_vectors.n_layers)
    assert sorted(places) == sorted(product(controls.names, layers, (-2.0, 1.0)))
    last = added[-1]
    row = controls.names.index(last.direction)
    assert torch.equal(last.intervention.direction, controls.directions[row, last.layer])


def test_a_grid_resumes_to_the_same_bytes(
    tiny_llama, asked, steering_vectors, tmp_path, monkeypatch
):
    monkeypatch.setattr(steering, "CHUNK", 2)
    arms = steering.arms(steering_vectors, {"backtracking": 2}, (-1, 0, 1))
    controls = Controls(("shuffled:0",), steering_vectors.directions[:1])
    arms += steering.control_arms(controls, {"backtracking": 2}, (1,))
    key = steering.STEERED_KEY
    whole = artifacts.Rows(tmp_path / "whole.jsonl", key)
    grid = steering.grid(tiny_llama, asked[:4], arms, store=whole, **OPTIONS)
    assert [one.key[:2] for one in grid[:4]] == [
        ("t0", "none"),
        ("t0", "backtracking"),
        ("t0", "backtracking"),
        ("t0", "shuffled:0"),
    ]
    content = whole.path.read_bytes()
    lines = content.splitlines(keepends=True)
    assert len(lines) == 16
    for kept in (0, 3, 8, 13):
        cut = tiny.killed(whole, f"cut-{kept}.jsonl", b"".join(lines[:kept]))
        assert steering.grid(tiny_llama, asked[:4], arms, store=cut, **OPTIONS) == grid
        assert cut.path.read_bytes() == content
    monkeypatch.setattr(steering.decode, "run", None)
    assert steering.grid(tiny_llama, asked[:4], arms, store=whole, **OPTIONS) == grid


def test_a_store_takes_no_chains_that_are_steered_somewhere_only(
    tiny_llama, asked, steering_vectors, tmp_path
):
    arms = steering.arms(steering_vectors, {"backtracking": 2}, (1,), where="generated")
    store = artifacts.Rows(tmp_path / "rows.jsonl", steering.STEERED_KEY)
    with pytest.raises(ValueError, match="backtracking acts on generated tokens: a store"):
        steering.grid(tiny_llama, asked[:1], arms, store=store, **OPTIONS)
    assert len(steering.grid(tiny_llama, asked[:1], arms, **OPTIONS)) == len(arms)


def test_directions_of_another_model_are_refused_with_both_shapes(tiny_llama, steering_vectors):
    steering.check(steering_vectors, tiny_llama)
    fewer = replace(
        steering_vectors,
        directions=steering_vectors.directions[:, :3],
        means=steering_vectors.means[:, :3],
        overall=steering_vectors.overall[:3],
    )
    with pytest.raises(ValueError, match=r"\[3, 32\] are of another model .* \[4, 32\]"):
        steering.check(fewer, tiny_llama)


def test_rows_survive_the_file(tiny_llama, asked, steering_vectors):
    from stllms.records import steered_from_row

    arms = steering.arms(steering_vectors, {"backtracking": 2}, (1,))
    for one in steering.grid(tiny_llama, asked[:1], arms, **OPTIONS):
        assert steered_from_row(to_row(one)) == one
