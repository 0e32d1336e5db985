"""The demo of notebook 00: questions on which steering shows come first, one example where
there are no widgets, and widgets that survive whatever is done to them and show no chain that
is not of their settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import tiny

from stllms import registry
from stllms.app import bench as benches
from stllms.app import demo, preflight, stages
from stllms.app.bench import Ask, Bench
from stllms.config import RunConfig
from stllms.labels import BEHAVIOURS
from stllms.models.model import ModelError
from stllms.records import to_row
from stllms.registry import MODELS
from stllms.runs.artifacts import Folder
from stllms.steering import conditions

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "00_demo.ipynb"
BEHAVIOUR = "adding-knowledge"
LAYER = MODELS["tiny-thinker"].steering_layers[BEHAVIOUR]


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    results = str(tmp_path_factory.mktemp("results"))
    return benches.bench(RunConfig(max_tokens=32, device="cpu", results=results))


@pytest.fixture(scope="module")
def ask(bench) -> Ask:
    return Ask(demo.choices(bench, 1)[0], BEHAVIOUR, 1.5)


@pytest.fixture(scope="module")
def listing(bench, ask) -> demo.Listing:
    return demo.listing(bench, ask)


# -- without widgets -----------------------------------------------------------------------


def test_the_example_is_plain_html_and_says_how_it_was_picked(bench):
    page = demo.show(bench, None, BEHAVIOUR, 1.0, widgets=False).data
    assert "<script" not in page
    assert f"Picked: of {demo.LISTED} questions" in page
    assert f"+1 {BEHAVIOUR}, layer {LAYER}" in page
    own = demo.show(bench, "Is wood a solid, Leo asks?", BEHAVIOUR, 0.01, widgets=False).data
    assert "Is wood a solid, Leo asks?" in own
    assert "Picked" not in own
    assert "changed no token" in own
    shown = demo.show(bench, None, BEHAVIOUR, 1.0, widgets=True)
    assert "<select" not in page
    assert type(shown).__name__ == "VBox"


# -- which questions -----------------------------------------------------------------------


def test_choices_differ_and_begin_with_every_category(bench):
    chosen = demo.choices(bench)
    assert len({task.id for task in chosen}) == len(chosen) == demo.LISTED
    assert len({task.category for task in chosen[:10]}) == 10


def moved(pair, ask) -> float:
    place = BEHAVIOURS.index(ask.behaviour)
    plain, steered = (benches.shares(chain)[place] for chain in pair)
    return (steered - plain) * (1 if ask.coefficient > 0 else -1)


@pytest.fixture(scope="module")
def whole() -> Bench:
    """The bench of the notebook: chains are as long as they will be."""
    return benches.bench(RunConfig(device="cpu"))


@pytest.mark.long
@pytest.mark.parametrize(
    ("behaviour", "coefficient", "verb"),
    [("adding-knowledge", 1.0, "raised"), ("backtracking", -2.0, "lowered")],
)
def test_the_list_begins_where_steering_shows(whole, behaviour, coefficient, verb):
    ask = Ask(demo.choices(whole, 1)[0], behaviour, coefficient)
    listed = demo.listing(whole, ask)
    assert {task.id for task in listed.tasks} == {task.id for task in demo.choices(whole)}
    found = [moved(pair, ask) for pair in benches.write_all(whole, ask, listed.tasks[:4])]
    assert found == sorted(found, reverse=True)
    assert min(found) > 0.05, "four questions on which something is to be seen"
    assert listed.said.startswith("Not every chain changes: of 30 questions")
    assert f"{verb} its share" in listed.said


def test_the_suggested_coefficients_are_those_of_the_reference(bench):
    place = "results/reference/full/tiny-thinker/steering_suggested.csv"
    rows = pd.read_csv(NOTEBOOK.parent.parent / place)
    rows = rows[rows["sign"] == "+"]
    assert bench.coefficients == dict(zip(rows["behaviour"], rows["coefficient"], strict=True))


def test_a_run_with_steered_chains_orders_the_questions_without_writing(
    bench, ask, tmp_path, monkeypatch
):
    config = RunConfig(max_tokens=32, device="cpu", results=str(tmp_path))
    folder = Folder(config).open()
    ran = replace(bench, config=config, origin=folder.label)
    asked = demo.choices(ran, 6)
    made = benches.write_all(ran, ask, asked)
    folder.steered.write_text(
        "".join(json.dumps(to_row(chain)) + "\n" for pair in made for chain in pair)
    )
    monkeypatch.setattr(conditions, "generate", lambda *_, **__: 1 / 0)
    found = demo.listing(ran, ask)
    gain = {task.id: moved(pair, ask) for task, pair in zip(asked, made, strict=True)}
    assert found.ordered
    assert "of 6 questions" in found.said
    assert found.tasks[0].id == max(gain, key=gain.get)
    assert len(found.tasks) == demo.LISTED


def test_without_steered_chains_the_order_of_the_run_stays_and_says_so(bench, ask, monkeypatch):
    monkeypatch.setattr(conditions, "generate", lambda *_, **__: 1 / 0)
    config = replace(bench.config, model="smollm2")  # 60 of 50 messages
    found = demo.listing(replace(bench, config=config), ask)
    assert (found.ordered, found.said) == (False, demo.NO_CHAINS)
    assert list(found.tasks) == demo.choices(replace(bench, config=config))


# -- where there are widgets ---------------------------------------------------------------


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
    assert "Picked: of" in stored


@pytest.mark.long
def test_nbconvert_shows_the_example(tmp_path):
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute"]
    where = {"cwd": NOTEBOOK.parent, "env": {**os.environ, "JUPYTER_PLATFORM_DIRS": "1"}}
    subprocess.run([*command, "--output-dir", tmp_path, NOTEBOOK.name], check=True, **where)
    made = (tmp_path / NOTEBOOK.name).read_text(encoding="utf-8")
    assert f"Picked: of {demo.LISTED} questions" in made
    assert "widget-view" not in made
    assert "<script" not in made


@pytest.fixture
def player(bench, ask, listing):
    made = demo.Demo(bench, ask, listing).request()
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


def test_question_and_list_follow_each_other(player):
    second = player.controls["task"].options[1][1]
    player.controls["task"].value = second
    assert player.controls["question"].value == second.content
    assert player.ask().task is second
    player.controls["question"].value = "Is ice a solid?"
    assert player.controls["task"].value == demo.OWN
    assert player.ask().task == benches.task("Is ice a solid?")
    player.controls["question"].value = second.content
    assert player.ask().task is second
    player.wait()


@pytest.mark.parametrize(
    ("question", "words"),
    [("caf\udce9", "no UTF-8"), ("why? " * 500, "exceed the context")],
)
def test_a_question_that_cannot_be_asked_is_one_line_and_can_be_mended(player, question, words):
    player.controls["question"].value = question
    player.wait()
    assert "<b>error:</b>" in player.status.value
    assert words in player.status.value
    assert "\n" not in player.status.value
    assert player.view.value == "", "the old chains do not answer this"
    player.controls["task"].index = 2
    player.wait()
    assert "tokens in" in player.status.value


def test_an_error_of_any_kind_is_shown_by_name_in_one_line(player, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the device\nis gone")

    monkeypatch.setattr(benches, "write", fail)
    player.controls["coefficient"].value = 0.5
    player.wait()
    assert "RuntimeError: the device is gone" in player.status.value


def test_a_change_cancels_the_chain_under_way_and_only_the_newest_is_written(
    player, monkeypatch
):
    began, asked, write = threading.Event(), [], benches.write

    def endless(bench, ask, *, watch):
        asked.append(ask.coefficient)
        if ask.coefficient != 0.5:
            return write(bench, ask, watch=watch)
        made = [chain.response for chain in write(bench, ask)]
        began.set()
        while True:
            watch(made)

    monkeypatch.setattr(benches, "write", endless)
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

    monkeypatch.setattr(benches, "write", endless)
    monkeypatch.setattr(benches, "label", lambda *_: [()])
    monkeypatch.setattr(demo, "render", lambda pair, **_: "half a chain")
    player.controls["coefficient"].value = 0.5
    assert began.wait(60)
    player.controls["stop"].click()
    player.wait()
    assert "stopped" in player.status.value
    assert player._thread is None


def test_a_behaviour_brings_its_own_order_and_the_question_stays(player):
    chosen, before = player.controls["task"].value, player.controls["task"].options
    player.controls["behaviour"].value = "backtracking"
    player.wait()
    assert player.controls["coefficient"].value == 2.0
    assert player.controls["task"].value == chosen
    assert player.controls["task"].options != before
    assert "+2 backtracking raised" in player.hint.value
    found = demo.listing(player.bench, replace(player.ask(), coefficient=2.0))
    assert player.controls["task"].options[0][1] == found.tasks[0]


def test_an_empty_box_is_no_error_and_write_writes(player):
    player.controls["task"].value = demo.OWN
    player.wait()
    assert player.controls["question"].value == ""
    assert player.controls["question"].placeholder == demo.EMPTY
    assert demo.WAITING in player.status.value
    assert "error" not in player.status.value
    assert player.view.value == ""
    player.controls["question"].value = "Is ice a solid?"
    player.wait()
    before, player.view.value = player.view.value, ""
    player.controls["write"].click()
    player.wait()
    assert player.view.value == before != ""


def other(bench, name: str) -> Bench:
    """A bench that differs in what the controls show: layers, warmth, suggestions."""
    config = RunConfig(name, max_tokens=16, temperature=2.0, device="cpu")
    return replace(bench, config=config, layers={"backtracking": 1}, coefficients={})


@pytest.fixture
def two(bench, ask, listing, monkeypatch):
    """A demo in which tiny-instruct can be chosen."""
    monkeypatch.setattr(demo, "at_hand", lambda config: ["tiny-thinker", "tiny-instruct"])
    made = demo.Demo(bench, ask, listing).request()
    made.wait()
    return made


def test_another_model_brings_its_own_controls_and_chains(two, bench, monkeypatch):
    monkeypatch.setattr(benches, "bench", lambda config: other(bench, config.model))
    before = two.view.value
    two.controls["model"].value = "tiny-instruct"
    two.wait()
    assert two.bench.config.model == "tiny-instruct"
    assert (two.controls["layer"].value, two.controls["temperature"].value) == (1, 2.0)
    assert two.controls["coefficient"].value == 1.0
    assert two.controls["task"].index == 0
    assert f"+1 {BEHAVIOUR}, layer 1" in two.view.value != before
    two.controls["model"].value = "tiny-thinker"
    two.wait()
    assert two.bench is bench
    assert f"layer {LAYER}" in two.view.value


def test_a_model_that_cannot_be_loaded_leaves_no_chain_and_can_be_left(two, monkeypatch):
    def fail(config):
        raise ModelError("no weights")

    monkeypatch.setattr(benches, "bench", fail)
    two.controls["model"].value = "tiny-instruct"
    two.wait()
    assert "no weights" in two.status.value
    assert two.view.value == ""
    two.controls["model"].value = "tiny-thinker"
    two.wait()
    assert "tokens in" in two.status.value


def test_models_at_hand_are_shipped_or_of_runs_whose_weights_are_here(tmp_path, monkeypatch):
    folder = tiny.save_tiny_model(tmp_path / "models" / "llama", "llama")
    config = RunConfig(results=str(tmp_path / "results"))
    assert demo.at_hand(config) == ["tiny-thinker"]
    here, gone = str(folder), "someowner/somemodel"
    for name, files in {
        here: ("run.json", "vectors.safetensors"),
        gone: ("run.json", "vectors.safetensors"),
        "gpt-4o": ("run.json", "vectors.safetensors"),
        "tiny-instruct": ("run.json",),
    }.items():
        place = config.results_folder / registry.slug(name)
        place.mkdir(parents=True)
        for file in files:
            (place / file).write_text(json.dumps({"configuration": {"model": name}}))
    assert demo.at_hand(config) == ["tiny-thinker", here]
    monkeypatch.setattr(preflight, "in_cache", lambda hub_id: hub_id == gone)
    assert demo.at_hand(RunConfig(gone, results=config.results)) == [
        gone, "tiny-thinker", here,
    ]  # fmt: skip
