"""Figures: what is drawn is the data, what is missing says so, nothing else appears."""

from __future__ import annotations

import warnings
from itertools import pairwise

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from stllms import comparison, effects, evaluation, plots
from stllms.config import MODELS
from stllms.records import BEHAVIOURS, STEERED, PlacedSegment

NAN = float("nan")


@pytest.fixture(autouse=True)
def style():
    """The style of the notebooks, warnings as errors, and every figure drawn and closed."""
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.style()
        yield
        for number in plt.get_fignums():
            plt.figure(number).canvas.draw()
    plt.close("all")


@pytest.fixture
def axes():
    return plt.subplots(figsize=(8, 4))[1]


def words(axes) -> list[str]:
    return [text.get_text().strip() for text in axes.texts]


def finite(axes) -> bool:
    """Whether every bar has a place and a height that is a number."""
    boxes = [p for p in axes.patches if isinstance(p, Rectangle)]
    return all(np.isfinite([b.get_x(), b.get_y(), b.get_height()]).all() for b in boxes)


# --- bars --------------------------------------------------------------------------------


def grouped() -> pd.DataFrame:
    rows = [
        ("deduction", "a", 0.5, 0.4, 0.7),
        ("deduction", "b", 0.2, 0.1, 0.3),
        ("adding-knowledge", "a", NAN, NAN, NAN),
        ("adding-knowledge", "b", 0.0, 0.0, 0.0),
    ]
    return pd.DataFrame(rows, columns=["behaviour", "model", "value", "low", "high"])


def draw_grouped(axes):
    palette = {"a": "#112233", "b": "#445566"}
    return plots.bars(
        axes, grouped(), x="behaviour", hue="model", palette=palette, label="share"
    )


def test_bars_have_the_heights_of_the_data_and_the_colours_of_the_palette(axes):
    assert draw_grouped(axes) is axes
    first, second = (c for c in axes.containers if isinstance(c, mpl.container.BarContainer))
    assert [bar.get_height() for bar in first] == [0.5, 0.0]
    assert [bar.get_height() for bar in second] == [0.2, 0.0]
    assert {to_hex(bar.get_facecolor()) for bar in first} == {"#112233"}
    assert [t.get_text() for t in axes.get_xticklabels()] == ["deduction", "adding-\nknowledge"]
    assert axes.get_ylabel() == "share"
    assert axes.get_ylim()[0] == 0
    assert axes.get_legend_handles_labels()[1] == ["a", "b"]


def test_bars_of_a_group_stand_side_by_side_around_their_tick(axes):
    draw_grouped(axes)
    boxes = sorted((b.get_x(), b.get_x() + b.get_width()) for b in axes.patches)
    for (_, right), (left, _) in pairwise(boxes):
        assert left >= right
    centres = [np.mean(boxes[i : i + 2]) for i in (0, 2)]
    assert centres == pytest.approx([0, 1])


def test_a_missing_bar_is_named_and_a_zero_is_not(axes):
    draw_grouped(axes)
    (label,) = axes.texts
    assert label.get_text().strip() == "n/a"
    assert label.get_position()[0] == pytest.approx(1 - 0.2), "bar a of the second group"
    assert finite(axes)


def test_whiskers_reach_from_low_to_high(axes):
    draw_grouped(axes)
    segments = [s for c in axes.collections for s in c.get_segments()]
    reach = sorted((s[0][1], s[1][1]) for s in segments)
    assert np.array(reach) == pytest.approx(np.array([[0.0, 0.0], [0.1, 0.3], [0.4, 0.7]]))


def steering_table(**changes) -> pd.DataFrame:
    modes = ["plain", "positive", "negative"]
    rows = [
        (b, m, 0.2 + 0.1 * i, 0.15, 0.5, 50, NAN if m == "plain" else 0.1, 0.35)
        for b in STEERED
        for i, m in enumerate(modes)
    ]
    columns = ["behaviour", "mode", "value", "low", "high", "n", "null_low", "null_high"]
    table = pd.DataFrame(rows, columns=columns)
    table.loc[table["mode"] == "plain", "null_high"] = NAN
    return table.assign(**changes)


def hatched(axes) -> list[Rectangle]:
    return [p for p in axes.patches if p.get_hatch()]


def test_steering_bars_show_three_modes_and_the_range_of_the_nulls(axes):
    plots.steering_bars(axes, steering_table())
    assert axes.get_legend_handles_labels()[1] == [*plots.MODES, "control directions"]
    assert len(hatched(axes)) == 8, "two modes of four behaviours"
    for box in hatched(axes):
        assert box.get_y() == pytest.approx(0.1)
        assert box.get_height() == pytest.approx(0.25)
    plain = [p for p in axes.patches if not p.get_hatch()][:4]
    assert not {round(p.get_x(), 3) for p in plain} & {
        round(b.get_x(), 3) for b in hatched(axes)
    }


def test_without_random_directions_the_legend_does_not_speak_of_them(axes):
    plots.steering_bars(axes, steering_table(null_low=NAN, null_high=NAN))
    assert not hatched(axes)
    assert axes.get_legend_handles_labels()[1] == list(plots.MODES)


def test_nulls_of_the_negative_side_alone_are_named_too(axes):
    table = steering_table()
    table.loc[table["mode"] == "positive", ["null_low", "null_high"]] = NAN
    plots.steering_bars(axes, table)
    assert len(hatched(axes)) == 4
    assert "control directions" in axes.get_legend_handles_labels()[1]


def test_a_behaviour_that_was_not_steered_has_two_bars_missing(axes):
    table = steering_table()
    gone = (table["behaviour"] == "backtracking") & (table["mode"] != "plain")
    table.loc[gone, ["value", "low", "high", "null_low", "null_high"]] = NAN
    plots.steering_bars(axes, table)
    assert words(axes) == ["n/a", "n/a"]
    assert finite(axes)


# --- comparison --------------------------------------------------------------------------


def members(*names: str, chains: int = 6) -> list[comparison.Member]:
    rng = np.random.default_rng(0)
    tasks = tuple(map(str, range(chains)))
    made = []
    for name in names:
        entry, counts = MODELS[name], rng.integers(0, 9, (chains, 6)).astype(float)
        one = comparison.Member(name, entry.display, entry.kind, entry.pair, tasks, counts)
        made.append(one)
    return comparison.ordered(made)


def test_a_comparison_has_a_bar_a_model_and_behaviour(axes):
    chosen = members("tiny-instruct", "tiny-thinker", "gpt-4o")
    rows, palette = comparison.table(chosen), comparison.colours(chosen)
    plots.compare(axes, rows, metric="segment fraction", palette=palette)
    assert len(axes.patches) == 3 * 6
    assert axes.get_legend_handles_labels()[1] == ["tiny-thinker", "tiny-instruct", "GPT-4o"]
    heights = np.reshape([p.get_height() for p in axes.patches], (3, 6))
    assert heights.sum(1) == pytest.approx([1, 1, 1]), "fractions of a model add up to one"
    assert "all" not in [t.get_text() for t in axes.get_xticklabels()]
    assert axes.get_ylabel() == "segment fraction (mean over tasks)"


def test_totals_have_a_line_a_model_and_name_what_is_missing(axes):
    chosen = members("tiny-thinker", "tiny-instruct")
    empty = members("gpt-4o", chains=0)
    rows = comparison.table([*chosen, *empty])
    plots.totals(axes, rows, palette=comparison.colours([*chosen, *empty]))
    widths = [p.get_width() for p in axes.patches]
    assert widths[:2] == [one.counts.sum(1).mean() for one in chosen]
    assert words(axes) == ["n/a"]
    assert axes.texts[0].get_position()[1] == 2
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        "tiny-thinker", "tiny-instruct", "GPT-4o",
    ]  # fmt: skip
    assert axes.get_ylim() == (2.5, -0.5), "the first on top, a row also for the missing one"


# --- lines and matrices ------------------------------------------------------------------


def test_curves_draw_a_line_a_behaviour_with_its_band_and_mark(axes):
    line = np.array([1.0, 3.0, 2.0])
    plots.curves(
        axes, {"deduction": line}, label="KL", bands={"deduction": (line - 1, line + 1)},
        mark={"deduction": 1},
    )  # fmt: skip
    drawn, mark = axes.lines
    assert drawn.get_ydata().tolist() == [1, 3, 2]
    assert drawn.get_xdata().tolist() == [0, 1, 2]
    assert to_hex(drawn.get_color()) == plots.COLOURS["deduction"].lower()
    assert mark.get_xdata() == [1, 1]
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0, 4)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "KL")


def effect_table() -> pd.DataFrame:
    values = np.random.default_rng(1).exponential(size=(12, 4, 5))
    values[:, 0] = NAN
    return effects.table({"kl/own": values}, STEERED)


@pytest.mark.parametrize(
    ("grid", "shared"),
    [((1, 4), {"sharey": True}), ((2, 2), {"sharex": True}), ((1, 4), {})],
)
def test_an_unavailable_panel_says_so_and_leaves_the_ticks_of_the_others(grid, shared):
    figure, panels = plt.subplots(*grid, figsize=(12, 6), **shared)
    table = effect_table()
    plots.effect_panels(panels.flat, table, STEERED, label="KL, nats")
    figure.canvas.draw()
    first, *others = panels.flat
    assert words(first) == ["unavailable:\ntoo few spans"]
    assert not first.lines
    for panel, name in zip(others, STEERED[1:], strict=True):
        mean = table.loc[table["behaviour"] == name, "mean"]
        assert panel.lines[0].get_ydata() == pytest.approx(mean.to_numpy())
        assert panel.get_title() == name
        assert len(panel.get_yticks()) > 1
        assert len(panel.get_xticks()) > 1
    if "sharey" in shared:
        assert [t.get_text() for t in first.get_yticklabels() if t.get_visible()]
        assert first.get_ylabel() == "KL, nats"


def test_the_published_band_is_one_standard_deviation():
    table = effect_table()
    _, panels = plt.subplots(1, 4)
    plots.effect_panels(panels, table, STEERED, label="x", band="sd")
    rows = table[table["behaviour"] == STEERED[1]]
    band = panels[1].collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx((rows["mean"] + rows["sd"]).max())
    assert band.min() == pytest.approx((rows["mean"] - rows["sd"]).min())


@pytest.mark.parametrize("band", ["interval", "sd"])
def test_one_huge_layer_does_not_hide_the_others_on_a_logarithmic_axis(band):
    table = effect_table()
    table["mean"] = 0.1 * 2.0 ** table["layer"].where(table["layer"] < 4, 10)
    heights = {}
    for log in (False, True):
        figure, panels = plt.subplots(1, 4, sharey=True)
        plots.effect_panels(panels, table, STEERED, label="x", band=band, log=log)
        figure.canvas.draw()
        line = panels[0].lines[0]  # all behaviours have the same means here
        points = panels[0].transData.transform(line.get_xydata())
        heights[log] = np.ptp(panels[0].transAxes.inverted().transform(points)[:4, 1])
        plt.close(figure)
    assert heights[False] < 0.05
    assert heights[True] > 0.2


def test_the_heatmap_writes_every_cosine_in_its_cell(axes):
    matrix = np.array([[1.0, 0.33], [0.33, 1.0]])
    plots.heatmap(axes, matrix, ["backtracking", "adding-knowledge"])
    assert words(axes) == ["1.00", "0.33", "0.33", "1.00"]
    assert axes.collections[0].get_clim() == (-1, 1)
    assert axes.get_yticklabels()[1].get_text() == "adding-\nknowledge"


def test_a_matrix_is_signed_symmetric_and_names_missing_cells(axes):
    table = pd.DataFrame([[0.1, -0.4], [NAN, 0.2]])
    plots.matrix(axes, table, ["up", "down"], ["a", "b"], label="change")
    assert sorted(words(axes)) == ["+0.10", "+0.20", "-0.40", "n/a"]
    assert axes.collections[0].get_clim() == (-0.4, 0.4)
    missing = next(t for t in axes.texts if t.get_text() == "n/a")
    assert missing.get_position() == (0.5, 1.5)


def test_a_dot_stands_for_every_chain(axes):
    plots.strip(axes, [0.2, 1.0, 1.0], label="coverage")
    assert axes.lines[0].get_xdata().tolist() == [0.2, 1.0, 1.0]
    assert axes.get_xlim()[1] > 1


def test_growth_has_a_line_a_behaviour_and_says_when_there_is_none(axes):
    table = pd.DataFrame(
        {"behaviour": ["deduction"] * 2, "spans": [10, 40], "cosine": [0.5, 0.9]}
    )
    plots.growth(axes, table)
    assert axes.lines[0].get_ydata().tolist() == [0.5, 0.9]
    assert axes.get_xscale() == "log"
    axes.figure.canvas.draw()
    low, high = axes.get_xlim()
    ticks = axes.get_xticklabels(which="both")
    named = [t.get_text() for t in ticks if low <= t.get_position()[0] <= high and t.get_text()]
    assert named == ["10", "20"], "plain numbers, and room between them"
    _, other = plt.subplots()
    plots.growth(other, table.iloc[:0])
    assert "too few spans" in words(other)[0]


# --- chains ------------------------------------------------------------------------------

TEXT = "Okay, I need to find 2 < 3 & $x$.\nWait, let me go back to the start. So it is 5."
SEGMENTS = (
    PlacedSegment("initializing", TEXT[:33], 0, 33),
    PlacedSegment("backtracking", TEXT[34:69], 34, 69),
)


def test_a_chain_is_drawn_letter_by_letter_on_the_colour_of_its_behaviour(axes):
    plots.chain(axes, TEXT, SEGMENTS, title="one", width=20)
    rows: dict[float, str] = {}
    for text in axes.texts:
        _, row = text.get_position()
        rows[row] = rows.get(row, "") + text.get_text()
    lines = [rows[row] for row in sorted(rows)]
    assert " ".join(lines).split() == TEXT.split(), "no word is lost or cut"
    assert max(map(len, lines)) <= 20
    coloured = dict.fromkeys(BEHAVIOURS, 0.0)
    for box in axes.patches:
        colour = to_hex(box.get_facecolor())
        label = next(b for b in BEHAVIOURS if plots.COLOURS[b].lower() == colour)
        coloured[label] += box.get_width()
    # The space at which a line is broken is not drawn.
    assert 33 - 3 <= coloured["initializing"] <= 33
    assert 35 - 3 <= coloured["backtracking"] <= 35
    assert coloured["deduction"] == 0


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("", 5, []),
        ("abc", 5, ["abc"]),
        ("ab cd ef", 5, ["ab cd", "ef"]),
        ("abcdefgh", 3, ["abc", "def", "gh"]),
        ("ab\n\ncd", 5, ["ab", "", "cd"]),
        ("ab cd\nef", 5, ["ab cd", "ef"]),
        ("ab cde", 4, ["ab", "cde"]),
    ],
)
def test_lines_are_broken_at_spaces_and_newlines(text, width, lines):
    assert [text[a:b] for a, b in plots._wrapped(text, width)] == lines


# --- the figure around them --------------------------------------------------------------


def overlap(one, two) -> bool:
    return one.x0 < two.x1 and two.x0 < one.x1 and one.y0 < two.y1 and two.y0 < one.y1


def test_captions_and_legends_do_not_cover_the_axes():
    figure, panels = plt.subplots(1, 2, figsize=(9, 4))
    for axes in panels:
        plots.steering_bars(axes, steering_table())
    plots.legend(figure)
    plots.caption(figure, "tiny-thinker (a fixture, built to be steerable), 60 tasks. " * 4)
    figure.canvas.draw()
    caption = figure._supxlabel
    boxes = [axes.get_tightbbox() for axes in panels]
    assert not any(overlap(caption.get_window_extent(), box) for box in boxes)
    assert not any(overlap(figure.legends[0].get_window_extent(), box) for box in boxes)
    inside = figure.bbox.padded(1)
    assert inside.contains(*caption.get_window_extent().min)
    assert inside.contains(*caption.get_window_extent().max)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == list(BEHAVIOURS)


def test_every_behaviour_has_a_colour_and_every_mode_of_the_bars_too():
    assert set(plots.COLOURS) == set(BEHAVIOURS)
    assert len(set(plots.COLOURS.values())) == 6
    assert set(plots.MODES) == set(evaluation.MODES)
