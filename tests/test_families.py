"""Every answer of the grammar's tasks, solved again from the words of its question."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from fractions import Fraction
from random import Random

import pytest

from stllms.organism import families, grammar, lexicon, wordings
from stllms.records import CATEGORIES, Task

FAMILIES = sorted(families.FAMILIES)
DRAWS = 1500


# --- the answers, from the question alone ------------------------------------------------
# A small solver a family, written from the English of the question. None of them looks at the
# steps of the puzzle; what words mean is said here again.

COMPASS = ["north", "east", "south", "west"]
WEEK = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
SORTS = {
    "dog cow horse sheep goat": "animal",
    "plum pear grape cherry lemon": "fruit",
    "iron gold copper silver zinc": "metal",
    "Mars Venus Saturn Jupiter Neptune": "planet",
}
SERVES = {
    "cut paper": "knife razor",
    "carry water": "bucket bottle",
    "drive a nail": "hammer mallet",
    "light a room": "torch lantern",
    "cross a river": "boat raft",
}
STATE = {
    "solid": "ice wood glass steel salt",
    "liquid": "water milk oil honey juice",
    "gas": "steam air oxygen helium smoke",
}


def numbers(question: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", question)]


def solve_flow(question: str) -> int:
    into, out, hours = numbers(question)
    return (into - out) * hours


def solve_machine(question: str) -> int:
    first, second = numbers(question)
    return (first + second) * 2  # adding is symmetric: it does not matter which is put in


def solve_extreme(question: str) -> int:
    return (max if "largest" in question else min)(numbers(question))


def solve_sequence(question: str) -> int:
    first, second, third = numbers(question)
    assert third - second == second - first
    return third + (third - second)


def solve_repeat(question: str) -> str:
    row = re.search(r"sees (.*)\. Which", question)[1].split(", ")
    assert row[2] == row[0] != row[1], "two colours in turn"
    return row[len(row) - 2]


def solve_order(question: str) -> str:
    pairs = re.findall(r"(\w+) is (\w+) than (\w+)", question)
    people = {name for one, _, other in pairs for name in (one, other)}
    above = {(one, other) for one, _, other in pairs}
    (rank,) = [
        order
        for order in itertools.permutations(people)
        if all(order.index(one) < order.index(other) for one, other in above)
    ]
    word = re.search(r"Who is the (\w+)\?", question)[1]
    same_word = word[:3] == pairs[0][1][:3]  # tallest goes with taller, shortest does not
    return rank[0] if same_word else rank[-1]


def solve_syllogism(question: str) -> str:
    every, kind, trait, who, own, asked, which = re.fullmatch(
        r"(All|No) (\w+)s are (\w+)\. (\w+) is a (\w+)\. Is (\w+) (\w+)\?", question
    ).groups()
    assert (kind, trait, who) == (own, which, asked)
    return "yes" if every == "All" else "no"


def solve_turn(question: str) -> str:
    start = re.search(r"\b(north|east|south|west)\b", question)[1]
    quarters = {"right": 1, "back": 2, "left": 3}[re.search(r"turns (\w+)", question)[1]]
    return COMPASS[(COMPASS.index(start) + quarters) % 4]


def solve_walk(question: str) -> int:
    there, back = re.findall(r"(\d+) steps (\w+)", question)
    assert {there[1], back[1]} in [{"north", "south"}, {"east", "west"}, {"up", "down"}]
    return abs(int(there[0]) - int(back[0]))


def solve_weekday(question: str) -> str:
    start = re.search(r"Today is (\w+)\.", question)[1]
    return WEEK[(WEEK.index(start) + numbers(question)[0]) % 7]


def solve_cause(question: str) -> str:
    cause, effect, given, asked = re.fullmatch(
        r"\w+ knows: if (.+), (.+)\. (.+)\. Is it true that (.+)\?", question
    ).groups()
    given = given[0].lower() + given[1:]
    if given == cause and asked == effect:
        return "yes"
    assert given == f"it is false that {effect}", "only modus ponens and modus tollens"
    assert asked == cause
    return "no"


def solve_chance(question: str) -> Fraction:
    (n, colour), (m, _) = re.findall(r"(\d+) (red|blue|green|white|black|yellow)", question)
    assert re.search(rf"(of {colour}\?|a {colour} one\?)$", question)
    return Fraction(int(n), int(n) + int(m))


def solve_certain(question: str) -> str:
    all_of, asked = re.search(r"are (\w+)\. .* be (\w+)\?", question).groups()
    return "yes" if all_of == asked else "no"


def solve_odd_one(question: str) -> str:
    words = re.search(r": (.*)\?", question)[1].split(", ")
    sort = {w: kind for group, kind in SORTS.items() for w in group.split()}
    counts = Counter(sort[word] for word in words)
    assert sorted(counts.values()) == [1, 2]
    return next(word for word in words if counts[sort[word]] == 1)


def solve_tool(question: str) -> str:
    use = next(use for use in SERVES if use in question)
    offered = re.findall(r"\ba (\w+)", question.replace(use, ""))
    (fit,) = set(offered) & set(SERVES[use].split())
    assert len(offered) == 2
    return fit


def solve_matter(question: str) -> str:
    item, asked = re.search(r"[Ii]s (\w+) a (\w+)", question).groups()
    return "yes" if item in STATE[asked].split() else "no"


SOLVERS = {
    "sum": lambda q: sum(numbers(q)),
    "difference": lambda q: numbers(q)[0] - numbers(q)[1],
    "machine": solve_machine,
    "flow": solve_flow,
    "extreme": solve_extreme,
    "parity": lambda q: "even" if numbers(q)[0] % 2 == 0 else "odd",
    "sequence": solve_sequence,
    "repeat": solve_repeat,
    "order": solve_order,
    "syllogism": solve_syllogism,
    "turn": solve_turn,
    "walk": solve_walk,
    "weekday": solve_weekday,
    "cause": solve_cause,
    "chance": solve_chance,
    "certain": solve_certain,
    "odd-one": solve_odd_one,
    "tool": solve_tool,
    "matter": solve_matter,
}


def test_there_are_at_least_twelve_families_in_the_categories_of_the_paper():
    assert len(FAMILIES) >= 12
    categories = {category for category, _ in families.FAMILIES.values()}
    assert categories == set(CATEGORIES)
    assert set(lexicon.FACTS) == set(FAMILIES)
    assert set(SOLVERS) == set(FAMILIES), "a solver is missing, or solves nothing"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_is_the_one_that_the_question_asks_for(name):
    rng = Random(f"solve/{name}")
    answers = set()
    for _ in range(150):
        puzzle = families.draw(rng, name)
        solved = SOLVERS[name](puzzle.question)
        if isinstance(solved, Fraction):
            assert Fraction(puzzle.answer) == solved, puzzle.question
        else:
            assert puzzle.answer == str(solved), puzzle.question
        assert (puzzle.family, puzzle.category) == (name, families.FAMILIES[name][0])
        answers.add(puzzle.answer)
    assert len(answers) > 1, "an answer that never changes tests nothing"


OPERATIONS = {"plus": lambda a, b: a + b, "minus": lambda a, b: a - b}


@pytest.mark.parametrize("name", FAMILIES)
def test_arithmetic_in_steps_and_examples_is_right(name):
    rng = Random(f"arithmetic/{name}")
    for _ in range(150):
        puzzle = families.draw(rng, name)
        for said in (*puzzle.steps, *puzzle.examples):
            for a, word, b, result in re.findall(r"(\d+) (plus|minus) (\d+) is (\d+)", said):
                assert OPERATIONS[word](int(a), int(b)) == int(result), said
            for half, whole in re.findall(r"twice (\d+) is (\d+)", said):
                assert 2 * int(half) == int(whole), said


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_step_states_the_answer(name):
    rng = Random(f"steps/{name}")
    for _ in range(60):
        puzzle = families.draw(rng, name)
        if puzzle.answer in ("yes", "no"):
            continue
        last = puzzle.steps[-1]
        parts = puzzle.answer.split("/")
        assert all(re.search(rf"\b{part}\b", last) for part in parts), (last, puzzle.answer)


# --- the tasks --------------------------------------------------------------------------


def question_of(task: Task) -> str:
    """The question without the hint that may follow it."""
    for hint in (h for texts in wordings.HINTS.values() for h in texts):
        if task.content.endswith(f" {hint}"):
            return task.content.removesuffix(f" {hint}")
    return task.content


def test_tasks_are_deterministic_unique_and_go_through_the_families_in_turn():
    first = grammar.tasks("evaluate", 60)
    assert first == grammar.tasks("evaluate", 60)
    assert first[:20] == grammar.tasks("evaluate", 20), "more tasks begin with the same ones"
    assert first != grammar.tasks("evaluate", 60, seed=1)
    assert len({t.id for t in first}) == 60
    per_category = Counter(category for category, _ in families.FAMILIES.values())
    found = Counter(t.category for t in first)
    for category, count in per_category.items():
        assert abs(found[category] - 60 * count / len(FAMILIES)) <= 3, category
    for task in first:
        (name,) = [n for n in FAMILIES if _solves(n, question_of(task), task)]
        assert families.FAMILIES[name][0] == task.category


def _solves(name: str, question: str, task: Task) -> bool:
    """Whether ``task`` is of this family: drawn from it by its words, and solved by it."""
    if families.FAMILIES[name][0] != task.category or shape(question) not in _shapes(name):
        return False
    solved = SOLVERS[name](question)
    return solved == Fraction(task.answer) if name == "chance" else str(solved) == task.answer


def shape(question: str) -> tuple[str, ...]:
    """The two words that tell templates apart: none of them can be drawn."""
    closed = {*lexicon.NAMES, *lexicon.THINGS, *lexicon.COLOURS, *lexicon.KINDS}
    closed |= {*lexicon.TRAITS, *lexicon.DAYS, *lexicon.POINTS}
    closed |= {w for words in lexicon.MATTER.values() for w in words}
    return tuple(w for w in re.findall(r"[A-Za-z]+", question) if w not in closed)[:2]


def _shapes(name: str, known: dict[str, set] = {}) -> set[tuple[str, ...]]:  # noqa: B006
    if name not in known:
        rng = Random(f"shapes/{name}")
        known[name] = {shape(families.draw(rng, name).question) for _ in range(200)}
    return known[name]
