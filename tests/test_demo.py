"""The demo of notebook 00: questions on which steering shows come first, one example where
there are no widgets, and widgets that survive whatever is done to them and show no chain that
is not of their settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from stllms import registry
from stllms.app import bench as benches
from stllms.app import demo, stages
from stllms.app.bench import Ask, Bench
from stllms.config import RunConfig
from stllms.labels import PAPER
from stllms.records import to_row
from stllms.registry import MODELS
from stllms.runs.artifacts import Folder
from stllms.steering import conditions
from stllms.vectors import reading

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "00_demo.ipynb"
BEHAVIOUR = "adding-knowledge"
LAYER = MODELS["tiny-thinker"].steering_layers[BEHAVIOUR]
RULE = "The list begins with those on which it moved most."


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    results = str(tmp_path_factory.mktemp("results"))
    return benches.bench(RunConfig(max_tokens=32, device="cpu", results=results))


# -- without widgets -----------------------------------------------------------------------


def test_the_example_is_static_html_and_says_how_it_was_picked(bench):
    page = demo.show(bench, None, BEHAVIOUR, 1.0, widgets=False).data
    assert "<script" not in page
    assert "<select" not in page
    assert RULE in page
    assert f"+1 {BEHAVIOUR}, layer {LAYER}" in page
    own = demo.show(bench, "Is wood a solid, Leo asks?", BEHAVIOUR, 0.01, widgets=False).data
    assert "Is wood a solid, Leo asks?" in own
    assert RULE not in own
    assert "changed no token" in own


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
    monkeypatch.delenv(stages.INSIDE, raising=False)
    if inside:
        monkeypatch.setenv(stages.INSIDE, "1")
    assert demo.live() is expected


def test_the_committed_notebook_shows_the_example():
    stored = NOTEBOOK.read_text(encoding="utf-8")
    outputs = [o for cell in json.loads(stored)["cells"] for o in cell.get("outputs", ())]
    kinds = {kind for output in outputs for kind in output.get("data", ())}
    assert kinds <= {"text/html", "text/plain"}, "no widget without its state"
    assert "nobody knows on which a push shows" in stored, "of a model without a run here"
    assert "smol-thinker" in stored


@pytest.mark.long
def test_nbconvert_shows_the_example(tmp_path):
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute"]
    where = {"cwd": NOTEBOOK.parent, "env": {**os.environ, "JUPYTER_PLATFORM_DIRS": "1"}}
    subprocess.run([*command, "--output-dir", tmp_path, NOTEBOOK.name], check=True, **where)
    made = (tmp_path / NOTEBOOK.name).read_text(encoding="utf-8")
    fixture = bool(registry.missing_packages("smol-thinker"))
    assert (RULE if fixture else "nobody knows on which a push shows") in made
    assert "widget-view" not in made
    assert "<script" not in made


# -- which questions -----------------------------------------------------------------------


def moved(pair, sign: int = 1, behaviour: str = BEHAVIOUR) -> float:
    place = PAPER.names.index(behaviour)
    baseline, steered = (benches.shares(chain)[place] for chain in pair)
    return (steered - baseline) * sign


@pytest.mark.long
@pytest.mark.parametrize(
    ("behaviour", "coefficient", "verb"),
    [("adding-knowledge", 1.0, "raised"), ("backtracking", -2.0, "lowered")],
)
def test_the_list_begins_where_steering_shows(behaviour, coefficient, verb):
    whole = benches.bench(RunConfig(device="cpu"))  # chains are as long as they will be
    listed, said = demo.listing(whole, behaviour, coefficient)
    assert {task.id for task in listed} == {task.id for task in demo.choices(whole)}
    ask = Ask(listed[0], behaviour, coefficient)
    sign = 1 if coefficient > 0 else -1
    found = [moved(p, sign, behaviour) for p in benches.write_all(whole, ask, listed[:4])]
    assert found == sorted(found, reverse=True)
    assert min(found) > 0.05, "four questions on which something is to be seen"
    assert said.startswith("Not every chain changes: of 30 questions")
    assert f"{verb} its share" in said


def test_the_suggested_coefficients_are_those_of_the_reference(bench):
    place = "results/reference/full/tiny-thinker/steering_suggested.csv"
    rows = pd.read_csv(NOTEBOOK.parent.parent / place)
    rows = rows[rows["sign"] == "+"]
    assert bench.coefficients == dict(zip(rows["behaviour"], rows["coefficient"], strict=True))


def test_a_run_with_steered_chains_orders_the_questions_without_writing(
    bench, tmp_path, monkeypatch
):
    config = RunConfig(max_tokens=32, device="cpu", results=str(tmp_path))
    folder = Folder(config).open()
    ran = replace(bench, config=config, origin=folder.label)
    asked = demo.choices(ran)[:6]
    assert len({task.id for task in demo.choices(ran)}) == demo.LISTED
    made = benches.write_all(ran, Ask(asked[0], "initializing", -1.5), asked)
    falls = [moved(pair, -1, "initializing") for pair in made]
    first, broken, *_ = sorted(range(6), key=falls.__getitem__, reverse=True)
    assert falls[first] > falls[broken] > 0
    for place, finished in enumerate((True, False)):
        chains = list(made[broken])
        response = replace(chains[place].response, finished=finished)
        chains[place] = replace(chains[place], response=response)
        made[broken] = tuple(chains)
    folder.steered.write_text(
        "".join(json.dumps(to_row(chain)) + "\n" for pair in made for chain in pair)
    )
    monkeypatch.setattr(conditions, "generate", lambda *_, **__: 1 / 0)
    listed, said = demo.listing(ran, "initializing", -1.5)
    n = sum(fall > 0 for fall in falls)
    assert f"of 6 questions, -1.5 initializing lowered its share on {n} and" in said
    assert listed[0] == asked[first]
    assert listed[5] == asked[broken], "behind the five that did not break"
    assert len(listed) == demo.LISTED


def test_without_steered_chains_the_order_of_the_run_stays_and_says_so(bench, monkeypatch):
    monkeypatch.setattr(conditions, "generate", lambda *_, **__: 1 / 0)
    config = replace(bench.config, model="smollm2")  # its run asks for 60 of 50 messages
    unsteered = replace(bench, config=config)
    expected = demo.choices(unsteered), demo.NO_CHAINS
    assert demo.listing(unsteered, BEHAVIOUR, 1.0) == expected


# -- where there are widgets ---------------------------------------------------------------


@pytest.fixture
def player(bench):
    listed = demo.choices(bench)
    made = demo.Demo(bench, Ask(listed[0], BEHAVIOUR, 1.5), listed).request()
    made.wait()
    assert "tokens in" in made.status.value
    return made


def test_moving_the_slider_changes_the_steered_chain(player):
    before = player.view.value
    player.controls["coefficient"].value = -2.0
    player.wait()
    assert player.view.value != before
    assert f"-2 {BEHAVIOUR}, layer {LAYER}" in player.view.value
    expected = demo.render(benches.write(player.bench, player.ask()))
    assert player.view.value == expected, "what was streamed ends as the final pair"


def test_a_behaviour_brings_layer_and_coefficient_and_another_seed_other_chains(
    player, monkeypatch
):
    monkeypatch.setitem(player.bench.layers, "deduction", 1)
    monkeypatch.setitem(player.bench.coefficients, "deduction", 0.5)
    player.controls["behaviour"].value = "deduction"
    player.wait()
    assert "+0.5 deduction, layer 1" in player.view.value
    before = player.view.value
    player.controls["another"].click()
    player.wait()
    assert player.ask().seed == 1
    assert player.view.value != before


def test_question_and_list_follow_each_other_and_an_empty_box_is_no_error(player):
    task, question = player.controls["task"], player.controls["question"]
    second = task.options[1][1]
    task.value = second
    assert question.value == second.content
    assert player.ask().task is second
    question.value = "Is ice a solid?"
    assert task.value == demo.OWN
    assert player.ask().task == benches.task("Is ice a solid?")
    question.value = second.content
    assert player.ask().task is second
    task.value = demo.OWN
    player.wait()
    assert question.value == ""
    assert demo.WAITING in player.status.value
    assert "error" not in player.status.value
    assert player.view.value == ""
    question.value = "Is ice a solid?"
    player.wait()
    before, player.view.value = player.view.value, ""
    player.controls["write"].click()
    player.wait()
    assert player.view.value == before != ""


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("caf\udce9", "no UTF-8"),
        ("why? " * 500, "exceed the context"),
        ("gone", "RuntimeError: the device is gone"),
    ],
)
def test_an_error_is_one_line_instead_of_chains_and_can_be_mended(
    player, monkeypatch, question, words
):
    write = benches.write

    def fail(bench, ask, **options):
        if ask.task.content == "gone":
            raise RuntimeError("the device\nis gone")
        return write(bench, ask, **options)

    monkeypatch.setattr(benches, "write", fail)
    player.controls["question"].value = question
    player.wait()
    assert "<b>error:</b>" in player.status.value
    assert words in player.status.value
    assert "\n" not in player.status.value
    assert player.view.value == "", "the old chains do not answer this"
    player.controls["task"].index = 2
    player.wait()
    assert "tokens in" in player.status.value


@pytest.fixture
def endless(monkeypatch):
    """The pair with coefficient 0.5 is written until it is cancelled; ``began`` is set when
    both its chains are shown, and ``asked`` holds every coefficient that was written."""
    began, asked, write = threading.Event(), [], benches.write

    def hang(bench, ask, *, watch):
        asked.append(ask.coefficient)
        if ask.coefficient != 0.5:
            return write(bench, ask, watch=watch)
        made = [chain.response for chain in write(bench, ask)]
        end = time.monotonic() + 60
        while time.monotonic() < end:
            watch(made)
            began.set()
            time.sleep(0.001)
        raise AssertionError("never cancelled")

    monkeypatch.setattr(benches, "write", hang)
    return began, asked


def test_a_change_cancels_the_chain_under_way_and_only_the_newest_is_written(player, endless):
    began, asked = endless
    player.controls["coefficient"].value = 0.5
    assert began.wait(60)
    for coefficient in (0.75, 1.0, -1.0):
        player.controls["coefficient"].value = coefficient
    player.wait()
    assert asked[0] == 0.5
    assert asked[-1] == -1.0
    assert f"-1 {BEHAVIOUR}" in player.view.value
    assert "tokens in" in player.status.value


def test_stop_leaves_what_is_there(player, endless):
    player.controls["coefficient"].value = 0.5
    assert endless[0].wait(60)
    player.controls["stop"].click()
    player.wait()
    assert "stopped" in player.status.value
    assert f"+0.5 {BEHAVIOUR}" in player.view.value
    assert "tokens ..." in player.view.value


def test_the_tokens_are_coloured_by_the_direction_and_nothing_is_written_again(
    player, monkeypatch
):
    by_label = player.view.value
    monkeypatch.setattr(benches, "write", lambda *_, **__: pytest.fail("written again"))
    player.controls["reading"].value = True
    player.wait()
    assert player.view.value.startswith(by_label)
    added = player.view.value.removeprefix(by_label)
    pair = player.shown[1]
    n = sum(len(chain.response.output_ids) for chain in pair)
    assert added.count(' nats"') == n, "value and surprise of every token of both chains"
    steered = pair[1]
    read = reading.read(
        player.bench.model, steered.response, player.bench.directions, BEHAVIOUR, LAYER
    )
    last = f'title="{read.values[-1]:+.2f}, {read.surprise[-1]:.2f} nats"'
    assert added.count(last) >= 1
    player.controls["reading"].value = False
    player.wait()
    assert player.view.value == by_label
