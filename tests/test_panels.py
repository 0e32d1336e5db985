"""Figures of several panels: what is drawn is what was given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from test_annotation import compare, two_chains

from stllms import effects, panels, plots
from stllms.records import STEERED, Annotation, PlacedSegment, Response, Steered


def figure() -> Figure:
    made = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(made)
    return made


def test_confusions_have_a_panel_an_annotator_and_kappa_in_the_title():
    drawn, found = figure(), two_chains()
    axes = drawn.subplots(1, 2)
    assert panels.confusions(axes, [found, found]) is axes
    drawn.canvas.draw()
    for panel in axes:
        assert panel.get_title() == "b: kappa 0.00 (0.00 to 0.00)"
        shares = [text.get_text() for text in panel.texts]
        assert {"0.30", "0.70", "n/a"} <= set(shares)
    assert axes[0].get_ylabel() == "labelled by a"
    assert axes[0].get_yticklabels()[1].get_text() == "deduction"
    assert axes[1].get_yticklabels()[1].get_text() == ""
    assert len(drawn.axes) == 2, "no colour bar"


def test_a_comparison_of_nothing_is_drawn_as_missing():
    drawn = figure()
    axes = drawn.subplots(1, 1, squeeze=False)[0]
    panels.confusions(axes, [compare([], [], [])])
    assert {text.get_text() for text in axes[0].texts} == {"n/a"}


def test_effects_have_a_row_a_model_with_its_own_layers_and_marks():
    rng = np.random.default_rng(0)
    sizes = {"one": 4, "two": 6}
    curves = pd.concat(
        effects.table({"s": rng.random((5, 4, n))}, STEERED).assign(model=model)
        for model, n in sizes.items()
    )
    drawn = figure()
    panels.effect_rows(drawn, curves, {"two": {STEERED[1]: 3}})
    assert len(drawn.subfigs) == 2
    for part, (model, n) in zip(drawn.subfigs, sizes.items(), strict=True):
        assert len(part.axes) == len(STEERED)
        assert part.axes[0].get_ylabel().startswith(model)
        for axes, name in zip(part.axes, STEERED, strict=True):
            mean = curves[(curves["model"] == model) & (curves["behaviour"] == name)]["mean"]
            assert axes.lines[0].get_ydata() == pytest.approx(mean.to_numpy())
            assert len(axes.lines[0].get_xdata()) == n
    marked = drawn.subfigs[1].axes[1].lines[1]
    assert list(marked.get_xdata()) == [3, 3]
    assert len(drawn.subfigs[0].axes[1].lines) == 1


@pytest.mark.parametrize("n_words", [1, 100, 2000])
def test_chains_stand_side_by_side_on_a_figure_that_fits_the_longest(n_words):
    drawn, text = figure(), " ".join(["word"] * n_words)
    segments = [PlacedSegment("deduction", "word", 0, 4)]
    assert panels.chains(drawn, [("plain", "a b", ()), ("+ x", text, segments)]) is drawn
    plots.caption(drawn, "a caption")
    drawn.canvas.draw()
    short, long = drawn.axes
    assert (short.get_title("left"), long.get_title("left")) == ("plain", "+ x")
    assert short.get_ylim() == long.get_ylim(), "lines of one height"
    line = long.get_window_extent().height / drawn.dpi / (long.get_ylim()[0] + 0.5)
    assert 0.18 < line < 0.45, "inches a line, however many there are"
    seen = "".join(entry.get_text() for entry in long.texts)
    cut = plots.n_lines(text) > panels.MOST_LINES
    assert ("more characters" in seen) == cut
    if cut:
        kept, note = seen.split("(and ")
        left_out = int(note.split()[0])
        rest = text[len(text) - left_out :]
        assert kept.replace(" ", "") + rest.replace(" ", "") == text.replace(" ", "")


def test_twins_name_what_was_added_or_that_there_is_nothing():
    drawn = figure()
    panels.twins(drawn, None)
    assert "nothing was steered" in drawn.axes[0].texts[0].get_text()
    response = Response("t", "", "", (), (), "a b", "a b", 0, "", closed=True, finished=True)
    plain = Steered("t", "none", -1, 0.0, "add", response, Annotation("t", "hand", ()))
    pushed = replace(plain, direction="backtracking", layer=4, coefficient=2.0)
    drawn = figure()
    panels.twins(drawn, (plain, pushed))
    titles = [axes.get_title("left") for axes in drawn.axes]
    assert titles == ["plain, task t", "+2 backtracking, layer 4"]
