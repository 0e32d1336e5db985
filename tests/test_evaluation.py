"""What steering did: small grids of hand-made chains whose numbers are known."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from stllms import evaluation, metrics, tables
from stllms.records import (
    BEHAVIOURS,
    STEERED,
    STEERED_KEY,
    Annotation,
    Response,
    Steered,
    Task,
    TokenSpan,
)

NAN = float("nan")
PLAIN = ("none", -1, 0.0)
ASKED = [Task(f"t{i}", "c", "?", str(i)) for i in range(6)]


def chain(
    task: str,
    arm: tuple[str, int, float] = PLAIN,
    tokens: tuple[int, int] = (5, 5),
    *,
    answer: str = "The answer is 0.",
    thinking: str = "So 1 plus 1 is 2.",
    operation: str = "add",
    finished: bool = True,
    closed: bool = True,
    annotator: str = "hand",
    failed: str | None = None,
    labels: tuple[str, str] = ("backtracking", "adding-knowledge"),
) -> Steered:
    """A chain with ``tokens`` of the two ``labels``."""
    first, second = tokens
    spans = [TokenSpan(labels[0], 10, 10 + first), TokenSpan(labels[1], 60, 60 + second)]
    made = Annotation(
        task,
        annotator,
        spans=tuple(s for s in spans if s.end > s.start),
        ledger={"coverage": 0.75},
        failed=failed,
    )
    response = Response(
        task_id=task,
        category="c",
        prompt_text="",
        prompt_ids=(),
        output_ids=tuple(range(first + second)),
        text=f"{thinking}\n</think>\n\n{answer}" if closed else thinking,
        thinking=thinking,
        thinking_start=0,
        answer=answer if closed else "",
        closed=closed,
        finished=finished,
    )
    return Steered(task, *arm, operation, response, made)


def grid() -> list[Steered]:
    """Plain: 1/2 backtracking. Positive at layer 3: more, by task. Controls: less."""
    up, down = ("backtracking", 3, 1.0), ("backtracking", 3, -1.0)
    chains = []
    for i, task in enumerate(ASKED):
        chains += [
            chain(task.id, PLAIN, (5, 5), answer=f"The answer is {i}."),
            chain(task.id, up, (6 + i % 3, 2), answer="The answer is 1."),
            chain(task.id, down, (1, 9), answer=f"The answer is {i}."),
            chain(task.id, ("shuffled:0", 3, 1.0), (4, 6)),
            chain(task.id, ("shuffled:1", 3, 1.0), (7, 3)),
            chain(task.id, ("shuffled:0", 3, -1.0), (5, 5)),
            chain(task.id, ("shuffled:0", 4, 1.0), (1, 99)),
        ]
    return chains


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return evaluation.table(evaluation.measure(grid(), ASKED))


def cell(rows: pd.DataFrame, direction: str, coefficient: float, metric: str, behaviour=""):
    at = (
        (rows["direction"] == direction)
        & (rows["coefficient"] == coefficient)
        & (rows["metric"] == metric)
        & (rows["behaviour"] == behaviour)
        & (rows["layer"] != 4)
    )
    (_, found), *rest = rows[at].iterrows()
    assert not rest
    return found


# --- measure -----------------------------------------------------------------------------


def test_a_chain_is_measured_by_its_tokens_its_answer_and_its_end():
    one = chain("t2", tokens=(2, 6), answer="The answer is 2.", finished=False)
    found = evaluation.measure([one], ASKED).iloc[0]
    assert found["token fraction/backtracking"] == 2 / 8
    assert found["token fraction/example-testing"] == 0
    assert found["token share/adding-knowledge"] == 6 / 8
    assert (found["accuracy"], found["tokens"], found["labelled"]) == (1.0, 8.0, 0.75)
    assert (found["closed"], found["truncated"]) == (1.0, 1.0)
    assert "well-formed" not in found.index, "only the grammar knows what is well-formed"


def test_fractions_are_of_four_behaviours_and_shares_of_six():
    one = chain("t1", tokens=(3, 1), labels=("deduction", "backtracking"))
    found = evaluation.measure([one], ASKED).iloc[0]
    assert found["token fraction/backtracking"] == 1.0
    assert found["token share/backtracking"] == 0.25


def test_a_chain_that_never_answered_is_wrong_whatever_it_was_thinking():
    musing = chain("t3", thinking="The answer is 3.", closed=False, finished=False)
    right = chain("t3", answer="The answer is 3.")
    found = evaluation.measure([musing, right], ASKED)
    assert found["accuracy"].tolist() == [0.0, 1.0]
    open_task = [Task("t3", "c", "?")]
    assert evaluation.measure([right], open_task)["accuracy"].isna().all()


def test_well_formed_is_what_the_grammar_could_have_written():
    good = chain("t0", annotator="grammar")
    bad = [
        chain("t0", annotator="grammar", thinking=""),
        chain("t0", annotator="grammar", thinking="So 1 plus 1 is"),
        chain("t0", annotator="grammar", answer="Maybe 4."),
        chain("t0", annotator="grammar", finished=False),
        chain("t0", annotator="grammar", closed=False),
    ]
    found = evaluation.measure([good, *bad], ASKED)["well-formed"]
    assert found.tolist() == [1.0] + [0.0] * len(bad)


@pytest.mark.parametrize(("empty", "value"), [("apart", NAN), ("published", 0.0)])
def test_a_chain_without_segments_follows_the_treatment_and_a_failed_one_is_unknown(
    empty, value
):
    none = chain("t0", tokens=(0, 0))
    failed = chain("t1", tokens=(0, 0), failed="no reply")
    found = evaluation.measure([none, failed], ASKED, empty=empty)
    at = "token fraction/backtracking"
    assert np.array_equal(found[at], [value, NAN], equal_nan=True)
    assert found["labelled"].tolist()[0] == 0.75
    assert np.isnan(found["labelled"].tolist()[1])


def test_chains_that_cannot_be_measured_are_refused_by_name():
    bare = Steered("t0", *PLAIN, "add", chain("t0").response)
    with pytest.raises(ValueError, match="1 of 2 chains have no annotation"):
        evaluation.measure([bare, chain("t1")], ASKED)
    with pytest.raises(ValueError, match="not asked: t9"):
        evaluation.measure([chain("t9")], ASKED)
    steered = evaluation.measure([chain("t0", ("backtracking", 3, 1.0))], ASKED)
    with pytest.raises(ValueError, match="no plain chains"):
        evaluation.table(steered)
    arm = ("backtracking", 3, 1.0)
    two = [chain("t0"), chain("t0", arm), chain("t0", arm, operation="ablate")]
    with pytest.raises(ValueError, match="each operation apart"):
        evaluation.table(evaluation.measure(two, ASKED))


# --- table -------------------------------------------------------------------------------


def test_the_columns_are_those_of_the_design_plus_the_layer(rows):
    assert rows.columns.tolist() == [
        "behaviour", "direction", "layer", "coefficient", "metric", "value", "ci_low",
        "ci_high", "n", "p", "p_holm", "null_low", "null_high", "null_n",
    ]  # fmt: skip


def test_values_are_means_over_tasks_and_p_values_those_of_the_pairs(rows):
    own = cell(rows, "backtracking", 1.0, "token fraction", "backtracking")
    values = np.array([6 / 8, 7 / 9, 8 / 10] * 2)
    assert own["value"] == pytest.approx(values.mean())
    assert own["n"] == 6
    assert own["ci_low"] < own["value"] < own["ci_high"]
    # All six tasks rose: only this sign pattern and its mirror image are as extreme.
    assert own["p"] == 2 / 2**6
    knowledge = cell(rows, "backtracking", 1.0, "token fraction", "adding-knowledge")
    assert knowledge["value"] == pytest.approx(1 - values.mean())


def test_p_values_are_paired_by_task_and_not_by_row():
    # Every task rises by one, whatever its level: paired p = 2/64. By row the levels mix.
    plain = {task.id: k for task, k in zip(ASKED, (1, 8, 2, 7, 3, 5), strict=True)}
    moved = {task: k + 1 for task, k in plain.items()}
    arm = ("backtracking", 3, 1.0)
    chains = [chain(t, PLAIN, (k, 10 - k)) for t, k in plain.items()]
    chains += [chain(t, arm, (k, 10 - k)) for t, k in reversed(moved.items())]
    found = cell(
        evaluation.table(evaluation.measure(chains, ASKED)),
        *("backtracking", 1.0, "token fraction", "backtracking"),
    )
    differences = [moved[t] - plain[t] for t in plain]
    signs = list(itertools.product((1, -1), repeat=6))
    sums = [abs(sum(s * d for s, d in zip(row, differences, strict=True))) for row in signs]
    assert found["p"] == np.mean([value >= abs(sum(differences)) for value in sums]) == 2 / 64


def test_plain_chains_have_no_p_value_and_only_own_fractions_are_corrected(rows):
    assert rows.loc[rows["direction"] == "none", "p"].isna().all()
    corrected = rows[rows["p_holm"].notna()]
    assert set(corrected["metric"]) == {"token fraction"}
    assert corrected["behaviour"].tolist() == corrected["direction"].tolist()
    assert sorted(corrected["coefficient"]) == [-1.0, 1.0]
    # Two tests at 2/64 each: Holm doubles the smaller, the other follows.
    assert corrected["p_holm"].tolist() == pytest.approx([4 / 64] * 2)


def test_the_null_is_the_range_of_controls_of_the_same_layer_and_coefficient(rows):
    up = cell(rows, "backtracking", 1.0, "token fraction", "backtracking")
    assert (up["null_low"], up["null_high"]) == pytest.approx((0.4, 0.7))
    down = cell(rows, "backtracking", -1.0, "token fraction", "backtracking")
    assert (down["null_low"], down["null_high"]) == pytest.approx((0.5, 0.5))
    # The control of layer 4 (0.01) is in neither.
    assert rows.loc[rows["direction"] == "none", "null_low"].isna().all()


@pytest.mark.parametrize("broken", ["shuffled:0", "shuffled:1"])
def test_a_control_whose_chains_are_all_empty_does_not_decide_the_null(broken):
    chains = [
        chain(one.task_id, one.key[1:4], (0, 0)) if one.direction == broken else one
        for one in grid()
    ]
    found = evaluation.table(evaluation.measure(chains, ASKED))
    up = cell(found, "backtracking", 1.0, "token fraction", "backtracking")
    left = 0.7 if broken == "shuffled:0" else 0.4
    assert (up["null_low"], up["null_high"]) == pytest.approx((left, left))


def test_a_null_of_some_tasks_is_compared_on_these_tasks():
    """Controls on the two hardest tasks alone, where plain chains have 0.1: a control that adds
    0.2 there would end 0.2 above the mean of all plain chains, not at its own 0.3."""
    hard = [task.id for task in ASKED[:2]]
    plain = {task.id: 1 if task.id in hard else 7 for task in ASKED}
    arm = ("backtracking", 3, 1.0)
    chains = [chain(t, PLAIN, (k, 10 - k)) for t, k in plain.items()]
    chains += [chain(t, arm, (k + 1, 9 - k)) for t, k in plain.items()]
    for i, more in enumerate((0, 2)):
        name = (f"shuffled:{i}", 3, 1.0)
        chains += [chain(t, name, (plain[t] + more, 10 - plain[t] - more)) for t in hard]
    found = cell(
        evaluation.table(evaluation.measure(chains, ASKED)),
        *("backtracking", 1.0, "token fraction", "backtracking"),
    )
    middle = (2 * 0.1 + 4 * 0.7) / 6
    assert (found["null_low"], found["null_high"]) == pytest.approx((middle, middle + 0.2))
    assert found["value"] == pytest.approx(middle + 0.1), "inside"
    assert (found["n"], found["null_n"]) == (6, 2)


def test_a_null_of_all_tasks_is_the_range_of_the_controls_means(rows):
    up = cell(rows, "backtracking", 1.0, "token fraction", "backtracking")
    assert up["null_n"] == 6
    means = [0.4, 0.7]  # of every chain of the two controls
    assert (up["null_low"], up["null_high"]) == pytest.approx(means)
    bars = evaluation.bars(rows).set_index(["behaviour", "mode"])
    assert bars.loc[("backtracking", "positive"), "null_n"] == 6
    old = evaluation.bars(rows.drop(columns="null_n"))
    assert old["null_n"].isna().all(), "a file of an earlier version"


# --- views of the table ------------------------------------------------------------------


def test_bars_are_plain_positive_and_negative_and_missing_where_nothing_was_steered(rows):
    found = evaluation.bars(rows).set_index(["behaviour", "mode"])
    assert found.index.tolist() == [
        (b, m) for b in STEERED for m in ("plain", "positive", "negative")
    ]
    value = found["value"]
    assert value["backtracking", "plain"] == 0.5
    assert value["backtracking", "positive"] == pytest.approx(np.mean([6 / 8, 7 / 9, 8 / 10]))
    assert value["backtracking", "negative"] == pytest.approx(0.1)
    assert value["adding-knowledge", "plain"] == 0.5
    assert np.isnan(value["adding-knowledge", "positive"])
    assert tables.shown(found)["n"].tolist()[:4] == ["6", "6", "6", "6"]


def test_differences_are_paired_and_carry_the_p_values_of_the_table(rows):
    measured = evaluation.measure(grid(), ASKED)
    found = evaluation.differences(measured, rows).set_index("coefficient")
    assert found.loc[-1.0, "difference"] == pytest.approx(0.1 - 0.5)
    assert found.loc[-1.0, ["low", "high"]].tolist() == pytest.approx([-0.4, -0.4])
    assert found.loc[1.0, "p"] == 2 / 64
    assert found.loc[1.0, "n"] == 6


def test_changes_are_of_all_six_shares_against_plain(rows):
    found = evaluation.changes(rows)
    assert found.index.tolist() == ["backtracking"]
    assert found.columns.tolist() == list(BEHAVIOURS)
    up = np.mean([6 / 8, 7 / 9, 8 / 10])
    assert found.loc["backtracking", "backtracking"] == pytest.approx(up - 0.5)
    assert found.loc["backtracking", "adding-knowledge"] == pytest.approx(0.5 - up)
    assert found.loc["backtracking", "deduction"] == 0
    assert evaluation.changes(rows, 0.5).shape == (0, 6), "no such coefficient, no rows"


def test_the_showcase_is_the_finished_chain_that_rose_most():
    arm = ("backtracking", 3, 1.0)
    chains = [chain(t.id) for t in ASKED[:3]]
    chains += [
        chain("t0", arm, (9, 1), finished=False),
        chain("t1", arm, (8, 2)),
        chain("t2", arm, (6, 4)),
    ]
    measured = evaluation.measure(chains, ASKED)
    plain, positive = evaluation.showcase(chains, measured, STEERED)
    assert (plain.key[:4], positive.key[:4]) == (("t1", *PLAIN), ("t1", *arm))
    chains.append(chain("t0", ("adding-knowledge", 3, 1.0), (0, 10)))
    measured = evaluation.measure(chains, ASKED)
    _, positive = evaluation.showcase(chains, measured, STEERED)
    assert positive.key[:2] == ("t0", "adding-knowledge"), "it rose more than backtracking did"
    assert evaluation.showcase(chains, measured, ["deduction"]) is None, "nothing was steered"
    chains = [chain("t0"), chain("t0", arm, (9, 1), finished=False), chain("t1", arm, (0, 10))]
    measured = evaluation.measure([*chains, chain("t1")], ASKED)
    assert evaluation.showcase(chains, measured, STEERED) is None, "no finished chain rose"


def test_texts_have_a_row_a_segment():
    assert evaluation.texts([chain("t0")]).empty
    assert "label" in evaluation.texts([]).columns


def test_scores_belong_to_their_chains_and_none_may_lack():
    pair = [chain("t0"), chain("t1")]
    scores = [
        dict(zip(STEERED_KEY, one.key, strict=True)) | {"kl": kl, "perplexity": 1.0}
        for one, kl in zip(pair, (0.25, None), strict=True)
    ]
    measured = evaluation.measure(pair, ASKED, scores[::-1])
    assert measured["task_id"].tolist() == ["t0", "t1"]
    assert measured["kl"].tolist() == pytest.approx([0.25, NAN], nan_ok=True)
    with pytest.raises(ValueError, match="1 of 2 chains have no score"):
        evaluation.measure(pair, ASKED, scores[:1])


def test_the_table_is_the_same_for_the_same_seed():
    measured = evaluation.measure(grid(), ASKED)
    first, second = (evaluation.table(measured, seed=3) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)


def test_side_effects_have_a_reader_for_each_name():
    one = chain("t0", annotator="grammar")
    score = dict(zip(STEERED_KEY, one.key, strict=True)) | {"kl": 0.5, "perplexity": np.e}
    measured = evaluation.measure([one], ASKED, [score])
    assert measured.loc[0, ["kl", "log perplexity"]].tolist() == [0.5, 1.0]
    own = {name for name in measured.columns if "/" not in name}
    assert own - {"task_id", "direction", "layer", "coefficient", "operation"} == set(
        evaluation.SIDE_EFFECTS
    )
    assert set(metrics.EMPTY) == {"apart", "published"}
