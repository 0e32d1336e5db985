"""Tasks of reasoning-gym: the mechanics on a stand-in, and the package itself where it is."""

from __future__ import annotations

import json
import math
import random
import sys
from types import SimpleNamespace

import pytest

from stllms import artifacts, checks, gym, run, tasks
from stllms.config import RunConfig
from stllms.records import Task


class Sums:
    """A dataset as the package makes them: items from ``seed + place``, a lenient verifier."""

    def __init__(self, size: int, seed: int, largest: int = 10**6) -> None:
        self.size, self.seed, self.largest = size, seed, largest

    def __getitem__(self, place: int) -> dict:
        if not 0 <= place < self.size:
            raise IndexError(place)
        draw = random.Random(self.seed + place)
        a, b = draw.randrange(self.largest), draw.randrange(self.largest)
        return {"question": f"{a} + {b}?", "answer": a + b, "metadata": {}}

    def score_answer(self, answer: str, item: dict) -> float:
        return 1.0 if int(answer) == item["answer"] else 0.01


def create_dataset(name: str, **options):
    if name == "composite":
        raise AssertionError("Must specify at least one dataset")
    return Sums(**options, **({"largest": 2} if name == "coins" else {}))


@pytest.fixture
def package(monkeypatch):
    """The stand-in in place of ``reasoning_gym``."""
    names = dict.fromkeys(("chain_sum", "coins", "composite", "ransom_note", "sudoku"))
    stand_in = SimpleNamespace(
        factory=SimpleNamespace(DATASETS=names), create_dataset=create_dataset
    )
    forget()
    monkeypatch.setitem(sys.modules, "reasoning_gym", stand_in)
    monkeypatch.setattr(checks.metadata, "version", lambda name: "0.0.1")
    yield stand_in
    forget()


def forget() -> None:
    gym._item.cache_clear()
    gym._dataset.cache_clear()


def question(seed: int, index: int) -> str:
    return Sums(gym.BLOCK, seed * gym.INDICES)[index]["question"] if index < gym.BLOCK else ""


def test_tasks_come_from_name_seed_and_index_alone(package):
    few, many = (gym.tasks("chain_sum", "build", n, seed=3) for n in (5, 250))
    assert many[:5] == few
    assert few != gym.tasks("chain_sum", "build", 5, seed=4)
    for task in few:
        assert task.id == f"gym-chain_sum-{task.index:06d}"
        assert task.category == "chain_sum"
        assert task.content == question(3, task.index)
        assert task.answer == str(sum(int(x) for x in task.content[:-1].split(" + ")))


def test_items_go_on_behind_the_first_block(package):
    late = next(t for t in gym.tasks("chain_sum", "build", 250) if t.index >= gym.BLOCK)
    whole = Sums(10 * gym.BLOCK, 0)
    assert late.content == whole[late.index]["question"]


def test_no_question_is_in_two_parts_even_of_another_seed(package):
    questions = {
        part: {
            t.content for seed in (0, 1) for t in gym.tasks("chain_sum", part, 60, seed=seed)
        }
        for part in gym.PARTS
    }
    assert {len(found) for found in questions.values()} == {120}
    assert len(set.union(*questions.values())) == 360


def test_a_question_is_asked_once_and_too_few_of_them_are_counted(package):
    found = {"0 + 0?", "0 + 1?", "1 + 0?", "1 + 1?"}
    for part in gym.PARTS:
        mine = {one for one in found if gym.part_of(one) == part}
        if mine:
            made = gym.tasks("coins", part, len(mine))
            assert {task.content for task in made} == mine
        words = f"{len(mine)} different questions to {part}"
        with pytest.raises(ValueError, match=words):
            gym.tasks("coins", part, len(mine) + 1)


def test_unknown_names_are_one_line_with_close_ones(package):
    with pytest.raises(ValueError, match="did you mean chain_sum") as error:
        RunConfig(tasks="gym:chain_sums")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="it has 5, from chain_sum to sudoku"):
        RunConfig(tasks="gym:zzzzzz")
    with pytest.raises(ValueError, match="unknown part 'test'"):
        gym.tasks("chain_sum", "test", 1)


def test_a_dataset_that_is_another_in_every_process_is_refused(package):
    with pytest.raises(ValueError, match="gym:ransom_note are others in every process"):
        RunConfig(tasks="gym:ransom_note")


def test_a_dataset_that_needs_options_says_so(package):
    with pytest.raises(ValueError, match=r"gym:composite cannot be made.*at least one"):
        gym.tasks("composite", "build", 1)


def test_without_the_package_the_error_is_a_command(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert run.main(["--tasks", "gym:chain_sum"]) == 2
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 1
    assert "reasoning-gym: pip install 'stllms[gym]'" in lines[0]


def test_a_run_has_its_tasks_by_part_and_says_the_version(package):
    config = RunConfig(tasks="gym:chain_sum", profile="smoke", seed=2)
    parts = {part: tasks.for_run(config, part) for part in gym.PARTS}
    assert {part: len(found) for part, found in parts.items()} == {
        "build": 16,
        "evaluate": 8,
        "compare": 8,
    }
    assert parts["build"] == gym.tasks("chain_sum", "build", 16, seed=2)
    assert config.identity()["tasks"] == "gym:chain_sum (reasoning-gym 0.0.1)"
    parameters = config.parameters()
    assert parameters["options"]["tasks"] == "gym:chain_sum"
    assert RunConfig.from_json(json.dumps(config.to_dict())) == config


def test_another_version_of_the_package_is_another_run(package, monkeypatch, tmp_path):
    place = {"tasks": "gym:chain_sum", "results": str(tmp_path)}
    artifacts.Folder(RunConfig(**place)).open()
    artifacts.Folder(RunConfig(**place)).open()
    monkeypatch.setattr(checks.metadata, "version", lambda name: "0.0.2")
    with pytest.raises(
        artifacts.ChangedConfiguration, match=r"tasks was .*0\.0\.1.* now .*0\.0\.2"
    ):
        artifacts.Folder(RunConfig(**place)).open()


def test_the_verifier_scores_and_not_the_string(package):
    task = gym.tasks("chain_sum", "build", 1)[0]
    right, wrong = f"{int(task.answer):,}", str(int(task.answer) + 1)
    assert tasks.score(task, f"<think>\nHm.\n</think>\nThe answer is {right}.") == 1.0
    assert tasks.score(task, f"So it is **{task.answer}**.") == 1.0
    assert tasks.score(task, f"<answer> {task.answer} </answer> or {wrong}") == 1.0
    assert tasks.score(task, f"The answer is {wrong}.") == 0.01
    assert tasks.score(task, "I give up, sorry.") == 0.0  # int() raises: not accepted
    assert tasks.score(task, f"<think>\nThe answer is {task.answer}") == 0.0
    assert tasks.score(task, "") == 0.0


def test_other_tasks_are_scored_as_before():
    asked = Task("a", "own", "2 + 2?", "4")
    assert tasks.score(asked, "The answer is 4.") == 1.0
    assert tasks.score(asked, "The answer is 5.") == 0.0
    assert math.isnan(tasks.score(Task("b", "own", "Why?"), "The answer is 4."))


@pytest.mark.parametrize(
    ("text", "several_lines", "expected"),
    [
        ("no <answer>1</answer> yes <answer>\n2\n3 </answer>.", True, ["2\n3"]),
        ("Grid:\n\n1 2\n3 4", True, ["1 2\n3 4"]),
        ("```text\n1 2\n3 4\n```\n\nDone.", True, ["1 2\n3 4", "Done"]),
        (
            "It is\n$\\boxed{x**2 + {y}}$.",
            False,
            ["plain", "x**2 + {y}", "\\boxed{x**2 + {y}}"],
        ),
        ("**Answer:** 3*x + 1\n\nBye.", False, ["plain", "3*x + 1", "Bye"]),
        ("  ", False, ["plain"]),
    ],
)
def test_the_readings_of_an_answer(text, several_lines, expected):
    assert gym.readings(text, "plain", several_lines=several_lines) == expected


# -- the package itself --------------------------------------------------------------------

NAMES = ("chain_sum", "mini_sudoku", "propositional_logic", "fraction_simplification")


@pytest.mark.parametrize("name", NAMES)
def test_the_packages_datasets_are_disjoint_and_score_their_answers(name):
    pytest.importorskip("reasoning_gym", reason="the extra 'gym' is not installed")
    forget()
    config = RunConfig(tasks=f"gym:{name}", n_samples=6, n_evaluate=4, n_compare=4)
    parts = [tasks.for_run(config, part) for part in gym.PARTS]
    assert len({task.content for part in parts for task in part}) == 14
    assert "reasoning-gym 0." in config.identity()["tasks"]
    first = parts[0][0]
    assert tasks.score(first, "zzz") < 0.5
    if first.answer is not None:
        assert tasks.score(first, f"So the answer is:\n\n{first.answer}") == 1.0


def test_a_name_nearly_right_in_the_package():
    pytest.importorskip("reasoning_gym", reason="the extra 'gym' is not installed")
    with pytest.raises(ValueError, match="did you mean chain_sum"):
        RunConfig(tasks="gym:chainsum")
