"""The released layer effects beside a run: METHOD section 12, a message, bad folders."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from stllms import artifacts, effects, published_tables, released_effects
from stllms.config import RunConfig
from stllms.records import STEERED


def setup(folder, tmp_path) -> RunConfig:
    given = None if folder is None else str(folder)
    return RunConfig(published=given, results=str(tmp_path / "results"))


def test_without_a_folder_one_line_says_how_to_get_them(tmp_path, capsys):
    assert released_effects.views(setup(None, tmp_path)) == []
    (line,) = capsys.readouterr().out.splitlines()
    assert "--published FOLDER" in line
    assert not (tmp_path / "results").exists()


def test_a_folder_without_layer_effects_says_so(tmp_path, capsys):
    entry = {"mean": torch.randn(28, 8), "count": 20}
    torch.save({"overall": entry}, tmp_path / "mean_vectors_x.pt")
    assert released_effects.views(setup(tmp_path, tmp_path)) == []
    assert f"{tmp_path}: no layer_effects_*.pt" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(artifacts.BadFile, match="there is no such folder"):
        released_effects.views(setup(tmp_path / "nowhere", tmp_path))


def test_files_without_a_steered_behaviour_say_so(tmp_path, capsys):
    torch.save({"other": [[0.1, 0.2]]}, tmp_path / "layer_effects_x.pt")
    assert released_effects.views(setup(tmp_path, tmp_path)) == []
    assert f"{tmp_path}: no layer effects of backtracking" in capsys.readouterr().out


def test_a_behaviour_that_a_file_lacks_leaves_the_others(tmp_path):
    values = {name: [[0.1, 0.3, 0.2]] * 3 for name in STEERED[1:]}
    torch.save(values, tmp_path / "layer_effects_x.pt")
    figure, table = released_effects.views(setup(tmp_path, tmp_path))
    assert table["behaviour"].tolist() == list(STEERED[1:])
    panels = figure.subfigs[0].axes
    assert [axes.get_title() for axes in panels] == list(STEERED)
    assert panels[0].texts[0].get_text().startswith("left out")
    assert [len(axes.lines) for axes in panels] == [0, 1, 1, 1]


def test_ranks_and_peaks_are_those_of_method_section_12(published, tmp_path):
    folder = tmp_path / "released"
    folder.mkdir()
    for path in published.glob("layer_effects_*.pt"):
        shutil.copy(path, folder)
    figure, table = released_effects.views(setup(folder, tmp_path))
    assert len(figure.subfigs) == table["model"].nunique() == 2
    table = table.set_index(["model", "behaviour"])

    def column(model, name):
        return [int(table.loc[(model, b), name].split()[0]) for b in STEERED]

    qwen, llama = "R1-Distill-Qwen-1.5B", "R1-Distill-Llama-8B"
    assert column(qwen, "peak layer") == [18, 18, 15, 18]
    assert column(llama, "peak layer") == [0, 2, 0, 0]
    assert column(llama, "rank of the steering layer") == [2, 4, 2, 4]
    assert column(llama, "rank without layers 0-4") == [1, 1, 1, 1]
    assert table.loc[(llama, STEERED[0]), "steering_layer"] == "12"
    assert " to " in table.loc[(qwen, STEERED[0]), "peak layer"]
    caption = figure._supxlabel.get_text()
    assert f"{llama} 45, {qwen} 46" in caption
    assert "dotted: published steering layer" in caption
    marked = figure.subfigs[0].axes[0].lines[-1]
    assert list(marked.get_xdata()) == [12, 12]


def test_a_model_without_published_layers_has_no_rank():
    values = {name: np.array([[0.1, 0.3, 0.2]] * 3) for name in STEERED}
    peaks = published_tables.peaks(values, None, draws=20).assign(model="own")
    table = released_effects.ranks(peaks)
    assert set(table["rank of the steering layer"]) == {"n/a"}
    assert set(table["peak layer"]) == {"1 (1 to 1)"}
    assert set(table["steering_layer"]) == {"n/a"}
    stacked = np.stack(list(values.values()), axis=1)
    curves = effects.table({"s": stacked}, STEERED).assign(model="own")
    figure = released_effects.draw(curves, peaks)
    assert len(figure.subfigs[0].axes[0].lines) == 1, "nothing is marked"
    assert "own 3)" in figure._supxlabel.get_text()
    assert "dotted" not in figure._supxlabel.get_text()
