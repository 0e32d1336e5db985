"""The files released with the paper: readers, and their tables and figures without a model.

==============================  ==========================================================
released file                   figures (method, section 10)
==============================  ==========================================================
``mean_vectors_*.pt``           heatmap of the directions, each at its steering layer
``layer_effects_*.pt``          layer effects in one row and 2x2
``reasoning_comparison_*.json`` counts, fractions, both, fractions with totals; each with the
                                published treatment and with the sound one
==============================  ==========================================================
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from stllms import __version__
from stllms.annotation import markup
from stllms.attribution import effects
from stllms.comparison import groups
from stllms.comparison.groups import Member
from stllms.labels import BEHAVIOURS, HEATMAP, STEERED
from stllms.plotting import axes as plots
from stllms.plotting import text
from stllms.registry import MODELS, ModelEntry
from stllms.runs import files
from stllms.runs.files import BadFile
from stllms.terminal import plain
from stllms.vectors import directions
from stllms.vectors.directions import SteeringVectors

if TYPE_CHECKING:
    import torch

#: What is read: kind -> the names of its files.
PATTERNS: dict[str, str] = {
    "vectors": "mean_vectors_*.pt",
    "effects": "layer_effects_*.pt",
    "comparison": "reasoning_comparison_*.json",
}
#: What :func:`run` writes below its folder, and deletes before it draws again.
OUTPUTS: tuple[str, ...] = (
    *("files.csv", "left_out.csv", "heatmap.csv", "vectors.csv"),
    *("layer_effects*.csv", "comparison*.csv"),
    *("figures/cosine_heatmap_*", "figures/layer_effects_*", "figures/comparison_*"),
)
#: Treatment of chains (method, section 11) -> the reader of the released markup.
READERS = {"published": "published-counts", "apart": "tolerant"}
#: Treatment -> what its figures are called, and what it is.
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
#: Figures of the layer effects: inches, panels, band, and the band in words.
LAYOUTS: dict[str, tuple[tuple[float, float], tuple[int, int], str, str]] = {
    "row": ((14, 3.3), (1, 4), "interval", "95% bootstrap interval over responses."),
    "grid": ((9, 6.2), (2, 2), "sd", "one standard deviation, as published."),
}
#: Layers 0-4, left out where the ledger asks for the peak behind the first layers.
EARLY = 5
#: Numbers of a table of layer effects, at most.
LARGEST = 1 << 27


# -- reading -----------------------------------------------------------------------------


class Chain(TypedDict):
    """What is used of a released chain."""

    label_counts: dict[str, int]
    annotated_response: str


_CHAINS = TypeAdapter(Annotated[list[Chain], Field(min_length=1)])


def load_comparison(path: str | Path) -> list[Chain]:
    """The released chains of one model; raises ``BadFile`` for any other file."""
    files.check_size(Path(path))
    rows = files.read_json(Path(path))
    try:
        return _CHAINS.validate_python(rows, strict=True)
    except ValidationError as error:
        wrong = error.errors(include_input=False, include_url=False)[0]
        place = "".join(f"[{part!r}]" for part in wrong["loc"])
        why = f"{place} {wrong['msg']}".strip()
        raise BadFile(f"{path}: expected a list of annotated chains: {why}") from None


def load_layer_effects(path: str | Path) -> dict[str, torch.Tensor]:
    """The released layer effects: label -> ``[responses, L]``, float32; ``[0, 0]`` for an
    empty list. The file holds lists of lists, or matrices; ``BadFile`` for anything else."""
    content = files.load_torch(path)
    if not isinstance(content, dict) or not content:
        raise BadFile(f"{path}: expected behaviour -> responses -> layers")
    found = {}
    for label, values in content.items():
        try:
            found[str(label)] = _matrix(values)
        except (ValueError, OverflowError, RuntimeError):
            form = "expected behaviour -> responses -> layers"
            raise BadFile(f"{path}: {form}, not so at {label!r}") from None
    return found


def _matrix(values: Any) -> torch.Tensor:
    """A table ``[responses, L]``, float32; ``ValueError`` for anything else.

    A list is measured before torch sees it: lists may share their parts, so that a file of a
    kilobyte unfolds to more than any memory holds.
    """
    import torch

    if isinstance(values, torch.Tensor) and files.is_plain(values) and values.ndim == 2:
        return values.float()
    if not isinstance(values, list) or not all(isinstance(row, list) for row in values):
        raise ValueError("no list of lists")
    width = max(map(len, values), default=0)
    if width * len(values) > LARGEST or any(len(row) < width for row in values):
        raise ValueError("no table, or one of more numbers than a released file may have")
    if not all(type(value) in (int, float) for row in values for value in row):
        raise ValueError("something that is no number")
    return torch.tensor(values, dtype=torch.float32).reshape(len(values), width)


class Effects(NamedTuple):
    """Released layer effects: steered behaviour -> ``[responses, L]``; label -> why it is
    left out."""

    values: dict[str, np.ndarray]
    left_out: dict[str, str]


def read_effects(path: Path) -> Effects:
    """The layer effects of the steered behaviours, as far as the file has them. Infinite
    values count as missing (NaN)."""
    content = {b: v.numpy() for b, v in load_layer_effects(path).items()}
    content = {b: np.where(np.isfinite(v), v, np.nan) for b, v in content.items()}
    why = {name: "not in the file" for name in STEERED if name not in content}
    for name, values in content.items():
        if name not in STEERED:
            why[name] = "not steered"
        elif not len(_known(values)):
            why[name] = f"responses: {len(values)}, none without NaN"
    found = {name: content[name] for name in STEERED if name not in why}
    sizes = sorted({values.shape[1] for values in found.values()})
    if len(sizes) > 1:
        raise BadFile(f"{path}: behaviours differ in their number of layers {sizes}")
    for n_layers in sizes:
        _check_layers(path, n_layers)
    return Effects(found, why)


def read_vectors(path: Path) -> SteeringVectors:
    """:func:`stllms.vectors.directions.load_published`, refused where the file has fewer
    layers than its model is steered at."""
    found = directions.load_published(path)
    _check_layers(path, found.n_layers)
    return found


def _known(values: np.ndarray) -> np.ndarray:
    """The responses without NaN."""
    return values[np.isfinite(values).all(1)]


def _check_layers(path: Path, n_layers: int) -> None:
    last = max((entry_of(path).steering_layers or {"": 0}).values())
    if last >= n_layers:
        raise BadFile(f"{path}: {n_layers} layers, but the model is steered at layer {last}")


def entry_of(path: Path) -> ModelEntry:
    """The model of a released file: the registry's with that hub name, else one of no pair.

    A name that is not in the registry is an instruct model if it says so, else of unknown
    kind.
    """
    name = re.sub(r"^(mean_vectors|layer_effects|reasoning_comparison)_", "", path.stem)
    for entry in MODELS.values():
        if entry.hub_id and entry.hub_id.split("/")[-1].lower() == name.lower():
            return entry
    instruct = "instruct" in name.lower()
    return ModelEntry(name, None, name, kind="instruct" if instruct else "unknown")


def of_file(path: Path, reader: str) -> Member:
    """The model of a released ``reasoning_comparison_<name>.json``, read by ``reader``.

    The member's tasks are the places in the file: all released files share their 100 tasks.
    """
    entry, chains = entry_of(path), load_comparison(path)
    read = [markup.read(one["annotated_response"], reader=reader).segments for one in chains]
    tasks = tuple(str(place) for place in range(len(chains)))
    counts = [Counter(segment.label for segment in segments) for segments in read]
    return Member(
        name=entry.name,
        display=entry.display,
        kind=entry.kind,
        pair=entry.pair,
        task_ids=tasks,
        counts=np.array([[one[b] for b in BEHAVIOURS] for one in counts], dtype=float),
        source="released",
        tasks="released",
        annotator="released",
        reader=reader,
        asked=tasks,
    )


def members(paths: Sequence[Path], treatment: str) -> list[Member]:
    """The models of released files under a treatment of method, section 11, in stable order."""
    return groups.ordered([of_file(path, READERS[treatment]) for path in paths])


# -- tables ------------------------------------------------------------------------------


def labels(entry: ModelEntry, found: SteeringVectors) -> pd.DataFrame:
    """Every label of a file of vectors: its spans, and whether it has a direction here."""
    norms = found.overall.norm(dim=-1)
    spans = dict(zip(found.behaviours, found.counts.tolist(), strict=True))
    rows = [
        (entry.display, name, n, status, float(norms[0]), float(norms[-1]))
        for status, part in (
            ("direction", spans),
            ("too few spans", found.unavailable),
            ("left out: no behaviour", found.left_out),
        )
        for name, n in part.items()
    ]
    columns = ["model", "label", "spans", "status", "first_norm", "last_norm"]
    return pd.DataFrame(rows, columns=columns)


def left_out(found: SteeringVectors) -> dict[str, str]:
    """The labels of a file of vectors that have no direction here -> why."""
    least = found.config["min_spans"]
    few = {b: f"spans: {n}, at least {least} needed" for b, n in found.unavailable.items()}
    return few | {name: f"spans: {n}, no behaviour" for name, n in found.left_out.items()}


def peaks(
    measured: Mapping[str, np.ndarray],
    steering_layers: Mapping[str, int] | None,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Peak layer and rank of the steering layer from effects ``[R, L]``, one row per behaviour.

    ``peak`` is the layer of the largest mean, ``late_peak`` that among layers from
    :data:`EARLY` on, ``rank`` that of the steering layer among all (1 is the largest; missing
    without a published layer), ``late_rank`` that from :data:`EARLY` on. ``*_low`` and
    ``*_high`` are central 95 % over bootstrap samples of the responses.
    """
    rows = []
    for name, values in measured.items():
        known = _known(values)
        samples = np.random.default_rng(seed).integers(len(known), size=(draws, len(known)))
        means = np.vstack([known.mean(0), known[samples].mean(1)])
        layer = (steering_layers or {}).get(name, -1)
        row: dict[str, Any] = {"behaviour": name, "n": len(known), "layers": known.shape[1]}
        for prefix, skip in (("", 0), ("late_", EARLY if known.shape[1] > EARLY else 0)):
            row |= _spread(f"{prefix}peak", means[:, skip:].argmax(1) + skip)
        row["steering_layer"] = layer if layer >= 0 else np.nan
        for prefix, skip in (("", 0), ("late_", EARLY)):
            ranks = (means[:, skip:] > means[:, [layer]]).sum(1) + 1
            row |= _spread(f"{prefix}rank", ranks if layer >= skip else None)
        rows.append(row)
    return pd.DataFrame(rows)


def _spread(name: str, drawn: np.ndarray | None) -> dict[str, float]:
    """The value (first) and the central 95 % of its bootstrap samples (the rest)."""
    names = (name, f"{name}_low", f"{name}_high")
    if drawn is None:
        return dict.fromkeys(names, np.nan)
    low, high = np.quantile(drawn[1:], [0.025, 0.975], method="nearest")
    return dict(zip(names, (int(drawn[0]), int(low), int(high)), strict=True))


def changes(
    published: Sequence[Member], sound: Sequence[Member], stored: Mapping[str, Sequence[Chain]]
) -> pd.DataFrame:
    """What the reader changes, one row per model: chains without segments, recovered, changed.

    ``equal_stored`` counts the chains whose published reading is exactly the file's own
    ``label_counts`` (``stored``: display name -> chains).
    """
    rows = []
    for old, new in zip(published, sound, strict=True):
        counts = [Counter(one["label_counts"]) for one in stored[old.display]]
        read = [Counter(dict(zip(BEHAVIOURS, row, strict=True))) for row in old.counts]
        empty = old.counts.sum(1) == 0
        rows.append(
            {
                "model": old.display,
                "kind": old.kind,
                "chains": len(read),
                "equal_stored": sum(a == b for a, b in zip(read, counts, strict=True)),
                "empty_published": old.empty,
                "empty_sound": new.empty,
                "recovered": int((empty & (new.counts.sum(1) > 0)).sum()),
                "otherwise_changed": int(((old.counts != new.counts).any(1) & ~empty).sum()),
                "segments_published": old.counts.sum(1).mean(),
                "segments_sound": new.counts.sum(1).mean(),
            }
        )
    return pd.DataFrame(rows)


# -- everything that a folder holds ------------------------------------------------------


def run(folder: str | Path, results: str | Path) -> list[Path]:
    """Draw what ``folder`` holds into ``<results>/published/``; returns what was written.

    Everything is read before anything is drawn, and what an earlier call drew there is deleted.
    A label that a file lacks is left out of its figures, printed on standard error and listed
    in ``left_out.csv``.

    Raises:
        BadFile: the folder is missing or holds none of :data:`PATTERNS`; or the first file
            that is empty, cut off, unsafe or not what its name says.
    """
    paths = find(folder)
    vectors = {path: read_vectors(path) for path in paths["vectors"]}
    measured = {path: read_effects(path) for path in paths["effects"]}
    chains = {path: load_comparison(path) for path in paths["comparison"]}
    target = Path(results) / "published"
    for path in _outputs(target):
        path.unlink()
    with mpl.rc_context():
        plots.style()
        _draw_vectors(target, vectors)
        _draw_effects(target, measured)
        _draw_comparison(target, chains)
    absent = {path: left_out(found) for path, found in vectors.items()}
    absent |= {path: found.left_out for path, found in measured.items()}
    _list_left_out(target, absent)
    files.save_table(target / "files.csv", listing(folder))
    return _outputs(target)


def ensure(folder: str | Path, results: str | Path) -> None:
    """:func:`run`, unless ``<results>/published/`` was drawn from the very same files."""
    drawn = Path(results) / "published" / "files.csv"
    if not drawn.is_file() or not files.load_table(drawn).equals(listing(folder)):
        run(folder, results)


def find(folder: str | Path) -> dict[str, list[Path]]:
    """The released files of a folder by kind; ``BadFile`` without any."""
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
    """One row per file of the folder: name, how it was used, bytes, a hash of its content."""
    used = {path: kind for kind, paths in find(folder).items() for path in paths}
    rows = []
    for path in sorted(Path(folder).expanduser().iterdir()):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            kind = used.get(path, "not used")
            rows.append((path.name, kind, path.stat().st_size, digest, __version__))
    return pd.DataFrame(rows, columns=["file", "used", "bytes", "sha256", "stllms"])


def _outputs(target: Path) -> list[Path]:
    return [path for pattern in OUTPUTS for path in sorted(target.glob(pattern))]


def _list_left_out(target: Path, absent: Mapping[Path, Mapping[str, str]]) -> None:
    rows = [(path.name, *item) for path, reasons in absent.items() for item in reasons.items()]
    for name, label, why in rows:
        print(plain(f"{name}: {label} left out ({why})"), file=sys.stderr)
    if rows:
        table = pd.DataFrame(rows, columns=["file", "label", "why"])
        files.save_table(target / "left_out.csv", table)


# -- figures -----------------------------------------------------------------------------


def _draw_vectors(target: Path, vectors: Mapping[Path, SteeringVectors]) -> None:
    """``vectors.csv`` and, for every file with a direction, a heatmap."""
    cells = []
    for path, found in vectors.items():
        entry = entry_of(path)
        layers = directions.heatmap_layers(
            found, directions.steering_layers(entry.steering_layers, found.n_layers), HEATMAP
        )
        if not layers:
            continue
        matrix = directions.cosines(found, layers).numpy()
        figure = _figure(6.6, 5.4)
        plots.heatmap(figure.subplots(), matrix, list(layers))
        which = "middle layer"
        if entry.steering_layers:
            which = "published steering layers (that of backtracking for labels without one)"
        about = f"{entry.display}, released vectors; {which}: {text.layer_text(layers)}."
        plots.caption(figure, f"{about} {_without(left_out(found))}")
        data = pd.DataFrame(matrix, list(layers), list(layers)).reset_index(names="behaviour")
        files.save_figure(target / "figures", f"cosine_heatmap_{_tag(path)}", figure, data)
        long = data.melt("behaviour", var_name="other", value_name="cosine")
        cells.append(long.assign(model=entry.display, layer=long["behaviour"].map(layers)))
    if cells:
        columns = ["model", "behaviour", "layer", "other", "cosine"]
        heatmap = pd.concat(cells, ignore_index=True)[columns]
        files.save_table(target / "heatmap.csv", heatmap)
    if vectors:
        rows = [labels(entry_of(path), found) for path, found in vectors.items()]
        files.save_table(target / "vectors.csv", pd.concat(rows, ignore_index=True))


def _draw_effects(target: Path, measured: Mapping[Path, Effects]) -> None:
    """Curves and peaks of every file, in one row (bootstrap interval) and 2x2 (one sd)."""
    curves, found = [], []
    for path, read in measured.items():
        if not read.values:
            continue
        entry = entry_of(path)
        rows = [effects.curve(v).assign(behaviour=name) for name, v in read.values.items()]
        table = pd.concat(rows, ignore_index=True)
        table = table.assign(model=entry.display, set="published/others")
        columns = ["model", "set", "behaviour", "layer", "mean", "low", "high", "sd", "n"]
        curves.append(table[columns])
        ranks = peaks(read.values, entry.steering_layers)
        ranks.insert(0, "model", entry.display)
        found.append(ranks)
        for name in LAYOUTS:
            figure = _effects_figure(name, curves[-1], entry.steering_layers, read.left_out)
            saved = f"layer_effects_{name}_{_tag(path)}"
            files.save_figure(target / "figures", saved, figure, curves[-1])
    if curves:
        files.save_table(target / "layer_effects.csv", pd.concat(curves, ignore_index=True))
        ranks = pd.concat(found, ignore_index=True)
        files.save_table(target / "layer_effects_peaks.csv", ranks)


def _effects_figure(
    name: str,
    table: pd.DataFrame,
    marks: Mapping[str, int] | None,
    absent: Mapping[str, str] | None = None,
) -> Figure:
    """The curves of one model, ``"row"`` or ``"grid"``, with its steering layers marked."""
    size, grid, band, words = LAYOUTS[name]
    figure = _figure(*size)
    plots.released_effects(
        figure.subplots(*grid, sharex=True, sharey=True).ravel(),
        table,
        label="surrogate gradient",
        band=band,
        mark=marks,
    )
    plots.caption(
        figure,
        f"{table['model'].iloc[0]}, released values: published objective, before the spans of"
        f" the other behaviours; mean over {_responses(table)} responses; band: {words}"
        f"{' Dotted: published steering layer.' if marks else ''}"
        f"{f' {_without(absent)}' if absent else ''}",
    )
    return figure


def _draw_comparison(target: Path, chains: Mapping[Path, list[Chain]]) -> None:
    """Tables and figures of both treatments, and what the reader changes."""
    if not chains:
        return
    found = {treatment: members(list(chains), treatment) for treatment in TREATMENTS}
    tables: dict[str, list[pd.DataFrame]] = {"": [], "_groups": [], "_pairs": []}
    for treatment, compared in found.items():
        rows = groups.table(compared, empty=treatment)
        averages = groups.group_intervals(compared, empty=treatment)
        pairs = groups.pairs(compared, empty=treatment).assign(metric="segment fraction")
        for name, table in zip(tables, (rows, averages, pairs), strict=True):
            tables[name].append(table.assign(treatment=treatment))
        _comparison_figures(target, compared, rows, averages, treatment)
    for name, parts in tables.items():
        files.save_table(target / f"comparison{name}.csv", pd.concat(parts, ignore_index=True))
    stored = {entry_of(path).display: rows for path, rows in chains.items()}
    files.save_table(
        target / "comparison_changes.csv", changes(found["published"], found["apart"], stored)
    )


def _comparison_figures(
    target: Path,
    compared: Sequence[Member],
    table: pd.DataFrame,
    averages: pd.DataFrame,
    treatment: str,
) -> None:
    """The four comparison figures of method, section 10, for one treatment."""
    name, words = TREATMENTS[treatment]
    palette, width = groups.colours(compared), groups.width(compared)
    totals = averages[averages["behaviour"] == "all"]
    twice = totals["kind"].duplicated(keep=False)
    kinds = totals["kind"].where(~twice, totals["kind"] + " (" + totals["tasks"] + ")")
    means = ", ".join(f"{n} {v:.1f}" for n, v in zip(kinds, totals["value"], strict=True))
    about = f"Released chains: {groups.caption(compared)} {words} 95% intervals over tasks."
    with_means = f"{about} Segments a chain, group averages: {means}."
    for figure_name, shown, words in (
        ("counts", ("segment count",), with_means),
        ("fractions", ("segment fraction",), about),
        ("both", ("segment count", "segment fraction"), about),
        ("totals", ("segment fraction",), with_means),
    ):
        figure = _figure(width + 3 * (figure_name == "totals"), 1.6 + 3.0 * len(shown))
        if figure_name == "totals":
            panels = figure.subplots(1, 2, width_ratios=(3, 1.2))
            plots.totals(panels[1], table, palette=palette)
        else:
            panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for panel, metric in zip(panels, shown, strict=False):
            plots.compare(panel, table, metric=metric, palette=palette)
        plots.models_legend(figure, palette, table)
        plots.caption(figure, words)
        files.save_figure(target / "figures", f"comparison_{figure_name}_{name}", figure, table)


def _figure(width: float, height: float) -> Figure:
    """A figure without pyplot's state; its canvas measures text as the PNG will show it."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tag(path: Path) -> str:
    """The model's part of a file name, fit for the name of a figure."""
    return re.sub(r"[^a-z0-9._-]+", "-", entry_of(path).name.lower())


def _without(absent: Mapping[str, str]) -> str:
    """For captions: ``Labels left out: deduction (why); ...``."""
    words = "; ".join(f"{label} ({why})" for label, why in absent.items())
    return f"Labels left out: {words or 'none'}."


def _responses(curves: pd.DataFrame) -> str:
    """``45``, or ``40 to 45`` where behaviours or layers differ."""
    low, high = int(curves["n"].min()), int(curves["n"].max())
    return str(low) if low == high else f"{low} to {high}"


# -- beside a run, in notebook 03 --------------------------------------------------------

#: Columns of ``layer_effects_peaks.csv`` that are shown, and what they are called.
RANKS: dict[str, str] = {
    "peak": "peak layer",
    "rank": "rank of the steering layer",
    "late_rank": "rank without layers 0-4",
}


def views(published: str | Path | None, results: str | Path) -> list[Figure | pd.DataFrame]:
    """What notebook 03 displays: a figure of the released layer effects, and the peaks and
    ranks of the steering layers. Without a folder, or without layer effects in it, one printed
    line that says so, and nothing else. Raises ``BadFile`` as :func:`run` does."""
    if published is None:
        print(
            "No released files: with a folder of the authors' layer_effects_*.pt, "
            "`./run_all.sh --model NAME --published FOLDER` or "
            'options = {"published": "FOLDER"} draws them here.'
        )
        return []
    if not find(published)["effects"]:
        print(f"{published}: no {PATTERNS['effects']} in it.")
        return []
    ensure(published, results)
    folder = Path(results) / "published"
    if not (folder / "layer_effects.csv").is_file():
        print(f"{published}: no layer effects of {', '.join(STEERED)} in its files.")
        return []
    curves = files.load_table(folder / "layer_effects.csv")
    found = files.load_table(folder / "layer_effects_peaks.csv")
    marks = {entry.display: entry.steering_layers for entry in MODELS.values()}
    by_model = curves.groupby("model", sort=False)
    figures = [_effects_figure("row", rows, marks.get(model)) for model, rows in by_model]
    return [*figures, _ranks(found)]


def _ranks(found: pd.DataFrame) -> pd.DataFrame:
    """Peaks and ranks (1 is the largest of all layers) with their intervals, as text."""
    keys = ["model", "behaviour", "layers", "steering_layer"]
    parts = [
        found[[*keys, name, f"{name}_low", f"{name}_high"]]
        .set_axis([*keys, "value", "low", "high"], axis=1)
        .assign(quantity=words)
        for name, words in RANKS.items()
    ]
    shown = pd.concat(parts, ignore_index=True).sort_values("model", kind="stable")
    shown["steering_layer"] = text.shown(shown[["steering_layer"]])
    table = text.intervals(shown, keys, "quantity", digits=0)
    return table[list(RANKS.values())].reset_index().rename_axis(columns=None)
