"""Frames for the eyes of a reader."""

from __future__ import annotations

import pandas as pd
import pytest

from stllms import tables

NAN = float("nan")
COLUMNS = ["who", "what", "value", "low", "high"]


def test_intervals_are_written_beside_their_value_in_the_order_of_the_rows():
    rows = [
        ("b", "rank", 2.0, 1.0, 4.0),
        ("b", "share", -0.001, NAN, NAN),
        ("a", "share", 0.25, -0.004, 0.5),
    ]
    shown = tables.intervals(pd.DataFrame(rows, columns=COLUMNS), ["what"], "who")
    assert list(shown.columns) == ["b", "a"]
    assert list(shown.index) == ["rank", "share"]
    assert shown["b"].tolist() == ["2.00 (1.00 to 4.00)", "0.00"], "no -0.00"
    assert shown["a"].tolist() == ["n/a", "0.25 (0.00 to 0.50)"]


def test_a_missing_value_is_not_a_number_and_ranks_have_no_point():
    rows = [("a", "rank", NAN, NAN, NAN), ("a", "peak", 12.0, 9.0, 19.0)]
    shown = tables.intervals(pd.DataFrame(rows, columns=COLUMNS), ["what"], "who", digits=0)
    assert shown["a"].tolist() == ["n/a", "12 (9 to 19)"]


def test_nothing_is_an_empty_table():
    assert tables.intervals(pd.DataFrame(columns=COLUMNS), ["what"], "who").empty


def test_small_p_values_are_not_shown_as_zero():
    table = pd.DataFrame({"p": [0.0002, 0.04, NAN], "share": [0.0002, 0.04, 1.5]})
    shown = tables.shown(table)
    assert shown["p"].tolist() == ["<0.001", "0.040", "n/a"]
    assert shown["share"].tolist() == ["0.000", "0.040", "1.500"]


def test_a_missing_answer_is_written_as_a_missing_number_is():
    table = pd.DataFrame({"outside": [True, None, NAN], "value": [1.0, 2.0, NAN]})
    shown = tables.shown(table)
    assert shown["outside"].tolist() == [True, "n/a", "n/a"]
    assert shown["value"].tolist() == ["1", "2", "n/a"]


def test_a_wide_table_refuses_two_numbers_for_one_cell_and_says_what_tells_them_apart():
    rows = pd.DataFrame(
        [("t", "grammar", "x", 1.0), ("t", "offline", "x", 3.0), ("t", "grammar", "y", 2.0)],
        columns=["kind", "annotator", "behaviour", "value"],
    )
    with pytest.raises(
        ValueError, match=r"2 rows share .*kind 't', behaviour 'x'.*of annotator"
    ):
        tables.wide(rows, ["kind"], "behaviour")
    found = tables.wide(rows, ["kind", "annotator"], "behaviour")
    assert found.index.tolist() == [("t", "grammar"), ("t", "offline")]
    assert found.columns.tolist() == ["x", "y"]
    assert found["x"].tolist() == [1.0, 3.0]
    assert found["y"].isna().tolist() == [False, True]
