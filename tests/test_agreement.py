"""Agreement of two annotators, against hand-made tables and a naive kappa."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stllms import agreement, spans
from stllms.config import RunConfig
from stllms.records import BEHAVIOURS, Annotation, PlacedSegment, Response


def response(text, task_id="t"):
    return Response(task_id, "verbal logic", "", (), (), text, text, 0, "", True, True)


def labelled(text, parts, who="a", task_id="t"):
    """An annotation from ``(label, text of the part)`` in order."""
    placed, at = [], 0
    for label, part in parts:
        start = text.index(part, at)
        at = start + len(part)
        placed.append(PlacedSegment(label, part, start, at))
    return spans.annotation(spans.place(placed, text), task_id, who)


def compare(first, second, responses, **options):
    return agreement.compare(first, second, responses, rng=np.random.default_rng(0), **options)


TEXT = "One two. Wait, three. Four."


def test_characters_are_the_unit_unless_sentences_are_asked_for():
    one = labelled(TEXT, [("deduction", "One two."), ("backtracking", "Wait, three. Four.")])
    two = labelled(
        TEXT, [("deduction", "One two. Wait, three."), ("backtracking", "Four.")], "b"
    )
    by_character = compare([one], [two], [response(TEXT)])
    assert by_character.units == len("Onetwo.Wait,three.Four.")
    assert by_character.accuracy == pytest.approx((7 + 5) / 23)
    by_sentence = compare([one], [two], [response(TEXT)], unit="sentence")
    assert by_sentence.units == 3
    assert by_sentence.accuracy == pytest.approx(2 / 3)
    # p_e = (1/3)(2/3) + (2/3)(1/3) = 4/9
    assert by_sentence.kappa == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))
    assert by_sentence.prevalence["deduction"] == pytest.approx((1 / 3, 2 / 3))
    assert by_sentence.difference["deduction"][0] == pytest.approx(1 / 3)


def test_an_annotator_agrees_with_itself_and_the_interval_is_one():
    texts = [f"One {i}. Wait, three." for i in range(5)]
    parts = [("deduction", "One"), ("backtracking", "Wait, three.")]
    same = [labelled(text, parts, task_id=str(i)) for i, text in enumerate(texts)]
    found = compare(same, same, [response(text, str(i)) for i, text in enumerate(texts)])
    assert (found.kappa, found.kappa_low, found.kappa_high) == pytest.approx((1, 1, 1))
    assert 0 < found.compared < 1  # the numbers have no label
    assert len(found.table()) == len(BEHAVIOURS)
    assert found.table()[1]["f1"] == pytest.approx(1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=50))
def test_kappa_equals_the_naive_restatement(pairs):
    table = np.zeros((3, 3))
    for a, b in pairs:
        table[a, b] += 1
    observed = sum(a == b for a, b in pairs) / len(pairs)
    first, second = ([pair[k] for pair in pairs] for k in (0, 1))
    expected = sum(first.count(x) * second.count(x) for x in range(3)) / len(pairs) ** 2
    found = agreement.kappa(table)
    if expected == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx((observed - expected) / (1 - expected))


def test_unrelated_annotators_have_a_kappa_around_zero_inside_its_interval():
    rng = np.random.default_rng(1)
    text = " ".join(f"S{i}." for i in range(100, 120))
    parts = text.split()
    chains = [response(text, str(i)) for i in range(30)]
    drawn = [
        [
            labelled(text, [(BEHAVIOURS[rng.integers(3)], part) for part in parts], who, str(i))
            for i in range(30)
        ]
        for who in "ab"
    ]
    found = compare(*drawn, chains, unit="sentence")
    assert abs(found.kappa) < 0.1
    assert found.kappa_low < found.kappa < found.kappa_high


def test_failed_and_empty_chains_are_left_out_and_counted():
    good = labelled(TEXT, [("deduction", TEXT)])
    failed = spans.failed(TEXT, "u", "b", "timed out")
    found = compare([good, good_u()], [good, failed], [response(TEXT), response(TEXT, "u")])
    assert found.compared == pytest.approx(0.5)
    nothing = compare([], [], [])
    assert math.isnan(nothing.kappa)
    assert nothing.chains == 0


def good_u():
    return labelled(TEXT, [("deduction", TEXT)], task_id="u")


def test_bad_arguments_are_named():
    good = labelled(TEXT, [("deduction", TEXT)])
    with pytest.raises(ValueError, match="no unit 'word'"):
        compare([good], [good], [response(TEXT)], unit="word")
    with pytest.raises(ValueError, match="2 annotations of a are not those of the 1 responses"):
        compare([good, good], [good], [response(TEXT)])
    with pytest.raises(ValueError, match="not those of the 1 responses"):
        compare([Annotation("x", "a")], [good], [response(TEXT)])


def two_chains():
    """Half of the first annotator's deduction is backtracking to the second."""
    one = labelled(TEXT, [("deduction", TEXT)])
    two = labelled(
        TEXT, [("deduction", "One two."), ("backtracking", "Wait, three. Four.")], "b"
    )
    return compare([one], [two], [response(TEXT)])


def test_rows_of_the_confusion_add_up_to_one_or_are_missing():
    found = two_chains()
    rows = found.by_first()
    deduction, backtracking = (BEHAVIOURS.index(b) for b in ("deduction", "backtracking"))
    assert rows[deduction, [deduction, backtracking]] == pytest.approx([7 / 23, 16 / 23])
    assert np.isnan(np.delete(rows, deduction, axis=0)).all(), "labels that were never given"
    table = agreement.confusions([found, found])
    assert list(table.columns) == ["annotator", "label", *BEHAVIOURS]
    assert len(table) == 2 * len(BEHAVIOURS)
    assert table.loc[deduction, "backtracking"] == pytest.approx(16 / 23)


def test_the_report_has_kappa_and_every_difference_of_shares():
    report = agreement.report([two_chains()]).set_index("quantity")
    assert set(report["annotator"]) == {"b"}
    assert report.loc["accuracy", "value"] == pytest.approx(7 / 23)
    assert report.loc["kappa", "value"] == pytest.approx(0), "one label: no more than chance"
    assert report.loc["compared", "value"] == pytest.approx(1)
    assert report.loc["deduction, difference", "value"] == pytest.approx(-16 / 23)
    assert report.loc["backtracking, difference", "value"] == pytest.approx(16 / 23)
    assert agreement.report([]).empty


def test_kappa_is_written_with_its_interval_or_as_missing():
    assert two_chains().kappa_text() == "0.00 (0.00 to 0.00)"
    assert compare([], [], []).kappa_text() == "n/a"


@pytest.mark.parametrize(
    ("model", "judge", "names"),
    [
        ("tiny-thinker", "auto", ("grammar", "offline", "lexical")),
        ("tiny-thinker", "openai:m", ("grammar", "offline", "lexical", "openai:m")),
        ("smollm2", "auto", ("offline", "lexical")),
        ("smollm2", "openai:m", ("openai:m", "lexical")),
        ("smollm2", "lexical", ("lexical", "offline")),
    ],
)
def test_annotators_are_measured_against_the_truth_where_there_is_one(model, judge, names):
    assert agreement.annotators(RunConfig(model=model, judge=judge)) == names
