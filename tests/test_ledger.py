"""The ledger: verdicts on released files and on runs, fixtures called fixtures, the rest not
run. The numbers written here are the paper's, not the module's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from released_files import (
    NAMES,
    PLACES,
    chain,
    chains,
    lacking,
    layer_effects,
    mean_vectors,
    write_comparison,
)

from stllms.attribution.effects import LayerEffects
from stllms.comparison import ledger
from stllms.config import PROFILES, RunConfig
from stllms.labels import PAPER
from stllms.registry import MODELS
from stllms.runs import files
from stllms.runs.artifacts import Folder

CLAIMS = [
    "behaviours differ between thinking and instruct models",
    "adding or subtracting a direction raises or lowers its behaviour",
    "effects peak in middle layers",
    "directions are distinct",
    "early layers carry token identity",
]
FIXTURE = "on a fixture, no evidence about the paper"
QWEN = "r1-distill-qwen-1.5b"
BEHAVIOURS, STEERED, HEATMAP = PAPER.names, PAPER.targets, PAPER.compared
ORDER = (*STEERED, "initializing", "deduction")
#: Per cent of the segments, thinking and instruct, and segments a response.
SHARES = {"thinking": (4, 9, 6, 15, 7, 52), "instruct": (1, 2, 5, 24, 9, 57)}
TOTALS = {"thinking": 2760, "instruct": 1440}


# -- artefacts of a run, written here ------------------------------------------------------


def steering_table(*, works: bool = True) -> pd.DataFrame:
    """What notebook 04 leaves: plain .3, with + .5, with - .1 for every behaviour."""
    rows = []
    for b in STEERED:
        for direction, coefficient, value in (("none", 0, 0.3), (b, 1, 0.5), (b, -1, 0.1)):
            p = np.nan if direction == "none" else 0.004 if works else 0.4
            rows.append((b, direction, 3, coefficient, "token fraction", value, p))
    columns = ["behaviour", "direction", "layer", "coefficient", "metric", "value", "p_holm"]
    table = pd.DataFrame(rows, columns=columns)
    low, high = table["value"] - 0.05, table["value"] + 0.05
    p = table["p_holm"]
    return table.assign(ci_low=low, ci_high=high, n=60, p=p, null_low=0.2, null_high=0.4)


def save_effects(path: Path, peak: int, layers: int = 28) -> None:
    values = torch.rand(6, 4, layers, generator=torch.Generator().manual_seed(0))
    values[:, :, peak] += 2
    exact = values.flip(-1)
    exact[:, 3] = torch.nan
    sets = {"published/others": values, "kl/own": exact}
    LayerEffects(sets, tuple("abcdef"), STEERED, "somebody").save(path)


def record(folder: Path, *, profile: str = "paper", **changed) -> None:
    """A ``run.json`` of a run with a profile, ``changed`` in what makes its identity."""
    names = ("n_build", "n_evaluate", "max_tokens", "temperature")
    own = {name: getattr(PROFILES[profile], name) for name in names}
    own |= {"annotator": "openai:gpt-4.1", "tasks": "messages", **changed}
    content = {"identity": own, "configuration": {"profile": profile}}
    files.write_json(folder / "run.json", content)


def write_run(results: Path, slug: str, *, works: bool = True, peak: int = 14) -> Path:
    """A folder of a run with everything that the ledger reads."""
    folder = results / slug
    files.save_table(folder / "steering.csv", steering_table(works=works))
    save_effects(folder / "layer_effects.safetensors", peak)
    matrix = pd.DataFrame(np.eye(5) + 0.25 * (1 - np.eye(5)), HEATMAP, list(HEATMAP))
    heatmap = matrix.rename_axis("behaviour").reset_index()
    files.save_table(folder / "figures" / "cosine_heatmap.csv", heatmap)
    similar = pd.DataFrame({"behaviour": BEHAVIOURS, "layer 0": 0.5, "layer 1": 0.2})
    files.save_table(folder / "figures" / "similarity_embedding.csv", similar)
    return folder


def write_pair(results: Path, thinking: str, instruct: str, *, p_holm: float) -> None:
    """Fractions of a pair that differ as the paper's averages do."""
    rows, pairs = [], []
    for b, *values in zip(ORDER, SHARES["thinking"], SHARES["instruct"], strict=True):
        for model, value in zip((thinking, instruct), values, strict=True):
            limits = (value / 100, value / 100 - 0.01, value / 100 + 0.01)
            rows.append((model, "run", b, "segment fraction", *limits))
        pairs.append((thinking, instruct, b, (values[0] - values[1]) / 100, 60, p_holm))
    columns = ["model", "source", "behaviour", "metric", "value", "low", "high"]
    folder = results / "comparison"
    files.save_table(folder / "comparison.csv", pd.DataFrame(rows, columns=columns))
    columns = ["thinking", "instruct", "behaviour", "difference", "n", "p_holm"]
    files.save_table(folder / "comparison_pairs.csv", pd.DataFrame(pairs, columns=columns))


def of(table: pd.DataFrame, claim: int, on: str = "") -> pd.DataFrame:
    """The rows of a claim whose ``on`` begins with a text."""
    return table[(table["claim"] == CLAIMS[claim]) & table["on"].str.startswith(on)]


# -- nothing was run -----------------------------------------------------------------------


def test_without_artefacts_every_claim_says_what_to_run_beside_the_papers_numbers(tmp_path):
    found = ledger.ledger(tmp_path)
    assert found["claim"].drop_duplicates().tolist() == CLAIMS
    assert list(found.columns) == list(ledger.COLUMNS)
    assert found["on"].eq("not run here").all()
    assert found["ours"].eq("").all()
    for verdict in found["verdict"]:
        assert verdict.startswith("needs the model; run with ./run_all.sh --model ")
        assert verdict.endswith(" --profile paper --judge openai:gpt-4.1")
    assert not list(tmp_path.iterdir())
    assert of(found, 0)["published"].item() == (
        "backtracking 4 and 1; uncertainty-estimation 9 and 2; example-testing 6 and 5; "
        "adding-knowledge 15 and 24; initializing 7 and 9; deduction 52 and 57"
    )
    steering = of(found, 1)["published"].tolist()
    assert steering[0] == (
        "backtracking 7.9 / 35.7 / 0.2; uncertainty-estimation 19.7 / 28.6 / 2.0; "
        "example-testing 13.6 / 34.0 / 1.6; adding-knowledge 43.1 / 49.7 / 11.2"
    )
    assert len(steering) == 3
    assert of(found, 2)["published"].tolist()[1] == (
        "backtracking 29; uncertainty-estimation 30; example-testing 29; adding-knowledge 46"
    )
    assert of(found, 3)["published"].item() == ".36 .32 .28 .17; .64 .33 .60; .19 .51; .45"


# -- a run: fixture, another model, the paper's --------------------------------------------


def test_a_fixture_is_never_evidence_about_the_paper(tmp_path):
    write_run(tmp_path, "tiny-thinker")
    write_pair(tmp_path, "tiny-thinker", "tiny-instruct", p_holm=0.001)
    found = ledger.ledger(tmp_path)
    for claim in range(5):
        row = of(found, claim, "tiny-thinker")
        assert row["verdict"].item() == f"shown {FIXTURE}"
        ours, _, papers = row["where"].item().partition("; published: ")
        assert "tiny-thinker" in ours
        for words in ("R1-Distill", "released", "ten models", "100 tasks"):
            assert words not in ours
        assert ("ten models" in papers) == (claim == 0)
        assert ("R1-Distill-Qwen-1.5B, released" in papers) == (claim == 3)
    rest = found[~found["on"].str.startswith("tiny-thinker")]
    assert rest["verdict"].str.startswith("needs the model").all()
    assert {*rest["claim"]} == {*CLAIMS[1:]}
    steering = of(found, 1, "tiny-thinker")
    assert steering["on"].item() == "tiny-thinker, 60 tasks"
    ours = "backtracking 30.0 (25.0–35.0) / 50.0 (45.0–55.0) / 10.0 (5.0–15.0); uncertainty"
    assert steering["ours"].item().startswith(ours)
    write_run(tmp_path, "somebody--model")
    row = of(ledger.ledger(tmp_path), 3, "somebody--model")
    assert row["verdict"].item() == "shown on another model"


def test_what_did_not_work_is_called_so(tmp_path):
    write_run(tmp_path, "tiny-thinker", works=False, peak=27)
    write_pair(tmp_path, "tiny-thinker", "tiny-instruct", p_holm=0.2)
    found = ledger.ledger(tmp_path)
    for claim in (0, 1, 2):
        assert of(found, claim, "tiny-thinker")["verdict"].item() == f"not shown {FIXTURE}"
    peaks = of(found, 2, "tiny-thinker")
    assert peaks["ours"].item().startswith("backtracking 27 (27–27)")
    assert "exact effects at own spans: backtracking 0 (0–0)" in peaks["note"].item()
    assert "adding-knowledge" not in peaks["note"].item().partition("exact")[2]


def steered(results: Path, table: pd.DataFrame, slug: str = "tiny-thinker") -> pd.Series:
    """The row of a run that left ``table``."""
    files.save_table(results / slug / "steering.csv", table)
    return of(ledger.ledger(results), 1, MODELS[slug].display).iloc[0]


def test_a_claim_is_shown_as_far_as_tests_and_controls_show_it(tmp_path):
    table = steering_table()
    table.loc[table["behaviour"] == "backtracking", "p_holm"] = 0.3
    row = steered(tmp_path, table, "smollm2")
    assert row["verdict"] == "shown in part on another model"
    assert "backtracking" not in row["note"]
    own = (table["behaviour"] == "backtracking") & (table["direction"] != "none")
    row = steered(tmp_path, table[~own])
    assert row["ours"].startswith("backtracking 30.0 (25.0–35.0) / n/a / n/a; ")
    assert row["verdict"] == f"shown in part {FIXTURE}"
    table = steering_table()
    first, second = table["behaviour"] == STEERED[0], table["behaviour"] == STEERED[1]
    table.loc[first, "null_high"] = 0.5  # where + takes it
    table.loc[second, "null_low"] = 0.05  # below where - takes it
    row = steered(tmp_path, table)
    assert row["verdict"] == f"shown in part {FIXTURE}"
    shown, _, inside = row["note"].partition("; ")
    assert "and outside the range of control directions: backtracking -, uncer" in shown
    assert inside == (
        "with Holm p < .05 but inside that range: backtracking +, uncertainty-estimation -"
    )
    row = steered(tmp_path, steering_table().assign(null_low=np.nan, null_high=np.nan))
    assert row["verdict"] == f"shown {FIXTURE}"
    assert row["note"].endswith("; no control directions to compare with")
    assert "outside" not in row["note"]


def test_a_run_at_other_coefficients_is_judged_at_the_one_that_its_figure_shows(tmp_path):
    table = steering_table().assign(null_n=10)
    table["coefficient"] = 0.25 * table["coefficient"]
    more = table[table["coefficient"] != 0].assign(
        coefficient=lambda one: one["coefficient"] * 2
    )
    row = steered(tmp_path, pd.concat([table, more]))
    assert row["verdict"] == f"shown {FIXTURE}"
    assert row["note"].startswith("coefficient 0.25: changes the claimed way")


def test_a_comparison_inside_the_folder_of_a_run_has_a_row(tmp_path):
    write_pair(tmp_path / "smol-thinker", "smol-thinker", "SmolLM2-135M-Instruct", p_holm=0.001)
    found = of(ledger.ledger(tmp_path), 0, "smol-thinker and SmolLM2-135M-Instruct")
    assert found["verdict"].tolist() == ["shown on another model"]


@pytest.mark.parametrize(
    ("changed", "degree"),
    [
        ({}, "on the paper's model"),
        (None, "with an unknown profile, not the paper's run"),
        (
            {"n_build": 16, "temperature": 0.65},
            "with profile paper but n_build 16, temperature 0.65, not the paper's run",
        ),
    ],
)
def test_the_papers_model_counts_in_the_papers_profile_only(tmp_path, changed, degree):
    folder, name = write_run(tmp_path, QWEN), MODELS[QWEN].display
    write_pair(tmp_path, name, "Qwen2.5-1.5B-Instruct", p_holm=0.001)
    if changed is not None:
        record(folder, **changed)
        record(tmp_path / "comparison" / QWEN, **changed)
    found = ledger.ledger(tmp_path)
    for claim in range(5):
        row = of(found, claim, name).iloc[0]
        assert row["verdict"] == f"shown {degree if changed == {} else f'on {name} {degree}'}"
        if changed is not None:
            assert ", annotator openai:gpt-4.1, tasks messages, profile " in row["on"]
    assert "backtracking 7.9 / 35.7 / 0.2" in of(found, 1, name)["published"].item()
    assert of(found, 2, name)["where"].item().endswith("; published: released values")
    assert of(found, 1, "not run here")["where"].str.contains("Qwen-1.5B").sum() == 0
    assert not len(of(found, 0, "not run here"))


def test_the_record_of_a_run_gives_its_profile(tmp_path):
    config = RunConfig(
        results=str(tmp_path), profile="paper", judge="offline", tasks="messages"
    )
    run = ledger.Run.of(Folder(config).open().path)
    assert (run.annotator, run.tasks, run.profile) == ("offline", "messages", "profile paper")
    other = Folder.comparison(RunConfig(results=str(tmp_path), n_compare=9))
    run = ledger.Run.of(other.member("tiny-instruct").open().path)
    assert run.profile == "profile default but n_compare 9"


# -- released files ------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """For released files; their figures are not rendered."""
    monkeypatch.setattr(files, "save_figure", lambda *_: None)
    path = tmp_path / "released"
    path.mkdir()
    return path


def peaked(layers: int, peaks: tuple[int, ...], *others: int) -> dict:
    """Effects whose means are largest at ``peaks``, then at ``others``."""
    values = layer_effects(layers, 45)
    for name, peak in zip(STEERED, peaks, strict=True):
        for row in values[name]:
            for rank, layer in enumerate((peak, *others)):
                row[layer] = 9.0 - rank
    return values


def gram_vectors() -> dict:
    """Means whose directions have the paper's cosines: the rows of a Cholesky factor."""
    matrix = np.eye(5)
    matrix[np.triu_indices(5, 1)] = (0.36, 0.32, 0.28, 0.17, 0.64, 0.33, 0.60, 0.19, 0.51, 0.45)
    factor = np.linalg.cholesky(np.triu(matrix) + np.triu(matrix, 1).T)
    content = mean_vectors(width=8)
    for name, row in zip(HEATMAP, factor, strict=True):
        away = torch.zeros(28, 8)
        away[:, :5] = torch.from_numpy(row).float()
        content[name]["mean"] = content["overall"]["mean"] + away
    return content


def test_numbers_of_the_released_files_are_reproduced_in_part_or_differ(tmp_path, folder):
    effects = folder / "layer_effects_deepseek-r1-distill-llama-8b.pt"
    # Llama-8B: the steering layer 12 ranks 2 for two behaviours, and 4 for the others.
    values = peaked(32, (0, 2, 0, 0), 12)
    for name in STEERED[1::2]:
        for row in values[name]:
            row[3], row[4] = 8.5, 8.4
    torch.save(values, effects)
    torch.save(peaked(28, (18, 18, 15, 18)), folder / PLACES["layer_effects"])
    torch.save(gram_vectors(), folder / PLACES["mean_vectors"])

    def rows():
        found = ledger.ledger(tmp_path, folder)
        return found[found["on"].str.startswith("released file")]

    found = rows()
    assert found["verdict"].tolist() == ["reproduced from released files"] * 4
    assert found["on"].iloc[0] == "released file, 45 responses"
    assert found["ours"].iloc[2].startswith("backtracking 2 (2–2), 12 (12–12); uncertainty-")
    assert found["ours"].iloc[2] != found["published"].iloc[2], "ours has intervals"
    assert found["ours"].iloc[3] == ".36 .32 .28 .17; .64 .33 .60; .19 .51; .45"
    torch.save(lacking(values, "adding-knowledge"), effects)
    torch.save(lacking(gram_vectors(), "adding-knowledge"), folder / PLACES["mean_vectors"])
    found = rows()
    part = "from part of the released files"
    assert found["verdict"].tolist() == ["reproduced from released files", *[part] * 3]
    assert found["ours"].iloc[3] == ".36 .32 .17; .64 .60; .51"
    assert found["note"].iloc[3].endswith("; without adding-knowledge")
    torch.save(peaked(32, (0, 2, 1, 0)), effects)
    torch.save(mean_vectors(), folder / PLACES["mean_vectors"])
    assert rows()["verdict"].tolist()[1:] == ["differs from released files"] * 3


def paper_chains(kind: str) -> list[dict]:
    """100 chains of one label each, with the paper's averages; the rest have no segment."""
    names = [b.replace("-", "_") for b in ORDER]
    labels = [b for b, n in zip(names, SHARES[kind], strict=True) for _ in range(n)]
    each, more = divmod(TOTALS[kind], len(labels))
    rows = [chain(**{b: each + (i < more)}) for i, b in enumerate(labels)]
    return rows + [chain()] * (100 - len(rows))


@pytest.mark.slow
def test_averages_need_all_ten_files(tmp_path, folder):
    for place, name in enumerate(NAMES):
        write_comparison(folder, name, paper_chains(("thinking", "instruct")[place % 2]))
    found = of(ledger.ledger(tmp_path, folder), 0)
    verdicts = found["verdict"].tolist()
    assert verdicts[:2] == ["reproduced from released files"] * 2
    # Chains without segments set apart: 4 of 93 chains are not the paper's 5 %.
    assert verdicts[2:] == ["differs from released files"] * 2
    assert found["note"].iloc[0].startswith("1000 of 1000 chains count exactly as their file")
    assert found["note"].iloc[0].endswith("6 of 6 differences have the paper's sign")
    assert found["ours"].iloc[1].startswith("27.6 (")
    (folder / f"reasoning_comparison_{NAMES[0]}.json").unlink()
    for name in NAMES[1:]:
        write_comparison(folder, name, chains(8))
    found = of(ledger.ledger(tmp_path, folder), 0)
    assert found["verdict"].eq("from part of the released files").all()
    assert found["on"].str.contains("4 thinking and 5 instruct models of 5 each").all()
    write_comparison(folder, NAMES[0], chains(6))
    found = of(ledger.ledger(tmp_path, folder), 0)
    assert found["on"].tolist() == ["not run here"], "not averaged over different tasks"


@pytest.mark.slow
def test_the_authors_own_files_reproduce_the_committed_ledger(published, tmp_path, monkeypatch):
    """Optional: needs the released files (``STLLMS_PUBLISHED``)."""
    monkeypatch.setattr(files, "save_figure", lambda *_: None)
    found = ledger.ledger(tmp_path, published)
    path = Path(__file__).parents[1] / "results" / "reference" / "ledger.csv"
    rows = pd.read_csv(path, keep_default_na=False)
    ours, theirs = (t[t["on"].str.startswith("released file")] for t in (found, rows))
    assert ours.to_numpy().tolist() == theirs.to_numpy().tolist()


# -- as text, on the command line ----------------------------------------------------------


def test_markdown_is_one_line_a_row_with_the_commands_once(tmp_path):
    write_run(tmp_path, "tiny-thinker")
    found = ledger.ledger(tmp_path)
    lines = ledger.markdown(found).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(found)
    assert {line.replace("\\|", "").count("|") for line in table} == {1 + len(ledger.COLUMNS)}
    assert sum(line.startswith(f"| {CLAIMS[1]}") for line in table) == 1
    assert "run_all.sh" not in "".join(table)
    assert lines[-1].count("--model deepseek-ai/DeepSeek-R1-Distill-Qwen-14B ") == 1


def test_the_command_line_writes_prints_and_puts_the_table_into_a_document(tmp_path, capsys):
    write_run(tmp_path / "runs", "tiny-thinker")
    document = tmp_path / "page.md"
    document.write_text("\n".join(["# Above", *ledger.MARKS, "below", ""]))
    ask = ["--results", str(tmp_path / "runs"), "--into", str(document)]
    for _ in range(2):  # the second time it replaces what the first time wrote
        assert ledger.main(ask) == 0
        found = ledger.ledger(tmp_path / "runs")
        table = ledger.markdown(found)
        printed = capsys.readouterr()
        assert printed.out == table
        assert printed.err.strip() == str(tmp_path / "runs" / "ledger.csv")
        first, second = ledger.MARKS
        assert document.read_text() == f"# Above\n{first}\n\n{table}\n{second}\nbelow\n"
    read = files.load_table(tmp_path / "runs" / "ledger.csv").fillna("")
    assert read.equals(found)
    document.write_text("no marks")
    assert ledger.main(ask) == 2
    assert "no place for the ledger" in capsys.readouterr().err


def test_the_page_holds_the_committed_ledger():
    root = Path(__file__).resolve().parents[1]
    rows = pd.read_csv(root / "results" / "reference" / "ledger.csv", keep_default_na=False)
    text = (root / "docs" / "claims.md").read_text(encoding="utf-8")
    assert ledger.put(text, ledger.markdown(rows)) == text, "stllms.comparison.ledger --into"


def test_what_cannot_be_read_is_named(tmp_path, capsys):
    assert ledger.main(["--results", str(tmp_path), "--published", str(tmp_path / "no")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    write_run(tmp_path, "tiny-thinker")
    (tmp_path / "tiny-thinker" / "run.json").write_text("[]")
    with pytest.raises(files.BadFile, match="not written by stllms"):
        ledger.ledger(tmp_path)


def test_runs_with_other_labels_have_no_row_and_change_none(tmp_path):
    """Not even where they leave what a row is made of, in the folder of the paper's model."""
    expected = ledger.ledger(tmp_path)
    for slug in ("tiny-thinker", QWEN, "smollm2"):
        record(write_run(tmp_path, slug), labels="mine:0123456789ab")
    write_pair(tmp_path, "tiny-thinker", "tiny-instruct", p_holm=0.001)
    record(tmp_path / "comparison", labels="mine:0123456789ab")
    pd.testing.assert_frame_equal(ledger.ledger(tmp_path), expected)
    record(tmp_path / "comparison")
    record(tmp_path / QWEN)
    found = ledger.ledger(tmp_path)
    assert not found.equals(expected)
    assert found["on"].str.contains("R1-Distill-Qwen-1.5B").sum() == 4
    assert not found["on"].str.contains("SmolLM2").any()
