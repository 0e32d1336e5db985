"""Data -> several axes at once; the single ones are in :mod:`stllms.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stllms import plots
from stllms.agreement import Agreement
from stllms.coloured import COLOURS
from stllms.evaluation import FRACTION, SIDE_EFFECTS
from stllms.records import STEERED, PlacedSegment, Steered

#: Lines of a chain that :func:`chains` draws at most; inches a line, and for all around them.
MOST_LINES, LINE_HEIGHT, HEAD_AND_FOOT = 40, 0.225, 0.95


def confusions(panels: Sequence[Axes], compared: Sequence[Agreement]) -> Sequence[Axes]:
    """A panel an annotator: how it labels what the reference calls each label.

    Every row is a share of what the reference gave that label, so rows add up to 1 and the
    diagonal is the share found again; kappa and its interval are in the title.
    """
    for place, (axes, found) in enumerate(zip(panels, compared, strict=True)):
        names = found.labels
        rows = names if place == 0 else [""] * len(names)
        plots.matrix(axes, found.by_first(), rows, names, label="", fmt=".2f", limit=1)
        axes.collections[0].colorbar.remove()
        axes.tick_params(axis="x", rotation=90)
        axes.set_xlabel(f"labelled by {found.second}")
        axes.set_title(f"{found.second}: kappa {found.kappa_text()}")
    panels[0].set_ylabel(f"labelled by {compared[0].first}")
    return panels


def chains(figure: Figure, shown: Sequence[tuple[str, str, Sequence[PlacedSegment]]]) -> Figure:
    """Chains side by side, each given as title, text and segments, below a legend.

    The figure is made as high as the longest of them needs, up to :data:`MOST_LINES`.
    """
    rows = min(MOST_LINES, max(plots.n_lines(text) for _, text, _ in shown))
    figure.set_figheight(LINE_HEIGHT * rows + HEAD_AND_FOOT)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (title, text, segments) in zip(panels, shown, strict=True):
        plots.chain(axes, text, segments, title=title, rows=max(rows, 1))
    plots.legend(figure)
    return figure


def twins(figure: Figure, pair: tuple[Steered, Steered] | None) -> Figure:
    """:func:`chains` of a plain chain and its steered twin, or a line that there is none."""
    if pair is None:
        axes = figure.subplots()
        plots.missing(axes, "nothing to show: nothing was steered, or no chain rose")
        return figure
    plain, steered = pair
    added = f"{steered.coefficient:+g} {steered.direction}, layer {steered.layer}"
    titles = f"plain, task {plain.task_id}", added
    return chains(
        figure,
        [
            (title, one.response.thinking, one.annotation.segments)
            for title, one in zip(titles, pair, strict=True)
        ],
    )


def effect_rows(
    figure: Figure, curves: pd.DataFrame, marks: Mapping[str, Mapping[str, int]]
) -> Figure:
    """A row of four panels a model from rows of :func:`stllms.effects.table` with a ``model``
    column: mean, bootstrap interval, and the layers of ``marks`` (model -> behaviour -> layer)
    as dotted lines."""
    groups = list(curves.groupby("model", sort=False))
    parts = figure.subfigures(len(groups), 1, squeeze=False)[:, 0]
    for part, (model, table) in zip(parts, groups, strict=True):
        axes = part.subplots(1, len(STEERED), sharex=True, sharey=True)
        label = f"{model}\nsurrogate gradient"
        released_effects(axes, table, label=label, mark=marks.get(str(model)))
    return figure


def released_effects(
    every: Sequence[Axes],
    table: pd.DataFrame,
    *,
    label: str,
    band: str = "interval",
    mark: Mapping[str, int] | None = None,
) -> None:
    """:func:`plots.effect_panels` of the steered behaviours that ``table`` has; the panels of
    the others say that they were left out. No vertical grid: dotted lines would be lost."""
    known = {}
    for axes, name in zip(every, STEERED, strict=True):
        if name in set(table["behaviour"]):
            known[name] = axes
            continue
        axes.set_title(name)
        plots.missing(axes, "left out:\nno released values").set(xlabel="layer", ylabel=label)
    plots.effect_panels(
        list(known.values()), table, list(known), label=label, band=band, mark=mark
    )
    for axes in every:
        axes.label_outer()
        axes.grid(axis="x", visible=False)


def doses(figure: Figure, table: pd.DataFrame) -> Figure:
    """The dose-response page, from :func:`stllms.doses.table`.

    First row: the own token fraction of each direction, its interval and the range of the
    controls. Then a panel a side effect with a line a direction; the grey band is the range of
    the control directions at the same coefficient, over all steering layers.
    """
    names = [name for name in STEERED if name in set(table["steered"])]
    effects = [name for name in SIDE_EFFECTS if name in set(table["metric"])]
    rows = 1 + -(-len(effects) // 4)
    every = figure.subplots(rows, 4, sharex=True, squeeze=False).ravel()
    for axes, name in zip(every[:4], STEERED, strict=True):
        found = table[(table["steered"] == name) & (table["metric"] == FRACTION)]
        axes.set_title(name)
        if found.empty:
            plots.missing(axes, "unavailable")
            continue
        _null(axes, found)
        _dose(axes, found, COLOURS[name], band=True)
    every[0].set_ylabel("own token fraction")
    for axes, metric in zip(every[4:], effects, strict=False):
        axes.set_title(metric)
        _null(axes, table[table["metric"] == metric])
        for name in names:
            found = table[(table["steered"] == name) & (table["metric"] == metric)]
            _dose(axes, found, COLOURS[name], band=False)
    for axes in every[4 + len(effects) :]:
        axes.set_visible(False)
    every[0].set_xticks(sorted(table["coefficient"].unique()))
    for axes in every[len(effects) : 4 + len(effects)]:
        axes.set_xlabel("coefficient")
        axes.tick_params(labelbottom=True)
    plots.legend(figure, names, columns=4)
    return figure


def _null(axes: Axes, rows: pd.DataFrame) -> None:
    """Where control directions of the same length ended, a grey bar a coefficient."""
    known = rows[rows["null_low"].notna()].groupby("coefficient")
    low, high = known["null_low"].min(), known["null_high"].max()
    width = 0.08 * (rows["coefficient"].max() - rows["coefficient"].min())
    axes.bar(low.index, high - low, width, bottom=low, color="#888888", alpha=0.35)


def _dose(axes: Axes, rows: pd.DataFrame, colour: str, *, band: bool) -> None:
    """One line over the coefficients."""
    rows = rows[rows["value"].notna()]
    at = rows["coefficient"]
    axes.plot(at, rows["value"], color=colour, marker="o", markersize=4)
    if band:
        axes.fill_between(at, rows["ci_low"], rows["ci_high"], color=colour, alpha=0.18, lw=0)


def sweep(panels: Sequence[Axes], table: pd.DataFrame, marks: Mapping[str, int]) -> None:
    """A panel a direction from :func:`stllms.doses.sweep`: own token fraction by layer, a line
    a coefficient, plain as a dashed line, the steering layer of ``marks`` dotted; the range of
    the controls is hatched in the colour of their coefficient."""
    for axes, name in zip(panels, STEERED, strict=True):
        found = table[table["behaviour"] == name]
        axes.set_title(name)
        if found.empty:
            plots.missing(axes, "not run" if table.empty else "unavailable")
            continue
        for coefficient, rows in found.groupby("coefficient"):
            colour = plots.MODES["positive" if coefficient > 0 else "negative"]
            edges = rows["ci_low"], rows["ci_high"]
            axes.plot(rows["layer"], rows["value"], color=colour, marker="o", markersize=4)
            axes.fill_between(rows["layer"], *edges, color=colour, alpha=0.15, linewidth=0)
            null = {
                **plots.HATCH,
                "edgecolor": colour,
                "hatch": "////" if coefficient > 0 else "...",
            }
            axes.fill_between(rows["layer"], rows["null_low"], rows["null_high"], **null)
        axes.axhline(found["plain"].iloc[0], color=plots.MODES["plain"], linestyle="--")
        if name in marks:
            axes.axvline(marks[name], color="#555555", linestyle=":", linewidth=1)
        axes.set_xlabel("layer")
    panels[0].set_ylabel("own token fraction")
