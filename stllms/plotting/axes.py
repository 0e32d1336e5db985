"""Data -> axes. A function here draws on what it is given and returns it.

None reads a file, saves or shows. ``labels`` is the set of labels that is drawn: it names the
panels and gives each behaviour one colour everywhere. A value that is missing is written as
``n/a``, never drawn as zero. Letters are sized for figures 7 inches wide, printed as they are;
where a set has more or longer names than fit the size given, the figure is made larger.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter, StrMethodFormatter

from stllms.labels import OTHER, PAPER, LabelSet
from stllms.records import PlacedSegment, Steered

#: The baseline, positive and negative steering.
MODES: dict[str, str] = {"plain": "#777777", "positive": "#1B9E77", "negative": "#7570B3"}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
#: The null interval: the range of control directions.
NULL: dict[str, Any] = {
    "label": "null interval",
    "facecolor": "none",
    "edgecolor": "#222222",
    "hatch": "//////",
    "linewidth": 0.6,
    "alpha": 0.5,
}
WHISKERS: dict[str, Any] = {"fmt": "none", "ecolor": "#333333", "elinewidth": 0.8}
#: How the bars of a second, third, ... way of measuring are hatched.
HATCHES = ("", "///", "...", "xxx", "---")
#: The comparison figures: name -> a panel a metric; ``totals`` has another for the models.
COMPARISONS = {
    "counts": ("segment count",),
    "fractions": ("segment fraction",),
    "both": ("segment count", "segment fraction"),
    "totals": ("segment fraction",),
}
#: Side effects that are no shares: unit.
UNITS = {"tokens": "tokens", "kl": "nats a token", "log perplexity": "nats a token"}
#: Characters of a line of a chain, and lines that are drawn at most.
LINE, MOST_LINES = 55, 40
#: Inches of a line of a chain, and for all around the lines.
LINE_HEIGHT, HEAD_AND_FOOT = 0.16, 0.9
#: Panels in a row, and characters of a line of a name, and of one with more than two of these.
ACROSS, NAME, LONG = 4, 14, 24
#: Coefficients that have a tick each; of more, the ends and 0.
TICKS = 5
#: Inches of a letter of a name, and in a legend of a row and of all that is beside a name.
LETTER, ROW, BESIDE = 0.063, 0.15, 0.5
#: Inches that a cell of a matrix needs at least, and one of a square matrix.
CELL, SQUARE = 0.27, 0.5
#: Inches of a colour bar, and of what is above and below a matrix.
COLOUR_BAR, AROUND = 1.0, 1.0


def style() -> None:
    """The look of every figure: call once, at the top of a notebook."""
    sns.set_theme(context="paper", style="whitegrid", font_scale=0.9)
    mpl.rcParams.update(
        {
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "axes.titlesize": 8,
            "legend.fontsize": 7,
            "lines.linewidth": 1.2,
            "lines.markersize": 3,
            "grid.linewidth": 0.6,
            "hatch.linewidth": 0.5,
            "pdf.fonttype": 42,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )


@contextmanager
def styled() -> Iterator[None]:
    """:func:`style` for what is drawn inside, or by the function that this decorates, and as it
    was before behind it."""
    with mpl.rc_context():
        style()
        yield
        interactive = mpl.is_interactive()
    mpl.interactive(interactive)  # a backend that was loaded inside decides, as in any cell


def caption(figure: Figure, text: str) -> None:
    """A few small words under a figure: which model, on what, and what it is not."""
    width = max(60, int(figure.get_figwidth() * 17))
    text = textwrap.fill(text, width, break_on_hyphens=False)
    figure.supxlabel(text, fontsize=7, color="#555555", x=0.01, ha="left")


def legend(panels: Sequence[Axes], handles: Sequence[Artist] = (), columns: int = 6) -> None:
    """A legend above the figure of ``panels``, where it hides nothing and only once: of what is
    labelled in the fullest of them, or of ``handles``.
    """
    figure = panels[0].figure
    drawn = max((axes.get_legend_handles_labels()[0] for axes in panels), key=len)
    handles = handles or drawn
    if handles and not figure.legends:
        columns = min(columns, len(handles))
        figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)


def side_legend(figure: Figure, axes: Axes) -> None:
    """The lines of ``axes`` named to the right of the figure, where they hide nothing."""
    handles, names = axes.get_legend_handles_labels()
    if handles:
        names = [short(name, LONG) for name in names]
        _at_least(axes, height=ROW * sum(name.count("\n") + 1 for name in names) + 0.6)
        figure.legend(handles, names, loc="outside right upper", frameon=False)


def short(name: str, width: int = NAME) -> str:
    """A name on lines of at most ``width`` characters, broken behind hyphens, spaces, slashes
    and underscores; a longer word is cut.
    """
    line = rf".{{1,{width}}}(?:(?<=[-/_ ])|\Z)|.{{1,{width}}}"
    return "\n".join(part.strip() for part in re.findall(line, name))


def _compact(name: str) -> str:
    """:func:`short` on two lines, which are longer if they must be."""
    return short(name, LONG if short(name).count("\n") > 1 else NAME)


def panels(
    figure: Figure,
    names: Sequence[str],
    *,
    columns: int = ACROSS,
    sharex: bool = False,
    sharey: bool = False,
) -> list[Axes]:
    """A panel for each name, at most ``columns`` in a row.

    ``figure`` has the size of one row, and is made as high as all rows need.
    """
    rows = math.ceil(len(names) / columns)
    columns = math.ceil(len(names) / rows)
    figure.set_figheight(rows * figure.get_figheight())
    grid = figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False)
    drawn, spare = np.split(grid.ravel(), [len(names)])
    for axes in spare:
        axes.remove()
    return list(drawn)


def _outer(drawn: Sequence[Axes]) -> None:
    """Axes named only where no other panel is between them and the edge of the figure."""
    places = {axes: axes.get_subplotspec() for axes in drawn}
    taken = {(at.rowspan.start, at.colspan.start) for at in places.values() if at}
    for axes, at in places.items():
        name = axes.get_xlabel()
        axes.label_outer()
        if at and (at.rowspan.stop, at.colspan.start) not in taken:
            axes.set_xlabel(name)
            axes.tick_params(axis="x", which="both", labelbottom=True)


def _title(axes: Axes, name: str) -> None:
    """A name over its panel, on as many lines as its width needs."""
    axes.set_title(short(name, max(NAME, int(_width(axes) / LETTER))))


def _name_rows(drawn: Sequence[Axes], label: str) -> None:
    """What is upwards, beside the first panel of every row."""
    for axes in drawn:
        at = axes.get_subplotspec()
        if at is None or at.is_first_col():
            axes.set_ylabel(label)


def _width(axes: Axes) -> float:
    """Inches of the figure that axes have to themselves."""
    return axes.figure.figure.get_figwidth() / _across(axes)


def _across(axes: Axes) -> int:
    """How many axes are beside each other, these among them."""
    at = axes.get_subplotspec()
    return at.get_gridspec().ncols if at else 1


def _at_least(axes: Axes, width: float = 0.0, height: float = 0.0) -> None:
    """Make the figure of the axes so large, if it is smaller (inches)."""
    figure = axes.figure.figure
    now = figure.get_size_inches()
    figure.set_size_inches(max(now[0], width), max(now[1], height))


def _columns(names: Sequence[str], most: int, inches: float) -> int:
    """The columns of a legend that fits the width, at most ``most``."""
    for columns in range(min(most, len(names)), 1, -1):
        parts = np.array_split([len(name) for name in names], columns)
        if sum(LETTER * part.max() + BESIDE for part in parts) <= inches:
            return columns
    return 1


def missing(axes: Axes, text: str) -> Axes:
    """An empty panel that says why it is empty. An axis that it shares keeps its ticks:
    they are those of the other panels.
    """
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
    axes.grid(False)
    if len(axes.get_shared_x_axes().get_siblings(axes)) == 1:
        axes.set_xticks([])
    if len(axes.get_shared_y_axes().get_siblings(axes)) == 1:
        axes.set_yticks([])
    return axes


# --- bars --------------------------------------------------------------------------------


def bars(
    axes: Axes,
    table: pd.DataFrame,
    *,
    x: str,
    hue: str,
    palette: Mapping[str, Any],
    label: str,
    hatches: Mapping[str, str] | None = None,
) -> Axes:
    """Grouped bars with intervals from rows (``x``, ``hue``, value, low, high); those that
    ``hatches`` names (by ``hue``) are hatched. Where the rows have them, ``null_low`` and
    ``null_high`` are drawn over the bars as the null interval.
    """
    groups, hues = list(dict.fromkeys(table[x])), list(dict.fromkeys(table[hue]))
    width, hatches = 0.8 / len(hues), hatches or {}
    shift = (table[hue].map(hues.index) - (len(hues) - 1) / 2) * width
    placed = table.assign(place=table[x].map(groups.index) + shift)
    for name, rows in placed.groupby(hue, sort=False):
        look = {"color": palette[name], "label": name, **_hatched(hatches.get(name, ""))}
        axes.bar(rows["place"], rows["value"].fillna(0), width * 0.92, **look)
    known = placed.dropna(subset="value")
    axes.errorbar(known["place"], known["value"], yerr=_reach(known), capsize=2, **WHISKERS)
    for spot in placed.loc[placed["value"].isna(), "place"]:
        axes.text(spot, 0.0, " n/a", rotation=90, ha="center", va="bottom", fontsize=7)
    if "null_low" in table and table["null_low"].notna().any():
        null = placed.dropna(subset="null_low")
        height = null["null_high"] - null["null_low"]
        axes.bar(null["place"], height, width * 0.92, bottom=null["null_low"], **NULL)
    names, turn = _along(groups, 0.85 * _width(axes))
    axes.set_xticks(np.arange(len(groups)), names)
    axes.tick_params(axis="x", rotation=turn)
    if turn:
        down = len({at.get_position().y0 for at in axes.figure.axes})
        _at_least(axes, height=2.2 * down + _longest(names))
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.grid(axis="x", visible=False)
    return axes


def _along(names: Sequence[str], inches: float) -> tuple[list[str], int]:
    """Names along so much of a horizontal axis, and the degrees by which they are turned: they
    stand upright where they would meet."""
    flat = [short(name) for name in names]
    if _longest(flat) <= inches / len(names):
        return flat, 0
    return [_compact(name) for name in names], 90


def _longest(names: Sequence[str]) -> float:
    """Inches of the longest line of the names."""
    return LETTER * max(len(line) for name in names for line in name.split("\n"))


def steering_bars(axes: Axes, table: pd.DataFrame, size: float = 1.0) -> Axes:
    """The paper's bars from :func:`stllms.steering.measures.bars`, with the null interval;
    ``size`` is the coefficient of both signs."""
    signs = {"positive": f"positive ({size:+g})", "negative": f"negative ({-size:+g})"}
    words = {"plain": "baseline", **signs}
    named = table.assign(mode=table["mode"].map(words))
    palette = {words[mode]: colour for mode, colour in MODES.items()}
    bars(axes, named, x="behaviour", hue="mode", palette=palette, label="token fraction")
    legend([axes])
    return axes


def comparison(
    figure: Figure, rows: pd.DataFrame, name: str, *, palette: Mapping[str, Any]
) -> Figure:
    """One of the comparison figures of method, section 10 (:data:`COMPARISONS`), from rows of
    ``comparison.csv``: a panel a metric, bars by behaviour, one a model, and their legend.

    Models that were measured another way than the first (other tasks, another annotator or
    reader) are hatched, an own hatch a way; then the legend says how each was measured.
    """
    ways = _measured(rows)
    hatches = {model: hatch for model, (hatch, _) in ways.items()}
    metrics = COMPARISONS[name]
    if name == "totals":
        panels = figure.subplots(1, 2, width_ratios=(3, 1.3))
        _totals(panels[1], rows, palette, hatches)
    else:
        panels = figure.subplots(len(metrics), 1, sharex=True, squeeze=False)[:, 0]
    look: dict[str, Any] = {"x": "behaviour", "hue": "model", "palette": palette}
    for axes, metric in zip(panels, metrics, strict=False):
        chosen = rows[(rows["metric"] == metric) & (rows["behaviour"] != "all")]
        bars(axes, chosen, label=metric, hatches=hatches, **look)
    patches: list[Artist] = []
    for model, (hatch, way) in ways.items():
        label = f"{model}\n({way})" if way else model
        patches.append(Patch(facecolor=palette[model], label=label, **_hatched(hatch)))
    columns = int(np.clip(figure.get_figwidth() / 2.2, 1, 5))
    legend(figure.axes, patches, columns=columns)
    return figure


def _totals(
    axes: Axes, rows: pd.DataFrame, palette: Mapping[str, Any], hatches: Mapping[str, str]
) -> None:
    """Segments a chain of every model."""
    chosen = rows[(rows["metric"] == "segment count") & (rows["behaviour"] == "all")]
    models, value = chosen["model"], chosen["value"].to_numpy(float)
    place = np.arange(len(chosen))
    drawn = axes.barh(place, value, color=[palette[name] for name in models], height=0.7)
    for patch, name in zip(drawn, models, strict=True):
        patch.set(**_hatched(hatches[name]))
    axes.errorbar(value, place, xerr=_reach(chosen), **WHISKERS)
    for spot in place[np.isnan(value)]:
        axes.text(0.0, spot, " n/a", va="center", fontsize=7)
    axes.set_yticks(place, models)
    axes.set(xlabel="segments a chain", ylim=(len(chosen) - 0.5, -0.5))
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)


def _reach(rows: pd.DataFrame) -> np.ndarray:
    """Lengths of whiskers below and above the value, ``[2, rows]``."""
    value, low, high = rows[["value", "low", "high"]].to_numpy(float).T
    return np.clip([value - low, high - value], 0, None)


def _hatched(hatch: str) -> dict[str, Any]:
    return {"hatch": hatch, "edgecolor": "white", "linewidth": 0} if hatch else {}


def _measured(rows: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Model -> hatch, and how it was measured in words; no words if all were measured alike."""
    names = [c for c in ("tasks", "annotator", "reader", "labels") if c in rows]
    known = rows.drop_duplicates("model").set_index("model")[names].fillna("")
    codes, ways = pd.factorize(known.apply(tuple, axis=1))
    words = [
        ", ".join(f"{name} {part}" for name, part in zip(names, way, strict=True) if part)
        for way in ways
    ]
    return {
        model: (HATCHES[code % len(HATCHES)], words[code] if len(ways) > 1 else "")
        for model, code in zip(known.index, codes, strict=True)
    }


# --- matrices ----------------------------------------------------------------------------


def matrix(
    axes: Axes,
    table: np.ndarray | pd.DataFrame,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    label: str,
    fmt: str = "+.2f",
    limit: float | None = None,
) -> Axes:
    """A labelled matrix of values, symmetric colours around zero; ``label`` is that of the
    colour bar, and without one there is none.
    """
    table = np.asarray(table, dtype=float)
    if not table.size:
        return missing(axes, "unavailable: nothing was steered")
    limit = limit or float(np.nanmax(np.abs(table), initial=1e-9))
    cell = max(CELL, LETTER * max(len(format(value, fmt)) for value in table.ravel()))
    beside = _longest(rows) + (COLOUR_BAR if label else 0)
    _at_least(axes, beside + cell * len(columns) * _across(axes))
    names, turn = _along(columns, _width(axes) - beside)
    above = AROUND + (_longest(names) if turn else 0)
    _at_least(axes, height=CELL * len(rows) + above)
    sns.heatmap(
        table,
        ax=axes,
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        annot=True,
        fmt=fmt,
        annot_kws={"fontsize": 7},
        xticklabels=names,
        yticklabels=list(rows),
        cbar=bool(label),
        cbar_kws={"label": label} if label else None,
    )
    for row, column in np.argwhere(np.isnan(table)):
        axes.text(column + 0.5, row + 0.5, "n/a", ha="center", va="center", fontsize=7)
    axes.tick_params(rotation=0)
    axes.tick_params(axis="x", rotation=turn)
    return axes


def heatmap(axes: Axes, values: np.ndarray, names: Sequence[str]) -> Axes:
    """Cosine similarities ``[N, N]`` with their values written in the cells."""
    if not len(names):
        return missing(axes, "unavailable: too few spans")
    rows, side = [short(name) for name in names], SQUARE * len(names) + AROUND
    _at_least(axes, side + COLOUR_BAR, side)
    matrix(axes, values, rows, names, label="cosine similarity", fmt=".2f", limit=1)
    axes.set_aspect("equal")
    if max(name.count("\n") for name in rows) < 2:
        axes.tick_params(axis="x", rotation=40)
    return axes


def confusions(
    panels: Sequence[Axes], shares: pd.DataFrame, report: pd.DataFrame, *, reference: str
) -> Sequence[Axes]:
    """A panel an annotator: how it labels what the reference calls each label.

    ``shares`` and ``report`` are :func:`~stllms.annotation.agreement.confusions` and
    :func:`~stllms.annotation.agreement.report` of the same comparisons. Every row is a share of
    what the reference gave that label, so rows add up to 1 and the diagonal is the share found
    again; kappa and its interval are in the title. Without any comparison that is said.
    """
    if shares.empty:
        missing(panels[0], "no other annotator to compare with")
    kappa = report[report["quantity"] == "kappa"].set_index("annotator")
    groups = shares.groupby("annotator", sort=False)
    for place, (axes, (name, found)) in enumerate(zip(panels, groups, strict=False)):
        labels = list(found["label"])
        rows = labels if place == 0 else [""] * len(labels)
        matrix(axes, found[labels], rows, labels, label="", fmt=".2f", limit=1)
        axes.tick_params(axis="x", rotation=90)
        axes.set_xlabel(f"labelled by {name}")
        value, low, high = kappa.loc[name, ["value", "low", "high"]]
        known = f"{value:.2f} ({low:.2f} to {high:.2f})"
        axes.set_title(f"{name}\nkappa {'n/a' if np.isnan(value) else known}")
    panels[0].set_ylabel(f"labelled by {reference}")
    return panels


# --- lines over layers, spans and coefficients -------------------------------------------


def strip(axes: Axes, values: Sequence[float], *, label: str) -> Axes:
    """One dot a chain, jittered with a fixed seed."""
    rng = np.random.default_rng(0)
    axes.plot(values, rng.uniform(-0.3, 0.3, len(values)), ".", color="#0072B2", alpha=0.6)
    axes.set(xlabel=label, xlim=(-0.02, 1.02), ylim=(-0.6, 0.6), yticks=[])
    return axes


def curves(
    axes: Axes,
    values: Mapping[str, np.ndarray],
    *,
    label: str,
    bands: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    mark: Mapping[str, int] | None = None,
    labels: LabelSet = PAPER,
) -> Axes:
    """One line a behaviour over the layers, with bands and marked layers where given."""
    if not values:
        return missing(axes, "unavailable: too few spans")
    for rank, (name, line) in enumerate(values.items()):
        layers = np.arange(len(line))
        colour = labels.colour(name) if name in labels.names else f"C{rank}"
        axes.plot(layers, line, color=colour, marker=MARKERS[rank % len(MARKERS)], label=name)
        if bands and name in bands:
            axes.fill_between(layers, *bands[name], color=colour, alpha=0.2, linewidth=0)
        if mark and name in mark:
            axes.axvline(mark[name], color=colour, linestyle=":")
    axes.set(xlabel="layer", ylabel=label)
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    return axes


def growth(axes: Axes, table: pd.DataFrame, *, labels: LabelSet = PAPER) -> Axes:
    """Split-half cosine of each direction against the spans it was built from."""
    if table.empty:
        return missing(axes, "unavailable: too few spans")
    for rank, (name, rows) in enumerate(table.groupby("behaviour", sort=False)):
        colour, marker = labels.colour(name), MARKERS[rank % len(MARKERS)]
        axes.plot(rows["spans"], rows["cosine"], color=colour, marker=marker, label=name)
    axes.set(xscale="log", xlabel="spans in the smaller half")
    axes.set_ylabel("cosine of disjoint halves")
    axes.set_ylim(top=1.02)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    return axes


def onset(
    panels: Sequence[Axes],
    table: pd.DataFrame,
    names: Sequence[str] | None = None,
    *,
    labels: LabelSet = PAPER,
) -> None:
    """A panel for each of ``names`` (the targets): its direction read around the starts of its
    own spans, and in grey of all others (:func:`stllms.vectors.reading.onset`)."""
    for axes, name in zip(panels, names or labels.targets, strict=True):
        axes.set_title(_compact(name))
        rows = table[table["behaviour"] == name]
        if rows.empty:
            missing(axes, "unavailable")
            continue
        for of, colour in (("others", OTHER), ("own", labels.colour(name))):
            line = rows[rows["of"] == of]
            axes.plot(line["offset"], line["value"], color=colour, label=of)
            axes.fill_between(
                line["offset"], line["low"], line["high"], color=colour, alpha=0.2, linewidth=0
            )
        axes.axvline(0, color=OTHER, linestyle=":", linewidth=0.8)
        axes.set_xlabel("tokens from its start")
    _name_rows(panels, "reading (coefficients)")
    if drawn := [axes for axes in panels if axes.get_legend_handles_labels()[0]]:
        lowest = min(drawn, key=lambda axes: axes.dataLim.y1)
        lowest.legend(fontsize="small", title="spans", loc="upper right")


def effect_panels(
    panels: Sequence[Axes],
    table: pd.DataFrame,
    names: Sequence[str] | None = None,
    *,
    label: str,
    band: str = "interval",
    mark: Mapping[str, int] | None = None,
    log: bool = False,
    absent: str = "unavailable:\ntoo few spans",
    labels: LabelSet = PAPER,
) -> Sequence[Axes]:
    """A panel for each of ``names`` (the targets): the mean, its band, and a legend above the
    figure, from :func:`stllms.attribution.effects.table`.

    ``band`` is ``"interval"`` (bootstrap) or ``"sd"`` (one standard deviation, as published);
    ``mark`` is a layer a behaviour, drawn as a dotted line; the null interval is drawn where
    the table has it. ``log`` draws values on a logarithmic axis, where one layer that has far
    more than the others does not hide them. ``absent`` is written where there is no value.
    """
    panels, names = list(panels), names or labels.targets
    for axes, name in zip(panels, names, strict=True):
        rows = table[(table["behaviour"] == name) & table["mean"].notna()]
        _title(axes, name)
        if rows.empty:
            missing(axes, absent).set(xlabel="layer", ylabel=label)
            continue
        edges = rows["low"], rows["high"]
        if band == "sd":
            edges = rows["mean"] - rows["sd"], rows["mean"] + rows["sd"]
        bands = {name: edges}
        curves(axes, {name: rows["mean"]}, label=label, bands=bands, mark=mark, labels=labels)
        if "null_low" in rows:
            axes.fill_between(rows["layer"], rows["null_low"], rows["null_high"], **NULL)
    if log:
        _logarithmic(panels, table[table["behaviour"].isin(names)])
    _outer(panels)
    for axes in panels:
        axes.grid(axis="x", visible=not mark)  # dotted lines would be lost
    words = "95% interval" if band == "interval" else "one standard deviation"
    handles = [
        Line2D([], [], color="#333333", marker=MARKERS[0], label="mean"),
        Patch(facecolor="#333333", alpha=0.2, label=words),
        Patch(**NULL) if "null_low" in table else None,
        Line2D([], [], color="#333333", ls=":", label="steering layer") if mark else None,
    ]
    legend(panels, [handle for handle in handles if handle])
    return panels


def _logarithmic(panels: Sequence[Axes], table: pd.DataFrame) -> None:
    """One logarithmic scale, down to half of the smallest mean: a band below 0 ends there."""
    drawn = table.filter(["mean", "null_low"]).to_numpy(float)
    drawn = drawn[drawn > 0]
    for axes in panels:
        if axes.lines and len(drawn):
            axes.set_yscale("log")
            axes.set_ylim(bottom=drawn.min() / 2)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())


def doses(figure: Figure, table: pd.DataFrame, *, labels: LabelSet = PAPER) -> Figure:
    """The dose-response page, from :func:`stllms.steering.dose.table`.

    First the own token fraction of each direction with its interval, then a panel a side effect
    with a line a direction. Shares have the same axis from 0 to 1 everywhere. The null interval
    is the range of the control directions at the same coefficient, over all steering layers. A
    side effect that was nowhere measured has no panel.
    ``figure`` has room for one row of targets: more make it higher.
    """
    seen = table[table["value"].notna()]["metric"].unique()
    effects = [name for name in seen if name != "token fraction"]
    shares = [name for name in effects if name not in UNITS]
    others = [name for name in UNITS if name in effects]
    first, rest = _rows(labels.targets), sorted([*_rows(shares), *_rows(others)], key=len)
    names = [name for name in labels.targets if name in set(table["steered"])]
    lines = [Line2D([], [], color=labels.colour(n), marker=MARKERS[0], label=n) for n in names]
    handles = [*lines, Patch(facecolor="#333333", alpha=0.2, label="95% interval")]
    columns = _columns([*names, "95% interval", "null interval"], 3, figure.get_figwidth())
    height = figure.get_figheight() * (len(first) + len(rest)) / (1 + len(rest))
    figure.set_figheight(height + ROW * max(0, math.ceil((len(names) + 2) / columns) - 2))
    rows = [*first, *rest]  # a full row last: it has the ticks of all columns
    grid = figure.subplots(len(rows), ACROSS, sharex=True, squeeze=False)
    own = table[table["metric"] == "token fraction"]
    for place, (line, titles) in enumerate(zip(grid, rows, strict=True)):
        for axes, name in zip_longest(line, titles):
            if name is None:
                axes.set_axis_off()
            elif place < len(first):
                _dose(axes, own[own["steered"] == name], name, labels, alone=True)
            else:
                _dose(axes, table[table["metric"] == name], name, labels)
    for line in grid[: len(first)]:
        line[0].set_ylabel("own token fraction")
    for axes in grid[-1]:
        axes.set_xlabel("coefficient")
    legend(figure.axes, [*handles, Patch(**NULL)], columns=columns)
    return figure


def _rows(names: Sequence[str]) -> list[Sequence[str]]:
    """The names in rows of :data:`ACROSS`."""
    return [names[i : i + ACROSS] for i in range(0, len(names), ACROSS)]


def _dose(
    axes: Axes, rows: pd.DataFrame, title: str, labels: LabelSet, *, alone: bool = False
) -> None:
    """One panel: a line a direction over the coefficients; intervals where it is one alone."""
    _title(axes, title)
    if rows.empty:
        missing(axes, "unavailable")
        return
    # A push of length 0 is the baseline, whatever its direction: no width there.
    zero = rows["coefficient"] == 0
    low, high = (rows[end].mask(zero, rows["value"]) for end in ("null_low", "null_high"))
    null = rows.assign(low=low, high=high).groupby("coefficient")
    null = null.agg({"low": "min", "high": "max"}).dropna()
    if len(null) > 1:
        axes.fill_between(null.index, null["low"], null["high"], **NULL)
    for name, line in rows[rows["value"].notna()].groupby("steered", sort=False):
        at, colour = line["coefficient"], labels.colour(name)
        axes.plot(at, line["value"], color=colour, marker=MARKERS[0])
        if alone:
            edges = line["ci_low"], line["ci_high"]
            axes.fill_between(at, *edges, color=colour, alpha=0.2, linewidth=0)
    tried = sorted(rows["coefficient"].unique())
    axes.set_xticks(tried if len(tried) <= TICKS else [tried[0], 0, tried[-1]])
    if title in UNITS and not alone:
        axes.set_ylim(bottom=0)
        axes.set_ylabel(UNITS[title])
    else:
        _shares(axes)


def sweep(
    panels: Sequence[Axes],
    table: pd.DataFrame,
    marks: Mapping[str, int],
    *,
    labels: LabelSet = PAPER,
) -> Sequence[Axes]:
    """A panel a direction from :func:`stllms.steering.dose.sweep`: own token fraction by layer,
    a line and a null interval a coefficient, the baseline dashed, the steering layer of
    ``marks`` dotted; and a legend above the figure.
    """
    for axes, name in zip(panels, labels.targets, strict=True):
        found = table[table["behaviour"] == name]
        _title(axes, name)
        if found.empty:
            missing(axes, "not run" if table.empty else "unavailable")
            continue
        for coefficient, rows in found.groupby("coefficient"):
            mode, hatch = ("positive", "//////") if coefficient > 0 else ("negative", "......")
            colour, at, sign = MODES[mode], rows["layer"], f"{coefficient:+g}"
            axes.plot(at, rows["value"], color=colour, marker=MARKERS[0], label=sign)
            edges = rows["ci_low"], rows["ci_high"]
            axes.fill_between(at, *edges, color=colour, alpha=0.15, linewidth=0)
            look = {"edgecolor": colour, "hatch": hatch, "label": f"null interval {sign}"}
            axes.fill_between(at, rows["null_low"], rows["null_high"], **NULL | look)
        plain = found["plain"].iloc[0]
        axes.axhline(plain, color=MODES["plain"], linestyle="--", label="baseline")
        if name in marks:
            axes.axvline(marks[name], color="#555555", linestyle=":", label="steering layer")
        axes.set_xlabel("layer")
        axes.locator_params(axis="x", integer=True)
        _shares(axes)
    _name_rows(panels, "own token fraction")
    legend(panels)
    return panels


def _shares(axes: Axes) -> None:
    """The axis of shares, the same in every panel."""
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])


# --- chains ------------------------------------------------------------------------------


def chains(
    figure: Figure,
    shown: Sequence[tuple[str, str, Sequence[PlacedSegment]]],
    *,
    labels: LabelSet = PAPER,
) -> Figure:
    """Chains side by side, each given as title, text and segments, below a legend; the
    background of every segment has the colour of its behaviour.

    The figure is made as high as the longest of them needs, up to :data:`MOST_LINES`: a longer
    text ends in a line that tells how much is left out.
    """
    rows = max(1, *(len(wrapped(text)) for _, text, _ in shown))
    rows = min(MOST_LINES, rows)
    columns = _columns(labels.names, 3, figure.get_figwidth())
    named = max(0, math.ceil(len(labels.names) / columns) - 2)
    figure.set_figheight(LINE_HEIGHT * rows + HEAD_AND_FOOT + ROW * named)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (title, text, segments) in zip(panels, shown, strict=True):
        colours = np.full(len(text), "", dtype=object)
        for segment in segments:
            colours[segment.start : segment.end] = labels.colour(segment.label)
        _chain(axes, text, colours, rows)
        axes.set_title(textwrap.fill(title, LINE), loc="left", fontsize=8)
    patches = [Patch(facecolor=one.colour, alpha=0.5, label=one.name) for one in labels.labels]
    legend(panels, patches, columns=columns)
    return figure


def _chain(axes: Axes, text: str, colours: np.ndarray, rows: int) -> None:
    """A chain letter by letter, each on its colour (if it has one), on axes with room for so
    many lines."""
    axes.set_axis_off()
    axes.set(xlim=(0, LINE), ylim=(rows - 0.5, -0.5))
    lines = wrapped(text)
    drawn = lines if len(lines) <= rows else lines[: rows - 1]
    letter = {"family": "monospace", "fontsize": 7, "ha": "center", "va": "center"}
    for row, (start, stop) in enumerate(drawn):
        for column, place in enumerate(range(start, stop)):
            if colour := colours[place]:
                box = Rectangle((column, row - 0.45), 1, 0.9, alpha=0.35, linewidth=0)
                box.set_facecolor(colour)
                axes.add_patch(box)
            axes.text(column + 0.5, row, text[place], letter, parse_math=False)
    if len(drawn) < len(lines):
        note = f"(and {len(text) - lines[rows - 1][0]} more characters)"
        axes.text(0, rows - 1, note, fontsize=7, style="italic", va="center")


def wrapped(text: str, width: int = LINE) -> list[tuple[int, int]]:
    """Start and end of lines of at most ``width`` characters, broken at spaces."""
    line = rf"(.{{1,{width}}}(?=[ \n]|\Z)|.{{1,{width}}}|(?=\n))[ \n]?"
    return [match.span(1) for match in re.finditer(line, text)]


def pair(
    figure: Figure, shown: tuple[Steered, Steered] | None, *, labels: LabelSet = PAPER
) -> Figure:
    """:func:`chains` of a baseline and a steered response, or a line that there are none."""
    if shown is None:
        missing(figure.subplots(), "nothing to show: nothing was steered, or no chain rose")
        return figure
    baseline, steered = shown
    added = f"{steered.coefficient:+g} {steered.direction}, layer {steered.layer}"
    texts = [
        (title, one.response.thinking, one.annotation.segments if one.annotation else ())
        for title, one in ((f"baseline, task {baseline.task_id}", baseline), (added, steered))
    ]
    return chains(figure, texts, labels=labels)
