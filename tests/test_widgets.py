"""The demo's widgets: they survive whatever is done to them, show no chain that is not of
their settings, and open on a pair in which something is to be seen."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest

from stllms import bench as benches
from stllms import demo, pairs, questions, registry, widgets
from stllms.config import MODELS, RunConfig
from stllms.loading import ModelError
from stllms.pairs import Ask

BEHAVIOUR = "adding-knowledge"
LAYER = (MODELS["tiny-thinker"].steering_layers or {}).get(BEHAVIOUR, 3)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    results = str(tmp_path_factory.mktemp("results"))
    return pairs.bench(RunConfig(max_tokens=32, device="cpu", results=results))


@pytest.fixture(scope="module")
def ask(bench):
    return Ask(questions.choices(bench, 1)[0], BEHAVIOUR, 1.5)


@pytest.fixture(scope="module")
def listing(bench, ask):
    return questions.listing(bench, ask)


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
    expected = demo.render(pairs.write(player.bench, player.ask()))
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
    assert player.ask().task == pairs.task("Is ice a solid?")
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
    monkeypatch.setattr(widgets, "render", lambda pair, **_: "half a chain")
    player.controls["coefficient"].value = 0.5
    assert began.wait(60)
    player.controls["stop"].click()
    player.wait()
    assert "stopped" in player.status.value
    assert player._thread is None


def test_the_widgets_open_on_the_pair_of_the_example(bench):
    page = demo.show(bench, None, BEHAVIOUR, 1.0, widgets=False).data
    shown = demo.Demo(bench, *demo.opening(bench, BEHAVIOUR, 1.0)).request()
    shown.wait()
    assert shown.view.value in page
    assert shown.ask().behaviour == BEHAVIOUR
    assert shown.controls["task"].index == 0
    assert "Not every chain changes" in shown.hint.value


def test_a_behaviour_brings_its_own_order_and_the_question_stays(player):
    chosen, before = player.controls["task"].value, player.controls["task"].options
    player.controls["behaviour"].value = "backtracking"
    player.wait()
    assert player.controls["coefficient"].value == 2.0
    assert player.controls["task"].value == chosen
    assert player.controls["task"].options != before
    assert "+2 backtracking raised" in player.hint.value
    found = questions.listing(player.bench, replace(player.ask(), coefficient=2.0))
    assert player.controls["task"].options[0][1] == found.tasks[0]


def test_an_empty_box_is_no_error_and_write_writes(player):
    player.controls["task"].value = demo.OWN
    player.wait()
    assert player.controls["question"].value == ""
    assert player.controls["question"].placeholder == widgets.EMPTY
    assert widgets.WAITING in player.status.value
    assert "error" not in player.status.value
    assert player.view.value == ""
    player.controls["question"].value = "Is ice a solid?"
    player.wait()
    before, player.view.value = player.view.value, ""
    player.controls["write"].click()
    player.wait()
    assert player.view.value == before != ""


def test_a_push_that_changes_nothing_is_said_in_the_status(player):
    player.controls["coefficient"].value = 0.01
    player.wait()
    assert "the push changed no token" in player.status.value


# --- another model -------------------------------------------------------------------------


def other(bench, name: str) -> benches.Bench:
    """A bench that differs in what the controls show: layers, warmth, suggestions."""
    config = RunConfig(name, max_tokens=16, temperature=2.0, device="cpu")
    return replace(bench, config=config, layers={"backtracking": 1}, coefficients={})


@pytest.fixture
def two(bench, ask, listing, monkeypatch):
    """A demo in which tiny-instruct can be chosen."""
    monkeypatch.setattr(benches, "at_hand", lambda config: ["tiny-thinker", "tiny-instruct"])
    made = demo.Demo(bench, ask, listing).request()
    made.wait()
    return made


def test_another_model_brings_its_own_controls_and_chains(two, bench, monkeypatch):
    monkeypatch.setattr(pairs, "bench", lambda config: other(bench, config.model))
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

    monkeypatch.setattr(pairs, "bench", fail)
    two.controls["model"].value = "tiny-instruct"
    two.wait()
    assert "no weights" in two.status.value
    assert two.view.value == ""
    two.controls["model"].value = "tiny-thinker"
    two.wait()
    assert "tokens in" in two.status.value


def test_models_at_hand_are_shipped_or_of_runs_whose_weights_are_here(
    tmp_path, save_tiny_model, monkeypatch
):
    folder = save_tiny_model(tmp_path / "models" / "llama", "llama")
    config = RunConfig(results=str(tmp_path / "results"))
    assert benches.at_hand(config) == ["tiny-thinker"]
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
    assert benches.at_hand(config) == ["tiny-thinker", here]
    monkeypatch.setattr(benches.refusals, "in_cache", lambda hub_id: hub_id == gone)
    assert benches.at_hand(RunConfig(gone, results=config.results)) == [
        gone, "tiny-thinker", here,
    ]  # fmt: skip


def test_the_dropdown_says_how_other_models_come_in(player):
    control = player.controls["model"]
    assert control.options == (("tiny-thinker", "tiny-thinker"),)
    assert 'model = "..." in the first cell' in control.tooltip
