"""The demo: twins at coefficient 0, streamed text that ends as the final one, widgets that
survive whatever is done to them, and one example where there are none."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from stllms import decode, demo, pairs, pipeline, tasks
from stllms.config import MODELS, RunConfig
from stllms.pairs import Ask
from stllms.records import BEHAVIOURS
from stllms.vectors import SteeringVectors

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "00_demo.ipynb"
BEHAVIOUR = "adding-knowledge"
LAYER = (MODELS["tiny-thinker"].steering_layers or {}).get(BEHAVIOUR, 3)


@pytest.fixture(scope="module")
def bench():
    return pairs.bench(RunConfig(max_tokens=32, device="cpu"))


@pytest.fixture(scope="module")
def ask(bench):
    return Ask(demo.choices(bench, 1)[0], BEHAVIOUR, 1.5)


def texts(pair) -> list[str]:
    return [chain.response.text for chain in pair]


# --- a pair of chains ----------------------------------------------------------------------


def test_at_coefficient_0_both_chains_are_the_same_text(bench, ask):
    plain, steered = pairs.write(bench, replace(ask, coefficient=0.0))
    assert plain.response == steered.response
    assert len(plain.response.output_ids) > 8
    assert (plain.direction, steered.direction) == ("none", BEHAVIOUR)


def test_a_direction_changes_the_steered_chain_alone(bench, ask):
    first, second = (pairs.write(bench, replace(ask, coefficient=c)) for c in (0.0, 4.0))
    assert texts(first)[0] == texts(second)[0]
    assert texts(first)[1] != texts(second)[1]
    other = pairs.write(bench, replace(ask, seed=11))
    assert texts(other)[0] != texts(first)[0]


def test_streamed_text_grows_token_by_token_into_the_final_one(bench, ask):
    seen = []
    pair = pairs.write(bench, ask, watch=seen.append)
    longest = max(len(chain.response.output_ids) for chain in pair)
    assert len(seen) == longest
    for row, chain in enumerate(pair):
        final = chain.response
        for step, made in enumerate(seen, 1):
            ids = made[row].output_ids
            assert ids == final.output_ids[:step]
            assert final.text.startswith(made[row].text.rstrip("�"))
        assert seen[-1][row] == final


def test_rows_that_wait_are_streamed_as_empty(tiny_llama):
    rows = [decode.Row((5, 6, 7), "a"), decode.Row((8, 9), "b")]
    seen = []
    made = decode.run(
        tiny_llama,
        rows,
        max_new_tokens=4,
        batch_size=1,
        watch=lambda written: seen.append([tuple(ids) for ids in written]),
    )
    assert seen[0][1] == ()
    assert seen[-1] == made
    assert [sum(map(len, rows)) for rows in seen] == list(range(1, len(seen) + 1))


def test_what_the_watcher_raises_ends_the_run_and_harms_nothing(bench, ask):
    def stop(_):
        raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        pairs.write(bench, ask, watch=stop)
    assert texts(pairs.write(bench, ask)) == texts(pairs.write(bench, ask))


def test_two_threads_may_write_at_the_same_time(bench, ask):
    made = {}

    def write(seed):
        made[seed] = texts(pairs.write(bench, replace(ask, seed=seed)))

    threads = [threading.Thread(target=write, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    write(3)
    for thread in threads:
        thread.join()
    for seed in (1, 2, 3):
        assert made[seed] == texts(pairs.write(bench, replace(ask, seed=seed)))


def test_shares_are_those_of_the_labelled_tokens(bench, ask):
    plain, _ = pairs.write(bench, ask)
    spans = plain.annotation.spans
    sizes = [sum(s.end - s.start for s in spans if s.label == name) for name in BEHAVIOURS]
    assert pairs.shares(plain).tolist() == pytest.approx([n / sum(sizes) for n in sizes])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": tasks.Task("t", "c", " \n")}, "the question is empty"),
        ({"task": tasks.Task("t", "c", "why? " * 500)}, "exceed the context"),
        ({"behaviour": "anger"}, "expected one of initializing"),
        ({"layer": 6}, "has layers 0 to 5"),
        ({"layer": -1}, "has layers 0 to 5"),
        ({"coefficient": float("nan")}, "coefficient"),
        ({"temperature": -0.1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"operation": "multiply"}, "add, ablate"),
    ],
)
def test_a_wrong_value_is_refused_by_name(bench, ask, change, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        pairs.write(bench, replace(ask, **change))


def test_a_behaviour_without_a_direction_is_refused_with_its_spans(bench, ask):
    kept = [BEHAVIOURS.index(name) for name in bench.directions.behaviours if name != BEHAVIOUR]
    old = bench.directions
    fewer = SteeringVectors(
        tuple(BEHAVIOURS[i] for i in kept),
        old.directions[kept],
        old.means[kept],
        old.overall,
        old.counts[kept],
        unavailable={BEHAVIOUR: 3},
    )
    with pytest.raises(ValueError, match="unavailable: 3 spans"):
        pairs.write(replace(bench, directions=fewer), ask)


# --- without widgets -----------------------------------------------------------------------


def test_the_example_is_plain_html_and_says_how_it_was_picked(bench):
    made = demo.show(bench, None, BEHAVIOUR, 1.0, widgets=False).data
    assert "<script" not in made
    assert "Picked: of 10 questions" in made
    assert f"+1 {BEHAVIOUR}, layer {LAYER}" in made
    own = demo.show(bench, "Is wood a solid, Leo asks?", widgets=False).data
    assert "Is wood a solid, Leo asks?" in own
    assert "Picked" not in own


def test_choices_differ_and_begin_with_every_category(bench):
    chosen = demo.choices(bench)
    assert len({task.id for task in chosen}) == len(chosen) == demo.TASKS
    assert len({task.category for task in chosen}) == 10


@pytest.mark.parametrize(
    ("shell", "inside", "expected"),
    [
        (None, False, False),
        ({}, False, False),
        ({"metadata": {}}, False, False),
        ({"metadata": {"cellId": "a"}}, False, True),
        ({"metadata": {"cellId": "a"}}, True, False),
    ],
    ids=["no kernel", "nothing", "nbclient", "jupyterlab", "the runner"],
)
def test_widgets_are_for_a_front_end_that_names_its_cell(monkeypatch, shell, inside, expected):
    made = shell and SimpleNamespace(kernel=1, get_parent=lambda: shell)
    monkeypatch.setattr(demo, "get_ipython", lambda: made)
    monkeypatch.delenv(pipeline.INSIDE, raising=False)
    if inside:
        monkeypatch.setenv(pipeline.INSIDE, "1")
    assert demo.live() is expected


def test_the_committed_notebook_shows_the_example():
    stored = NOTEBOOK.read_text(encoding="utf-8")
    outputs = [o for cell in json.loads(stored)["cells"] for o in cell.get("outputs", ())]
    kinds = {kind for output in outputs for kind in output.get("data", ())}
    assert kinds <= {"text/html", "text/plain"}, "no widget without its state"
    assert "Picked: of" in stored


@pytest.mark.slow
def test_nbconvert_shows_the_example(tmp_path):
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute"]
    where = {"cwd": NOTEBOOK.parent, "env": {**os.environ, "JUPYTER_PLATFORM_DIRS": "1"}}
    subprocess.run([*command, "--output-dir", tmp_path, NOTEBOOK.name], check=True, **where)
    made = (tmp_path / NOTEBOOK.name).read_text(encoding="utf-8")
    assert "Picked: of 10 questions" in made
    assert "widget-view" not in made
    assert "<script" not in made


# --- with widgets --------------------------------------------------------------------------


@pytest.fixture
def player(bench, ask):
    made = demo.Demo(bench, ask).request()
    made.wait()
    assert "tokens in" in made.status.value
    return made


def test_moving_the_slider_changes_the_steered_chain(player):
    before = player.view.value
    player.controls["coefficient"].value = -2.0
    player.wait()
    assert player.view.value != before
    assert f"-2 {BEHAVIOUR}, layer {LAYER}" in player.view.value
    expected = demo.render(pairs.write(player.bench, player.ask()))
    assert player.view.value == expected, "what was streamed ends as the final pair"


def test_a_behaviour_brings_its_layer_and_another_seed_other_chains(player, monkeypatch):
    monkeypatch.setitem(player.bench.layers, "deduction", 1)
    player.controls["behaviour"].value = "deduction"
    player.wait()
    assert "deduction, layer 1" in player.view.value
    before = player.view.value
    player.controls["another"].click()
    player.wait()
    assert player.ask().seed == 1
    assert player.view.value != before


def test_question_and_list_follow_each_other(player):
    second = player.controls["task"].options[1][1]
    player.controls["task"].value = second
    assert player.controls["question"].value == second.content
    assert player.ask().task is second
    player.controls["question"].value = "Is ice a solid?"
    assert player.controls["task"].value == demo.OWN
    assert player.ask().task == pairs.task("Is ice a solid?")
    player.controls["question"].value = second.content
    assert player.ask().task is second
    player.wait()


@pytest.mark.parametrize(
    ("question", "words"),
    [("  ", "the question is empty"), ("why? " * 500, "exceed the context")],
)
def test_a_question_that_cannot_be_asked_is_one_line_and_can_be_mended(player, question, words):
    player.controls["question"].value = question
    player.wait()
    assert "<b>error:</b>" in player.status.value
    assert words in player.status.value
    assert "\n" not in player.status.value
    player.controls["task"].index = 2
    player.wait()
    assert "tokens in" in player.status.value


def test_an_error_of_any_kind_is_shown_by_name_in_one_line(player, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the device\nis gone")

    monkeypatch.setattr(pairs, "write", fail)
    player.controls["coefficient"].value = 0.5
    player.wait()
    assert "RuntimeError: the device is gone" in player.status.value


def test_a_change_cancels_the_chain_under_way_and_only_the_newest_is_written(
    player, monkeypatch
):
    began, asked, write = threading.Event(), [], pairs.write

    def endless(bench, ask, *, watch):
        asked.append(ask.coefficient)
        if ask.coefficient != 0.5:
            return write(bench, ask, watch=watch)
        made = [chain.response for chain in write(bench, ask)]
        began.set()
        while True:
            watch(made)

    monkeypatch.setattr(pairs, "write", endless)
    player.controls["coefficient"].value = 0.5
    assert began.wait(60)
    thread = player._thread
    for coefficient in (0.75, 1.0, -1.0):
        player.controls["coefficient"].value = coefficient
    player.wait()
    assert not thread.is_alive()
    assert asked[0] == 0.5
    assert asked[-1] == -1.0
    assert f"-1 {BEHAVIOUR}" in player.view.value
    assert "tokens in" in player.status.value


def test_stop_leaves_what_is_there(player, monkeypatch):
    began = threading.Event()

    def endless(bench, ask, *, watch):
        began.set()
        while True:
            watch([])

    monkeypatch.setattr(pairs, "write", endless)
    monkeypatch.setattr(pairs, "label", lambda *_: [()])
    monkeypatch.setattr(demo, "render", lambda pair, **_: "half a chain")
    player.controls["coefficient"].value = 0.5
    assert began.wait(60)
    player.controls["stop"].click()
    player.wait()
    assert "stopped" in player.status.value
    assert player._thread is None
