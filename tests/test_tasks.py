"""The tasks are what their README says; files and answers are read with care, and rejected
rather than guessed; tasks of reasoning-gym on a stand-in, and on the package where it is."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from collections import Counter
from pathlib import Path
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

#: Two tasks are near-duplicates from this token-set ratio on. The tests below hold both sides
#: of it: no two of our tasks reach it, and every lightly reworded copy of a task does.
NEAR = 80.0

#: Two masked tasks (no numbers, no names) are one template from this ratio on.
TEMPLATE = 80.0


@pytest.fixture(scope="module")
def parts() -> dict[str, list[Task]]:
    return {part: tasks.load(part) for part in tasks.PARTS}


def similarity(left: list[str], right: list[str]) -> np.ndarray:
    """Token-set ratios in lower case, 0 below ``NEAR``, shape ``[len(left), len(right)]``."""
    queries = [text.lower() for text in left]
    choices = queries if right is left else [text.lower() for text in right]
    return process.cdist(queries, choices, scorer=fuzz.token_set_ratio, score_cutoff=NEAR)


def closest_pair(texts: list[str]) -> tuple[float, str, str]:
    scores = similarity(texts, texts)
    scores[np.tril_indices(len(texts))] = 0
    i, j = divmod(int(scores.argmax()), len(texts))
    return float(scores[i, j]), texts[i], texts[j]


def contents(*groups: list[Task]) -> list[str]:
    return [task.content for group in groups for task in group]


def masked(text: str) -> str:
    """``text`` without numbers, in digits or words, and without names in mid-sentence."""
    text = re.sub(r"(?<=[a-z,;:] )[A-Z][a-z]+", "@", text)
    text = re.sub(r"\d[\d.,:/]*", "#", text.lower())
    words = "one two three four five six seven eight nine ten eleven twelve twenty thirty"
    words += " forty fifty sixty eighty hundred thousand"
    return re.sub(rf"\b(?:{'|'.join(words.split())})\b", "#", text)


def repeated_templates(texts: list[str]) -> list[list[str]]:
    """Groups of more than two texts that are one template, by a chain of likenesses."""
    masks = [masked(text) for text in texts]
    alike = process.cdist(masks, masks, scorer=fuzz.ratio) >= TEMPLATE
    seen: set[int] = set()
    groups = []
    for first in range(len(texts)):
        group, frontier = set(), {first} - seen
        while frontier:
            group |= frontier
            frontier = {int(j) for i in frontier for j in np.flatnonzero(alike[i])} - group
        seen |= group
        if len(group) > 2:
            groups.append([texts[i] for i in sorted(group)])
    return groups


class TestMessages:
    def test_each_part_has_its_number_of_tasks_and_categories(self, parts):
        for part, each in (("train", 50), ("evaluate", 5)):
            counts = Counter(task.category for task in parts[part])
            assert counts == dict.fromkeys(CATEGORIES, each)
        counts = Counter(task.category for task in parts["checkable"])
        assert counts == dict.fromkeys(CHECKABLE_KINDS, 10)

    def test_ids_are_unique_and_name_part_category_and_number(self, parts):
        everything = [task for part in parts.values() for task in part]
        assert len({task.id for task in everything}) == 650
        for part, prefix in (
            ("train", "train"),
            ("evaluate", "evaluate"),
            ("checkable", "check"),
        ):
            for task in parts[part]:
                slug = task.category.replace(" ", "-")
                assert re.fullmatch(rf"{prefix}-{slug}-\d{{2,3}}", task.id)

    def test_the_first_tasks_are_balanced(self, parts):
        for part in tasks.PARTS:
            kinds = [task.category for task in parts[part]]
            for start in range(0, len(kinds), 10):
                assert kinds[start : start + 10] == kinds[:10]
            assert len(set(kinds[:10])) == 10

    def test_only_the_checkable_tasks_have_an_answer(self, parts):
        assert all(task.answer is None for task in parts["train"] + parts["evaluate"])
        assert all(task.answer for task in parts["checkable"])

    def test_lengths_and_characters_are_within_bounds(self, parts):
        for text in contents(*parts.values()):
            assert 30 <= len(text) <= 450
            assert text == " ".join(text.split())
            assert text.isascii()
            assert text[-1] in '.?")'
            assert text.count('"') % 2 == 0
            assert text.count("(") == text.count(")")

    def test_no_two_tasks_are_near_duplicates(self, parts):
        score, *pair = closest_pair(contents(*parts.values()))
        assert score < NEAR, pair

    def test_the_threshold_catches_every_lightly_reworded_copy(self, parts):
        def reworded(text: str) -> list[str]:
            words = text.split()
            shorter = [word for i, word in enumerate(words) if i % 6 != 5]
            halves = words[len(words) // 2 :] + words[: len(words) // 2]
            return [" ".join(shorter), " ".join(halves), re.sub(r"\d+", "77", text)]

        for text in contents(*parts.values()):
            for copy in reworded(text):
                assert similarity([text], [copy])[0, 0] >= NEAR, copy

    def test_no_template_is_used_more_than_twice_in_a_category(self, parts):
        everything = [task for part in parts.values() for task in part]
        for category in {task.category for task in everything}:
            texts = [task.content for task in everything if task.category == category]
            assert repeated_templates(texts) == []

    def test_the_template_check_finds_swapped_numbers_and_names(self):
        swapped = [
            "If Ada has 3 apples and Bo has 5, how many apples have they got together?",
            "If Max has seven apples and Tom has 12, how many apples have they got together?",
            "If Ida has 40 apples and Liz has 2.5, how many apples have they got together?",
            "Why does a metal spoon feel colder than a wooden one from the same drawer?",
        ]
        assert repeated_templates(swapped) == [swapped[:3]]
        assert repeated_templates(swapped[1:]) == []

    def test_the_readme_states_the_counts(self):
        readme = Path(__file__).parent.parent / "messages" / "README.md"
        text = readme.read_text(encoding="utf-8")
        for name, count in (("train", 500), ("evaluate", 50), ("checkable", 100)):
            assert re.search(rf"`{name}\.jsonl`[^\n]*\b{count}\b", text)


class TestLoad:
    def test_n_takes_the_first_tasks(self, parts):
        assert tasks.load("train", n=20) == parts["train"][:20]

    @pytest.mark.parametrize("n", [0, -1, 51])
    def test_n_out_of_range_names_what_can_be_had(self, n):
        with pytest.raises(ValueError, match=rf"evaluate.*{n} tasks asked for.*1 and 50"):
            tasks.load("evaluate", n=n)

    def test_an_unknown_part_names_the_parts(self):
        with pytest.raises(ValueError, match=r"'test'.*train, evaluate, checkable"):
            tasks.load("test")


class TestBalancedSample:
    @pytest.mark.parametrize("n", [3, 16, 100, 500])
    def test_categories_differ_by_one_task_at_most_without_repeats(self, parts, n):
        drawn = tasks.balanced_sample(parts["train"], n, seed=3)
        counts = Counter(task.category for task in drawn)
        assert len({task.id for task in drawn}) == len(drawn) == n
        assert len(counts) == min(n, 10)
        assert max(counts.values()) - min(counts.values()) <= 1
        assert len({task.category for task in drawn[:10]}) == min(n, 10)

    def test_the_seed_alone_decides(self, parts):
        first, again, other = (
            tasks.balanced_sample(parts["train"], 30, seed=seed) for seed in (5, 5, 6)
        )
        assert first == again != other

    @pytest.mark.parametrize(
        ("n", "words"),
        [(0, "between 1 and 6"), (7, "between 1 and 6"), (4, "'narrow' has 1 tasks, 2 are")],
    )
    def test_a_number_that_cannot_be_had_is_refused(self, n, words):
        few = [*(Task(f"a{i}", "wide", "?") for i in range(5)), Task("b", "narrow", "?")]
        with pytest.raises(ValueError, match=words):
            tasks.balanced_sample(few, n, seed=0)


class TestFromFile:
    def test_reads_tasks_with_and_without_the_optional_fields(self, tmp_path):
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

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{'id': 1}", "line 2: not JSON"),
            ('{"id": "x", "content": "y"', "line 2: not JSON"),
            ("[" * 100_000, "line 2: not JSON"),
            ('["x", "y"]', "line 2: expected an object, got list"),
            ('{"content": "y"}', "line 2, field 'id': missing"),
            ('{"id": "x"}', "line 2, field 'content': missing"),
            ('{"id": 7, "content": "y"}', "line 2, field 'id': expected a string, got 7"),
            ('{"id": "x", "content": ["y"]}', "'content': expected a string, got ['y']"),
            (
                '{"id": "x", "content": "y", "answer": 4}',
                "'answer': expected a string, got 4",
            ),
            ('{"id": "x", "content": "y", "category": null}', "'category': expected a string"),
            ('{"id": "x", "content": " "}', "line 2, field 'content': empty"),
            ('{"id": "", "content": "y"}', "line 2, field 'id': empty"),
            ('{"id": "first", "content": "y"}', "line 2, field 'id': 'first' is on line 1 too"),
        ],
    )
    def test_a_bad_line_is_named_with_file_line_and_field(self, tmp_path, line, message):
        path = tmp_path / "mine.jsonl"
        path.write_text('{"id": "first", "content": "z"}\n' + line + "\n", encoding="utf-8")
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            tasks.from_file(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("text", ["", "\n \n"])
    def test_an_empty_file(self, tmp_path, text):
        path = tmp_path / "mine.jsonl"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"mine\.jsonl: empty"):
            tasks.from_file(path)

    def test_a_file_that_is_not_there_a_folder_and_bytes(self, tmp_path):
        with pytest.raises(ValueError, match=r"none\.jsonl: cannot be read"):
            tasks.from_file(tmp_path / "none.jsonl")
        with pytest.raises(ValueError, match="cannot be read"):
            tasks.from_file(tmp_path)
        (tmp_path / "mine.jsonl").write_bytes(b'{"id": "\xff"}')
        with pytest.raises(ValueError, match=r"mine\.jsonl: not UTF-8 text \(byte 8\)"):
            tasks.from_file(tmp_path / "mine.jsonl")

    def test_our_own_files_pass(self, parts):
        for part in tasks.PARTS:
            path = Path(__file__).parent.parent / "messages" / f"{part}.jsonl"
            assert tasks.from_file(path) == parts[part]
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            extra = {"answer"} if part == "checkable" else set()
            assert all(set(row) == {"id", "category", "content"} | extra for row in rows)


def ids(found: list[Task]) -> list[str]:
    return [task.id for task in found]


class TestSelect:
    def test_a_run_can_be_evaluated_on_the_tasks_with_exact_answers(self, parts):
        asked = tasks.select("evaluate", source="checkable", n=30)
        assert asked == parts["checkable"][:30]
        assert tasks.select("evaluate", source="messages", n=7) == parts["evaluate"][:7]
        for source in ("checkable", "messages"):
            assert tasks.select("build", source=source, n=10) == parts["train"][:10]
            compared = tasks.select("compare", source=source, n=20, seed=3)
            assert compared == tasks.balanced_sample(parts["train"], 20, seed=3)

    def test_the_grammars_parts_share_no_question(self):
        found = {
            part: tasks.select(part, source="grammar", n=40, seed=2)
            for part in tasks.PARTS_OF_RUN
        }
        assert found["evaluate"] == found["compare"]
        built, held_out = ({t.content for t in found[p]} for p in ("build", "evaluate"))
        assert not built & held_out

    def test_a_persons_file_builds_with_its_first_tasks_and_skips_them_after(self, tmp_path):
        path = tmp_path / "mine.jsonl"
        path.write_text("".join(f'{{"id": "{i}", "content": "q{i}"}}\n' for i in range(9)))
        options = {"source": str(path), "seed": 0}
        assert ids(tasks.select("build", n=4, **options)) == list("0123")
        assert ids(tasks.select("evaluate", n=5, skip=4, **options)) == list("45678")
        with pytest.raises(ValueError, match=r"evaluate: 10 tasks .* 1 and 9 can be had"):
            tasks.select("evaluate", n=6, skip=4, **options)

    def test_an_unknown_part_is_refused(self):
        with pytest.raises(ValueError, match="'train' of a run: choose one of build, evaluate"):
            tasks.select("train", source="messages", n=1)


class TestSubset:
    def test_every_category_in_turn_in_the_order_of_the_tasks(self, parts):
        some = tasks.subset(parts["evaluate"], 10, seed=0)
        assert {task.category for task in some} == set(CATEGORIES)
        assert [task for task in parts["evaluate"] if task in some] == some
        assert some == tasks.subset(parts["evaluate"], 10, seed=0)
        assert some != tasks.subset(parts["evaluate"], 10, seed=1)

    def test_all_where_none_or_as_many_are_asked_for(self, parts):
        for n in (None, 50, 99):
            assert tasks.subset(parts["evaluate"], n, seed=0) == parts["evaluate"]

    def test_categories_of_any_size_share(self):
        asked = [Task(f"a{i}", "a", "?") for i in range(9)] + [Task("b", "b", "?")]
        found = Counter(task.category for task in tasks.subset(asked, 4, seed=0))
        assert found == {"a": 3, "b": 1}


# -- answers -------------------------------------------------------------------------------


class TestReadAnswer:
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
            (
                "We add.\n\nTherefore it costs **6.35 euros** in the end, as promised.",
                "6.35 euros",
            ),
            ("17 * 24 - 19 * 12 = 408 - 228 = 180", "180"),
            ("Adding it all up, the youngest of the four is Oli.", "Oli"),
            (
                "After all of that counting there were exactly 15 handshakes",
                "15",
            ),
            ("By this method one obtains 600 pages without any doubt", "600"),
            (
                "No, because each move keeps the parity.",
                "No, because each move keeps the parity",
            ),
            ("I don't think the answer is 5. I count six.\n\nAnswer: 6", "6"),
            ("If the answer is 5, we fail. The sum is 6", "The sum is 6"),
            ("<think>The answer is 5.</think>\nThe answer is 6.", "6"),
            ("The opening tag was in the prompt: 5</think>6", "6"),
            ("42", "42"),
        ],
    )
    def test_finds_the_final_answer(self, text, answer):
        assert tasks.read_answer(text) == answer

    @pytest.mark.parametrize(
        "text",
        [
            "",
            " \n ",
            "<think>The answer is 5.",
            "</think>",
            r"\boxed{}",
            "Five printers of that kind then print 600 pages every 4 minutes",
            "It follows that one should think about this a good deal longer",
        ],
    )
    def test_says_none_rather_than_guess(self, text):
        assert tasks.read_answer(text) is None

    def test_is_quick_on_long_and_broken_text(self):
        for text in ("\\boxed{" * 3000, "answer to " * 20_000, "9" * 20_000):
            assert not tasks.is_correct(text, "5")


class TestIsCorrect:
    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            ("180", "180"),
            ("The answer is 180.0.", "180"),
            ("The answer is $1.50.", "1.50"),
            ("The answer is 1.5 euros per pen.", "1.50"),
            (r"\boxed{\$540.80}", "540.80"),
            (r"\boxed{1{,}080 \text{ ml}}", "1080"),
            (r"\boxed{4\,000\,\text{g}}", "4000"),
            ("Answer: 4,000 grams", "4000"),
            ("Answer: 4 000 g", "4000"),
            (r"\boxed{102 \text{ m}^2}", "102"),
            ("Answer: 102 m²", "102"),
            (r"\boxed{120^\circ}", "120"),
            ("Answer: 120°", "120"),
            ("Answer: −5 degrees", "-5"),
            ("Answer: minus five", "-5"),
            (r"\boxed{-\frac{1}{2}}", "-0.5"),
            (r"\boxed{\dfrac{14}{24}}", "7/12"),
            (r"\boxed{\frac7{12}}", "7/12"),
            ("Answer: 2 1/2", "2.5"),
            (r"\boxed{2\tfrac12}", "5/2"),
            ("Answer: .5", "1/2"),
            ("Answer: 25%", "25"),
            ("Answer: 25 per cent", "1/4"),
            (r"\boxed{25\%}", "0.25"),
            ("Answer: six", "6"),
            ("There are six of them.", "6"),
            ("On the 8th day.", "8"),
            ("Answer: day eight", "8"),
            ("x = 36", "36"),
            ("The answer is 15, because each of 6 people meets 5 others, not 6.", "15"),
            ("Answer: 26 (a Tuesday)", "26"),
            ("The letter s occurs 6 times between the two others.", "6"),
            ("The answer is 6 times.", "6"),
            ("Answer: 15, not 30.", "15"),
            ("Answer: 10:02 pm", "22:02"),
            ("Answer: 10:02 P.M.", "22:02"),
            ("At 9:00.", "09:00"),
            ("Answer: 12:05 am", "00:05"),
            ("Answer: Yes.", "yes"),
            ("No, it need not be.", "no"),
            ("So the result is no", "no"),
            ("**NO**", "no"),
            ("It was Cal.", "Cal"),
            ("The answer is that Cal did it.", "Cal"),
            ("The answer is a liar.", "liar"),
            ("The answer is that B is a liar.", "liar"),
            ("The answer is the letter N.", "N"),
            ('The answer is "frog".', "frog"),
            (r"\boxed{\text{Saturday}}", "Saturday"),
            ("It will be on a SATURDAY!", "saturday"),
            ("Answer: A", "a"),
        ],
    )
    def test_accepts_the_same_answer_in_another_form(self, text, answer):
        assert tasks.is_correct(text, answer)

    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            ("The answer is not 5.", "5"),
            ("I do not think that the answer is 5.", "5"),
            ("If the answer is 5, then pigs can fly over the whole town of mine.", "5"),
            ("The answer is 5 or 6.", "5"),
            ("The answer is 5 and 6.", "5"),
            ("The answer is more than 5.", "5"),
            ("The answer is about 5.", "5"),
            ("The answer is at least 5.", "5"),
            ("The answer is just over 5.", "5"),
            ("Answer: twenty-five", "5"),
            ("Answer: ~5", "5"),
            (r"\boxed{\approx 5}", "5"),
            (r"\boxed{x \leq 5}", "5"),
            (r"\boxed{\sqrt{5}}", "5"),
            (r"\boxed{5\pi}", "5"),
            (r"\boxed{5^2}", "5"),
            ("Answer: 5^2", "5"),
            (r"\boxed{2 \cdot 5}", "5"),
            ("Answer: 5 thousand", "5"),
            ("Answer: 5 and a half", "5"),
            ("Answer: 2 1/2", "2"),
            ("Answer: 15", "5"),
            ("Answer: 5.1", "5"),
            ("Answer: 5,1", "5"),
            ("Answer: 5, 6", "5"),
            ("Answer: 5/6", "5"),
            ("Answer: 5/0", "5"),
            ("Answer: 5-7", "5"),
            ("Answer: -5", "5"),
            ("Answer: 0.58", "7/12"),
            ("Answer: 0.5833333", "7/12"),
            ("Answer: 1.234", "1234"),
            ("Answer: 1,23", "123"),
            ("Answer: 12,345,67", "1234567"),
            ("Answer: A5", "5"),
            ("Answer: 5:00", "5"),
            ("Answer: 50%", "5"),
            ("Answer: 3*4", "34"),
            ("Answer: 10:02", "22:02"),
            ("Answer: 10:02 am", "22:02"),
            ("Answer: 22:02 or 22:03", "22:02"),
            ("Answer: 2202", "22:02"),
            ("Yes and no.", "yes"),
            ("Yes, or rather no.", "yes"),
            ("Not yes.", "yes"),
            ("Nobody knows.", "no"),
            ("Answer: not Cal", "Cal"),
            ("Answer: Cal or Ben", "Cal"),
            ("Answer: Cal and Ben", "Cal"),
            ("Answer: Cal (or Ben)", "Cal"),
            ("Answer: Cal's brother", "Cal"),
            ("Answer: everyone but Cal", "Cal"),
            ("Answer: Ben blames Cal", "Cal"),
            ("Answer: Calvin", "Cal"),
            ("Answer: truth-teller", "liar"),
            ("Answer: greenish", "green"),
            ("Answer: green, white", "green"),
            ("Answer: the", "n"),
            ("<think>The answer is 5.", "5"),
            ("The answer is 5.</think>The answer is 6.", "5"),
            ("", "5"),
        ],
    )
    def test_rejects_what_is_not_the_answer(self, text, answer):
        assert not tasks.is_correct(text, answer)

    def test_no_two_different_answers_are_taken_for_one(self):
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
    names = dict.fromkeys(("chain_sum", "coins", "composite", "ransom_note", "sudoku"))
    stand_in = SimpleNamespace(
        factory=SimpleNamespace(DATASETS=names), create_dataset=create_dataset
    )
    tasks._dataset.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", stand_in)
    yield stand_in
    tasks._dataset.cache_clear()


def gym(name: str, part: str = "build", n: int = 1, seed: int = 0) -> list[Task]:
    return tasks.select(part, source=f"gym:{name}", n=n, seed=seed)


def question(seed: int, index: int) -> str:
    return Sums(tasks.BLOCK, seed * tasks.INDICES)[index]["question"]


def test_tasks_come_from_name_seed_and_index_alone(package):
    few, many = (gym("chain_sum", "build", n, 3) for n in (5, 250))
    assert many[:5] == few
    assert few != gym("chain_sum", "build", 5, 4)
    for task in few:
        assert task.id == f"gym-chain_sum-{task.index:06d}"
        assert task.category == "chain_sum"
        assert task.content == question(3, task.index)
        assert task.answer == str(sum(int(x) for x in task.content[:-1].split(" + ")))


def test_items_go_on_behind_the_first_block(package):
    late = next(t for t in gym("chain_sum", "build", 250) if t.index >= tasks.BLOCK)
    whole = Sums(10 * tasks.BLOCK, 0)
    assert late.content == whole[late.index]["question"]


def test_no_question_is_in_two_parts_even_of_another_seed(package):
    questions = {
        part: {t.content for seed in (0, 1) for t in gym("chain_sum", part, 60, seed)}
        for part in tasks.PARTS_OF_RUN
    }
    assert {len(found) for found in questions.values()} == {120}
    assert len(set.union(*questions.values())) == 360


def test_a_question_is_asked_once_and_too_few_of_them_are_counted(package):
    found = {"0 + 0?", "0 + 1?", "1 + 0?", "1 + 1?"}
    for part in tasks.PARTS_OF_RUN:
        mine = {one for one in found if tasks.gym_part(one) == part}
        if mine:
            made = gym("coins", part, len(mine))
            assert {task.content for task in made} == mine
        words = f"{len(mine)} different questions to {part}"
        with pytest.raises(ValueError, match=words):
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
    assert tasks.readings(text, "plain", several_lines=several_lines) == expected


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("chain_sums", "no dataset 'chain_sums'; did you mean chain_sum"),
        ("zzzzzz", "it has 5, from chain_sum to sudoku"),
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
