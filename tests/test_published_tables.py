"""Released files -> tables: loops as references, what is left out, what is refused."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
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

from stllms import (
    artifacts,
    claims,
    comparison,
    effects,
    ledger,
    metrics,
    published_tables,
    run,
    vectors,
)
from stllms.records import BEHAVIOURS, HEATMAP, STEERED


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "released")


def test_peaks_equal_a_loop_over_resamples():
    rng = np.random.default_rng(1)
    values = rng.uniform(size=(7, 9)) + np.linspace(0, 0.3, 9)
    values[3, 2] = np.nan
    found = published_tables.peaks({"backtracking": values}, {"backtracking": 6}).iloc[0]
    known = np.delete(values, 3, axis=0)
    rng, peaks, ranks, late = np.random.default_rng(0), [], [], []
    for sample in rng.integers(6, size=(2000, 6)):
        mean = known[sample].mean(0)
        peaks.append(int(mean.argmax()))
        ranks.append(sorted(mean, reverse=True).index(mean[6]) + 1)
        late.append(5 + int(mean[5:].argmax()))
    for name, drawn, value in (
        ("peak", peaks, known.mean(0).argmax()),
        ("rank", ranks, effects.rank(known.mean(0), 6)),
        ("late_peak", late, 5 + known.mean(0)[5:].argmax()),
    ):
        low, high = np.quantile(drawn, [0.025, 0.975], method="nearest")
        assert found[[name, f"{name}_low", f"{name}_high"]].tolist() == [value, low, high]
    assert found["n"] == 6


def test_group_intervals_equal_a_loop_over_tasks(tmp_path):
    paths = [write_comparison(tmp_path, NAMES[i], chains(12, i)) for i in (0, 2)]
    compared = published_tables.members(paths, "apart")
    compared[0].counts[3] = 0  # set apart: no fractions
    found = comparison.group_intervals(compared, empty="apart", draws=400, seed=3)
    plain = comparison.table(compared, empty="apart")
    keys = ["kind", "metric", "behaviour"]
    plain = plain.groupby(keys)["value"].mean().rename("value_plain").reset_index()
    both = found.merge(plain, on=keys)
    known = both[both["value_plain"].notna()]
    assert len(known) > 6
    assert known["value"].tolist() == pytest.approx(known["value_plain"].tolist())
    assert compared[0].task_ids == tuple(str(i) for i in range(12))
    drawn = metrics.resamples(compared[0].task_ids, draws=400, seed=3)
    means = []
    for times in drawn:
        tasks = np.repeat(np.arange(12), times)
        rows = [
            one.counts[tasks, 1] / np.clip(one.counts[tasks].sum(1), 1, None)
            for one in compared
        ]
        rows[0][tasks == 3] = np.nan
        means.append(np.mean([np.nanmean(row) for row in rows]))
    row = found[(found["metric"] == "segment fraction") & (found["behaviour"] == BEHAVIOURS[1])]
    assert row[["low", "high"]].to_numpy().ravel() == pytest.approx(
        np.quantile(means, [0.025, 0.975])
    )


# -- what is left out ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (lacking(mean_vectors(), "deduction"), {"deduction": "spans: 0, at least 10 needed"}),
        (mean_vectors(deduction=3), {"deduction": "spans: 3, at least 10 needed"}),
        (mean_vectors(summarizing=1), {"summarizing": "spans: 1, no behaviour"}),
        (mean_vectors(), {}),
    ],
)
def test_a_label_without_a_direction_is_left_out_with_the_reason(tmp_path, content, why):
    path = tmp_path / PLACES["mean_vectors"]
    torch.save(content, path)
    found = published_tables.read_vectors(path)
    assert published_tables.left_out(found) == why
    layers = vectors.heatmap_layers(found, dict.fromkeys(STEERED, 1), HEATMAP)
    assert list(layers) == [name for name in HEATMAP if name not in why]


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"backtracking": []}, {"backtracking": "responses: 0, none without NaN"}),
        (
            {"backtracking": [[np.nan] * 28, [np.inf] * 28]},
            {"backtracking": "responses: 2, none without NaN"},
        ),
        ({"deduction": []}, {"deduction": "not steered"}),
        ({"summarizing": [[0.0] * 3]}, {"summarizing": "not steered"}),
        ({}, {}),
    ],
)
def test_a_label_without_effects_is_left_out_with_the_reason(tmp_path, changed, why):
    path = tmp_path / PLACES["layer_effects"]
    torch.save({**layer_effects(), **changed}, path)
    found = published_tables.read_effects(path)
    assert found.left_out == why
    assert {*found.effects} == {*STEERED} - {*why}
    assert {values.shape for values in found.effects.values()} == {(9, 28)}


def test_effects_that_are_not_in_the_file_are_left_out(tmp_path):
    path = tmp_path / PLACES["layer_effects"]
    torch.save({"somebody": [[1.0]]}, path)
    found = published_tables.read_effects(path)
    assert found.effects == {}
    lacking_ones = dict.fromkeys(STEERED, "not in the file")
    assert found.left_out == {**lacking_ones, "somebody": "not steered"}


def test_an_infinite_effect_counts_as_missing(tmp_path):
    path = tmp_path / PLACES["layer_effects"]
    made = layer_effects()
    made["backtracking"][2][5] = np.inf
    torch.save(made, path)
    found = published_tables.read_effects(path).effects["backtracking"]
    assert np.isnan(found[2, 5])
    assert np.isfinite(np.delete(found, 2, axis=0)).all()
    curve = effects.curve(found)
    assert published_tables.n_responses(curve) == "8 to 9"
    assert published_tables.n_responses(curve[:5]) == "9"


def test_the_ledger_calls_a_part_of_a_released_file_a_part(published, tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "save_figure", lambda *_: None)
    folder = tmp_path / "released"
    folder.mkdir()
    for name in ("layer_effects_deepseek-r1-distill-llama-8b.pt", PLACES["mean_vectors"]):
        content = torch.load(published / name, weights_only=True)
        torch.save(lacking(content, "adding-knowledge"), folder / name)
    rows = ledger.ledger(tmp_path, folder)
    rows = rows[rows["on"].str.startswith("released file")].set_index("where")
    assert rows["verdict"].tolist() == [claims.PART] * 3
    peaks, ranks, heatmap = rows["ours"]
    assert [text.split()[1] for text in peaks.split("; ")] == ["0", "2", "0"]
    assert [text.split()[1] for text in ranks.split("; ")] == ["2", "4", "2"]
    assert heatmap == ".36 .32 .17; .64 .60; .51"
    assert rows["note"].iloc[2].endswith("; without adding-knowledge")
    content["deduction"]["mean"] = content["overall"]["mean"] - 1
    torch.save(lacking(content, "adding-knowledge"), folder / PLACES["mean_vectors"])
    rows = ledger.ledger(tmp_path, folder)
    assert rows.loc[rows["on"] == "released file", "verdict"].tolist() == [claims.DIFFERS]


def test_the_ledger_takes_the_released_files_themselves(published, tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "save_figure", lambda *_: None)
    folder = tmp_path / "released"
    folder.mkdir()
    for path in [*published.glob("layer_effects_*"), *published.glob("mean_vectors_*")]:
        shutil.copy(path, folder)
    rows = ledger.ledger(tmp_path, folder)
    rows = rows[rows["on"].str.startswith("released file")]
    assert rows["verdict"].tolist() == [claims.REPRODUCED] * 4


# -- what is refused -----------------------------------------------------------------------


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def refused(folder: Path, results: Path, capsys) -> str:
    """The one line of ``--published`` with exit status 2; nothing was drawn."""
    assert run.main(["--published", str(folder), "--results", str(results)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert not (results / "published").exists()
    return lines[0]


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (cut, ""),
        (lambda path: path.write_text("<html>not found</html>"), ""),
        (lambda path: path.write_bytes(bytes(range(256)) * 9), ""),
    ],
    ids=["empty", "truncated", "html", "noise"],
)
def test_a_damaged_file_is_named(folder, tmp_path, capsys, kind, damage, words):
    path = folder / PLACES[kind]
    damage(path)
    line = refused(folder, tmp_path / "results", capsys)
    assert str(path) in line
    assert words in line


@pytest.mark.parametrize(
    ("kind", "content", "words"),
    [
        ("mean_vectors", {"a": 1}, "expected label"),
        ("mean_vectors", lacking(mean_vectors(), "overall"), "no 'overall'"),
        ("mean_vectors", mean_vectors(layers=5), "5 layers, but the model is steered at layer"),
        (
            "mean_vectors",
            {**mean_vectors(), "deduction": mean_vectors(layers=3)["deduction"]},
            "",
        ),
        (
            "mean_vectors",
            {
                **mean_vectors(),
                "deduction": {"mean": torch.full((28, 8), torch.nan), "count": 40},
            },
            "deduction",
        ),
        ("layer_effects", [1, 2], "expected behaviour"),
        ("layer_effects", {b: [1.0, 2.0] for b in STEERED}, "expected behaviour"),
        (
            "layer_effects",
            {**layer_effects(), "backtracking": [[1.0], [1.0, 2.0]]},
            "backtracking",
        ),
        ("layer_effects", {**layer_effects(), "backtracking": [[0.0] * 27]}, "[27, 28]"),
        ("layer_effects", layer_effects(layers=5), "5 layers"),
    ],
)
def test_a_foreign_tensor_file_is_named(folder, tmp_path, capsys, kind, content, words):
    path = folder / PLACES[kind]
    torch.save(content, path)
    line = refused(folder, tmp_path / "results", capsys)
    assert str(path) in line
    assert words in line


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "an empty list"),
        ({"a": 1}, "a dict"),
        ([1], "chain 0 lacks"),
        ([*chains(2), {"response": "x"}], "chain 2 lacks"),
        ([{**chains(1)[0], "annotated_response": None}], "annotated_response is no text"),
        ([{**chains(1)[0], "label_counts": ["deduction"]}], "label_counts"),
        ([{**chains(1)[0], "label_counts": {"deduction": "3"}}], "label_counts"),
    ],
)
def test_a_foreign_comparison_file_is_named(folder, tmp_path, capsys, rows, words):
    path = write_comparison(folder, MODEL, rows)
    line = refused(folder, tmp_path / "results", capsys)
    assert str(path) in line
    assert words in line


def test_a_missing_or_empty_folder_is_named(tmp_path, capsys):
    assert "there is no such folder" in refused(tmp_path / "nowhere", tmp_path, capsys)
    (tmp_path / "empty" / "mean_vectors_x.pt").mkdir(parents=True)
    line = refused(tmp_path / "empty", tmp_path, capsys)
    assert str(tmp_path / "empty") in line
    assert "mean_vectors_*.pt" in line


def test_a_file_in_the_place_of_the_folder_is_called_one(folder, tmp_path, capsys):
    path = folder / PLACES["comparison"]
    line = refused(path, tmp_path / "results", capsys)
    assert line.endswith(f"{path}: a file, expected the folder that it is in")


class Code:
    """Makes a folder as soon as it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.made),)


def plain_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("write", [torch.save, plain_pickle])
@pytest.mark.parametrize("kind", ["mean_vectors", "layer_effects"])
def test_code_in_a_file_is_refused_and_not_run(folder, tmp_path, capsys, kind, write):
    write({"overall": Code(tmp_path / "made")}, folder / PLACES[kind])
    line = refused(folder, tmp_path / "results", capsys)
    assert str(folder / PLACES[kind]) in line
    assert "no code of it was run" in line
    assert not (tmp_path / "made").exists()
