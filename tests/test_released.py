"""The released files: exact tables, what is missing, what is refused."""

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
    chain,
    chains,
    lacking,
    layer_effects,
    mean_vectors,
    write_comparison,
    write_folder,
)

from stllms.comparison import released
from stllms.labels import PAPER
from stllms.runs import files
from stllms.runs.files import BadFile


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "released")


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, by name; only their PNG is written, and empty."""
    drawn = {}

    def keep(folder, name, figure, _):
        drawn[name] = figure
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").touch()

    monkeypatch.setattr(files, "save_figure", keep)
    return drawn


def table(results: Path, name: str) -> pd.DataFrame:
    return files.load_table(results / "published" / f"{name}.csv")


def caption(figure) -> str:
    return figure._supxlabel.get_text().replace("\n", " ")


# -- everything of a folder ----------------------------------------------------------------


@pytest.mark.slow
def test_what_is_returned_is_what_is_there(folder, tmp_path):
    paths = released.run(folder, tmp_path)
    there = [path for path in (tmp_path / "published").rglob("*") if path.is_file()]
    assert sorted(paths) == sorted(there)
    assert all(path.stat().st_size for path in there)
    for kind in (".png", ".pdf", ".csv"):
        drawn = {path.stem for path in paths if path.suffix == kind and "figures" in path.parts}
        assert drawn == {
            "cosine_heatmap_r1-distill-qwen-1.5b",
            *(f"layer_effects_{name}_r1-distill-qwen-1.5b" for name in ("row", "grid")),
            *(
                f"comparison_{name}_{treatment}"
                for name in ("counts", "fractions", "both", "totals")
                for treatment in ("published", "sound")
            ),
        }
    figure, ranks = released.views(folder, tmp_path)
    row = tmp_path / "published" / "figures" / "layer_effects_row_r1-distill-qwen-1.5b.png"
    assert figure.data == row.read_bytes()
    assert ranks["rank"].str.isdigit().all()


def test_nothing_is_drawn_again_until_a_file_changes_and_then_nothing_old_stays(
    folder, tmp_path, figures
):
    (folder / "notes.txt").write_text("mine")
    released.ensure(folder, tmp_path)
    listed = table(tmp_path, "files").set_index("file")["used"]
    assert listed["notes.txt"] == "not used"
    assert sorted(listed) == ["comparison", "effects", "not used", "vectors"]
    target = tmp_path / "published"
    (target / "notes.csv").write_text("mine")
    figures.clear()
    released.ensure(folder, tmp_path)
    assert not figures
    (folder / PLACES["layer_effects"]).unlink()
    released.ensure(folder, tmp_path)
    assert figures
    assert not list(target.rglob("layer_effects*"))
    assert (target / "notes.csv").read_text() == "mine"


@pytest.mark.parametrize("kind", PLACES)
def test_one_kind_of_file_gives_its_figures_alone(folder, tmp_path, figures, kind):
    for other in {*PLACES} - {kind}:
        (folder / PLACES[other]).unlink()
    released.run(folder, tmp_path)
    begins = {"mean_vectors": "cosine_heatmap"}.get(kind, kind)
    assert figures
    assert all(name.startswith(begins) for name in figures)


def test_a_model_that_nobody_knows_is_drawn_at_its_middle_layer(folder, tmp_path, figures):
    torch.save(mean_vectors(layers=4), folder / "mean_vectors_My Own.pt")
    torch.save(layer_effects(layers=4, responses=1), folder / "layer_effects_My Own.pt")
    write_comparison(folder, "somebody-instruct", chains())
    released.run(folder, tmp_path)
    assert "cosine_heatmap_my-own" in figures
    heatmap = table(tmp_path, "heatmap")
    assert heatmap.loc[heatmap["model"] == "My Own", "layer"].eq(2).all()
    peaks = table(tmp_path, "layer_effects_peaks")
    own = peaks[peaks["model"] == "My Own"]
    assert own[["steering_layer", "rank", "late_rank"]].isna().all(axis=None)
    assert (own["peak_low"] == own["peak_high"]).all()
    row, known = (figures[f"layer_effects_row_{n}"] for n in ("my-own", "r1-distill-qwen-1.5b"))
    assert [len(axes.lines) for axes in row.axes] == [1] * 4, "nothing is marked"
    assert list(known.axes[0].lines[-1].get_xdata()) == [17, 17]
    assert ["Dotted" in caption(figure) for figure in (row, known)] == [False, True]
    kinds = table(tmp_path, "comparison").set_index("model")["kind"]
    assert set(kinds["somebody-instruct"]) == {"instruct"}


def test_the_heatmap_has_the_cosines_at_the_published_steering_layers(
    folder, tmp_path, figures
):
    released.run(folder, tmp_path)
    found = table(tmp_path, "heatmap").set_index(["behaviour", "other"])["cosine"]
    means = {name: one["mean"].double().numpy() for name, one in mean_vectors().items()}
    layers = {"initializing": 17, "backtracking": 17, "deduction": 17}
    layers |= {"uncertainty-estimation": 18, "adding-knowledge": 18}
    differences = {b: (means[b] - means["overall"])[layers[b]] for b in PAPER.compared}
    for one, u in differences.items():
        for other, v in differences.items():
            cosine = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
            assert found[one, other] == pytest.approx(cosine, abs=1e-5)
    labels = table(tmp_path, "vectors").set_index("label")
    assert labels.loc["summarizing", "status"] == "left out: no behaviour"
    norm = np.linalg.norm(means["overall"][-1])
    assert labels["last_norm"].iloc[0] == pytest.approx(norm, rel=1e-5)


def test_peaks_equal_a_loop_over_resamples():
    rng = np.random.default_rng(1)
    values = rng.uniform(size=(7, 9)) + np.linspace(0, 0.3, 9)
    values[3, 2] = np.nan
    found = released.peaks({"backtracking": values}, {"backtracking": 6}).iloc[0]
    known = np.delete(values, 3, axis=0)
    rng, drawn = np.random.default_rng(0), []
    for sample in (np.arange(6), *rng.integers(6, size=(2000, 6))):
        mean = known[sample].mean(0)
        rank = sorted(mean, reverse=True).index(mean[6]) + 1
        late_rank = sorted(mean[5:], reverse=True).index(mean[6]) + 1
        drawn.append((mean.argmax(), rank, 5 + mean[5:].argmax(), late_rank))
    for name, (value, *rest) in zip(
        ("peak", "rank", "late_peak", "late_rank"), np.transpose(drawn), strict=True
    ):
        low, high = np.quantile(rest, [0.025, 0.975], method="nearest")
        assert found[[name, f"{name}_low", f"{name}_high"]].tolist() == [value, low, high]
    assert found["n"] == 6


def test_views_say_in_one_line_why_there_are_none(tmp_path, capsys):
    assert released.views(None, tmp_path) == []
    assert "--published FOLDER" in capsys.readouterr().out
    torch.save({"other": [[0.1, 0.2]]}, tmp_path / "layer_effects_x.pt")
    assert released.views(tmp_path, tmp_path) == []
    assert "no layer effects of backtracking" in capsys.readouterr().out


# -- comparison ----------------------------------------------------------------------------


@pytest.mark.parametrize("models", [1, 10])
def test_any_number_of_models_is_compared(tmp_path, models, figures):
    for place, name in enumerate(NAMES[:models]):
        write_comparison(tmp_path, name, chains(seed=place))
    released.run(tmp_path, tmp_path)
    rows = table(tmp_path, "comparison")
    assert rows["model"].nunique() == models
    assert rows["treatment"].unique().tolist() == ["published", "apart"]
    assert table(tmp_path, "comparison_pairs")["thinking"].nunique() == models // 2


def test_the_published_treatment_equals_the_stored_counts(tmp_path, figures):
    """Counts and fractions from ``label_counts`` alone, without a reader of ours: numbered tags
    are lost, and their chain counts as zeros."""
    lost = chain('["0. {}"]', deduction=3, backtracking=1)
    rows = [*chains(5), lost, chain()]
    write_comparison(tmp_path, MODEL, rows)
    released.run(tmp_path, tmp_path)
    found = table(tmp_path, "comparison")
    found = found.set_index(["treatment", "metric", "behaviour"])["value"]
    stored = pd.DataFrame([one["label_counts"] for one in rows], columns=list(PAPER.names))
    stored = stored.fillna(0)
    total = stored.sum(axis=1)
    shares = stored.div(total.where(total > 0, 1), axis=0)
    for b in PAPER.names:
        for metric, values in (("count", stored[b]), ("fraction", shares[b])):
            value = found["published", f"segment {metric}", b]
            assert value == pytest.approx(values.mean(), rel=1e-7)
    assert found["apart", "segment count", "deduction"] * 7 == pytest.approx(
        stored["deduction"].sum() + 3, rel=1e-7
    )
    (changes,) = table(tmp_path, "comparison_changes").to_dict("records")
    assert changes["chains"] == changes["equal_stored"] == 7
    empty = [changes[name] for name in ("empty_published", "empty_sound", "recovered")]
    assert empty == [2, 1, 1]
    assert changes["otherwise_changed"] == 0
    rows[1]["label_counts"] = {"deduction": 77}
    write_comparison(tmp_path, MODEL, rows)
    released.run(tmp_path, tmp_path)
    assert table(tmp_path, "comparison_changes")["equal_stored"].tolist() == [6]


# -- part of what there could be -----------------------------------------------------------


def test_a_label_that_is_missing_leaves_the_rest(folder, tmp_path, figures):
    torch.save(mean_vectors(deduction=3), folder / PLACES["mean_vectors"])
    part = {**lacking(layer_effects(), "backtracking"), "summarizing": []}
    part["adding-knowledge"][2][5] = np.inf
    torch.save(part, folder / PLACES["layer_effects"])
    released.run(folder, tmp_path)
    assert len(figures) == 3 + 8
    labels = table(tmp_path, "vectors").set_index("label")
    assert labels.loc["deduction", ["status", "spans"]].tolist() == ["too few spans", 3]
    assert table(tmp_path, "heatmap")["behaviour"].unique().tolist() == list(
        PAPER.compared[:-1]
    )
    peaks = table(tmp_path, "layer_effects_peaks").set_index("behaviour")["n"]
    assert peaks.to_dict() == dict.fromkeys(PAPER.targets[1:], 9) | {"adding-knowledge": 8}
    grid = figures["layer_effects_grid_r1-distill-qwen-1.5b"]
    assert grid.axes[0].texts[0].get_text() == "left out:\nno released values"
    assert "mean over 8 to 9 responses" in caption(grid)


def test_files_without_any_known_label_draw_nothing(folder, tmp_path, figures):
    torch.save({"overall": mean_vectors()["overall"]}, folder / PLACES["mean_vectors"])
    torch.save({"other": [[0.0] * 28]}, folder / PLACES["layer_effects"])
    released.run(folder, tmp_path)
    assert all(name.startswith("comparison") for name in figures)
    assert not (tmp_path / "published" / "heatmap.csv").exists()
    assert not (tmp_path / "published" / "layer_effects.csv").exists()


def test_effects_are_the_finite_numbers_of_the_file(tmp_path):
    path = tmp_path / PLACES["layer_effects"]
    content = {**layer_effects(), "backtracking": [], "summarizing": [[0.0] * 3]}
    content["example-testing"] = [[np.nan] * 28, [np.inf] * 28]
    content["adding-knowledge"][2][5] = -np.inf
    torch.save(content, path)
    found = released.read_effects(path)
    assert [*found] == ["uncertainty-estimation", "adding-knowledge"]
    assert np.argwhere(np.isnan(found["adding-knowledge"])).tolist() == [[2, 5]]
    expected = np.float32(content["uncertainty-estimation"])
    assert np.array_equal(found["uncertainty-estimation"], expected)


# -- what is refused -----------------------------------------------------------------------


def refused(folder: Path, results: Path) -> str:
    """The one line of the refusal; nothing was drawn."""
    with pytest.raises(BadFile) as caught:
        released.run(folder, results)
    assert "\n" not in str(caught.value)
    assert not (results / "published").exists()
    return str(caught.value)


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("damage", ["empty", "truncated", "html"])
def test_a_damaged_file_is_named(folder, tmp_path, kind, damage):
    path = folder / PLACES[kind]
    whole = path.read_bytes()
    content = {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "html": b"<html>not found</html>",
    }
    path.write_bytes(content[damage])
    line = refused(folder, tmp_path / "results")
    assert str(path) in line
    assert damage != "empty" or "the file is empty" in line


SHORT = mean_vectors(layers=3)["deduction"]
NAN = {"mean": torch.full((28, 8), torch.nan), "count": 40}


@pytest.mark.parametrize(
    ("kind", "content", "words"),
    [
        ("mean_vectors", lacking(mean_vectors(), "overall"), "no 'overall'"),
        ("mean_vectors", mean_vectors(layers=5), "5 layers, but the model is steered at layer"),
        ("mean_vectors", {**mean_vectors(), "deduction": SHORT}, "the mean of deduction"),
        ("mean_vectors", {**mean_vectors(), "deduction": NAN}, "deduction is not finite"),
        ("layer_effects", [1, 2], "expected behaviour -> responses"),
        ("layer_effects", {b: [1.0, 2.0] for b in PAPER.targets}, "['backtracking'][0]"),
        ("layer_effects", {"x": [["1"]]}, "['x'][0][0] Input should be a valid number"),
        ("layer_effects", {"x": torch.ones(2, 2)}, "['x']"),
        ("layer_effects", {"backtracking": [[1.0], [1.0, 2.0]]}, "there are [1, 2]"),
        ("layer_effects", {**layer_effects(), "backtracking": [[0.0] * 27]}, "[27, 28]"),
        ("layer_effects", layer_effects(layers=5), "5 layers"),
        ("comparison", [], "a list of annotated chains"),
        ("comparison", [*chains(2), {"response": "x"}], "[2]['label_counts'] Field required"),
        ("comparison", [{**chain(), "label_counts": {"a\nb": "3"}}], r"['a\nb']"),
    ],
)  # fmt: skip
def test_a_foreign_file_is_named(folder, tmp_path, kind, content, words):
    path = folder / PLACES[kind]
    if kind == "comparison":
        path.write_text(json.dumps(content))
    else:
        torch.save(content, path)
    line = refused(folder, tmp_path / "results")
    assert str(path) in line
    assert words in line


def test_a_missing_or_empty_folder_is_named(tmp_path):
    assert "there is no such folder" in refused(tmp_path / "nowhere", tmp_path)
    line = refused(tmp_path, tmp_path)
    assert f"{tmp_path}: no released file, expected mean_vectors_*.pt or" in line
