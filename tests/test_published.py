"""The released files drawn without a model: METHOD's numbers, exact counts, bad files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from stllms import (
    artifacts,
    compare,
    comparison,
    effects,
    files,
    published,
    published_tables,
    run,
)
from stllms.artifacts import BadFile
from stllms.config import MODELS
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


def mean_vectors(layers: int = 28, width: int = 8, **counts: int) -> dict:
    rng = torch.Generator().manual_seed(0)
    names = {"overall": 500, **dict.fromkeys(BEHAVIOURS, 40), **counts}
    return {
        name: {"mean": torch.randn(layers, width, generator=rng), "count": n}
        for name, n in names.items()
    }


def layer_effects(layers: int = 28, responses: int = 9) -> dict:
    rng = np.random.default_rng(0)
    return {b: rng.uniform(size=(responses, layers)).tolist() for b in STEERED}


def chains(n: int = 6, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        counts = {b: int(k) for b, k in zip(BEHAVIOURS, rng.integers(0, 4, 6), strict=True)}
        markup = "".join(f'["{b}"] text ["end-section"]' * k for b, k in counts.items())
        rows.append(
            {
                "response": "text",
                "thinking_process": "text",
                "label_counts": {b: k for b, k in counts.items() if k},
                "annotated_response": markup,
            }
        )
    return rows


def write_comparison(folder: Path, model: str, rows: list[dict]) -> Path:
    path = folder / f"reasoning_comparison_{model}.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


NAMES = [
    entry.hub_id.split("/")[-1].lower()
    for entry in MODELS.values()
    if entry.hub_id and entry.kind != "unknown"
]


@pytest.fixture
def folder(tmp_path) -> Path:
    """One file of every kind."""
    made = tmp_path / "released"
    made.mkdir()
    name = "deepseek-r1-distill-qwen-1.5b"
    torch.save(mean_vectors(summarizing=1), made / f"mean_vectors_{name}.pt")
    torch.save(layer_effects(), made / f"layer_effects_{name}.pt")
    write_comparison(made, name, chains())
    return made


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
    write_comparison(folder, "deepseek-r1-distill-qwen-1.5b", chains(seed=5))
    published.ensure(folder, tmp_path)
    assert figure.stat().st_mtime_ns > before


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
    drawn = np.random.default_rng(3).multinomial(12, np.full(12, 1 / 12), size=400)
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


PLACES = {
    "mean_vectors": "mean_vectors_deepseek-r1-distill-qwen-1.5b.pt",
    "layer_effects": "layer_effects_deepseek-r1-distill-qwen-1.5b.pt",
    "comparison": "reasoning_comparison_deepseek-r1-distill-qwen-1.5b.json",
}


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


def lacking(made: dict, name: str) -> dict:
    return {key: value for key, value in made.items() if key != name}


@pytest.mark.parametrize(
    ("kind", "content", "words"),
    [
        ("mean_vectors", {"a": 1}, "expected label"),
        ("mean_vectors", lacking(mean_vectors(), "overall"), "no 'overall'"),
        ("mean_vectors", lacking(mean_vectors(), "deduction"), "no direction of deduction"),
        ("mean_vectors", mean_vectors(deduction=3), "no direction of deduction"),
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
                "deduction": {"mean": torch.full((28, 8), torch.nan), "count": 9},
            },
            "deduction",
        ),
        ("layer_effects", [1, 2], "expected behaviour"),
        ("layer_effects", {b: [1.0, 2.0] for b in STEERED}, "expected behaviour"),
        ("layer_effects", lacking(layer_effects(), "backtracking"), "backtracking"),
        (
            "layer_effects",
            {**layer_effects(), "backtracking": [[1.0], [1.0, 2.0]]},
            "backtracking",
        ),
        ("layer_effects", {**layer_effects(), "backtracking": [[0.0] * 27]}, "[27, 28]"),
        (
            "layer_effects",
            {**layer_effects(), "backtracking": [[torch.nan] * 28]},
            "backtracking",
        ),
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
    path = write_comparison(folder, "deepseek-r1-distill-qwen-1.5b", rows)
    line = refused(folder, tmp_path / "results", capsys)
    assert str(path) in line
    assert words in line


def test_a_missing_or_empty_folder_is_named(tmp_path, capsys):
    assert "there is no such folder" in refused(tmp_path / "nowhere", tmp_path, capsys)
    (tmp_path / "empty").mkdir()
    line = refused(tmp_path / "empty", tmp_path, capsys)
    assert str(tmp_path / "empty") in line
    assert "mean_vectors_*.pt" in line


@pytest.mark.usefixtures("tables_only")
def test_counts_that_differ_from_the_stored_ones_are_counted(folder, tmp_path):
    rows = chains(4)
    rows[1]["label_counts"] = {"deduction": 77}
    write_comparison(folder, "deepseek-r1-distill-qwen-1.5b", rows)
    published.run(folder, tmp_path)
    changes = files.load_table(tmp_path / "published" / "comparison_changes.csv")
    assert changes[["chains", "equal_stored"]].to_numpy().tolist() == [[4, 3]]


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
    assert config.stage_options("05_compare")["published"] == str(folder)


def test_a_bad_file_is_a_bad_file_for_a_caller_too(folder, tmp_path):
    (folder / PLACES["comparison"]).write_text("[")
    with pytest.raises(BadFile, match="truncated JSON"):
        published.run(folder, tmp_path)
    assert artifacts.BadFile is BadFile
