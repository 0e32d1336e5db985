"""The tasks are what their README says; files and answers are read with care."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rapidfuzz import fuzz, process

from stllms import records, tasks
from stllms.config import RunConfig

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
def parts() -> dict[str, list[records.Task]]:
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


def contents(*groups: list[records.Task]) -> list[str]:
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
            assert counts == dict.fromkeys(records.CATEGORIES, each)
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

    def test_lengths_vary(self, parts):
        for category in records.CATEGORIES:
            lengths = [
                len(task.content) for task in parts["train"] if task.category == category
            ]
            low, high = np.percentile(lengths, [10, 90])
            assert high >= 1.8 * low

    def test_evaluation_is_disjoint_from_training(self, parts):
        scores = similarity(contents(parts["evaluate"]), contents(parts["train"]))
        i, j = divmod(int(scores.argmax()), scores.shape[1])
        pair = parts["evaluate"][i].id, parts["train"][j].id
        assert scores.max() < NEAR, f"{pair}: {scores.max():.0f}"

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

    def test_openings_vary_within_a_category(self, parts):
        openings = Counter(
            (task.category, " ".join(task.content.lower().split()[:3]))
            for part in parts.values()
            for task in part
        )
        assert max(openings.values()) <= 3

    def test_every_exact_answer_is_read_back(self, parts):
        for task in parts["checkable"]:
            assert tasks.is_correct(f"Some steps.\n\n**Answer:** {task.answer}", task.answer)
            assert tasks.is_correct(rf"Hence \(\boxed{{{task.answer}}}\).", task.answer)
            assert not tasks.is_correct("The answer is unknown.", task.answer)

    def test_the_readme_states_the_counts(self):
        readme = Path(__file__).parent.parent / "messages" / "README.md"
        text = readme.read_text(encoding="utf-8")
        for name, count in (("train", 500), ("evaluate", 50), ("checkable", 100)):
            assert re.search(rf"`{name}\.jsonl`[^\n]*\b{count}\b", text)


class TestOneRuleOnly:
    """Patterns that once fitted two rules."""

    def test_the_rows_of_the_table_fix_the_product_and_the_sum(self, parts):
        (task,) = (t for t in parts["train"] if t.id == "train-pattern-recognition-003")
        rows = [tuple(map(int, row)) for row in re.findall(r"(\d+) (\d+) (\d+)", task.content)]
        terms = np.array([[a * b, a + b, 1] for a, b, _ in rows])
        assert np.linalg.matrix_rank(terms) == 3
        rule = np.linalg.solve(terms, [c for _, _, c in rows])
        assert rule == pytest.approx([1, 1, 0])

    def test_the_syllables_of_the_words_are_not_their_vowels(self, parts):
        (task,) = (t for t in parts["evaluate"] if t.id == "evaluate-pattern-recognition-03")
        shown = dict(re.findall(r'"(\w+)"[^"\d.]* (\d)', task.content))
        assert len(shown) == 4
        for vowel in ("[aeiou]", "[aeiouy]", "[aeiou]+", "[aeiouy]+"):
            counts = {word: str(len(re.findall(vowel, word))) for word in shown}
            assert counts != shown


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
    def test_equally_many_of_each_category_without_repeats(self, parts):
        drawn = tasks.balanced_sample(parts["train"], 100, seed=3)
        assert Counter(task.category for task in drawn) == dict.fromkeys(records.CATEGORIES, 10)
        assert len({task.id for task in drawn}) == 100
        assert len({task.category for task in drawn[:10]}) == 10

    def test_the_seed_alone_decides(self, parts):
        first, again, other = (
            tasks.balanced_sample(parts["train"], 30, seed=seed) for seed in (5, 5, 6)
        )
        assert first == again
        assert first != other

    def test_a_remainder_goes_to_different_categories(self, parts):
        counts = Counter(t.category for t in tasks.balanced_sample(parts["train"], 16, seed=0))
        assert sorted(counts.values()) == [1] * 4 + [2] * 6

    def test_fewer_tasks_than_categories(self, parts):
        drawn = tasks.balanced_sample(parts["train"], 3, seed=0)
        assert len({task.category for task in drawn}) == 3

    def test_all_tasks_can_be_drawn(self, parts):
        drawn = tasks.balanced_sample(parts["evaluate"], 50, seed=1)
        assert sorted(task.id for task in drawn) == sorted(
            task.id for task in parts["evaluate"]
        )

    def test_a_category_that_is_too_small_is_named(self):
        few = [records.Task(f"a{i}", "wide", "?") for i in range(5)]
        few.append(records.Task("b", "narrow", "?"))
        with pytest.raises(ValueError, match="'narrow' has 1 tasks, 2 are needed"):
            tasks.balanced_sample(few, 4, seed=0)

    @pytest.mark.parametrize("n", [0, 51])
    def test_n_out_of_range(self, parts, n):
        with pytest.raises(ValueError, match="between 1 and 50"):
            tasks.balanced_sample(parts["evaluate"], n, seed=0)


class TestFromFile:
    def test_reads_tasks_with_and_without_the_optional_fields(self, tmp_path):
        path = tmp_path / "mine.jsonl"
        path.write_text(
            '\ufeff{"id": "a", "content": "Why \u2028 so?", "source": "me"}\n\n'
            '{"id": "b", "content": "2+2?", "category": "sums", "answer": "4"}\r\n',
            encoding="utf-8",
        )
        assert tasks.from_file(path) == [
            records.Task("a", "own", "Why \u2028 so?"),
            records.Task("b", "sums", "2+2?", "4"),
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


def test_a_run_can_be_evaluated_on_the_tasks_with_exact_answers():
    setup = RunConfig(model="smollm2", tasks="checkable", n_samples=10, n_evaluate=30)
    asked = tasks.for_run(setup, "evaluate")
    assert len(asked) == 30
    assert all(task.answer for task in asked)
    built = tasks.for_run(setup, "build")
    assert built == tasks.for_run(replace(setup, tasks="messages"), "build")
    with pytest.raises(ValueError, match="expected grammar, messages, checkable, gym:NAME"):
        RunConfig(tasks="chekable")


# -- tasks for control directions ----------------------------------------------------------


def test_a_judge_gets_controls_on_a_stated_number_of_tasks_from_every_category():
    setup = RunConfig(model="owner/name", profile="paper", judge="openai:gpt-4.1")
    asked = tasks.for_run(setup, "evaluate")
    some = tasks.for_controls(setup, asked)
    assert len(some) == setup.settings.n_control == 10
    assert {task.category for task in some} == set(records.CATEGORIES)
    assert [task.id for task in asked if task in some] == [task.id for task in some]
    assert some == tasks.for_controls(setup, asked)
    assert some != tasks.for_controls(replace(setup, seed=1), asked)
    replayed = replace(setup, judge="replay:some/folder")
    assert tasks.for_controls(replayed, asked) == some, "a judge's replies are of these alone"


@pytest.mark.parametrize(
    "options", [{"judge": "offline"}, {"n_control": 50}, {"profile": "full"}]
)
def test_controls_get_all_tasks_where_labels_are_free_or_as_many_are_asked_for(options):
    given = {"model": "owner/name", "profile": "paper", "judge": "openai:gpt-4.1", **options}
    setup = RunConfig(**given)
    asked = tasks.for_run(setup, "evaluate")
    assert tasks.for_controls(setup, asked) == asked


def test_categories_of_any_size_share_the_tasks_of_controls():
    asked = [records.Task(f"a{i}", "a", "?") for i in range(9)] + [records.Task("b", "b", "?")]
    setup = RunConfig(model="owner/name", judge="openai:x", n_control=4)
    found = Counter(task.category for task in tasks.for_controls(setup, asked))
    assert found == {"a": 3, "b": 1}
