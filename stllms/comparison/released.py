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

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from IPython.display import Image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from stllms import __version__
from stllms.annotation import markup
from stllms.attribution import effects
from stllms.comparison import groups
from stllms.comparison.groups import Member
from stllms.hashes import file_hash
from stllms.labels import PAPER
from stllms.plotting import axes as plots
from stllms.plotting import text
from stllms.registry import MODELS, ModelEntry
from stllms.runs import files
from stllms.runs.files import BadFile
from stllms.vectors import directions
from stllms.vectors.directions import SteeringVectors

#: What is read: kind -> the names of its files.
PATTERNS: dict[str, str] = {
    "vectors": "mean_vectors_*.pt",
    "effects": "layer_effects_*.pt",
    "comparison": "reasoning_comparison_*.json",
}
#: What :func:`run` writes below its folder, and deletes before it draws again.
OUTPUTS: tuple[str, ...] = (
    *("files.csv", "heatmap.csv", "vectors.csv", "layer_effects*.csv", "comparison*.csv"),
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


# -- reading -----------------------------------------------------------------------------


class Chain(TypedDict):
    """What is used of a released chain."""

    label_counts: dict[str, int]
    annotated_response: str


_CHAINS = TypeAdapter(Annotated[list[Chain], Field(min_length=1)])
_EFFECTS = TypeAdapter(dict[str, list[list[float]]])


def load_comparison(path: str | Path) -> list[Chain]:
    """The released chains of one model; raises ``BadFile`` for any other file."""
    files.check_size(Path(path))
    rows = files.read_json(Path(path))
    return _validated(_CHAINS, rows, f"{path}: expected a list of annotated chains")


def read_effects(path: Path) -> dict[str, np.ndarray]:
    """The layer effects of the steered behaviours that have any, ``[responses, L]`` float32;
    infinite values count as missing (NaN). Raises ``BadFile`` for any other file, and for one
    of fewer layers than its model is steered at."""
    expected = f"{path}: expected behaviour -> responses -> layers"
    content = _validated(_EFFECTS, files.load_torch(path), expected)
    sizes = sorted({len(row) for name in PAPER.targets for row in content.get(name, ())})
    if len(sizes) > 1:
        raise BadFile(f"{expected}, the same number of layers everywhere: there are {sizes}")
    for n_layers in sizes:
        _check_layers(path, n_layers)
    found = {b: np.array(content[b], np.float32) for b in PAPER.targets if content.get(b)}
    found = {b: np.where(np.isfinite(values), values, np.nan) for b, values in found.items()}
    return {b: values for b, values in found.items() if len(_known(values))}


def read_vectors(path: Path) -> SteeringVectors:
    """:func:`stllms.vectors.directions.load_published`, refused where the file has fewer
    layers than its model is steered at."""
    found = directions.load_published(path)
    _check_layers(path, found.n_layers)
    return found


def _validated(adapter: TypeAdapter, content: Any, expected: str) -> Any:
    try:
        return adapter.validate_python(content, strict=True)
    except ValidationError as error:
        wrong = error.errors(include_input=False, include_url=False)[0]
        place = "".join(f"[{part!r}]" for part in wrong["loc"])
        raise BadFile(f"{expected}: {place} {wrong['msg']}") from None


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
        counts=np.array([[one[b] for b in PAPER.names] for one in counts], dtype=float),
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


def peaks(
    measured: Mapping[str, np.ndarray], steering_layers: Mapping[str, int] | None
) -> pd.DataFrame:
    """Peak layer and rank of the steering layer from effects ``[R, L]``, one row per behaviour.

    ``peak`` is the layer of the largest mean, ``late_peak`` that among layers from
    :data:`EARLY` on, ``rank`` that of the steering layer among all (1 is the largest; missing
    without a published layer), ``late_rank`` that from :data:`EARLY` on. ``*_low`` and
    ``*_high`` are central 95 % over 2000 bootstrap samples of the responses.
    """
    rows = []
    for name, values in measured.items():
        known = _known(values)
        samples = np.random.default_rng(0).integers(len(known), size=(2000, len(known)))
        means = np.vstack([known.mean(0), known[samples].mean(1)])
        layer = (steering_layers or {}).get(name, -1)
        row: dict[str, Any] = {"behaviour": name, "n": len(known), "layers": known.shape[1]}
        for prefix, skip in (("", 0), ("late_", EARLY if known.shape[1] > EARLY else 0)):
            row |= _spread(f"{prefix}peak", means[:, skip:].argmax(1) + skip)
        row["steering_layer"] = layer if layer >= 0 else np.nan
        for prefix, skip in (("", 0), ("late_", EARLY)):
            ranks = (means[:, skip:] > means[:, [layer]]).sum(1) + 1
            row |= _spread(f"{prefix}rank", np.where(layer >= skip, ranks, np.nan))
        rows.append(row)
    return pd.DataFrame(rows)


def _spread(name: str, drawn: np.ndarray) -> dict[str, float]:
    """The value (first) and the central 95 % of its bootstrap samples (the rest)."""
    low, high = np.quantile(drawn[1:], [0.025, 0.975], method="nearest")
    return {name: drawn[0], f"{name}_low": low, f"{name}_high": high}


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
        read = [Counter(dict(zip(PAPER.names, row, strict=True))) for row in old.counts]
        empty = old.counts.sum(1) == 0
        rows.append(
            {
                "model": old.display,
                "kind": old.kind,
                "chains": len(read),
                "equal_stored": sum(a == b for a, b in zip(read, counts, strict=True)),
                "empty_published": old.empty,
                "empty_sound": new.empty,
                "recovered": (empty & (new.counts.sum(1) > 0)).sum(),
                "otherwise_changed": ((old.counts != new.counts).any(1) & ~empty).sum(),
                "segments_published": old.counts.sum(1).mean(),
                "segments_sound": new.counts.sum(1).mean(),
            }
        )
    return pd.DataFrame(rows)


# -- everything that a folder holds ------------------------------------------------------


def run(folder: str | Path, results: str | Path) -> list[Path]:
    """Draw what ``folder`` holds into ``<results>/published/``; returns what was written.

    Everything is read before anything is drawn, and what an earlier call drew there is deleted.

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
        _draw_effects(target, {path: found for path, found in measured.items() if found})
        if chains:
            _draw_comparison(target, chains)
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
    if not folder.is_dir():
        raise BadFile(f"{folder}: there is no such folder")
    found = {kind: sorted(folder.glob(pattern)) for kind, pattern in PATTERNS.items()}
    if not any(found.values()):
        raise BadFile(f"{folder}: no released file, expected {' or '.join(PATTERNS.values())}")
    return found


def listing(folder: str | Path) -> pd.DataFrame:
    """One row per file of the folder: name, how it was used, bytes, a hash of its content."""
    used = {path: kind for kind, paths in find(folder).items() for path in paths}
    rows = []
    for path in sorted(Path(folder).expanduser().iterdir()):
        if path.is_file():
            kind, digest = used.get(path, "not used"), file_hash(path)
            rows.append((path.name, kind, path.stat().st_size, digest, __version__))
    return pd.DataFrame(rows, columns=["file", "used", "bytes", "sha256", "stllms"])


def _outputs(target: Path) -> list[Path]:
    return [path for pattern in OUTPUTS for path in sorted(target.glob(pattern))]


# -- figures -----------------------------------------------------------------------------


def _draw_vectors(target: Path, vectors: Mapping[Path, SteeringVectors]) -> None:
    """``vectors.csv`` and, for every file with a direction, a heatmap."""
    rows, cells = [], []
    for path, found in vectors.items():
        entry = entry_of(path)
        rows.append(labels(entry, found))
        steered_at = directions.steering_layers(entry.steering_layers, found.n_layers)
        layers = directions.heatmap_layers(found, steered_at, PAPER.compared)
        if not layers:
            continue
        matrix = directions.cosines(found, layers).numpy()
        figure = _figure(6.6, 5.4)
        plots.heatmap(figure.subplots(), matrix, list(layers))
        which = "middle layer"
        if entry.steering_layers:
            which = "published steering layers (that of backtracking for labels without one)"
        about = f"{entry.display}, released vectors; {which}: {text.layer_text(layers)}."
        plots.caption(figure, about)
        data = pd.DataFrame(matrix, list(layers), list(layers)).reset_index(names="behaviour")
        files.save_figure(target / "figures", f"cosine_heatmap_{_tag(path)}", figure, data)
        long = data.melt("behaviour", var_name="other", value_name="cosine")
        cells.append(long.assign(model=entry.display, layer=long["behaviour"].map(layers)))
    _save(target / "vectors.csv", rows)
    columns = ["model", "behaviour", "layer", "other", "cosine"]
    _save(target / "heatmap.csv", [one[columns] for one in cells])


def _draw_effects(target: Path, measured: Mapping[Path, Mapping[str, np.ndarray]]) -> None:
    """Curves and peaks of every file, in one row (bootstrap interval) and 2x2 (one sd)."""
    curves, ranks = [], []
    for path, found in measured.items():
        entry = entry_of(path)
        rows = [effects.curve(values).assign(behaviour=b) for b, values in found.items()]
        table = pd.concat(rows, ignore_index=True)
        table = table.assign(model=entry.display, set="published/others")
        columns = ["model", "set", "behaviour", "layer", "mean", "low", "high", "sd", "n"]
        curves.append(table[columns])
        ranks.append(peaks(found, entry.steering_layers))
        ranks[-1].insert(0, "model", entry.display)
        for name in LAYOUTS:
            figure = _effects_figure(name, curves[-1], entry.steering_layers)
            saved = f"layer_effects_{name}_{_tag(path)}"
            files.save_figure(target / "figures", saved, figure, curves[-1])
    _save(target / "layer_effects.csv", curves)
    _save(target / "layer_effects_peaks.csv", ranks)


def _effects_figure(name: str, table: pd.DataFrame, marks: Mapping[str, int] | None) -> Figure:
    """The curves of one model, ``"row"`` or ``"grid"``, with its steering layers marked."""
    size, grid, band, words = LAYOUTS[name]
    figure = _figure(*size)
    plots.effect_panels(
        figure.subplots(*grid, sharex=True, sharey=True).ravel(),
        table,
        label="surrogate gradient",
        band=band,
        mark=marks,
        absent="left out:\nno released values",
    )
    low, high = table["n"].min(), table["n"].max()
    plots.caption(
        figure,
        f"{table['model'].iloc[0]}, released values: published objective, before the spans of"
        f" the other behaviours; mean over {low if low == high else f'{low} to {high}'}"
        f" responses; band: {words}{' Dotted: published steering layer.' if marks else ''}",
    )
    return figure


def _draw_comparison(target: Path, chains: Mapping[Path, list[Chain]]) -> None:
    """Tables and figures of both treatments, and what the reader changes."""
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
        _save(target / f"comparison{name}.csv", parts)
    stored = {entry_of(path).display: rows for path, rows in chains.items()}
    changed = changes(found["published"], found["apart"], stored)
    files.save_table(target / "comparison_changes.csv", changed)


def _comparison_figures(
    target: Path,
    compared: Sequence[Member],
    table: pd.DataFrame,
    averages: pd.DataFrame,
    treatment: str,
) -> None:
    """The four comparison figures of method, section 10, for one treatment."""
    tag, words = TREATMENTS[treatment]
    palette, width = groups.colours(compared), groups.width(compared)
    totals = averages[averages["behaviour"] == "all"]
    means = [f"{n} {v:.1f}" for n, v in zip(totals["kind"], totals["value"], strict=True)]
    for name, metrics in plots.COMPARISONS.items():
        figure = _figure(width + 3 * (name == "totals"), 1.6 + 3.0 * len(metrics))
        plots.comparison(figure, table, name, palette=palette)
        plots.caption(
            figure,
            f"Released chains: {groups.caption(compared)} {words} 95% intervals over tasks. "
            f"Segments a chain, group averages: {', '.join(means)}.",
        )
        files.save_figure(target / "figures", f"comparison_{name}_{tag}", figure, table)


def _save(path: Path, parts: Sequence[pd.DataFrame]) -> None:
    """The tables of several files as one; nothing where there is none."""
    if parts:
        files.save_table(path, pd.concat(parts, ignore_index=True))


def _figure(width: float, height: float) -> Figure:
    """A figure without pyplot's state; its canvas measures text as the PNG will show it."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tag(path: Path) -> str:
    """The model's part of a file name, fit for the name of a figure."""
    return re.sub(r"[^a-z0-9._-]+", "-", entry_of(path).name.lower())


# -- beside a run, in notebook 03 --------------------------------------------------------


def views(published: str | Path | None, results: str | Path) -> list[Image | pd.DataFrame]:
    """What notebook 03 displays: the figures of the released layer effects, and the peaks and
    ranks of the steering layers. Without a folder, or without layer effects in it, one printed
    line that says so, and nothing else. Raises ``BadFile`` as :func:`run` does."""
    if published is None:
        print(
            "No released files: with a folder of the authors' layer_effects_*.pt, "
            "`./run_all.sh --model NAME --published FOLDER` or "
            'options = {"published": "FOLDER"} draws them here.'
        )
        return []
    ensure(published, results)
    folder = Path(results) / "published"
    figures = sorted(folder.glob("figures/layer_effects_row_*.png"))
    if not figures:
        print(f"{published}: no layer effects of {', '.join(PAPER.targets)} in its files.")
        return []
    ranks = files.load_table(folder / "layer_effects_peaks.csv")
    return [*(Image(filename=str(path)) for path in figures), text.shown(ranks)]
