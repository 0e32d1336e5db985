"""The released files drawn without a model: METHOD's numbers, exact counts, part of a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from released_files import (
    MODEL,
    NAMES,
    PLACES,
    chains,
    lacking,
    layer_effects,
    mean_vectors,
    write_comparison,
    write_folder,
)

from stllms import artifacts, compare, files, published, run
from stllms.artifacts import BadFile
from stllms.records import BEHAVIOURS, HEATMAP, STEERED

QWEN, LLAMA = "R1-Distill-Qwen-1.5B", "R1-Distill-Llama-8B"


# -- the authors' files --------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(published, tmp_path_factory):
    """``(paths, folder)`` of everything drawn from the released files."""
    from stllms import published as module

    results = tmp_path_factory.mktemp("results")
    return module.run(published, results), results / "published"


def test_what_is_returned_is_what_is_there(drawn):
    paths, folder = drawn
    there = sorted(path for path in folder.rglob("*") if path.is_file())
    assert sorted(paths) == there
    assert all(path.stat().st_size for path in there)
    figures = {path.stem for path in paths if path.suffix == ".png"}
    assert figures == {path.stem for path in paths if path.suffix == ".pdf"}
    assert figures == {
        "cosine_heatmap_r1-distill-qwen-1.5b",
        *(f"layer_effects_{kind}_r1-distill-qwen-1.5b" for kind in ("row", "grid")),
        *(f"layer_effects_{kind}_r1-distill-llama-8b" for kind in ("row", "grid")),
        *(
            f"comparison_{kind}_{treatment}"
            for kind in ("counts", "fractions", "both", "totals")
            for treatment in ("published", "sound")
        ),
    }


def test_heatmap_of_method_section_12(drawn):
    found = files.load_table(drawn[1] / "heatmap.csv")
    matrix = found.pivot(index="behaviour", columns="other", values="cosine")
    square = matrix.loc[list(HEATMAP), list(HEATMAP)].to_numpy()
    upper = square[np.triu_indices(5, 1)]
    assert [f"{value:.2f}" for value in upper] == (
        ["0.36", "0.32", "0.28", "0.17", "0.64", "0.33", "0.60", "0.19", "0.51", "0.45"]
    )
    layers = found.drop_duplicates("behaviour").set_index("behaviour")["layer"]
    assert layers.to_dict() == {
        "initializing": 17,
        "backtracking": 17,
        "uncertainty-estimation": 18,
        "adding-knowledge": 18,
        "deduction": 17,
    }


def test_the_extra_label_is_reported_and_the_norm_grows(drawn):
    labels = files.load_table(drawn[1] / "vectors.csv").set_index("label")
    assert labels.loc["summarizing", ["spans", "status"]].tolist() == [
        1,
        "left out: no behaviour",
    ]
    assert labels.loc[list(BEHAVIOURS), "status"].eq("direction").all()
    assert round(labels["first_norm"].iloc[0]) == 15
    assert round(labels["last_norm"].iloc[0]) == 232


def test_peaks_and_ranks_of_method_section_12(drawn):
    found = files.load_table(drawn[1] / "layer_effects_peaks.csv")
    found = found.set_index(["model", "behaviour"])
    qwen, llama = (found.loc[model].loc[list(STEERED)] for model in (QWEN, LLAMA))
    assert qwen["peak"].tolist() == [18, 18, 15, 18]
    assert llama["peak"].tolist() == [0, 2, 0, 0]
    assert llama["steering_layer"].tolist() == [12] * 4
    assert llama["rank"].tolist() == [2, 4, 2, 4]
    assert llama["late_peak"].tolist() == [12] * 4
    assert llama["late_rank"].tolist() == [1] * 4
    for name in ("peak", "rank", "late_peak"):
        assert (found[f"{name}_low"] <= found[name]).all()
        assert (found[name] <= found[f"{name}_high"]).all()


def test_published_treatment_equals_the_files_own_counts_exactly(drawn, published):
    """Counts and fractions from ``label_counts`` alone, without a reader of ours."""
    found = files.load_table(drawn[1] / "comparison.csv")
    found = found[found["treatment"] == "published"].set_index(["model", "metric", "behaviour"])
    paths = sorted(published.glob("reasoning_comparison_*.json"))
    for path in paths:
        model = compare.entry_of(path).display
        rows = [row["label_counts"] for row in json.loads(path.read_text(encoding="utf-8"))]
        table = pd.DataFrame(rows).reindex(columns=list(BEHAVIOURS)).fillna(0)
        total = table.sum(axis=1)
        shares = table.div(total.where(total > 0, 1), axis=0)
        for behaviour in BEHAVIOURS:
            count = found.loc[(model, "segment count", behaviour), "value"]
            share = found.loc[(model, "segment fraction", behaviour), "value"]
            assert count == float(f"{table[behaviour].mean():.8g}")
            assert share == float(f"{shares[behaviour].mean():.8g}")
        assert found.loc[(model, "segment count", "all"), "value"] == total.mean()
    changes = files.load_table(drawn[1] / "comparison_changes.csv")
    assert len(changes) == len(paths) == 5
    assert changes["equal_stored"].tolist() == changes["chains"].tolist() == [100] * 5


def test_twenty_chains_are_lost_to_numbered_tags(drawn):
    changes = files.load_table(drawn[1] / "comparison_changes.csv").set_index("model")
    assert changes["recovered"].sum() == changes["empty_published"].sum() == 20
    assert changes["recovered"].to_dict() == {
        "R1-Distill-Llama-8B": 3,
        "Llama-3.1-8B-Instruct": 0,
        "R1-Distill-Qwen-14B": 15,
        "Qwen2.5-14B-Instruct": 0,
        "R1-Distill-Llama-70B": 2,
    }
    assert not changes["empty_sound"].any()
    groups = files.load_table(drawn[1] / "comparison_groups.csv")
    totals = groups[(groups["metric"] == "segment count") & (groups["behaviour"] == "all")]
    totals = totals.set_index(["treatment", "kind"])["value"].round(2)
    assert totals["published", "thinking"] == 26.53
    assert totals["apart", "thinking"] == 28.38
    assert totals["published", "instruct"] == totals["apart", "instruct"] == 16.42


# -- files of the same form, written here --------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "released")


@pytest.fixture
def tables_only(monkeypatch):
    """Figures are made, but not rendered: the tests that look at tables are quick."""

    def empty_files(folder, name, figure, data):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for kind in ("png", "pdf", "csv"):
            (Path(folder) / f"{name}.{kind}").write_text(name)

    monkeypatch.setattr(artifacts, "save_figure", empty_files)


@pytest.mark.usefixtures("tables_only")
@pytest.mark.parametrize("models", [1, 2, 10])
def test_any_number_of_models_is_compared(tmp_path, models):
    for place, name in enumerate(NAMES[:models]):
        write_comparison(tmp_path, name, chains(seed=place))
    published.run(tmp_path, tmp_path)
    rows = files.load_table(tmp_path / "published" / "comparison.csv")
    assert rows["model"].nunique() == models
    assert rows["treatment"].unique().tolist() == ["published", "apart"]
    pairs = files.load_table(tmp_path / "published" / "comparison_pairs.csv")
    assert pairs["thinking"].nunique() == models // 2


@pytest.mark.usefixtures("tables_only")
def test_a_model_that_nobody_knows_is_drawn_at_its_middle_layer(folder, tmp_path):
    torch.save(mean_vectors(layers=4), folder / "mean_vectors_My Own.pt")
    torch.save(layer_effects(layers=4, responses=1), folder / "layer_effects_My Own.pt")
    write_comparison(folder, "somebody-instruct", chains())
    paths = published.run(folder, tmp_path)
    assert tmp_path / "published/figures/cosine_heatmap_my-own.png" in paths
    heatmap = files.load_table(tmp_path / "published" / "heatmap.csv")
    assert heatmap.loc[heatmap["model"] == "My Own", "layer"].eq(2).all()
    peaks = files.load_table(tmp_path / "published" / "layer_effects_peaks.csv")
    own = peaks[peaks["model"] == "My Own"]
    assert own[["steering_layer", "rank", "late_rank"]].isna().all(axis=None)
    assert (own["peak_low"] == own["peak_high"]).all()


@pytest.mark.usefixtures("tables_only")
def test_other_files_are_listed_as_not_used(folder, tmp_path):
    (folder / "notes.txt").write_text("mine")
    published.run(folder, tmp_path)
    listed = files.load_table(tmp_path / "published" / "files.csv").set_index("file")["used"]
    assert listed["notes.txt"] == "not used"
    assert sorted(listed) == ["comparison", "effects", "not used", "vectors"]


@pytest.mark.usefixtures("tables_only")
def test_nothing_is_drawn_again_until_a_file_changes(folder, tmp_path):
    published.ensure(folder, tmp_path)
    figure = tmp_path / "published/figures/comparison_both_sound.png"
    before = figure.stat().st_mtime_ns
    published.ensure(folder, tmp_path)
    assert figure.stat().st_mtime_ns == before
    write_comparison(folder, MODEL, chains(seed=5))
    published.ensure(folder, tmp_path)
    assert figure.stat().st_mtime_ns > before


@pytest.mark.usefixtures("tables_only")
def test_counts_that_differ_from_the_stored_ones_are_counted(folder, tmp_path):
    rows = chains(4)
    rows[1]["label_counts"] = {"deduction": 77}
    write_comparison(folder, MODEL, rows)
    published.run(folder, tmp_path)
    changes = files.load_table(tmp_path / "published" / "comparison_changes.csv")
    assert changes[["chains", "equal_stored"]].to_numpy().tolist() == [[4, 3]]


# -- part of what there could be -----------------------------------------------------------


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, by name, and not written."""
    made = {}
    monkeypatch.setattr(
        artifacts, "save_figure", lambda _, name, drawn, __: made.update({name: drawn})
    )
    return made


def test_a_label_that_is_missing_leaves_the_rest(folder, tmp_path, capsys, figures):
    torch.save(mean_vectors(deduction=3), folder / PLACES["mean_vectors"])
    part = {**lacking(layer_effects(), "backtracking"), "summarizing": []}
    torch.save(part, folder / PLACES["layer_effects"])
    published.run(folder, tmp_path)
    assert len(figures) == 3 + 8
    left_out = files.load_table(tmp_path / "published" / "left_out.csv")
    assert left_out.to_numpy().tolist() == [
        [PLACES["mean_vectors"], "deduction", "spans: 3, at least 10 needed"],
        [PLACES["layer_effects"], "backtracking", "not in the file"],
        [PLACES["layer_effects"], "summarizing", "not steered"],
    ]
    printed = capsys.readouterr().err.splitlines()
    assert printed == [
        f"{name}: {label} left out ({why})" for name, label, why in left_out.to_numpy()
    ]
    heatmap = files.load_table(tmp_path / "published" / "heatmap.csv")
    assert heatmap["behaviour"].unique().tolist() == list(HEATMAP[:-1])
    peaks = files.load_table(tmp_path / "published" / "layer_effects_peaks.csv")
    assert peaks["behaviour"].tolist() == [name for name in STEERED if name != "backtracking"]
    for name in ("row", "grid"):
        drawn = figures[f"layer_effects_{name}_r1-distill-qwen-1.5b"]
        empty, *others = drawn.axes
        assert empty.get_title() == "backtracking"
        assert empty.texts[0].get_text() == "left out:\nno released values"
        assert not any(axes.texts for axes in others)
        assert "backtracking (not in the file)" in drawn._supxlabel.get_text().replace(
            "\n", " "
        )
    caption = figures["cosine_heatmap_r1-distill-qwen-1.5b"]._supxlabel.get_text()
    assert "deduction (spans: 3, at least 10 needed)" in caption.replace("\n", " ")


@pytest.mark.parametrize("kind", PLACES)
def test_a_folder_with_one_kind_of_file_gives_its_figures_alone(
    folder, tmp_path, figures, kind
):
    for other in {*PLACES} - {kind}:
        (folder / PLACES[other]).unlink()
    results = tmp_path / "results"
    assert run.main(["--published", str(folder), "--results", str(results)]) == 0
    begins = {"mean_vectors": "cosine_heatmap"}.get(kind, kind)
    assert figures
    assert all(name.startswith(begins) for name in figures)


def test_files_without_any_known_label_draw_nothing_and_say_so(
    folder, tmp_path, capsys, figures
):
    torch.save({"overall": mean_vectors()["overall"]}, folder / PLACES["mean_vectors"])
    torch.save({"other": [[0.0] * 28]}, folder / PLACES["layer_effects"])
    results = tmp_path / "results"
    assert run.main(["--published", str(folder), "--results", str(results)]) == 0
    assert len(capsys.readouterr().err.splitlines()) == len(BEHAVIOURS) + len(STEERED) + 1
    assert all(name.startswith("comparison") for name in figures)
    assert not (results / "published" / "heatmap.csv").exists()
    assert not (results / "published" / "layer_effects.csv").exists()


@pytest.mark.usefixtures("tables_only")
def test_what_other_files_gave_before_is_gone(folder, tmp_path):
    published.run(folder, tmp_path)
    made = tmp_path / "published"
    (made / "notes.csv").write_text("mine")
    (folder / PLACES["layer_effects"]).unlink()
    paths = published.run(folder, tmp_path)
    assert not list(made.rglob("layer_effects*"))
    assert {*paths, made / "notes.csv"} == {path for path in made.rglob("*") if path.is_file()}


def test_the_mean_is_over_the_responses_that_have_a_value(folder, tmp_path, figures):
    values = layer_effects()
    values["backtracking"][0] = [np.nan] * 28
    torch.save(values, folder / PLACES["layer_effects"])
    published.run(folder, tmp_path)
    caption = figures["layer_effects_row_r1-distill-qwen-1.5b"]._supxlabel.get_text()
    assert "mean over 8 to 9 responses" in caption


# -- the command line ----------------------------------------------------------------------


@pytest.mark.usefixtures("tables_only")
def test_published_alone_draws_and_prints_the_paths(folder, tmp_path, capsys):
    results = tmp_path / "results"
    assert run.main(["--published", str(folder), "--results", str(results)]) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert printed[-1] == results / "ledger.csv"
    assert set(printed) == {path for path in results.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "more", [["--seed", "3"], ["--profile", "full"], ["--to", "02"], ["--fresh"]]
)
def test_options_of_a_run_are_refused_without_a_model(folder, tmp_path, capsys, more):
    assert run.main(["--published", str(folder), "--results", str(tmp_path), *more]) == 2
    line = capsys.readouterr().err.strip()
    assert more[0] in line
    assert "--model" in line


def test_with_a_model_the_folder_goes_to_notebook_05(folder):
    given = run.parser().parse_args(["--published", str(folder), "--model", "tiny-thinker"])
    config = run.configurations(given)[0]
    assert config.published == str(folder)
    assert config.stage_options("05_compare")["published"].startswith(f"{folder.name}:")


def test_a_bad_file_is_a_bad_file_for_a_caller_too(folder, tmp_path):
    (folder / PLACES["comparison"]).write_text("[")
    with pytest.raises(BadFile, match="truncated JSON"):
        published.run(folder, tmp_path)
    assert artifacts.BadFile is BadFile
