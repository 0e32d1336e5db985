"""The files released with the paper -> their heatmap, layer effects and comparison, no model.

:func:`run` reads a folder of released files and writes figures and tables to
``<results>/published/``. Everything is read before anything is drawn, so that a bad file leaves
nothing half done; it raises ``BadFile``, one line that names it. A label that a file lacks is
left out of its figures, printed on standard error and listed in ``left_out.csv``.

==============================  ==========================================================
released file                   figures (METHOD, section 10)
==============================  ==========================================================
``mean_vectors_*.pt``           heatmap of the directions, each at its steering layer
``layer_effects_*.pt``          layer effects in one row (bootstrap interval over
                                responses) and 2x2 (one standard deviation, as published)
``reasoning_comparison_*.json`` counts, fractions, both, fractions with totals; with the
                                published treatment and with the sound one
==============================  ==========================================================
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stllms import (
    __version__,
    artifacts,
    compare,
    comparison,
    effects,
    panels,
    plots,
    tables,
    vectors,
)
from stllms import published_tables as released
from stllms.artifacts import BadFile
from stllms.comparison import Member
from stllms.config import ModelEntry
from stllms.published_tables import Released
from stllms.records import HEATMAP
from stllms.terminal import plain
from stllms.vectors import SteeringVectors

#: What is read: kind -> the names of its files.
PATTERNS: dict[str, str] = {
    "vectors": "mean_vectors_*.pt",
    "effects": "layer_effects_*.pt",
    "comparison": "reasoning_comparison_*.json",
}
#: What :func:`run` writes below its folder, deleted before it draws again.
MADE: tuple[str, ...] = (
    *("files.csv", "left_out.csv", "heatmap.csv", "vectors.csv"),
    *("layer_effects*.csv", "comparison*.csv"),
    *("figures/cosine_heatmap_*", "figures/layer_effects_*", "figures/comparison_*"),
)
#: The objective and the positions of the released layer effects (METHOD, section 7).
SET = "published/others"
#: ``empty_chains`` -> how the figures of a treatment are called, and what it is.
TREATMENTS: dict[str, tuple[str, str]] = {
    "published": (
        "published",
        "Published treatment: opening tags without numbers, chains without any count as zeros.",
    ),
    "apart": (
        "sound",
        "Sound treatment: tags of every form read, chains without segments set apart.",
    ),
}


def run(folder: str | Path, results: str | Path) -> list[Path]:
    """Draw what ``folder`` holds into ``<results>/published/``; returns what was written.

    What an earlier call drew there, perhaps from other files, is deleted first.

    Raises:
        BadFile: the folder is missing or holds none of :data:`PATTERNS`; or the first file
            that is empty, cut off, unsafe or not what its name says.
    """
    paths = find(folder)
    directions = {path: released.read_vectors(path) for path in paths["vectors"]}
    measured = {path: released.read_effects(path) for path in paths["effects"]}
    chains = {path: released.read_counts(path) for path in paths["comparison"]}
    write = _Writer(Path(results) / "published")
    write.clear()
    with mpl.rc_context():
        plots.style()
        if directions:
            _draw_vectors(write, directions)
        if measured:
            _draw_effects(write, measured)
        if chains:
            _draw_comparison(write, chains)
    _list_left_out(
        write,
        {path: released.left_out(found) for path, found in directions.items()}
        | {path: found.left_out for path, found in measured.items()},
    )
    write.table("files", listing(folder))
    return write.paths


def _list_left_out(write: _Writer, left_out: Mapping[Path, Mapping[str, str]]) -> None:
    rows = [
        (path.name, label, why)
        for path, labels in left_out.items()
        for label, why in labels.items()
    ]
    for name, label, why in rows:
        print(plain(f"{name}: {label} left out ({why})"), file=sys.stderr)
    if rows:
        write.table("left_out", pd.DataFrame(rows, columns=["file", "label", "why"]))


def _without(left_out: Mapping[str, str]) -> str:
    """For captions: ``Labels left out: deduction (why); ...``."""
    said = "; ".join(f"{label} ({why})" for label, why in left_out.items())
    return f"Labels left out: {said or 'none'}."


def ensure(folder: str | Path, results: str | Path) -> None:
    """:func:`run`, unless ``<results>/published/`` was made from the very same files."""
    made = Path(results) / "published" / "files.csv"
    if not made.is_file() or not artifacts.load_table(made).equals(listing(folder)):
        run(folder, results)


def find(folder: str | Path) -> dict[str, list[Path]]:
    """The released files of a folder by kind; :class:`BadFile` without any."""
    folder = Path(folder).expanduser()
    if folder.is_file():
        raise BadFile(f"{folder}: a file, expected the folder that it is in")
    if not folder.is_dir():
        raise BadFile(f"{folder}: there is no such folder")
    found = {
        kind: sorted(path for path in folder.glob(pattern) if not path.is_dir())
        for kind, pattern in PATTERNS.items()
    }
    if not any(found.values()):
        raise BadFile(f"{folder}: no released file, expected {' or '.join(PATTERNS.values())}")
    return found


def listing(folder: str | Path) -> pd.DataFrame:
    """One row a file of the folder: name, how it was used, bytes, a hash of its content."""
    used = {path: kind for kind, paths in find(folder).items() for path in paths}
    rows = [
        (path.name, used.get(path, "not used"), path.stat().st_size, _digest(path), __version__)
        for path in sorted(Path(folder).expanduser().iterdir())
        if path.is_file()
    ]
    return pd.DataFrame(rows, columns=["file", "used", "bytes", "sha256", "stllms"])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- directions --------------------------------------------------------------------------


def _draw_vectors(write: _Writer, directions: Mapping[Path, SteeringVectors]) -> None:
    cells, labels = [], []
    for path, found in directions.items():
        entry = compare.entry_of(path)
        layers = vectors.heatmap_layers(
            found, vectors.steering_layers(entry.steering_layers, found.n_layers), HEATMAP
        )
        labels.append(released.labels(entry, found))
        if not layers:
            continue
        matrix = vectors.cosines(found, layers).numpy()
        figure = _figure(6.6, 5.4)
        plots.heatmap(figure.subplots(), matrix, list(layers))
        plots.caption(figure, _about_vectors(entry, found, layers))
        data = pd.DataFrame(matrix, list(layers), list(layers)).reset_index(names="behaviour")
        write.figure(f"cosine_heatmap_{_tag(path)}", figure, data)
        long = data.melt("behaviour", var_name="other", value_name="cosine")
        cells.append(long.assign(model=entry.display, layer=long["behaviour"].map(layers)))
    columns = ["model", "behaviour", "layer", "other", "cosine"]
    if cells:
        write.table("heatmap", pd.concat(cells, ignore_index=True)[columns])
    write.table("vectors", pd.concat(labels, ignore_index=True))


def _about_vectors(entry: ModelEntry, found: SteeringVectors, layers: Mapping[str, int]) -> str:
    which = "middle layer"
    if entry.steering_layers:
        which = "published steering layers (that of backtracking for labels without one)"
    return (
        f"{entry.display}, released vectors; {which}: {tables.layer_text(layers)}. "
        f"{_without(released.left_out(found))}"
    )


# -- layer effects -----------------------------------------------------------------------


def _draw_effects(write: _Writer, measured: Mapping[Path, Released]) -> None:
    curves, found = [], []
    for path, read in measured.items():
        entry, values = compare.entry_of(path), read.effects
        if not values:
            continue
        rows = pd.concat(
            [effects.curve(values[name]).assign(behaviour=name) for name in values],
            ignore_index=True,
        ).assign(model=entry.display, set=SET)
        curves.append(rows[["model", "set", "behaviour", *rows.columns[:6]]])
        found.append(released.peaks(values, entry.steering_layers).assign(model=entry.display))
        about = (
            f"{entry.display}, released values: published objective, before the spans of the"
            f" other behaviours; mean over {released.n_responses(rows)} responses"
        )
        known = " Dotted: published steering layer." if entry.steering_layers else ""
        absent = f" {_without(read.left_out)}" if read.left_out else ""
        for name, size, grid, band, words in (
            ("row", (14, 3.3), (1, 4), "interval", "95% bootstrap interval over responses."),
            ("grid", (9, 6.2), (2, 2), "sd", "one standard deviation, as published."),
        ):
            figure = _figure(*size)
            panels.released_effects(
                figure.subplots(*grid, sharex=True, sharey=True).ravel(),
                curves[-1],
                label="surrogate gradient",
                band=band,
                mark=entry.steering_layers,
            )
            plots.caption(figure, f"{about}; band: {words}{known}{absent}")
            write.figure(f"layer_effects_{name}_{_tag(path)}", figure, curves[-1])
    if not curves:
        return
    write.table("layer_effects", pd.concat(curves, ignore_index=True))
    made = pd.concat(found, ignore_index=True)
    write.table("layer_effects_peaks", made[["model", *made.columns[:-1]]])


# -- comparison --------------------------------------------------------------------------


def _draw_comparison(write: _Writer, chains: Mapping[Path, list[dict[str, int]]]) -> None:
    rows, averages, pairs = [], [], []
    found = {treatment: released.members(list(chains), treatment) for treatment in TREATMENTS}
    for treatment, compared in found.items():
        table = comparison.table(compared, empty=treatment)
        groups = comparison.group_intervals(compared, empty=treatment)
        _comparison_figures(write, compared, table, groups, treatment)
        rows.append(table.assign(treatment=treatment))
        averages.append(groups.assign(treatment=treatment))
        paired = comparison.pairs(compared, empty=treatment)
        pairs.append(paired.assign(metric="segment fraction", treatment=treatment))
    write.table("comparison", pd.concat(rows, ignore_index=True))
    write.table("comparison_groups", pd.concat(averages, ignore_index=True))
    write.table("comparison_pairs", pd.concat(pairs, ignore_index=True))
    stored = {compare.entry_of(path).display: counts for path, counts in chains.items()}
    write.table("comparison_changes", released.changes(*found.values(), stored))


def _comparison_figures(
    write: _Writer,
    compared: Sequence[Member],
    table: pd.DataFrame,
    groups: pd.DataFrame,
    treatment: str,
) -> None:
    """The four comparison figures of METHOD section 10 for one treatment."""
    name, words = TREATMENTS[treatment]
    palette = comparison.colours(compared)
    totals = groups[(groups["behaviour"] == "all") & (groups["metric"] == "segment count")]
    named = totals["kind"].where(
        ~totals["kind"].duplicated(keep=False), totals["kind"] + " (" + totals["tasks"] + ")"
    )
    means = ", ".join(f"{n} {v:.1f}" for n, v in zip(named, totals["value"], strict=True))
    about = f"Released chains: {comparison.caption(compared)} {words} 95% intervals over tasks."
    width = comparison.width(compared)
    for figure_name, shown in (
        ("counts", ("segment count",)),
        ("fractions", ("segment fraction",)),
        ("both", ("segment count", "segment fraction")),
        ("totals", ("segment fraction",)),
    ):
        figure = _figure(width + 3 * (figure_name == "totals"), 1.6 + 3.0 * len(shown))
        if figure_name == "totals":
            axes = figure.subplots(1, 2, width_ratios=(3, 1.2))
            plots.totals(axes[1], table, palette=palette)
        else:
            axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for panel, metric in zip(axes, shown, strict=False):
            plots.compare(panel, table, metric=metric, palette=palette)
        plots.models_legend(figure, palette, table)
        groups_too = f" Segments a chain, group averages: {means}."
        plots.caption(figure, about + groups_too * (figure_name in ("counts", "totals")))
        write.figure(f"comparison_{figure_name}_{name}", figure, table)


# -- files -------------------------------------------------------------------------------


class _Writer:
    """Writes below one folder, and remembers the paths in their order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[Path] = []

    def clear(self) -> None:
        """Deletes what is left of :data:`MADE`, so that no table of other files stays."""
        for path in [path for pattern in MADE for path in self.folder.glob(pattern)]:
            path.unlink()

    def table(self, name: str, table: pd.DataFrame) -> None:
        self.paths.append(self.folder / f"{name}.csv")
        artifacts.save_table(self.paths[-1], table)

    def figure(self, name: str, figure: Figure, data: pd.DataFrame) -> None:
        folder = self.folder / "figures"
        artifacts.save_figure(folder, name, figure, data)
        self.paths += [folder / f"{name}.{kind}" for kind in ("png", "pdf", "csv")]


def _figure(width: float, height: float) -> Figure:
    """A figure of its own canvas: no window, no backend and no global state is touched."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tag(path: Path) -> str:
    """The model's part of a file name, fit for the name of a figure."""
    return re.sub(r"[^a-z0-9._-]+", "-", compare.entry_of(path).name.lower())
