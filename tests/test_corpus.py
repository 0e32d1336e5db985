"""The corpus of labelled chains (training/corpus/) and what checks it."""

import json
from itertools import pairwise

import pytest

from training import corpus

LINES = (corpus.MESSAGES / "train.jsonl").read_text("utf-8").splitlines()
QUESTIONS = {row["id"]: row["content"] for row in map(json.loads, LINES)}


@pytest.fixture(scope="module")
def chains():
    return corpus.read()


def test_the_corpus_is_as_it_should_be(chains):
    assert corpus.faults(chains, QUESTIONS) == []
    assert {one["task_id"] for one in chains} == set(QUESTIONS), "one chain for every task"


def test_the_shares_that_the_model_learns_from_are_those_asked_for(chains):
    share = corpus.statistics(chains)["share of segments"]
    assert 0.12 <= share["backtracking"] <= 0.15
    assert 0.12 <= share["example-testing"] <= 0.16


def test_the_card_has_the_numbers_of_the_corpus(chains, monkeypatch, tmp_path):
    shipped = (corpus.FOLDER / "README.md").read_text("utf-8")
    numbers = json.loads((corpus.FOLDER / "card.json").read_text("utf-8"))
    monkeypatch.setattr(corpus, "FOLDER", tmp_path)
    assert corpus.card(chains) == shipped
    assert json.loads((tmp_path / "card.json").read_text("utf-8")) == numbers
    assert numbers["agreement"]["chains"] >= 60


def test_second_readings_are_of_the_sentences_of_the_corpus():
    for one in corpus.readings():
        assert {len(row) for row in (one["written"], *one["readings"])} == {
            len(one["sentences"])
        }
        assert {label for row in one["readings"] for label in row} <= set(corpus.LABELS)


def chain(**change):
    """A chain that has nothing wrong with it."""
    labels = [*corpus.LABELS, "deduction"]
    texts = [
        f"{start} {' '.join('abcdefg'[i] + chr(97 + k) for k in range(22))}."
        for i, start in enumerate(("Okay so", "Then", "I know", "Say", "Maybe", "Wait", "Thus"))
    ]
    segments = [{"label": a, "text": b} for a, b in zip(labels, texts, strict=True)]
    row = {"task_id": "t", "question": "Why is it so?", "segments": segments, "answer": "Yes."}
    return row | change


def test_a_chain_without_fault_has_none():
    assert corpus.problems(chain(), {"t": "Why is it so?"}) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question": "Another?"}, "not that of the training task"),
        ({"answer": "It is 3 + 4 = 8."}, "a sum that is wrong: 3 + 4 = 8"),
        ({"answer": "It is $5."}, "markup"),
        ({"check": "6 * 7"}, "its check gives 42"),
        ({"check": "6 * 7", "answer": "It is 142."}, "its check gives 42"),
        ({"segments": chain()["segments"][1:]}, "does not begin with initializing"),
        ({"segments": chain()["segments"][:3]}, "words, not 120 to 300"),
        (
            {"segments": [*chain()["segments"], chain()["segments"][3]]},
            "the same segment twice",
        ),
    ],
)
def test_what_is_wrong_with_a_chain_is_said(change, words):
    found = corpus.problems(chain(**change), {"t": "Why is it so?"})
    assert any(words in one for one in found), found


def test_an_answer_that_has_the_value_of_its_check_is_right():
    assert corpus.wrong_answer(chain(check="6 * 7", answer="It is 42.")) is None
    assert corpus.wrong_answer(chain(check="10 ** 4", answer="It is 10,000 in all.")) is None


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("17 times 24 is 408", 0),
        ("1/2 + 1/3 = 5/6", 0),
        ("10 / 3 = 3.33", 0),
        ("10 / 3 = 3.34", 1),
        ("5 - 9 = -4", 0),
        ("1,000 + 2 = 1,003", 1),
        ("2 + 3 = 5 * 1", 0),  # goes on: not read
        ("x + 3 = 5", 0),
    ],
)
def test_sums_are_done_again(text, wrong):
    assert len(corpus.wrong_sums(text)) == wrong


def test_kappa_of_readings_by_hand():
    """Two readers of seven sentences, one disagreement: (6/7 - chance) / (1 - chance)."""
    first, second = [*corpus.LABELS, "deduction"], [*corpus.LABELS, "backtracking"]
    chance = sum(first.count(x) * second.count(x) for x in corpus.LABELS) / 49
    found = corpus.kappas(first, second)
    assert found["all"] == pytest.approx((6 / 7 - chance) / (1 - chance), abs=1e-3)
    assert found["initializing"] == 1.0 > found["deduction"]
    one = {"task_id": "t", "sentences": list("abcdefg"), "written": first}
    agreed = corpus.agreement([one | {"readings": [first, second]}])
    assert (agreed["sentences"], agreed["against both readers"]) == (7, 0)
    assert agreed["kappa"]["reader 2 with the writing"] == found
    turned = first[::-1]
    assert corpus.agreement([one | {"readings": [turned, turned]}])[
        "against both readers"
    ] == sum(x != y for x, y in zip(first, turned, strict=True))


def test_no_chain_is_a_near_copy_of_another(chains):
    """Triples of words shared by two chains of one category, of the smaller one's."""
    own = [
        (one["category"], set(corpus.triples(corpus.words(corpus.thinking(one)))))
        for one in chains
    ]
    for (kind, first), (other, second) in pairwise(sorted(own, key=lambda pair: pair[0])):
        if kind == other:
            assert len(first & second) < 0.25 * min(len(first), len(second))
