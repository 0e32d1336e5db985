"""The tasks are what their README says; files and answers are read with care, and rejected
rather than guessed; tasks of reasoning-gym on a stand-in, and on the package where it is."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from rapidfuzz import fuzz, process
from tiny import CATEGORIES

from stllms import tasks
from stllms.records import Task

CHECKABLE_KINDS = (
    *("arithmetic", "logic", "counting", "dates", "units"),
    *("letters", "sequences", "sets", "clocks", "money"),
)


@pytest.fixture(scope="module")
def parts() -> dict[str, list[Task]]:
    return {part: tasks.load(part) for part in tasks.PARTS}


# -- which tasks ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "prefix", "kinds", "each"),
    [
        ("train", "train", CATEGORIES, 50),
        ("evaluate", "evaluate", CATEGORIES, 5),
        ("checkable", "check", CHECKABLE_KINDS, 10),
    ],
)
def test_a_part_has_its_tasks_in_turn_with_ids_that_name_them(parts, part, prefix, kinds, each):
    found = parts[part]
    assert Counter(task.category for task in found) == dict.fromkeys(kinds, each)
    in_turn = [task.category for task in found]
    assert in_turn == in_turn[:10] * each, "the first n are balanced"
    for task in found:
        slug = task.category.replace(" ", "-")
        assert re.fullmatch(rf"{prefix}-{slug}-\d{{2,3}}", task.id)
        assert bool(task.answer) == (part == "checkable")


def test_texts_are_clean_and_no_two_are_near_duplicates(parts):
    every = [task for part in parts.values() for task in part]
    assert len({task.id for task in every}) == 650
    texts = [task.content for task in every]
    for text in texts:
        assert 30 <= len(text) <= 450
        assert text == " ".join(text.split())
        assert text.isascii()
        assert text[-1] in '.?")'
        assert text.count('"') % 2 == 0
        assert text.count("(") == text.count(")")
    lower = [text.lower() for text in texts]
    alike = process.cdist(lower, lower, scorer=fuzz.token_set_ratio, score_cutoff=80)
    np.fill_diagonal(alike, 0)
    assert not [(texts[i], texts[j]) for i, j in np.argwhere(alike)]


def test_loading_takes_the_first_and_refuses_what_is_not_there(parts):
    assert tasks.load("train", n=20) == parts["train"][:20]
    for n in (0, -1, 51):
        with pytest.raises(ValueError, match=rf"evaluate.*{n} tasks asked for.*1 and 50"):
            tasks.load("evaluate", n=n)
    with pytest.raises(ValueError, match=r"'test'.*train, evaluate, checkable"):
        tasks.load("test")


@pytest.mark.parametrize("n", [3, 16, 100, 500])
def test_a_balanced_sample_has_equally_many_of_each_category(parts, n):
    drawn, again, other = (tasks.balanced_sample(parts["train"], n, seed) for seed in (3, 3, 4))
    assert drawn == again != other
    counts = Counter(task.category for task in drawn)
    assert len({task.id for task in drawn}) == len(drawn) == n
    assert len(counts) == min(n, 10)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len({task.category for task in drawn[:10]}) == min(n, 10)


@pytest.mark.parametrize(
    ("n", "words"),
    [(0, "between 1 and 6"), (7, "between 1 and 6"), (4, "'narrow' has 1 tasks, 2 are")],
)
def test_a_sample_that_cannot_be_had_is_refused(n, words):
    few = [*(Task(f"a{i}", "wide", "?") for i in range(5)), Task("b", "narrow", "?")]
    with pytest.raises(ValueError, match=words):
        tasks.balanced_sample(few, n, seed=0)


def test_a_file_is_read_with_and_without_the_optional_fields(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '\ufeff{"id": "a", "content": "Why \u2028 so?", "source": "me"}\n\n'
        '{"id": "b", "content": "2+2?", "category": "sums", "answer": "4"}\r\n',
        encoding="utf-8",
    )
    assert tasks.from_file(path) == [
        Task("a", "own", "Why \u2028 so?"),
        Task("b", "sums", "2+2?", "4"),
    ]


def test_a_chat_stands_in_place_of_a_text(tmp_path):
    path, said = tmp_path / "mine.jsonl", [("system", "Rhyme."), ("user", "Why?")]
    chat = tuple({"role": role, "content": text} for role, text in said)
    path.write_text(json.dumps({"id": "a", "messages": chat, "answer": "4"}), encoding="utf-8")
    assert tasks.from_file(path) == [Task("a", "own", "Why?", "4", messages=chat)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'id': 1}", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ('["x", "y"]', "line 2: expected an object, got list"),
        ('{"content": "y"}', "line 2, field 'id': missing"),
        ('{"id": 7, "content": "y"}', "line 2, field 'id': expected a string, got 7"),
        ('{"id": "x", "content": ["y"]}', "'content': expected a string, got ['y']"),
        ('{"id": "x", "content": "y", "answer": 4}', "'answer': expected a string, got 4"),
        ('{"id": "x", "content": "y", "category": null}', "'category': expected a string"),
        ('{"id": "x", "content": " "}', "line 2, field 'content': empty"),
        ('{"id": "first", "content": "y"}', "line 2, field 'id': 'first' is on line 1 too"),
        ('{"id": "x", "content": "y", "messages": []}', "line 2: both 'content' and"),
        ('{"id": "x", "messages": []}', "line 2, field 'messages': expected a list"),
        ('{"id": "x", "messages": ["y"]}', "line 2, message 1: expected {role, content}"),
        ('{"id": "x", "messages": [{"role": "user"}]}', "message 1, field 'content': missing"),
        (
            '{"id": "x", "messages": [{"role": "me", "content": "y"}]}',
            "message 1, field 'role': 'me', expected system, user, assistant",
        ),
        (
            '{"id": "x", "messages": [{"role": "system", "content": "y"}]}',
            "line 2, field 'messages': the last one must be the user's",
        ),
    ],
)
def test_a_bad_line_is_named_with_file_line_and_field(tmp_path, line, message):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"id": "first", "content": "z"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        tasks.from_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_empty_missing_or_no_text_is_named(tmp_path):
    path = tmp_path / "mine.jsonl"
    for content, message in (
        (b"\n \n", "empty"),
        (b'{"id": "\xff"}', r"not UTF-8 text \(byte 8\)"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"mine\.jsonl: {message}"):
            tasks.from_file(path)
    for missing in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(ValueError, match=f"{missing.name}: cannot be read"):
            tasks.from_file(missing)


def ids(found: list[Task]) -> list[str]:
    return [task.id for task in found]


def test_a_run_takes_its_tasks_from_a_set(parts):
    asked = tasks.select("evaluate", source="checkable", n=30)
    assert asked == parts["checkable"][:30]
    assert tasks.select("evaluate", source="messages", n=7) == parts["evaluate"][:7]
    for source in ("checkable", "messages"):
        assert tasks.select("build", source=source, n=10) == parts["train"][:10]
        compared = tasks.select("compare", source=source, n=20, seed=3)
        assert compared == tasks.balanced_sample(parts["train"], 20, seed=3)
    with pytest.raises(ValueError, match="'train' of a run: choose one of build, evaluate"):
        tasks.select("train", source="messages", n=1)


def test_each_seed_takes_the_next_questions_of_the_embedded_models():
    def grammar(part: str, n: int, seed: int = 0) -> list[str]:
        return ids(tasks.select(part, source="grammar", n=n, seed=seed))

    assert grammar("build", 3) == [f"tiny-build-{i:04}" for i in range(3)]
    assert grammar("build", 2, seed=3) == ["tiny-build-0006", "tiny-build-0007"]
    assert grammar("evaluate", 300, seed=1) == grammar("compare", 300, seed=1)
    assert grammar("evaluate", 300, seed=1) == grammar("evaluate", 400)[300:] + grammar(
        "evaluate", 200
    ), "from the end on to the beginning"
    with pytest.raises(ValueError, match="build: 1001 tasks asked for, between 1 and 1000"):
        grammar("build", 1001)


def test_a_persons_file_builds_with_its_first_tasks_and_skips_them_after(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(f'{{"id": "{i}", "content": "q{i}"}}\n' for i in range(9)))
    options = {"source": str(path), "seed": 0}
    assert ids(tasks.select("build", n=4, **options)) == list("0123")
    assert ids(tasks.select("evaluate", n=5, skip=4, **options)) == list("45678")
    with pytest.raises(ValueError, match=r"evaluate: 10 tasks .* 1 and 9 can be had"):
        tasks.select("evaluate", n=6, skip=4, **options)


def test_a_subset_takes_the_categories_in_turn_in_the_order_of_the_tasks(parts):
    some, again, other = (tasks.subset(parts["evaluate"], 10, seed=s) for s in (0, 0, 1))
    assert some == again != other
    assert {task.category for task in some} == set(CATEGORIES)
    assert [task for task in parts["evaluate"] if task in some] == some
    for n in (None, 50, 99):
        assert tasks.subset(parts["evaluate"], n, seed=0) == parts["evaluate"]
    asked = [Task(f"a{i}", "a", "?") for i in range(9)] + [Task("b", "b", "?")]
    found = Counter(task.category for task in tasks.subset(asked, 4, seed=0))
    assert found == {"a": 3, "b": 1}, "categories of any size share"


# -- answers -------------------------------------------------------------------------------


def correct(text: str, answer: str) -> bool:
    return tasks.score(Task("a", "own", "?", answer), text) == 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 42.", "42"),
        ("The answer is 412.5 grams. That is all.", "412.5 grams"),
        ("So the final answer is: **22:02**.", "22:02"),
        ("**Answer:** Thursday\n\nThis follows from 100 = 14 x 7 + 2.", "Thursday"),
        ("## Final Answer\n\n7/12", "7/12"),
        ("The answer to 17 times 24 is 408", "408"),
        ("Answer: 5\n\nWait, I slipped.\n\nAnswer: 6", "6"),
        (r"Thus \boxed{7} is not it, but \boxed{\frac{7}{12}} is.", "7/12"),
        (r"\[ \boxed{\text{Cal}} \]", "Cal"),
        (r"The total is $\boxed{1{,}332}$.", "1332"),
        ("We add.\n\nHence it costs **6.35 euros** in the end, as promised.", "6.35 euros"),
        ("17 * 24 - 19 * 12 = 408 - 228 = 180", "180"),
        ("Adding it all up, the youngest of the four is Oli.", "Oli"),
        ("After all of that counting there were exactly 15 handshakes", "15"),
        ("By this method one obtains 600 pages without any doubt", "600"),
        ("No, because each move is odd.", "No, because each move is odd"),
        ("I don't think the answer is 5. I count six.\n\nAnswer: 6", "6"),
        ("If the answer is 5, we fail. The sum is 6", "The sum is 6"),
        ("<think>The answer is 5.</think>\nThe answer is 6.", "6"),
        ("The opening tag was in the prompt: 5</think>6", "6"),
        ("42", "42"),
        # None rather than a guess.
        (" \n ", None),
        ("<think>The answer is 5.", None),
        ("</think>", None),
        (r"\boxed{}", None),
        ("Five printers of that kind then print 600 pages every 4 minutes", None),
        ("It follows that one should think about this a good deal longer", None),
    ],
)
def test_finds_the_final_answer_where_it_is_clear(text, answer):
    assert tasks.read_answer(text) == answer


def test_is_quick_on_long_and_broken_text():
    for text in ("\\boxed{" * 3000, "answer to " * 20_000, "9" * 20_000):
        assert not correct(text, "5")


@pytest.mark.parametrize(
    ("answer", "texts"),
    [
        ("180", ["180", "The answer is 180.0."]),
        ("1.50", ["The answer is $1.50.", "The answer is 1.5 euros per pen."]),
        ("540.80", [r"\boxed{\$540.80}"]),
        ("1080", [r"\boxed{1{,}080 \text{ ml}}"]),
        ("4000", [r"\boxed{4\,000\,\text{g}}", "Answer: 4,000 grams", "Answer: 4 000 g"]),
        ("102", [r"\boxed{102 \text{ m}^2}", "Answer: 102 m²"]),
        ("120", [r"\boxed{120^\circ}", "Answer: 120°"]),
        ("-5", ["Answer: −5 degrees", "Answer: minus five"]),
        ("-0.5", [r"\boxed{-\frac{1}{2}}"]),
        ("7/12", [r"\boxed{\dfrac{14}{24}}", r"\boxed{\frac7{12}}"]),
        ("2.5", ["Answer: 2 1/2"]),
        ("5/2", [r"\boxed{2\tfrac12}"]),
        ("1/2", ["Answer: .5"]),
        ("25", ["Answer: 25%"]),
        ("1/4", ["Answer: 25 per cent"]),
        ("0.25", [r"\boxed{25\%}"]),
        ("6", ["Answer: six", "There are six of them."]),
        ("6", ["The letter s occurs 6 times between the two others."]),
        ("6", ["The answer is 6 times."]),
        ("8", ["On the 8th day.", "Answer: day eight"]),
        ("36", ["x = 36"]),
        ("15", ["The answer is 15, because each of 6 people meets 5 others, not 6."]),
        ("15", ["Answer: 15, not 30."]),
        ("26", ["Answer: 26 (a Tuesday)"]),
        ("22:02", ["Answer: 10:02 pm", "Answer: 10:02 P.M."]),
        ("09:00", ["At 9:00."]),
        ("00:05", ["Answer: 12:05 am"]),
        ("yes", ["Answer: Yes."]),
        ("no", ["No, it need not be.", "So the result is no", "**NO**"]),
        ("Cal", ["It was Cal.", "The answer is that Cal did it."]),
        ("liar", ["The answer is a liar.", "The answer is that B is a liar."]),
        ("N", ["The answer is the letter N."]),
        ("frog", ['The answer is "frog".']),
        ("Saturday", [r"\boxed{\text{Saturday}}"]),
        ("saturday", ["It will be on a SATURDAY!"]),
        ("a", ["Answer: A"]),
    ],
)
def test_accepts_the_same_answer_in_another_form(answer, texts):
    for text in texts:
        assert correct(text, answer), text


@pytest.mark.parametrize(
    ("answer", "texts"),
    [
        ("5", ["The answer is not 5.", "I do not think that the answer is 5."]),
        ("5", ["If the answer is 5, then pigs can fly over the whole town of mine."]),
        ("5", ["The answer is 5 or 6.", "The answer is 5 and 6."]),
        ("5", ["The answer is more than 5.", "The answer is about 5."]),
        ("5", ["The answer is at least 5.", "The answer is just over 5."]),
        ("5", ["Answer: twenty-five", "Answer: ~5", r"\boxed{\approx 5}", r"\boxed{x \leq 5}"]),
        ("5", [r"\boxed{\sqrt{5}}", r"\boxed{5\pi}", r"\boxed{5^2}", "Answer: 5^2"]),
        ("5", [r"\boxed{2 \cdot 5}", "Answer: 5 thousand", "Answer: 5 and a half"]),
        ("5", ["Answer: 15", "Answer: 5.1", "Answer: 5,1", "Answer: 5, 6", "Answer: 5/6"]),
        ("5", ["Answer: 5/0", "Answer: 5-7", "Answer: -5", "Answer: A5", "Answer: 5:00"]),
        ("5", ["Answer: 50%", "<think>The answer is 5."]),
        ("5", ["The answer is 5.</think>The answer is 6.", ""]),
        ("2", ["Answer: 2 1/2"]),
        ("7/12", ["Answer: 0.58", "Answer: 0.5833333"]),
        ("1234", ["Answer: 1.234"]),
        ("123", ["Answer: 1,23"]),
        ("1234567", ["Answer: 12,345,67"]),
        ("34", ["Answer: 3*4"]),
        ("22:02", ["Answer: 10:02", "Answer: 10:02 am", "Answer: 22:02 or 22:03"]),
        ("22:02", ["Answer: 2202"]),
        ("yes", ["Yes and no.", "Yes, or rather no.", "Not yes."]),
        ("no", ["Nobody knows."]),
        ("Cal", ["Answer: not Cal", "Answer: Cal or Ben", "Answer: Cal and Ben"]),
        ("Cal", ["Answer: Cal (or Ben)", "Answer: Cal's brother", "Answer: everyone but Cal"]),
        ("Cal", ["Answer: Ben blames Cal", "Answer: Calvin"]),
        ("liar", ["Answer: truth-teller"]),
        ("green", ["Answer: greenish", "Answer: green, white"]),
        ("n", ["Answer: the"]),
    ],
)
def test_rejects_what_is_not_the_answer(answer, texts):
    for text in texts:
        assert not correct(text, answer), text


def test_no_two_different_answers_are_taken_for_one():
    given = {task.answer.casefold() for task in tasks.load("checkable")}
    for one in given:
        assert [other for other in given if tasks.same(one, other)] == [one]


# -- reasoning-gym -------------------------------------------------------------------------


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
    factory = SimpleNamespace(DATASETS=("chain_sum", "coins", "composite", "ransom_note"))
    stand_in = SimpleNamespace(factory=factory, create_dataset=create_dataset)
    tasks._dataset.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", stand_in)
    yield
    tasks._dataset.cache_clear()


def gym(name: str, part: str = "build", n: int = 1, seed: int = 0) -> list[Task]:
    return tasks.select(part, source=f"gym:{name}", n=n, seed=seed)


def test_tasks_come_from_name_seed_and_index_alone(package):
    few, many = (gym("chain_sum", "build", n, 3) for n in (5, 250))
    assert many[:5] == few
    assert few != gym("chain_sum", "build", 5, 4)
    assert many[-1].index >= tasks.BLOCK, "items go on behind the first block"
    whole = Sums(10 * tasks.BLOCK, 3 * tasks.INDICES)
    for task in many:
        assert task.id == f"gym-chain_sum-{task.index:06d}"
        assert task.category == "chain_sum"
        assert task.content == whole[task.index]["question"]
        assert task.answer == str(sum(int(x) for x in task.content[:-1].split(" + ")))


def test_no_question_is_in_two_parts_even_of_another_seed(package):
    questions = [
        {t.content for seed in (0, 1) for t in gym("chain_sum", part, 60, seed)}
        for part in tasks.PARTS_OF_RUN
    ]
    assert [len(found) for found in questions] == [120] * 3
    assert len(set.union(*questions)) == 360


def test_a_question_is_asked_once_and_too_few_of_them_are_counted(package):
    for part in tasks.PARTS_OF_RUN:
        every = ("0 + 0?", "0 + 1?", "1 + 0?", "1 + 1?")
        mine = {one for one in every if tasks.gym_part(one) == part}
        if mine:
            assert {task.content for task in gym("coins", part, len(mine))} == mine
        with pytest.raises(ValueError, match=f"{len(mine)} different questions to {part}"):
            gym("coins", part, len(mine) + 1)


def test_the_verifier_scores_and_not_the_string(package):
    task = gym("chain_sum", "build", 1)[0]
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
        ("So\n$\\boxed{x + {y}}$.", False, ["plain", "x + {y}", "\\boxed{x + {y}}"]),
        ("**Answer:** 3*x + 1\n\nBye.", False, ["plain", "3*x + 1", "Bye"]),
        ("  ", False, ["plain"]),
    ],
)
def test_the_readings_of_an_answer(text, several_lines, expected):
    assert tasks.readings(text, "plain", several_lines=several_lines) == expected


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("chain_sums", r"no dataset 'chain_sums' \(did you mean chain_sum"),
        ("zzzzzz", "no dataset 'zzzzzz'$"),
        ("ransom_note", "gym:ransom_note are others in every process"),
        ("composite", r"gym:composite cannot be made.*at least one"),
    ],
)
def test_a_dataset_that_cannot_be_had_is_refused_in_one_line(package, name, words):
    with pytest.raises(ValueError, match=words) as error:
        gym(name)
    assert "\n" not in str(error.value)


def test_without_the_package_the_error_is_a_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"reasoning-gym: pip install 'stllms\[gym\]'"):
        gym("chain_sum")


@pytest.mark.parametrize(
    "name", ["chain_sum", "mini_sudoku", "propositional_logic", "fraction_simplification"]
)
def test_the_packages_datasets_are_disjoint_and_score_their_answers(name):
    pytest.importorskip("reasoning_gym", reason="the extra 'gym' is not installed")
    tasks._dataset.cache_clear()
    parts = [gym(name, part, 4) for part in tasks.PARTS_OF_RUN]
    assert len({task.content for part in parts for task in part}) == 12
    first = parts[0][0]
    assert tasks.score(first, "zzz") < 0.5
    if first.answer is not None:
        assert tasks.score(first, f"So the answer is:\n\n{first.answer}") == 1.0
