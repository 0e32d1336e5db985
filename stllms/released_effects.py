"""The released layer effects beside a run's own: a figure and the rank of the steering layer.

METHOD, section 12, "effects peak in middle layers": the ranks and their intervals, no verdict.
What is shown was computed and written by :mod:`stllms.published`.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from stllms import artifacts, panels, plots, published, published_tables, tables
from stllms.config import RunConfig
from stllms.records import STEERED

HOW = (
    "No released files: with a folder of the authors' layer_effects_*.pt, "
    "`./run_all.sh --model NAME --published FOLDER` or "
    'options = {"published": "FOLDER"} draws them here.'
)
#: Columns of ``layer_effects_peaks.csv`` that are shown, and what they are called.
RANKS: dict[str, str] = {
    "peak": "peak layer",
    "rank": "rank of the steering layer",
    "late_rank": "rank without layers 0-4",
}


def views(setup: RunConfig) -> list[Figure | pd.DataFrame]:
    """What notebook 03 displays: the figure and the table of ranks.

    Without ``setup.published``, or with no layer effects in that folder, nothing but one
    printed line that says so.

    Raises:
        artifacts.BadFile: a file of the folder cannot be read.
    """
    if setup.published is None:
        print(HOW)
        return []
    if not published.find(setup.published)["effects"]:
        print(f"{setup.published}: no {published.PATTERNS['effects']} in it.")
        return []
    published.ensure(setup.published, setup.results_folder)
    folder = setup.results_folder / "published"
    if not (folder / "layer_effects.csv").is_file():
        print(f"{setup.published}: no layer effects of {', '.join(STEERED)} in its files.")
        return []
    curves = artifacts.load_table(folder / "layer_effects.csv")
    peaks = artifacts.load_table(folder / "layer_effects_peaks.csv")
    return [draw(curves, peaks), ranks(peaks)]


def draw(curves: pd.DataFrame, peaks: pd.DataFrame) -> Figure:
    """A row of panels a model, with bootstrap intervals and the published steering layers;
    the caption says over how many responses each model's mean is."""
    known = peaks.dropna(subset="steering_layer")
    marks = {
        model: dict(zip(rows["behaviour"], rows["steering_layer"].astype(int), strict=True))
        for model, rows in known.groupby("model")
    }
    figure = Figure(figsize=(14, 0.4 + 2.8 * peaks["model"].nunique()), layout="constrained")
    panels.effect_rows(figure, curves, marks)
    responses = ", ".join(
        f"{model} {published_tables.n_responses(rows)}"
        for model, rows in curves.groupby("model", sort=False)
    )
    plots.caption(
        figure,
        f"Released values, mean over the responses ({responses}), 95% bootstrap interval over "
        f"them{'; dotted: published steering layer' if marks else ''}.",
    )
    return figure


def ranks(peaks: pd.DataFrame) -> pd.DataFrame:
    """Peak, and rank of the published steering layer (1 is the largest of all layers), each
    with the central 95 % over bootstrap samples of the responses; a row a model and behaviour.
    """
    found = [
        peaks.assign(
            quantity=words,
            value=peaks[name],
            low=peaks[f"{name}_low"],
            high=peaks[f"{name}_high"],
        )
        for name, words in RANKS.items()
    ]
    shown = pd.concat(found, ignore_index=True).sort_values("model", kind="stable")
    keys = ["model", "behaviour", "layers", "steering_layer"]
    shown["steering_layer"] = tables.shown(shown[["steering_layer"]])
    made = tables.intervals(shown, keys, "quantity", digits=0)
    return made[list(RANKS.values())].reset_index().rename_axis(columns=None)
