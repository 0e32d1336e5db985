"""The demo: twins at coefficient 0, streamed text that ends as the final one, questions on
which the push shows, and one example where there are no widgets."""

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

import pandas as pd
import pytest

from stllms import decode, demo, pairs, pipeline, questions, registry, steering, tasks
from stllms.artifacts import Folder
from stllms.config import MODELS, RunConfig
from stllms.pairs import Ask
from stllms.records import BEHAVIOURS, STEERED, to_row
from stllms.vectors import SteeringVectors

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "00_demo.ipynb"
BEHAVIOUR = "adding-knowledge"
LAYER = (MODELS["tiny-thinker"].steering_layers or {}).get(BEHAVIOUR, 3)


@pytest.fixture(scope="module")
def bench():
    return pairs.bench(RunConfig(max_tokens=32, device="cpu"))


@pytest.fixture(scope="module")
def ask(bench):
    return Ask(questions.choices(bench, 1)[0], BEHAVIOUR, 1.5)


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
    assert seen[-1] == [chain.ids for chain in made]
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
        ({"coefficient": 1e39}, "coefficient: 1e+39, expected a number from -1000 to 1000"),
        ({"coefficient": -1001.0}, "from -1000 to 1000"),
        ({"task": tasks.Task("t", "c", "caf\udce9?")}, "character 4 is no UTF-8"),
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
    assert f"Picked: of {questions.LISTED} questions" in made
    assert f"+1 {BEHAVIOUR}, layer {LAYER}" in made
    own = demo.show(bench, "Is wood a solid, Leo asks?", widgets=False).data
    assert "Is wood a solid, Leo asks?" in own
    assert "Picked" not in own


def test_a_push_that_changes_nothing_or_breaks_the_text_is_remarked(bench, ask):
    plain, steered = pairs.write(bench, replace(ask, coefficient=2.5))
    assert pairs.remark((plain, steered)) == ""
    twin = replace(steered, response=plain.response, annotation=plain.annotation)
    assert pairs.remark((plain, twin)).startswith("the push changed no token: try another seed")
    assert pairs.remark((plain, replace(twin, coefficient=0.0))) == ""
    whole = replace(plain, response=replace(plain.response, finished=True))
    endless = replace(steered, response=replace(steered.response, finished=False))
    assert "broke the text (not finished)" in pairs.remark((whole, endless))
    assert pairs.remark((replace(plain, response=endless.response), twin)) == ""
    bare = {**steered.annotation.ledger, "coverage": 0.2}
    noise = replace(steered, annotation=replace(steered.annotation, ledger=bare))
    assert "broke the text (mostly unlabelled)" in pairs.remark((plain, noise))
    twins = replace(ask, coefficient=0.01)
    assert "changed no token" in demo.example(bench, twins).data


# --- which questions -----------------------------------------------------------------------


def test_choices_differ_and_begin_with_every_category(bench):
    chosen = questions.choices(bench)
    assert len({task.id for task in chosen}) == len(chosen) == questions.LISTED
    assert len({task.category for task in chosen[:10]}) == 10


@pytest.fixture(scope="module")
def whole():
    """The bench of the notebook: chains are as long as they will be."""
    return pairs.bench(RunConfig(device="cpu"))


def moved(pair, ask) -> float:
    place = BEHAVIOURS.index(ask.behaviour)
    plain, steered = (pairs.shares(chain)[place] for chain in pair)
    return (steered - plain) * (1 if ask.coefficient > 0 else -1)


@pytest.mark.parametrize("behaviour", STEERED)
def test_the_list_begins_where_the_suggested_push_shows(whole, behaviour):
    coefficient = pairs.coefficient_of(whole, behaviour)
    ask, listed = demo.opening(whole, behaviour, coefficient)
    assert {task.id for task in listed.tasks} == {t.id for t in questions.choices(whole)}
    found = [moved(pair, ask) for pair in pairs.write_all(whole, ask, listed.tasks[:4])]
    assert found == sorted(found, reverse=True)
    assert min(found) > 0.05, "four questions on which something is to be seen"
    assert moved(pairs.write(whole, ask), ask) == found[0]
    assert listed.said.startswith("Not every chain changes: of 30 questions")


def test_taking_away_begins_where_the_share_falls_most(whole):
    ask, listed = demo.opening(whole, "backtracking", -2.0)
    assert moved(pairs.write(whole, ask), ask) > 0.05
    assert "lowered its share" in listed.said


def test_the_suggested_coefficients_are_those_of_the_reference(whole):
    place = "results/reference/full/tiny-thinker/steering_suggested.csv"
    rows = pd.read_csv(NOTEBOOK.parent.parent / place)
    rows = rows[rows["sign"] == "+"]
    expected = dict(zip(rows["behaviour"], rows["coefficient"], strict=True))
    assert registry.TINY_THINKER_COEFFICIENTS == whole.coefficients == expected


def test_a_run_with_steered_chains_orders_the_questions_without_writing(
    bench, ask, tmp_path, monkeypatch
):
    config = RunConfig(max_tokens=32, device="cpu", results=str(tmp_path))
    folder = Folder(config).open()
    ran = replace(bench, config=config, origin=folder.label)
    asked = questions.choices(ran, 6)
    made = pairs.write_all(ran, ask, asked)
    folder.steered.write_text(
        "".join(json.dumps(to_row(chain)) + "\n" for pair in made for chain in pair)
    )
    monkeypatch.setattr(steering, "generate", lambda *_, **__: 1 / 0)
    found = questions.listing(ran, ask)
    gain = {task.id: moved(pair, ask) for task, pair in zip(asked, made, strict=True)}
    assert found.ordered
    assert "of 6 questions" in found.said
    assert found.tasks[0].id == max(gain, key=gain.get)
    assert len(found.tasks) == questions.LISTED


def test_without_steered_chains_the_order_of_the_run_stays_and_says_so(bench, ask, monkeypatch):
    monkeypatch.setattr(steering, "generate", lambda *_, **__: 1 / 0)
    config = replace(bench.config, model="smollm2")  # 60 of 50 messages
    found = questions.listing(replace(bench, config=config), ask)
    assert (found.ordered, found.said) == (False, questions.NO_CHAINS)
    assert list(found.tasks) == questions.choices(replace(bench, config=config))


# --- where there are widgets ---------------------------------------------------------------


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
    assert f"Picked: of {questions.LISTED} questions" in made
    assert "widget-view" not in made
    assert "<script" not in made
