"""Figures and text: what is drawn is the data, what is missing says so, nothing is lost."""

from __future__ import annotations

import itertools
import re
import warnings
from dataclasses import replace
from html import unescape

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex

from stllms.labels import OTHER, PALETTE, PAPER, LabelSet
from stllms.plotting import axes as draw
from stllms.plotting import text as words
from stllms.records import Annotation, PlacedSegment, Response, Steered

NAN = float("nan")
BEHAVIOURS, STEERED = PAPER.names, PAPER.targets
COLOURS = {one.name: one.colour for one in PAPER.labels}
TEXT = "Okay, I need to find 2 < 3 & $x$.\nWait, let me go back to the start. So it is 5."
SEGMENTS = (
    PlacedSegment("initializing", TEXT[:33], 0, 33),
    PlacedSegment("backtracking", TEXT[34:69], 34, 69),
)


@pytest.fixture(autouse=True)
def style():
    """The style of the notebooks, warnings as errors, and every figure drawn and closed."""
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("error")
        draw.style()
        yield
        for number in plt.get_fignums():
            plt.figure(number).canvas.draw()
    plt.close("all")


@pytest.fixture
def axes():
    return plt.subplots(figsize=(7, 3))[1]


def written(axes) -> list[str]:
    return [text.get_text().strip() for text in axes.texts]


def legend_of(figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def reach(collection) -> tuple[float, float]:
    heights = np.concatenate([path.vertices[:, 1] for path in collection.get_paths()])
    return heights.min(), heights.max()


# --- bars --------------------------------------------------------------------------------


def test_bars_are_the_data_side_by_side_with_whiskers_and_a_missing_one_is_named(axes):
    rows = [
        ("deduction", "a", 0.5, 0.4, 0.7),
        ("deduction", "b", 0.2, 0.1, 0.3),
        ("adding-knowledge", "a", NAN, NAN, NAN),
        ("adding-knowledge", "b", 0.0, 0.0, 0.0),
    ]
    table = pd.DataFrame(rows, columns=["behaviour", "model", "value", "low", "high"])
    palette = {"a": "#112233", "b": "#445566"}
    draw.bars(axes, table, x="behaviour", hue="model", palette=palette, label="share")
    first, second = (c for c in axes.containers if isinstance(c, mpl.container.BarContainer))
    assert [bar.get_height() for bar in first] == [0.5, 0.0]
    assert [bar.get_height() for bar in second] == [0.2, 0.0]
    assert {to_hex(bar.get_facecolor()) for bar in first} == {"#112233"}
    assert [t.get_text() for t in axes.get_xticklabels()] == ["deduction", "adding-\nknowledge"]
    assert axes.get_ylim()[0] == 0
    assert axes.get_legend_handles_labels()[1] == ["a", "b"]
    segments = [s for c in axes.collections for s in c.get_segments()]
    ends = sorted((s[0][1], s[1][1]) for s in segments)
    assert np.array(ends) == pytest.approx(np.array([[0.0, 0.0], [0.1, 0.3], [0.4, 0.7]]))
    boxes = sorted((b.get_x(), b.get_x() + b.get_width()) for b in axes.patches)
    assert all(left >= right for (_, right), (left, _) in itertools.pairwise(boxes))
    assert [np.mean(boxes[i : i + 2]) for i in (0, 2)] == pytest.approx([0, 1])
    assert written(axes) == ["n/a"]
    assert axes.texts[0].get_position()[0] == pytest.approx(1 - 0.2), "a of the second group"


def steering_table() -> pd.DataFrame:
    rows = [
        (b, m, 0.2 + 0.1 * i, 0.15, 0.5, NAN if m == "plain" else 0.1, 0.35 if i else NAN)
        for b in STEERED
        for i, m in enumerate(("plain", "positive", "negative"))
    ]
    columns = ["behaviour", "mode", "value", "low", "high", "null_low", "null_high"]
    return pd.DataFrame(rows, columns=columns)


def test_steering_bars_have_the_null_interval_over_them_and_in_the_legend(axes):
    draw.steering_bars(axes, steering_table())
    modes = ["baseline", "positive (+1)", "negative (-1)"]
    assert legend_of(axes.figure) == [*modes, "null interval"]
    null = [p for p in axes.patches if p.get_hatch()]
    assert len(null) == 8, "two modes of four behaviours"
    assert {(round(p.get_y(), 6), round(p.get_height(), 6)) for p in null} == {(0.1, 0.25)}
    baseline = {round(p.get_x(), 3) for p in axes.patches[:4]}
    assert not baseline & {round(p.get_x(), 3) for p in null}
    _, other = plt.subplots()
    draw.steering_bars(other, steering_table().assign(null_low=NAN, null_high=NAN), 0.25)
    assert legend_of(other.figure) == ["baseline", "positive (+0.25)", "negative (-0.25)"]


def compared(*ways: tuple[str, str]) -> pd.DataFrame:
    """Rows of models and how they were measured; the last has no total."""
    rows = []
    for rank, (model, tasks) in enumerate(ways):
        for place, behaviour in enumerate(BEHAVIOURS):
            for metric in ("segment count", "segment fraction"):
                rows.append((model, tasks, behaviour, metric, 0.1 * (place + rank)))
        total = NAN if rank == len(ways) - 1 else 4.0 + rank
        rows.append((model, tasks, "all", "segment count", total))
    table = pd.DataFrame(rows, columns=["model", "tasks", "behaviour", "metric", "value"])
    return table.assign(annotator="x", reader=None, low=table["value"], high=table["value"])


HUES = {"a": "#111111", "b": "#222222", "c": "#333333"}
PANELS = {"counts": [18], "fractions": [18], "both": [18, 18], "totals": [18, 3]}


@pytest.mark.parametrize("name", PANELS)
def test_a_comparison_has_a_bar_a_model_and_says_who_was_measured_otherwise(name):
    alike = [(model, "grammar") for model in "abc"]
    apart = [alike[0], ("b", "messages"), alike[2]]
    for ways, hatches in ((alike, [None] * 3), (apart, [None, "///", None])):
        figure = plt.figure(figsize=(9, 5))
        draw.comparison(figure, compared(*ways), name, palette=HUES)
        assert [len(axes.patches) for axes in figure.axes] == PANELS[name]
        way = "\n(tasks {}, annotator x)" if ways is apart else ""
        assert legend_of(figure) == [f"{model}{way.format(tasks)}" for model, tasks in ways]
        for axes in figure.axes:
            bars = np.reshape(axes.patches, (3, -1))
            assert [bar.get_hatch() for bar in bars[:, 0]] == hatches
        heights = np.reshape([p.get_height() for p in figure.axes[0].patches], (3, 6))
        assert heights == pytest.approx(0.1 * (np.arange(6) + np.arange(3)[:, None]))
    if name == "totals":
        assert [p.get_width() for p in axes.patches][:2] == [4, 5]
        assert written(axes) == ["n/a"]
        assert axes.texts[0].get_position()[1] == 2
        assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b", "c"]
        assert axes.get_ylim() == (2.5, -0.5), "the first on top, a row also for the missing"


# --- matrices ----------------------------------------------------------------------------


def test_a_matrix_is_signed_symmetric_and_names_missing_cells(axes):
    table = pd.DataFrame([[0.1, -0.4], [NAN, 0.2]])
    draw.matrix(axes, table, ["up", "down"], ["a", "b"], label="change")
    assert sorted(written(axes)) == ["+0.10", "+0.20", "-0.40", "n/a"]
    assert axes.collections[0].get_clim() == (-0.4, 0.4)
    missing = next(t for t in axes.texts if t.get_text() == "n/a")
    assert missing.get_position() == (0.5, 1.5)


def test_confusions_have_a_panel_an_annotator_and_kappa_in_the_title():
    shares = pd.DataFrame(
        [("x", "a", 0.3, 0.7), ("x", "b", NAN, NAN), ("y", "a", 1, 0), ("y", "b", 0, 1)],
        columns=["annotator", "label", "a", "b"],
    )
    kappa = [("x", "kappa", 0.5, 0.4, 0.6), ("x", "accuracy", 0.9, NAN, NAN)]
    kappa.append(("y", "kappa", NAN, NAN, NAN))
    columns = ["annotator", "quantity", "value", "low", "high"]
    report = pd.DataFrame(kappa, columns=columns)
    figure, panels = plt.subplots(1, 2)
    draw.confusions(panels, shares, report, reference="truth")
    titles = [panel.get_title() for panel in panels]
    assert titles == ["x\nkappa 0.50 (0.40 to 0.60)", "y\nkappa n/a"]
    assert written(panels[0]) == ["0.30", "0.70", "n/a", "n/a"]
    assert panels[0].get_ylabel() == "labelled by truth"
    assert [t.get_text() for t in panels[1].get_yticklabels()] == ["", ""]
    assert len(figure.axes) == 2, "no colour bar"


# --- lines -------------------------------------------------------------------------------


def test_curves_draw_a_line_a_behaviour_with_its_band_and_mark(axes):
    line = np.array([1.0, 3.0, 2.0])
    bands, mark = {"deduction": (line - 1, line + 1)}, {"deduction": 1}
    draw.curves(axes, {"deduction": line}, label="KL", bands=bands, mark=mark)
    drawn, mark = axes.lines
    assert drawn.get_xydata().tolist() == [[0, 1], [1, 3], [2, 2]]
    assert to_hex(drawn.get_color()) == COLOURS["deduction"].lower()
    assert list(mark.get_xdata()) == [1, 1]
    assert reach(axes.collections[0]) == (0, 4)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "KL")
    draw.side_legend(axes.figure, axes)
    assert legend_of(axes.figure) == ["deduction"]


def test_growth_has_a_line_a_behaviour_and_says_when_there_is_none(axes):
    cosines, counts = np.array([[0.5], [0.9]]), np.array([[10], [40]])
    table = words.growth(cosines, counts, (0.1, 0.5), ["deduction"])
    draw.growth(axes, table)
    assert axes.lines[0].get_xydata().tolist() == [[10, 0.5], [40, 0.9]]
    axes.figure.canvas.draw()
    low, high = axes.get_xlim()
    ticks = axes.get_xticklabels(which="both")
    named = [t.get_text() for t in ticks if low <= t.get_position()[0] <= high and t.get_text()]
    assert named == ["10", "20"], "plain numbers, and room between them"
    _, other = plt.subplots()
    draw.growth(other, table.iloc[:0])
    assert "too few spans" in written(other)[0]


def effect_table(n_layers: int = 5) -> pd.DataFrame:
    """Every behaviour but the first, over the layers."""
    rng = np.random.default_rng(1)
    rows = [(b, layer, rng.exponential()) for b in STEERED[1:] for layer in range(n_layers)]
    table = pd.DataFrame(rows, columns=["behaviour", "layer", "mean"])
    return table.assign(low=table["mean"] / 2, high=table["mean"] * 2, sd=0.25)


BANDS = {
    "interval": (lambda r: (r["low"].min(), r["high"].max()), "95% interval"),
    "sd": (
        lambda r: ((r["mean"] - r["sd"]).min(), (r["mean"] + r["sd"]).max()),
        "one standard deviation",
    ),
}


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize(
    ("grid", "shared"), [((1, 4), {"sharey": True}), ((2, 2), {"sharex": True})]
)
def test_effect_panels_have_means_bands_and_nulls_and_say_what_is_missing(band, grid, shared):
    figure, panels = plt.subplots(*grid, figsize=(7, 4), **shared)
    table = effect_table().assign(null_low=0.01, null_high=9.0)
    given = {"band": band, "mark": {STEERED[1]: 2}, "absent": "nothing here"}
    draw.effect_panels(panels.flat, table, STEERED, label="KL, nats", **given)
    figure.canvas.draw()
    first, *others = panels.flat
    assert written(first) == ["nothing here"]
    assert not first.lines
    expected, words = BANDS[band]
    for panel, name in zip(others, STEERED[1:], strict=True):
        rows = table[table["behaviour"] == name]
        assert panel.lines[0].get_ydata() == pytest.approx(rows["mean"].to_numpy())
        assert reach(panel.collections[0]) == pytest.approx(expected(rows))
        assert reach(panel.collections[1]) == pytest.approx((0.01, 9.0))
        assert panel.get_title() == name
        assert len(panel.get_yticks()) > 1, "the empty panel leaves the ticks of the others"
        assert len(panel.get_xticks()) > 1
    assert list(others[0].lines[1].get_xdata()) == [2, 2]
    if "sharey" in shared:
        assert [t.get_text() for t in first.get_yticklabels() if t.get_visible()]
        assert first.get_ylabel() == "KL, nats"
    assert legend_of(figure) == ["mean", words, "null interval", "steering layer"]


def test_one_huge_layer_does_not_hide_the_others_on_a_logarithmic_axis():
    table = effect_table()
    table["mean"] = 0.1 * 2.0 ** table["layer"].where(table["layer"] < 4, 10)
    heights = {}
    for log in (False, True):
        figure, panels = plt.subplots(1, 4, sharey=True)
        draw.effect_panels(panels, table, STEERED, label="x", band="sd", log=log)
        figure.canvas.draw()
        points = panels[1].transData.transform(panels[1].lines[0].get_xydata())
        heights[log] = np.ptp(panels[1].transAxes.inverted().transform(points)[:4, 1])
        plt.close(figure)
    assert heights[False] < 0.05
    assert heights[True] > 0.2


# --- doses -------------------------------------------------------------------------------


def dose_table() -> pd.DataFrame:
    """Two directions at five coefficients with a null interval of the width of the push."""
    rows = [
        (b, metric, c, 0.5 + 0.1 * c, 0.4 + 0.1 * c, 0.6 + 0.1 * c, 0.5 - abs(c) / 10, 0.9)
        for b in STEERED[:2]
        for metric in ("token fraction", "accuracy", "tokens")
        for c in (-2.0, -1.0, 0.0, 1.0, 2.0)
    ]
    names = ["steered", "metric", "coefficient", "value", "ci_low", "ci_high"]
    table = pd.DataFrame(rows, columns=[*names, "null_low", "null_high"])
    table.loc[table["coefficient"] == 0, ["null_low", "null_high"]] = NAN
    return table


def test_doses_have_a_panel_a_fraction_and_a_side_effect_on_fixed_axes():
    figure = plt.figure(figsize=(7, 5))
    draw.doses(figure, dose_table())
    panels = {axes.get_title(): axes for axes in figure.axes if axes.axison}
    assert list(panels) == [*STEERED, "accuracy", "tokens"]
    assert written(panels[STEERED[2]]) == ["unavailable"]
    shares = [panels[name] for name in (STEERED[0], STEERED[1], "accuracy")]
    assert {axes.get_ylim() for axes in shares} == {(-0.03, 1.03)}
    assert panels["tokens"].get_ylim()[0] == 0
    assert panels["tokens"].get_ylabel() == "tokens"
    first = panels[STEERED[0]]
    assert first.get_ylabel() == "own token fraction"
    assert list(first.get_xticks()) == [-2, -1, 0, 1, 2]
    (line,) = first.lines
    assert line.get_ydata() == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])
    assert len(panels["accuracy"].lines) == 2
    assert legend_of(figure) == [*STEERED[:2], "95% interval", "null interval"]
    null, interval = first.collections
    assert null.get_hatch()
    (path,) = null.get_paths()
    ends = {x: path.vertices[path.vertices[:, 0] == x, 1] for x in (-2.0, 0.0, 2.0)}
    assert ends[0.0] == pytest.approx(0.5), "no width where nothing is added"
    for end in (-2.0, 2.0):
        assert (ends[end].min(), ends[end].max()) == pytest.approx((0.3, 0.9))
    assert reach(interval) == pytest.approx((0.2, 0.8))
    empty = plt.figure()
    draw.doses(empty, dose_table().assign(null_low=NAN, null_high=NAN))
    assert len(empty.axes[0].collections) == 1, "no controls, no null interval"
    unknown = dose_table()
    unknown.loc[unknown["metric"] == "accuracy", "value"] = NAN
    figure = plt.figure()
    draw.doses(figure, unknown)
    assert "accuracy" not in [axes.get_title() for axes in figure.axes if axes.axison]


def test_doses_have_ticks_that_do_not_overlap():
    nine = [-0.5, -0.35, -0.25, -0.15, 0.0, 0.15, 0.25, 0.35, 0.5]
    table = pd.concat(
        dose_table().query("coefficient == 1").assign(coefficient=one) for one in nine
    )
    figure = plt.figure(figsize=(7, 5))
    draw.doses(figure, table)
    figure.draw_without_rendering()
    ticks = [text for text in figure.axes[-1].get_xticklabels() if text.get_text()]
    assert [float(one.get_text().replace("\u2212", "-")) for one in ticks] == [-0.5, 0.0, 0.5]
    boxes = [one.get_window_extent() for one in ticks]
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


def test_the_sweep_has_a_legend_or_is_said_to_be_missing():
    rows = [("backtracking", layer, c, 0.3, 0.2, 0.4, 0.25, 0.1, 0.5) for c in (-1, 1)
            for layer in range(3)]  # fmt: skip
    columns = ["behaviour", "layer", "coefficient", "value", "ci_low", "ci_high", "plain"]
    table = pd.DataFrame(rows, columns=[*columns, "null_low", "null_high"])
    figure, panels = plt.subplots(1, 4)
    draw.sweep(panels, table, {"backtracking": 2})
    assert [written(panel) for panel in panels] == [[], *[["unavailable"]] * 3]
    assert legend_of(figure) == [
        "-1", "null interval -1", "+1", "null interval +1", "baseline", "steering layer",
    ]  # fmt: skip
    *_, baseline, layer = panels[0].lines
    assert list(baseline.get_ydata()) == [0.25, 0.25]
    assert list(layer.get_xdata()) == [2, 2]
    figure, panels = plt.subplots(1, 4)
    draw.sweep(panels, table.iloc[:0], {})
    assert written(panels[0]) == ["not run"]
    assert not figure.legends


# --- sets of labels of a person's own ----------------------------------------------------

LONG = "names a source or says that there's none".replace("'", "-")
OWN = (
    *("planning", LONG, "asks the user back", "refusal", "self-correction"),
    *("quotes/paraphrases", "x" * 40, "counts_on_its_fingers", "sycophancy"),
)


def own(n: int) -> LabelSet:
    """``n`` targets and half as many other labels."""
    others = [f"other {number}" for number in range((n + 1) // 2)]
    names = [*OWN[:n], *others]
    return LabelSet.from_dict({"labels": dict.fromkeys(names), "targets": list(OWN[:n])})


def panel_table(labels: LabelSet) -> pd.DataFrame:
    rows = [(name, layer, 1.0 + layer) for name in labels.targets for layer in range(4)]
    table = pd.DataFrame(rows, columns=["behaviour", "layer", "mean"])
    return table.assign(low=table["mean"] / 2, high=table["mean"] * 2, sd=0.25)


@pytest.mark.parametrize(
    ("n", "columns", "rows"), [(1, 4, [1]), (2, 4, [2]), (4, 4, [4]), (4, 2, [2, 2]),
                               (5, 4, [3, 2]), (5, 2, [2, 2, 1]), (9, 4, [3, 3, 3])]
)  # fmt: skip
def test_there_is_a_panel_a_target_in_rows_of_the_height_given(n, columns, rows):
    figure = plt.figure(figsize=(7, 2))
    panels = draw.panels(figure, OWN[:n], columns=columns, sharex=True)
    assert figure.axes == panels
    places = [axes.get_subplotspec().rowspan.start for axes in panels]
    assert [places.count(row) for row in range(len(rows))] == rows
    assert figure.get_size_inches().tolist() == [7, 2 * len(rows)]


def test_the_papers_panels_are_those_of_plain_subplots():
    for shape, size, columns in (((1, 4), (7, 2.3), 4), ((2, 2), (7, 4.2), 2)):
        known, expected = plt.subplots(*shape, figsize=size, sharey=True)
        figure = plt.figure(figsize=(7, size[1] / shape[0]))
        panels = draw.panels(figure, STEERED, columns=columns, sharey=True)
        assert figure.get_size_inches().tolist() == known.get_size_inches().tolist()
        for axes, other in zip(panels, expected.flat, strict=True):
            assert axes.get_position().bounds == other.get_position().bounds


def test_names_are_broken_behind_what_joins_their_words():
    assert [draw.short(name).split("\n") for name in BEHAVIOURS[:3]] == [
        ["initializing"], ["deduction"], ["adding-", "knowledge"],
    ]  # fmt: skip
    for name in OWN:
        for width in (14, 24):
            lines = draw.short(name, width).split("\n")
            assert max(map(len, lines)) <= width
            assert "".join(lines).replace(" ", "") == name.replace(" ", ""), "no letter is lost"
    assert draw.short("a/b_c d", 2).split("\n") == ["a/", "b_", "c", "d"]


def overlaps(texts) -> list[tuple[str, str]]:
    boxes = [(t.get_text(), t.get_window_extent().padded(-1)) for t in texts if t.get_text()]
    return [(a, b) for (a, one), (b, two) in itertools.combinations(boxes, 2)
            if one.overlaps(two)]  # fmt: skip


def names_of(figure) -> list:
    """The titles, the words along the axes, and the entries of legends."""
    found = [entry for legend in figure.legends for entry in legend.get_texts()]
    for axes in [axes for axes in figure.axes if axes.axison]:
        found += [axes.title, axes.xaxis.label, *axes.get_xticklabels()]
        found += axes.get_yticklabels()
    return [
        text for text in found if text.get_visible() and re.search("[a-z]", text.get_text())
    ]


def drawn_with(labels: LabelSet) -> dict[str, mpl.figure.Figure]:
    """The figures in which names meet, with a set of labels."""
    names, targets = labels.names, labels.targets
    found = {}
    for name, columns, band in (("row", 4, "interval"), ("grid", 2, "sd")):
        found[name] = plt.figure(figsize=(7, 2.2))
        panels = draw.panels(found[name], targets, columns=columns, sharex=True, sharey=True)
        draw.effect_panels(panels, panel_table(labels), label="x", band=band, labels=labels)
    rows = [(b, of, at, 0.1) for b in targets for of in ("own", "others") for at in (-1, 0, 1)]
    reading = pd.DataFrame(rows, columns=["behaviour", "of", "offset", "value"])
    reading = reading.assign(low=0, high=0.2)
    found["onset"] = plt.figure(figsize=(7, 2.2))
    draw.onset(draw.panels(found["onset"], targets, sharey=True), reading, labels=labels)
    rows = [(b, m, c, 0.5) for b in targets for m in ("token fraction", "loops", "tokens")
            for c in (-1.0, 0.0, 1.0)]  # fmt: skip
    doses = pd.DataFrame(rows, columns=["steered", "metric", "coefficient", "value"])
    doses = doses.assign(ci_low=0.4, ci_high=0.6, null_low=NAN, null_high=NAN)
    found["doses"] = draw.doses(plt.figure(figsize=(7, 6.6)), doses, labels=labels)
    rows = [(b, layer, c) for b in targets for layer in (0, 1) for c in (-1, 1)]
    sweep = pd.DataFrame(rows, columns=["behaviour", "layer", "coefficient"])
    sweep = sweep.assign(value=0.3, ci_low=0.2, ci_high=0.4, plain=0.2, null_low=0, null_high=1)
    found["sweep"] = plt.figure(figsize=(7, 2.4))
    draw.sweep(draw.panels(found["sweep"], targets, sharey=True), sweep, {}, labels=labels)
    rows = [(b, mode, 0.2, 0.1, 0.3) for b in targets for mode in draw.MODES]
    bars = pd.DataFrame(rows, columns=["behaviour", "mode", "value", "low", "high"])
    found["bars"], axes = plt.subplots(figsize=(7, 3))
    draw.steering_bars(axes, bars)
    found["matrix"], axes = plt.subplots(figsize=(7, 2.6))
    draw.matrix(axes, np.full((len(targets), len(names)), -0.5), targets, names, label="x")
    found["heatmap"], axes = plt.subplots(figsize=(5, 4.2))
    draw.heatmap(axes, np.eye(len(names)), names)
    shown = [("one", TEXT, [PlacedSegment(targets[-1], TEXT[:20], 0, 20)])]
    found["chains"] = draw.chains(plt.figure(figsize=(7, 3)), shown, labels=labels)
    return found


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_names_of_any_length_have_room_in_every_figure(n):
    labels = own(n)
    for name, figure in drawn_with(labels).items():
        draw.caption(figure, "a caption")
        figure.canvas.draw()
        texts = names_of(figure)
        assert overlaps(texts) == [], name
        assert any(labels.targets[0] in text.get_text() for text in texts), name
        for text in texts:
            box = text.get_window_extent()
            assert figure.bbox.padded(2).contains(*box.min), (name, text.get_text())
            assert figure.bbox.padded(2).contains(*box.max), (name, text.get_text())


def test_the_colours_are_those_of_the_set_and_a_strange_label_has_one_of_its_own(axes):
    labels = LabelSet.from_dict(
        {"labels": {"up": {"colour": "#123456"}, "down": {"colour": "#654321"}}}
    )
    draw.curves(axes, {"up": [0, 1], "down": [1, 0], "odd": [1, 1]}, label="x", labels=labels)
    assert [to_hex(line.get_color()) for line in axes.lines[:2]] == ["#123456", "#654321"]
    assert to_hex(axes.lines[2].get_color()) not in {"#123456", "#654321"}
    segments = [PlacedSegment("down", "a", 0, 1), PlacedSegment("odd", "b", 1, 2)]
    figure = draw.chains(plt.figure(), [("t", "ab", segments)], labels=labels)
    boxes = figure.axes[0].patches
    assert [to_hex(box.get_facecolor()) for box in boxes] == ["#654321", OTHER]
    assert legend_of(figure) == ["up", "down"]


def test_a_target_called_like_a_side_effect_is_not_mixed_with_it():
    labels = LabelSet.from_dict({"labels": {"tokens": "", "other": ""}, "targets": ["tokens"]})
    rows = [
        ("tokens", metric, c, value, value, value, NAN, NAN)
        for metric, value in (("token fraction", 0.5), ("tokens", 70.0))
        for c in (0.0, 1.0)
    ]
    columns = ["steered", "metric", "coefficient", "value", "ci_low", "ci_high"]
    table = pd.DataFrame(rows, columns=[*columns, "null_low", "null_high"])  # fmt: skip
    figure = draw.doses(plt.figure(), table, labels=labels)
    first, second = (axes for axes in figure.axes if axes.axison)
    assert [line.get_ydata().tolist() for line in first.lines] == [[0.5, 0.5]]
    assert [line.get_ydata().tolist() for line in second.lines] == [[70, 70]]
    assert first.get_ylim() == (-0.03, 1.03)


# --- chains in figures -------------------------------------------------------------------


def test_a_chain_is_drawn_letter_by_letter_on_the_colour_of_its_behaviour():
    (axes,) = draw.chains(plt.figure(), [("one", TEXT, SEGMENTS)]).axes
    rows: dict[float, str] = {}
    for text in axes.texts:
        row = text.get_position()[1]
        rows[row] = rows.get(row, "") + text.get_text()
    lines = [rows[row] for row in sorted(rows)]
    assert " ".join(lines).split() == TEXT.split(), "no word is lost or cut"
    coloured = dict.fromkeys(BEHAVIOURS, 0.0)
    names = {colour.lower(): name for name, colour in COLOURS.items()}
    for box in axes.patches:
        coloured[names[to_hex(box.get_facecolor())]] += box.get_width()
    assert coloured == {**dict.fromkeys(BEHAVIOURS, 0), "initializing": 33, "backtracking": 35}


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("", 5, []),
        ("abcdefgh", 3, ["abc", "def", "gh"]),
        ("ab\n\ncd", 5, ["ab", "", "cd"]),
        ("ab cde", 4, ["ab", "cde"]),
    ],
)
def test_lines_are_broken_at_spaces_and_newlines(text, width, lines):
    assert [text[a:b] for a, b in draw.wrapped(text, width)] == lines


@pytest.mark.parametrize("n_words", [1, 1000])
def test_chains_stand_side_by_side_on_a_figure_that_fits_the_longest(n_words):
    text = " ".join(["word"] * n_words)
    figure = plt.figure(figsize=(7, 3))
    draw.chains(figure, [("plain", "a b", ()), ("+ x", text, ())])
    draw.caption(figure, "a caption")
    figure.canvas.draw()
    short, long = figure.axes
    assert short.get_ylim() == long.get_ylim(), "lines of one height"
    line = long.get_window_extent().height / figure.dpi / (long.get_ylim()[0] + 0.5)
    assert 0.12 < line < 0.3, "inches a line, however many there are"
    assert legend_of(figure) == list(BEHAVIOURS)
    seen, _, note = "".join(entry.get_text() for entry in long.texts).partition("(and ")
    rest = text[len(text) - int(note.split()[0]) :] if note else ""
    assert (seen + rest).replace(" ", "") == text.replace(" ", "")
    assert bool(note) == (n_words == 1000)


def steered(coefficient: float, text: str = "a b") -> Steered:
    response = Response("t1", "", "", (), (), text, text, 0, "", closed=True, finished=True)
    one = Steered("t1", "none", -1, 0.0, "add", response, Annotation("t1", "x", ()))
    if not coefficient:
        return one
    return replace(one, direction="backtracking", layer=4, coefficient=coefficient)


def test_captions_and_legends_do_not_cover_the_axes():
    figure, panels = plt.subplots(1, 2, figsize=(9, 4))
    for axes in panels:
        draw.steering_bars(axes, steering_table())
    draw.caption(figure, "tiny-thinker (a fixture, built to be steerable), 60 tasks. " * 4)
    figure.canvas.draw()
    caption, (legend,) = figure._supxlabel.get_window_extent(), figure.legends
    for box in [axes.get_tightbbox() for axes in panels]:
        assert not caption.overlaps(box)
        assert not legend.get_window_extent().overlaps(box)
    assert figure.bbox.padded(1).contains(*caption.min)
    assert figure.bbox.padded(1).contains(*caption.max)


# --- chains as text ----------------------------------------------------------------------


def bare(html: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", html))


@pytest.mark.parametrize(
    "segments",
    [SEGMENTS, (*SEGMENTS, PlacedSegment("deduction", TEXT[20:50], 20, 50)), ()],
    ids=["apart", "overlapping", "none"],
)
def test_a_chain_keeps_its_text_and_shows_overlaps_once(segments):
    assert bare(words.html(TEXT, segments)) == TEXT
    painted = words.terminal(TEXT, segments, colour=True)
    assert re.sub(r"\x1b\[[0-9;]*m", "", painted) == TEXT
    lines = words.terminal(TEXT, segments, colour=False).splitlines()
    assert " ".join(line[24:] for line in lines).split() == TEXT.split()


def test_texts_have_the_names_and_colours_of_the_set_given():
    labels = LabelSet.from_dict({"labels": {"up": {"colour": "#123456"}, "go on": ""}})
    segments = [PlacedSegment("up", TEXT[:9], 0, 9), PlacedSegment("deduction", "x", 9, 10)]
    made = words.html(TEXT, segments, labels=labels)
    assert re.findall("background:(#[0-9a-f]{6})", made) == ["#123456", OTHER]
    panel = words.Panel("a", TEXT, segments, [0.5, NAN])
    response = Response("t", "", "", (), (), TEXT, TEXT, 0, "", closed=True, finished=True)
    one = Steered("t", "none", -1, 0.0, "add", response, Annotation("t", "x", tuple(segments)))
    for page in (
        words.html_panels([panel], labels=labels),
        words.html_legend(labels),
        words.html_pairs({"up": (one, one)}, labels=labels),
        words.terminal_shares(["a"], [[0.5, NAN]], colour=False, labels=labels),
    ):
        assert {name for name in (*labels.names, *BEHAVIOURS[2:]) if name in page} == {
            "up", "go on",
        }  # fmt: skip
    lines = words.terminal(TEXT, segments, colour=False, labels=labels).splitlines()
    assert lines[0].split() == ["up", *TEXT[:9].split()]


def luminance(code: int) -> float:
    """Relative luminance (WCAG 2) of a colour of xterm's 256 (its cube and its greys)."""
    levels = (0, 95, 135, 175, 215, 255)
    if code >= 232:
        channels = [8 + 10 * (code - 232)] * 3
    else:
        channels = [levels[(code - 16) // step % 6] for step in (36, 6, 1)]
    linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_a_terminal_tells_all_colours_apart_under_black_letters():
    codes = [words.terminal_code(colour) for colour in (*PALETTE, OTHER)]
    assert len(set(codes)) == len(codes)
    assert min(luminance(code) + 0.05 for code in codes) / 0.05 > 6
    assert words.terminal_code("#ffffff") == 231
    assert words.terminal_code("#E69F00") == 221
    painted = words.terminal(TEXT, SEGMENTS, colour=True)
    assert [int(code) for code in re.findall(r"48;5;(\d+)m", painted)] == [
        words.terminal_code(COLOURS[segment.label]) for segment in SEGMENTS
    ]


def test_html_is_escaped_everywhere():
    evil = "<script>alert(1)</script>"
    segment = PlacedSegment(evil, evil, 0, len(evil))
    made = words.html_panels([words.Panel(evil, evil, (segment,), [0] * 6, evil)])
    made += words.html(evil, (), title=evil) + words.html_line(evil, wrong=True)
    assert "<script" not in made
    assert made.count("&lt;script&gt;") >= 6


def test_bars_are_as_long_as_the_shares_and_a_missing_share_is_no_zero():
    shares = [0.0, 0.5, 0.25, 0.25, 0.0, NAN]
    made = words.html_panels([words.Panel("plain", TEXT, SEGMENTS, shares)])
    widths = [int(width) for width in re.findall(r"width:(\d+)px", made)]
    assert widths == [round(share * words.WIDTH) for share in shares[:5]]
    assert made.count("n/a") == 1
    table = words.terminal_shares(["plain"], [shares], colour=False).splitlines()
    assert table[0].split() == ["share", "of", "tokens", "plain"]
    assert [line.split()[-1] for line in table[1:]] == ["0%", "50%", "25%", "25%", "0%", "n/a"]


def test_pairs_show_both_chains_with_what_was_added_or_that_there_is_nothing():
    figure = draw.pair(plt.figure(), None)
    assert "nothing was steered" in written(figure.axes[0])[0]
    figure = draw.pair(plt.figure(), (steered(0), steered(2.0)))
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == ["baseline, task t1", "+2 backtracking, layer 4"]
    pair = steered(0.0, "plainly written"), steered(1.0, "<b>back</b>")
    made = words.html_pairs({"backtracking": pair, "deduction": None})
    for part in ("plainly written", "&lt;b&gt;back", "+1 backtracking, layer 4"):
        assert part in made
    assert made.count("<td") == 2
    assert "deduction: not steered, or no chain rose" in made
    assert bare(words.html_line("two\nlines", wrong=True)) == "error: two lines"


# --- tables ------------------------------------------------------------------------------


def test_intervals_are_written_beside_their_value_in_the_order_of_the_rows():
    rows = [
        ("b", "rank", 2.0, 1.0, 4.0),
        ("b", "share", -0.001, NAN, NAN),
        ("a", "share", 0.25, -0.004, 0.5),
    ]
    table = pd.DataFrame(rows, columns=["who", "what", "value", "low", "high"])
    shown = words.intervals(table, ["what"], "who")
    assert list(shown.columns) == ["b", "a"]
    assert list(shown.index) == ["rank", "share"]
    assert shown["b"].tolist() == ["2.00 (1.00 to 4.00)", "0.00"], "no -0.00"
    assert shown["a"].tolist() == ["n/a", "0.25 (0.00 to 0.50)"]
    whole = words.intervals(table[:1], ["what"], "who", digits=0)
    assert whole["b"].tolist() == ["2 (1 to 4)"]
    assert words.intervals(table.iloc[:0], ["what"], "who").empty


def test_shown_numbers_are_rounded_and_nothing_is_shown_as_something_else():
    table = pd.DataFrame(
        {"p": [0.0002, 0.04, NAN], "share": [0.0002, 1.5, NAN], "n": [1.0, 2.0, NAN],
         "outside": [True, None, NAN]}
    )  # fmt: skip
    shown = words.shown(table)
    assert shown["p"].tolist() == ["<0.001", "0.040", "n/a"]
    assert shown["share"].tolist() == ["0.000", "1.500", "n/a"]
    assert shown["n"].tolist() == ["1", "2", "n/a"]
    assert shown["outside"].tolist() == [True, "n/a", "n/a"]


def test_a_wide_table_refuses_two_numbers_for_one_cell():
    rows = pd.DataFrame(
        [("t", "grammar", "x", 1.0), ("t", "offline", "x", 3.0), ("t", "grammar", "y", 2.0)],
        columns=["kind", "annotator", "behaviour", "value"],
    )
    with pytest.raises(ValueError, match="duplicate entries"):
        words.wide(rows, ["kind"], "behaviour")
    found = words.wide(rows, ["kind", "annotator"], "behaviour")
    assert found.index.tolist() == [("t", "grammar"), ("t", "offline")]
    assert found.columns.tolist() == ["x", "y"]
    assert found["x"].tolist() == [1.0, 3.0]
    assert found["y"].isna().tolist() == [False, True]
