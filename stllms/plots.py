"""Data -> axes. A function here draws on the axes it is given and returns them.

None reads a file, saves or shows. Colours are one per behaviour everywhere (Okabe and Ito's
palette, told apart by colour-blind readers); a value that is missing is written as ``n/a``,
never drawn as zero.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter, StrMethodFormatter

from stllms.coloured import COLOURS, OTHER
from stllms.records import BEHAVIOURS, PlacedSegment

#: Plain, positive and negative steering.
MODES: dict[str, str] = {"plain": "#777777", "positive": "#1B9E77", "negative": "#7570B3"}
MARKERS = ("o", "s", "^", "D", "v", "P")
#: The range of control directions.
HATCH = {"facecolor": "none", "edgecolor": "#222222", "hatch": "////", "lw": 0.6, "alpha": 0.5}
WHISKERS = {"fmt": "none", "ecolor": "#333333", "elinewidth": 1}
#: Characters of a line of a chain.
LINE = 62
LETTER = {"family": "monospace", "fontsize": 9, "ha": "center", "va": "center"}


def style() -> None:
    """The look of every figure: call once, at the top of a notebook."""
    sns.set_theme(context="notebook", style="whitegrid", font_scale=0.85)
    mpl.rcParams.update(
        {
            "figure.dpi": 80,
            "figure.constrained_layout.use": True,
            "axes.titlesize": "medium",
            "pdf.fonttype": 42,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )


def caption(figure: Figure, text: str) -> None:
    """One small line under a figure that says which model, on what, and what it is not."""
    width = max(60, int(figure.get_figwidth() * 15))
    text = textwrap.fill(text, width, break_on_hyphens=False)
    figure.supxlabel(text, fontsize=8, color="#555555", x=0.01, ha="left")


def short(behaviour: str) -> str:
    """A behaviour on two lines, for axes."""
    return behaviour.replace("-", "-\n", 1)


def bars(
    axes: Axes,
    table: pd.DataFrame,
    *,
    x: str,
    hue: str,
    palette: Mapping[str, str],
    label: str,
    hatches: Mapping[str, str] | None = None,
) -> Axes:
    """Grouped bars with intervals from rows (``x``, ``hue``, value, low, high); those that
    ``hatches`` names (by ``hue``) are hatched."""
    groups, hues = list(dict.fromkeys(table[x])), list(dict.fromkeys(table[hue]))
    width = 0.8 / len(hues)
    for rank, name in enumerate(hues):
        rows = table[table[hue] == name].set_index(x).reindex(groups)
        place = np.arange(len(groups)) + (rank - (len(hues) - 1) / 2) * width
        value = rows["value"].to_numpy(float)
        whiskers = [value - rows["low"].to_numpy(float), rows["high"].to_numpy(float) - value]
        look = {
            "color": palette[name],
            "label": name,
            **_hatched((hatches or {}).get(name, "")),
        }
        axes.bar(place, np.nan_to_num(value), width * 0.92, **look)
        known = ~np.isnan(value)
        reach = np.clip(np.array(whiskers)[:, known], 0, None)
        axes.errorbar(place[known], value[known], yerr=reach, capsize=2, **WHISKERS)
        for spot in place[~known]:
            axes.text(spot, 0.0, " n/a", rotation=90, ha="center", va="bottom", fontsize=7)
    axes.set_xticks(np.arange(len(groups)), [short(group) for group in groups])
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.grid(axis="x", visible=False)
    return axes


def heatmap(axes: Axes, matrix: np.ndarray, labels: Sequence[str]) -> Axes:
    """Cosine similarities ``[N, N]`` with their values written in the cells."""
    if not len(labels):
        return missing(axes, "unavailable: too few spans")
    names = [short(label) for label in labels]
    sns.heatmap(
        np.asarray(matrix),
        ax=axes,
        vmin=-1,
        vmax=1,
        cmap="RdBu_r",
        annot=True,
        fmt=".2f",
        square=True,
        xticklabels=names,
        yticklabels=names,
        cbar_kws={"label": "cosine similarity", "shrink": 0.8},
    )
    axes.tick_params(axis="x", rotation=40)
    axes.tick_params(axis="y", rotation=0)
    return axes


def curves(
    axes: Axes,
    values: Mapping[str, np.ndarray],
    *,
    label: str,
    bands: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    mark: Mapping[str, int] | None = None,
) -> Axes:
    """One line a behaviour over the layers, with bands and marked layers where given."""
    if not values:
        return missing(axes, "unavailable: too few spans")
    for rank, (name, line) in enumerate(values.items()):
        layers = np.arange(len(line))
        colour = COLOURS.get(name, f"C{rank}")
        marker = MARKERS[rank % len(MARKERS)]
        axes.plot(layers, line, color=colour, marker=marker, markersize=4, label=name)
        if bands and name in bands:
            axes.fill_between(layers, *bands[name], color=colour, alpha=0.18, linewidth=0)
        if mark and name in mark:
            axes.axvline(mark[name], color=colour, linestyle=":", linewidth=1)
    axes.set_xlabel("layer")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    return axes


def missing(axes: Axes, text: str) -> Axes:
    """An empty panel that says why it is empty. An axis that it shares keeps its ticks:
    they are those of the other panels."""
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, fontsize=9)
    axes.grid(False)
    if len(axes.get_shared_x_axes().get_siblings(axes)) == 1:
        axes.set_xticks([])
    if len(axes.get_shared_y_axes().get_siblings(axes)) == 1:
        axes.set_yticks([])
    return axes


def strip(axes: Axes, values: Sequence[float], *, label: str) -> Axes:
    """One dot a chain, jittered with a fixed seed."""
    rng = np.random.default_rng(0)
    axes.plot(values, rng.uniform(-0.3, 0.3, len(values)), ".", color="#0072B2", alpha=0.6)
    axes.set_yticks([])
    axes.set_ylim(-0.6, 0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel(label)
    return axes


def matrix(
    axes: Axes,
    table: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    label: str,
    fmt: str = "+.2f",
    limit: float | None = None,
) -> Axes:
    """A labelled matrix of signed changes, symmetric colours around zero."""
    table = np.asarray(table, dtype=float)
    if not table.size:
        return missing(axes, "unavailable: nothing was steered")
    limit = limit or float(np.nanmax(np.abs(table), initial=1e-9))
    sns.heatmap(
        table,
        ax=axes,
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        annot=True,
        fmt=fmt,
        annot_kws={"fontsize": 8},
        xticklabels=[short(name) for name in columns],
        yticklabels=list(rows),
        cbar_kws={"label": label},
    )
    for row, column in np.argwhere(np.isnan(table)):
        axes.text(column + 0.5, row + 0.5, "n/a", ha="center", va="center", fontsize=8)
    axes.tick_params(axis="x", rotation=0)
    axes.tick_params(axis="y", rotation=0)
    return axes


def chain(
    axes: Axes,
    text: str,
    segments: Sequence[PlacedSegment],
    *,
    title: str,
    width: int = LINE,
    rows: int | None = None,
) -> Axes:
    """A chain as text, the background of every segment in the colour of its behaviour.

    ``rows`` is how many lines the axes have room for (:func:`n_lines` of the text, unless
    said): a longer text ends in a line that tells how much is left out.
    """
    labels = np.full(len(text), "", dtype=object)
    for segment in segments:
        labels[segment.start : segment.end] = segment.label
    lines = list(_wrapped(text, width))
    rows = max(1, len(lines)) if rows is None else rows
    axes.set_axis_off()
    axes.set_title(textwrap.fill(title, 80), loc="left", fontsize=9)
    axes.set_xlim(0, width)
    axes.set_ylim(rows - 0.5, -0.5)
    drawn = lines if len(lines) <= rows else lines[: rows - 1]
    for row, (start, stop) in enumerate(drawn):
        for left, right in _runs(labels[start:stop]):
            label = labels[start + left]
            if label:
                box = Rectangle((left, row - 0.45), right - left, 0.9, alpha=0.35, linewidth=0)
                box.set_facecolor(COLOURS.get(label, OTHER))
                axes.add_patch(box)
        for column, letter in enumerate(text[start:stop]):
            axes.text(column + 0.5, row, letter, parse_math=False, **LETTER)
    if len(drawn) < len(lines):
        note = f"(and {len(text) - lines[rows - 1][0]} more characters)"
        axes.text(0, rows - 1, note, fontsize=8, style="italic", va="center")
    return axes


def n_lines(text: str, width: int = LINE) -> int:
    """Lines of ``width`` characters that :func:`chain` draws a text in."""
    return sum(1 for _ in _wrapped(text, width))


def _wrapped(text: str, width: int):
    """Start and end of lines of at most ``width`` characters, broken at spaces."""
    start = 0
    while start < len(text):
        newline = text.find("\n", start, start + width + 1)
        if newline >= 0:
            stop = newline
        elif len(text) - start <= width:
            stop = len(text)
        else:
            space = text.rfind(" ", start, start + width + 1)
            stop = space if space > start else start + width
        yield start, stop
        start = stop + (stop < len(text) and text[stop] in " \n")


def _runs(labels: np.ndarray):
    """Maximal runs of one label as (start, end)."""
    start = 0
    for place in range(1, len(labels) + 1):
        if place == len(labels) or labels[place] != labels[start]:
            yield start, place
            start = place


def legend(figure: Figure, behaviours: Sequence[str] = BEHAVIOURS, *, columns: int = 6) -> None:
    """The behaviours' colours, above a figure."""
    patches = [Patch(facecolor=COLOURS[name], alpha=0.5, label=name) for name in behaviours]
    figure.legend(
        handles=patches, loc="outside upper center", ncols=columns, fontsize=8, frameon=False
    )


def side_legend(figure: Figure, axes: Axes) -> None:
    """The lines of ``axes`` named to the right of the figure, where they hide nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)


def compare(axes: Axes, rows: pd.DataFrame, *, metric: str, palette: Mapping[str, str]) -> Axes:
    """Bars of one metric by behaviour, a bar a model, from :func:`stllms.comparison.table`.

    Models that were measured another way than the first (other tasks, another annotator or
    reader) are hatched, an own hatch a way.
    """
    chosen = rows[(rows["metric"] == metric) & (rows["behaviour"] != "all")]
    return bars(
        axes,
        chosen,
        x="behaviour",
        hue="model",
        palette=palette,
        label=f"{metric} (mean over tasks)",
        hatches={name: hatch for name, (hatch, _) in _measured(rows).items()},
    )


def totals(axes: Axes, rows: pd.DataFrame, *, palette: Mapping[str, str]) -> Axes:
    """Segments a chain of every model, hatched as in :func:`compare`, from
    :func:`stllms.comparison.table`."""
    chosen = rows[(rows["metric"] == "segment count") & (rows["behaviour"] == "all")]
    hatches = _measured(rows)
    place = np.arange(len(chosen))
    value = chosen["value"].to_numpy(float)
    error = [value - chosen["low"].to_numpy(float), chosen["high"].to_numpy(float) - value]
    made = axes.barh(place, value, color=[palette[n] for n in chosen["model"]], height=0.7)
    for patch, name in zip(made, chosen["model"], strict=True):
        patch.set(**_hatched(hatches[name][0]))
    axes.errorbar(value, place, xerr=np.clip(error, 0, None), **WHISKERS)
    for spot in place[np.isnan(value)]:
        axes.text(0.0, spot, " n/a", va="center", fontsize=7)
    axes.set_yticks(place, chosen["model"])
    axes.set_ylim(len(chosen) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("segments a chain")
    axes.grid(axis="y", visible=False)
    return axes


def models_legend(
    figure: Figure, palette: Mapping[str, object], rows: pd.DataFrame | None = None
) -> None:
    """The models' colours above a figure, at most five columns (pairs stay in one).

    ``rows`` are those of :func:`stllms.comparison.table`: where they were not all measured the
    same way, each model's label says how, and its hatch is that of its bars.
    """
    ways = {} if rows is None else _measured(rows)
    patches = []
    for name, colour in palette.items():
        hatch, way = ways.get(name, ("", ""))
        label = f"{name}\n({way})" if way else name
        patches.append(Patch(facecolor=colour, label=label, **_hatched(hatch)))
    columns = min(5, len(patches))
    figure.legend(
        handles=patches, loc="outside upper center", ncols=columns, fontsize=8, frameon=False
    )


#: How the bars of a second, third, ... way of measuring are hatched.
HATCHES = ("", "///", "...", "xxx", "---")


def _hatched(hatch: str) -> dict[str, object]:
    return {"hatch": hatch, "edgecolor": "white", "linewidth": 0} if hatch else {}


def _measured(rows: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Model -> hatch, and how it was measured in words; no words if all were measured alike."""
    names = ["tasks", "annotator", "reader"]
    known = rows[["model", *names]].fillna("").drop_duplicates("model").set_index("model")
    ways = list(dict.fromkeys(known.itertuples(index=False, name=None)))
    said = {
        way: ", ".join(f"{n} {text}" for n, text in zip(names, way, strict=True) if text)
        for way in ways
    }
    return {
        model: (HATCHES[ways.index(way) % len(HATCHES)], said[way] if len(ways) > 1 else "")
        for model, way in zip(
            known.index, known.itertuples(index=False, name=None), strict=True
        )
    }


def growth(axes: Axes, table: pd.DataFrame) -> Axes:
    """Split-half cosine of each direction against the spans it was built from."""
    if table.empty:
        return missing(axes, "unavailable: too few spans")
    for rank, (name, rows) in enumerate(table.groupby("behaviour", sort=False)):
        marker = MARKERS[rank % len(MARKERS)]
        axes.plot(rows["spans"], rows["cosine"], color=COLOURS[name], marker=marker, label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(top=1.02)
    axes.set_xlabel("spans in the smaller half")
    axes.set_ylabel("cosine of disjoint halves")
    return axes


def effect_panels(
    panels: Sequence[Axes],
    table: pd.DataFrame,
    names: Sequence[str],
    *,
    label: str,
    band: str = "interval",
    mark: Mapping[str, int] | None = None,
    log: bool = False,
) -> Sequence[Axes]:
    """A panel a behaviour from :func:`stllms.effects.table`: the mean line and its band.

    ``band`` is ``"interval"`` (bootstrap) or ``"sd"`` (one standard deviation, as published);
    ``mark`` is a layer a behaviour, drawn as a dotted line; the range of control directions is
    hatched where the table has it (:func:`stllms.effects.beside_nulls`). ``log`` draws values
    on a logarithmic axis, where one layer that has far more than the others does not hide them.
    """
    panels = list(panels)
    for axes, name in zip(panels, names, strict=True):
        rows = table[(table["behaviour"] == name) & table["mean"].notna()]
        axes.set_title(name)
        if rows.empty:
            missing(axes, "unavailable:\ntoo few spans").set(xlabel="layer", ylabel=label)
            continue
        line = rows["mean"].to_numpy()
        spread = rows["sd"].to_numpy()
        edges = (line - spread, line + spread)
        if band == "interval":
            edges = (rows["low"].to_numpy(), rows["high"].to_numpy())
        curves(axes, {name: line}, label=label, bands={name: edges}, mark=mark)
        if "null_low" in rows:
            null = rows["null_low"].to_numpy(), rows["null_high"].to_numpy()
            axes.fill_between(rows["layer"], *null, **HATCH)
    if log:
        _logarithmic(panels, table[table["behaviour"].isin(names)])
    for axes in panels:
        axes.label_outer()
    return panels


def _logarithmic(panels: Sequence[Axes], table: pd.DataFrame) -> None:
    """One logarithmic scale, down to half of the smallest mean: a band below 0 ends there."""
    drawn = table[[name for name in ("mean", "null_low") if name in table]].to_numpy(float)
    drawn = drawn[drawn > 0]
    for axes in panels:
        if axes.lines and len(drawn):
            axes.set_yscale("log")
            axes.set_ylim(bottom=drawn.min() / 2)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())


def steering_bars(axes: Axes, table: pd.DataFrame) -> Axes:
    """The paper's bars from :func:`stllms.evaluation.bars`, with the range of the nulls."""
    names = list(dict.fromkeys(table["behaviour"]))
    bars(axes, table, x="behaviour", hue="mode", palette=MODES, label="token fraction")
    width, named = 0.8 / len(MODES), False
    for rank, mode in enumerate(MODES):
        rows = table[table["mode"] == mode].set_index("behaviour").reindex(names)
        place = np.arange(len(names)) + (rank - (len(MODES) - 1) / 2) * width
        low, high = rows["null_low"].to_numpy(float), rows["null_high"].to_numpy(float)
        known = ~np.isnan(low)
        if not known.any():
            continue
        axes.bar(
            place[known],
            (high - low)[known],
            width * 0.92,
            bottom=low[known],
            **HATCH,
            label=None if named else "control directions",
        )
        named = True
    return axes
