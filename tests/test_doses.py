"""Doses and prices: rows with known numbers, and one small measured grid."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import test_evaluation as small
from matplotlib import pyplot as plt

from stllms import doses, evaluation, panels

NAN = float("nan")
OWN = "token fraction"


@pytest.fixture(scope="module")
def measured() -> pd.DataFrame:
    return evaluation.measure(small.grid(), small.ASKED)


@pytest.fixture(scope="module")
def rows(measured) -> pd.DataFrame:
    return evaluation.table(measured)


def side(direction: str, coefficient: float, **values: float) -> list[dict]:
    return [
        {"metric": m, "direction": direction, "coefficient": coefficient, "value": v}
        for m, v in values.items()
    ]


def own(direction: str, coefficient: float, value: float, low=NAN, high=NAN) -> dict:
    return {
        "behaviour": "backtracking",
        "metric": OWN,
        "direction": direction,
        "coefficient": coefficient,
        "value": value,
        "ci_low": value - 0.05,
        "ci_high": value + 0.05,
        "null_low": low,
        "null_high": high,
    }


PLAIN = {"accuracy": 0.8, "closed": 1.0, "loops": 0.0}
EFFECTS = pd.DataFrame(
    side("none", 0.0, **PLAIN)
    + side("backtracking", 0.5, **PLAIN)
    + side("backtracking", 1.0, accuracy=0.7, closed=0.95, loops=0.1)
    + side("backtracking", 2.0, accuracy=0.7, closed=0.95, loops=0.3)
    + side("backtracking", 3.0, **PLAIN)
    + side("backtracking", -1.0, accuracy=0.1, closed=1.0, loops=0.0)
    + side("backtracking", -0.5, accuracy=NAN, closed=1.0, loops=0.0)
    + side("shuffled:0", 1.0, accuracy=0.0, closed=0.0, loops=1.0)
)


def test_costs_are_side_effects_by_arm_with_one_row_for_a_kind_of_controls(rows):
    found = doses.costs(rows).set_index(["direction", "coefficient"])
    assert found.loc[("none", 0.0), "accuracy"] == 1.0
    assert found.loc[("backtracking", 1.0), "accuracy"] == pytest.approx(1 / 6)
    # Output tokens of the control arms at +1: 10, 10 and 100.
    assert found.loc[("shuffled", 1.0), "tokens"] == pytest.approx(40)
    assert "well-formed" not in found.columns


def test_doses_go_over_the_coefficients_with_plain_at_zero(rows):
    found = doses.table(rows)
    assert set(found["steered"]) == {"backtracking"}
    dose = found[found["metric"] == OWN]
    assert dose["coefficient"].tolist() == [-1.0, 0.0, 1.0]
    assert dose["value"].tolist() == pytest.approx([0.1, 0.5, np.mean([6 / 8, 7 / 9, 0.8])])
    nothing = rows[rows["direction"] == "none"]
    assert doses.table(nothing).empty, "nothing was steered"


def test_the_largest_coefficient_within_the_limits_is_suggested():
    assert doses.suggested(EFFECTS, "backtracking", 1) == 1.0, "2 repeats itself too much"
    assert doses.suggested(EFFECTS, "backtracking", -1) == -0.5, "-1 answers wrongly"
    assert doses.suggested(EFFECTS, "backtracking", 1, {"accuracy": 0.05}) == 0.5
    assert doses.suggested(EFFECTS, "backtracking", 1, {"closed": 0.001}) == 0.5
    assert doses.suggested(EFFECTS, "backtracking", 1, {"loops": 0.4}) == 3.0
    assert doses.suggested(EFFECTS, "deduction", 1) is None


def test_nothing_is_suggested_where_the_smallest_push_breaks_the_text():
    broken = EFFECTS.copy()
    half = (broken["direction"] == "backtracking") & (broken["coefficient"] == 0.5)
    broken.loc[half & (broken["metric"] == "closed"), "value"] = 0.2
    assert doses.suggested(broken, "backtracking", 1) is None


def test_coefficients_that_break_the_text_are_named_with_the_loop_score():
    assert doses.broken(EFFECTS) == {
        ("backtracking", 2.0): {"loops": (0.0, 0.3)},
        ("backtracking", -1.0): {"accuracy": (0.8, 0.1)},
    }
    assert doses.warning(EFFECTS).splitlines() == [
        "backtracking +2 breaks the text: loops 0.30 (plain 0.00)",
        "backtracking -1 breaks the text: loops 0.00 (plain 0.00), accuracy 0.10 (plain 0.80)",
    ]
    assert doses.warning(EFFECTS, {"loops": 0.9}) == "no coefficient breaks the text"


def test_a_limit_of_zero_allows_a_gain_and_no_loss():
    rows = pd.DataFrame(
        [
            {"direction": "none", "coefficient": 0.0, "metric": "accuracy", "value": 0.8},
            {
                "direction": "backtracking",
                "coefficient": 1.0,
                "metric": "accuracy",
                "value": 0.9,
            },
            {
                "direction": "backtracking",
                "coefficient": -1.0,
                "metric": "accuracy",
                "value": 0.7,
            },
        ]
    )
    beyond = {("backtracking", -1.0): {"accuracy": (0.8, 0.7)}}
    assert doses.broken(rows, {"accuracy": 0}) == beyond
    assert doses.broken(rows.assign(metric="tokens"), {"tokens": 0.2}) == {}
    assert len(doses.broken(rows.assign(metric="tokens"), {"tokens": 0.05})) == 2, "either way"


def test_a_limit_below_zero_is_refused():
    with pytest.raises(ValueError, match=r"limit of accuracy is -0\.1: say how much worse"):
        doses.suggested(EFFECTS, "backtracking", 1, {"accuracy": -0.1})


def test_a_limit_on_something_unknown_is_refused_by_name():
    with pytest.raises(ValueError, match="no side effect 'loop'; there are: accuracy"):
        doses.suggested(EFFECTS, "backtracking", 1, {"loop": 0.1})


def test_a_claim_needs_to_be_outside_plain_and_outside_every_control():
    fractions = [
        own("none", 0.0, 0.20),
        own("backtracking", 1.0, 0.40, 0.10, 0.45),
        own("backtracking", -0.5, 0.10, 0.12, 0.30),
    ]
    effects = EFFECTS[EFFECTS["coefficient"].isin([0.0, 1.0, -0.5])]
    found = doses.summary(pd.concat([pd.DataFrame(fractions), effects]))
    up, down = (found[found["sign"] == sign].iloc[0] for sign in "+-")
    assert (up["coefficient"], up["value"]) == (1.0, 0.40)
    assert (up["outside plain"], up["outside controls"]) == ("yes", "no"), "0.40 < 0.45"
    assert (down["outside plain"], down["outside controls"]) == ("yes", "yes")
    assert up["accuracy"] == 0.7


def test_where_nothing_was_steered_the_summary_has_its_columns_and_no_rows(rows):
    found = doses.summary(rows[rows["direction"] == "none"])
    assert found.empty
    assert {"behaviour", "coefficient", "outside controls"} <= set(found.columns)


def test_without_controls_nothing_is_said_about_them():
    fractions = [own("none", 0.0, 0.20), own("backtracking", 1.0, 0.22)]
    effects = EFFECTS[EFFECTS["coefficient"].isin([0.0, 1.0])]
    found = doses.summary(pd.concat([pd.DataFrame(fractions), effects]))
    up, down = (found[found["sign"] == sign].iloc[0] for sign in "+-")
    assert up["outside controls"] == ""
    assert up["outside plain"] == "no", "0.22 is inside 0.15 to 0.25"
    assert np.isnan(down["coefficient"]), "no negative coefficient was tried"


def test_a_sweep_has_a_row_a_layer_and_coefficient(measured):
    other = measured.copy()
    other.loc[other["direction"] == "backtracking", "layer"] = 1
    both = pd.concat([measured, other[other["direction"] == "backtracking"]])
    found = doses.sweep(both[~both["direction"].str.startswith("shuffled")])
    assert found[["layer", "coefficient"]].to_numpy().tolist() == [
        [1, -1.0],
        [3, -1.0],
        [1, 1.0],
        [3, 1.0],
    ]
    assert set(found["plain"]) == {0.5}
    assert found["null_low"].isna().all(), "none was swept"
    beside = doses.sweep(both).set_index(["layer", "coefficient"])
    assert beside.loc[(3, 1.0), ["null_low", "null_high"]].notna().all()
    assert beside.loc[(1, 1.0), ["null_low", "null_high"]].isna().all(), "of the same layer"
    assert doses.sweep(pd.DataFrame()).empty, "none was run"


def test_the_page_has_a_panel_a_fraction_and_a_side_effect(rows):
    figure = plt.figure()
    panels.doses(figure, doses.table(rows))
    titles = [axes.get_title() for axes in figure.axes if axes.get_visible()]
    effects = [name for name in evaluation.SIDE_EFFECTS if name in set(rows["metric"])]
    assert titles[4:] == effects
    line = figure.axes[titles.index("backtracking")].lines[0]
    assert line.get_ydata().tolist() == pytest.approx([0.1, 0.5, np.mean([6 / 8, 7 / 9, 0.8])])
    bars = figure.axes[titles.index("backtracking")].patches
    assert len(bars) == 2, "controls were added at -1 and +1"
    plt.close(figure)


def test_the_sweep_is_drawn_or_said_to_be_missing(measured):
    figure, axes = plt.subplots(1, 4)
    panels.sweep(axes, doses.sweep(measured), {"backtracking": 3})
    words = [[text.get_text() for text in panel.texts] for panel in axes]
    assert words == [[], ["unavailable"], ["unavailable"], ["unavailable"]]
    panels.sweep(axes, doses.sweep(pd.DataFrame()), {})
    assert axes[0].texts[-1].get_text() == "not run"
    plt.close(figure)
