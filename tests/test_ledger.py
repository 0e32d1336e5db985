"""The ledger: numbers of released files, fixtures called fixtures, the rest "not run"."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from released_files import NAMES, chains, write_comparison

from stllms import artifacts, claims, evaluation, findings, ledger
from stllms.artifacts import BadFile
from stllms.config import MODELS, PROFILES, RunConfig
from stllms.effects import LayerEffects
from stllms.records import BEHAVIOURS, HEATMAP, STEERED

CLAIMS = [
    "behaviours differ between thinking and instruct models",
    "adding or subtracting a direction raises or lowers its behaviour",
    "effects peak in middle layers",
    "directions are distinct",
    "early layers carry token identity",
]
FIXTURE = "on a fixture, no evidence about the paper"


# -- artefacts of a run, made here ---------------------------------------------------------


def steering_table(*, works: bool = True) -> pd.DataFrame:
    """What notebook 04 leaves: plain .3, with + .5, with - .1 for every behaviour."""
    rows = []
    for b in STEERED:
        for direction, coefficient, value in (("none", 0, 0.3), (b, 1, 0.5), (b, -1, 0.1)):
            p = np.nan if direction == "none" else 0.004 if works else 0.4
            rows.append((b, direction, 3, coefficient, "token fraction", value, p))
    columns = ["behaviour", "direction", "layer", "coefficient", "metric", "value", "p_holm"]
    made = pd.DataFrame(rows, columns=columns)
    return made.assign(
        ci_low=made["value"] - 0.05,
        ci_high=made["value"] + 0.05,
        n=60,
        p=made["p_holm"],
        null_low=0.2,
        null_high=0.4,
    )


def save_effects(path: Path, peak: int, layers: int = 28) -> None:
    values = torch.rand(6, 4, layers, generator=torch.Generator().manual_seed(0))
    values[:, :, peak] += 2
    exact = values.flip(-1)
    exact[:, 3] = torch.nan
    made = LayerEffects(
        {"published/others": values, "kl/own": exact}, tuple("abcdef"), STEERED, "somebody"
    )
    made.save(path)


def record(folder: Path, *, profile: str = "paper", **changed) -> None:
    """A ``run.json`` of a run with a profile, ``changed`` in what makes its identity."""
    names = ("n_build", "n_evaluate", "max_tokens", "temperature")
    own = {name: getattr(PROFILES[profile], name) for name in names}
    own |= {"annotator": "openai:gpt-4.1", "tasks": "messages", **changed}
    content = {"identity": own, "configuration": {"profile": profile}}
    artifacts.write_json(folder / "run.json", content)


def make_run(results: Path, slug: str, *, works: bool = True, peak: int = 14) -> Path:
    """A folder of a run with everything that the ledger reads."""
    folder = results / slug
    artifacts.save_table(folder / "steering.csv", steering_table(works=works))
    save_effects(folder / "layer_effects.safetensors", peak)
    matrix = pd.DataFrame(np.eye(5) + 0.25 * (1 - np.eye(5)), HEATMAP, list(HEATMAP))
    heatmap = matrix.rename_axis("behaviour").reset_index()
    artifacts.save_table(folder / "figures" / "cosine_heatmap.csv", heatmap)
    similar = pd.DataFrame({"behaviour": BEHAVIOURS, "layer 0": 0.5, "layer 1": 0.2})
    artifacts.save_table(folder / "figures" / "similarity_embedding.csv", similar)
    return folder


def make_comparison(results: Path, thinking: str, instruct: str, *, p_holm: float) -> None:
    """Fractions of a pair that differ as the paper's averages do."""
    paper = claims.COMPARISON["published"]
    rows, pairs = [], []
    for place, b in enumerate(claims.ORDER):
        values = [paper[kind][0][place] / 100 for kind in ("thinking", "instruct")]
        for model, value in zip((thinking, instruct), values, strict=True):
            rows.append(
                (model, "run", b, "segment fraction", value, value - 0.01, value + 0.01)
            )
        pairs.append((thinking, instruct, b, values[0] - values[1], 60, p_holm))
    columns = ["model", "source", "behaviour", "metric", "value", "low", "high"]
    folder = results / "comparison"
    artifacts.save_table(folder / "comparison.csv", pd.DataFrame(rows, columns=columns))
    columns = ["thinking", "instruct", "behaviour", "difference", "n", "p_holm"]
    artifacts.save_table(folder / "comparison_pairs.csv", pd.DataFrame(pairs, columns=columns))


def of(table: pd.DataFrame, claim: int, on: str = "") -> pd.DataFrame:
    """The rows of a claim whose ``on`` begins with a text."""
    return table[(table["claim"] == CLAIMS[claim]) & table["on"].str.startswith(on)]


# -- nothing was run -----------------------------------------------------------------------


def test_without_artefacts_every_claim_says_what_to_run(tmp_path):
    found = ledger.ledger(tmp_path)
    assert found["claim"].drop_duplicates().tolist() == CLAIMS
    assert list(found.columns) == list(ledger.COLUMNS)
    assert found["on"].eq("not run here").all()
    assert found["ours"].eq("").all()
    for verdict in found["verdict"]:
        assert verdict.startswith("needs the model; run with ./run_all.sh --model ")
        assert verdict.endswith(" --profile paper --judge openai:gpt-4.1")
    assert not list(tmp_path.iterdir())


def test_the_published_numbers_are_those_of_method_section_12(tmp_path):
    found = ledger.ledger(tmp_path)
    comparison = of(found, 0)["published"].item()
    assert comparison == (
        "backtracking 4 and 1; uncertainty-estimation 9 and 2; example-testing 6 and 5; "
        "adding-knowledge 15 and 24; initializing 7 and 9; deduction 52 and 57"
    )
    steering = of(found, 1)["published"].tolist()
    assert steering[0] == (
        "backtracking 7.9 / 35.7 / 0.2; uncertainty-estimation 19.7 / 28.6 / 2.0; "
        "example-testing 13.6 / 34.0 / 1.6; adding-knowledge 43.1 / 49.7 / 11.2"
    )
    assert "adding-knowledge 34.8 / 61.5 / 17.7" in steering[1]
    assert "backtracking 5.8 / 26.1 / 0.9" in steering[2]
    peaks = of(found, 2)["published"].tolist()
    assert peaks[1] == (
        "backtracking 29; uncertainty-estimation 30; example-testing 29; adding-knowledge 46"
    )
    assert of(found, 3)["published"].item() == ".36 .32 .28 .17; .64 .33 .60; .19 .51; .45"


# -- a run: fixture, another model, the paper's --------------------------------------------


def test_a_fixture_is_never_evidence_about_the_paper(tmp_path):
    make_run(tmp_path, "tiny-thinker")
    make_comparison(tmp_path, "tiny-thinker", "tiny-instruct", p_holm=0.001)
    found = ledger.ledger(tmp_path)
    for claim in range(5):
        row = of(found, claim, "tiny-thinker")
        assert row["verdict"].item() == f"shown {FIXTURE}"
    rest = found[~found["on"].str.startswith("tiny-thinker")]
    assert rest["verdict"].str.startswith("needs the model").all()
    assert {*rest["claim"]} == {*CLAIMS[1:]}
    steering = of(found, 1, "tiny-thinker")
    assert steering["on"].item() == "tiny-thinker, 60 tasks"
    assert (
        steering["ours"]
        .item()
        .startswith(
            "backtracking 30.0 (25.0–35.0) / 50.0 (45.0–55.0) / 10.0 (5.0–15.0); uncertainty"
        )
    )


def test_what_did_not_work_is_called_so(tmp_path):
    make_run(tmp_path, "tiny-thinker", works=False, peak=27)
    make_comparison(tmp_path, "tiny-thinker", "tiny-instruct", p_holm=0.2)
    found = ledger.ledger(tmp_path)
    for claim in (0, 1, 2):
        assert of(found, claim, "tiny-thinker")["verdict"].item() == f"not shown {FIXTURE}"
    peaks = of(found, 2, "tiny-thinker")
    assert peaks["ours"].item().startswith("backtracking 27 (27–27)")
    assert "exact effects at own spans: backtracking 0 (0–0)" in peaks["note"].item()
    assert "adding-knowledge" not in peaks["note"].item().partition("exact")[2]


def test_part_of_a_claim_is_shown_in_part(tmp_path):
    folder = make_run(tmp_path, "smollm2")
    table = steering_table()
    table.loc[table["behaviour"] == "backtracking", "p_holm"] = 0.3
    artifacts.save_table(folder / "steering.csv", table)
    row = of(ledger.ledger(tmp_path), 1, MODELS["smollm2"].display)
    assert row["verdict"].item() == "shown in part on another model"
    assert "backtracking" not in row["note"].item()
    assert "uncertainty-estimation +, uncertainty-estimation -" in row["note"].item()


def test_a_behaviour_without_a_direction_is_not_available_and_not_shown(tmp_path):
    table = steering_table()
    own = (table["behaviour"] == "backtracking") & (table["direction"] != "none")
    artifacts.save_table(tmp_path / "tiny-thinker" / "steering.csv", table[~own])
    row = of(ledger.ledger(tmp_path), 1, "tiny-thinker")
    assert row["ours"].item().startswith("backtracking 30.0 (25.0–35.0) / n/a / n/a; ")
    assert row["verdict"].item() == f"shown in part {FIXTURE}"


def test_the_papers_own_model_speaks_about_the_paper(tmp_path):
    record(make_run(tmp_path, "r1-distill-qwen-1.5b"))
    name = MODELS["r1-distill-qwen-1.5b"].display
    make_comparison(tmp_path, name, "Qwen2.5-1.5B-Instruct", p_holm=0.001)
    record(tmp_path / "comparison" / "r1-distill-qwen-1.5b")
    found = ledger.ledger(tmp_path)
    for claim in range(5):
        row = of(found, claim, name)
        assert row["verdict"].item() == "shown on the paper's model"
    assert "backtracking 7.9 / 35.7 / 0.2" in of(found, 1, name)["published"].item()
    assert of(found, 1, "not run here")["where"].str.contains("Qwen-1.5B").sum() == 0
    assert not len(of(found, 0, "not run here"))


@pytest.mark.parametrize(
    ("made", "profile"),
    [
        (None, "an unknown profile"),
        ({"profile": "smoke"}, "profile smoke"),
        (
            {"n_build": 16, "temperature": 0.65},
            "profile paper but n_build 16, temperature 0.65",
        ),
    ],
)
def test_the_papers_model_in_another_profile_is_not_the_papers_run(tmp_path, made, profile):
    slug = "r1-distill-qwen-1.5b"
    folder, name = make_run(tmp_path, slug), MODELS[slug].display
    make_comparison(tmp_path, name, "Qwen2.5-1.5B-Instruct", p_holm=0.001)
    if made is not None:
        record(folder, **made)
        record(tmp_path / "comparison" / slug, **made)
    found = ledger.ledger(tmp_path)
    for claim in range(5):
        verdict = of(found, claim, name)["verdict"].item()
        assert verdict == f"shown on {name} with {profile}, not the paper's run"


def test_a_row_says_how_its_run_was_made(tmp_path):
    record(make_run(tmp_path, "smollm2"), profile="smoke", annotator="offline")
    name = MODELS["smollm2"].display
    found = ledger.ledger(tmp_path)
    for claim in range(1, 5):
        said = of(found, claim, name)["on"].item()
        assert said.endswith(", annotator offline, tasks messages, profile smoke")


def test_the_record_of_a_run_gives_its_profile(tmp_path):
    config = RunConfig(
        results=str(tmp_path), profile="paper", judge="offline", tasks="messages"
    )
    made = claims.Made.of(artifacts.Folder(config).open().record())
    assert made == claims.Made("offline", "messages", "profile paper")
    assert made.as_paper
    other = artifacts.Folder.comparison(RunConfig(results=str(tmp_path), n_compare=9))
    made = claims.Made.of(other.member("tiny-instruct").open().record())
    assert made.profile == "profile default but n_compare 9"


def test_where_says_what_the_row_is_about(tmp_path):
    make_run(tmp_path, "tiny-thinker")
    make_run(tmp_path, "r1-distill-qwen-1.5b")
    make_comparison(tmp_path, "tiny-thinker", "tiny-instruct", p_holm=0.001)
    found = ledger.ledger(tmp_path)
    for claim in range(5):
        where = of(found, claim, "tiny-thinker")["where"].item()
        ours, _, papers = where.partition("; published: ")
        assert "tiny-thinker" in ours
        for words in ("R1-Distill", "released", "ten models", "100 tasks"):
            assert words not in ours
        assert ("ten models" in papers) == (claim == 0)
        assert ("R1-Distill-Qwen-1.5B, released" in papers) == (claim == 3)
    name = MODELS["r1-distill-qwen-1.5b"].display
    assert of(found, 2, name)["where"].item().endswith("; published: released values")


# -- random directions ---------------------------------------------------------------------


def test_a_change_that_a_random_direction_makes_too_is_not_shown(tmp_path):
    folder = make_run(tmp_path, "tiny-thinker")
    table = steering_table()
    first, second = table["behaviour"] == STEERED[0], table["behaviour"] == STEERED[1]
    table.loc[first, "null_high"] = 0.5  # where + takes it
    table.loc[second, "null_low"] = 0.05  # below where - takes it
    artifacts.save_table(folder / "steering.csv", table)
    row = of(ledger.ledger(tmp_path), 1, "tiny-thinker")
    assert row["verdict"].item() == f"shown in part {FIXTURE}"
    shown, _, inside = row["note"].item().partition("; ")
    assert "and outside the range of control directions: backtracking -, uncer" in shown
    assert inside == (
        "with Holm p < .05 but inside that range: backtracking +, uncertainty-estimation -"
    )


def test_without_random_directions_the_note_says_so(tmp_path):
    folder = make_run(tmp_path, "tiny-thinker")
    table = steering_table().assign(null_low=np.nan, null_high=np.nan)
    artifacts.save_table(folder / "steering.csv", table)
    row = of(ledger.ledger(tmp_path), 1, "tiny-thinker")
    assert row["verdict"].item() == f"shown {FIXTURE}"
    note = row["note"].item()
    assert note.endswith("; no control directions to compare with")
    assert "outside" not in note


def test_a_model_of_a_persons_own_goes_by_its_folder(tmp_path):
    make_run(tmp_path, "somebody--model")
    row = of(ledger.ledger(tmp_path), 3, "somebody--model")
    assert row["verdict"].item() == "shown on another model"


# -- released files ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(published, tmp_path_factory):
    """The ledger of the authors' files alone; figures are not rendered for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts, "save_figure", lambda *_: None)
        results = tmp_path_factory.mktemp("results")
        return ledger.write(results, published), results


def test_what_the_released_files_reproduce(released):
    found, _ = released
    rows = found[
        found["on"].str.startswith("released file,") | (found["on"] == "released file")
    ]
    assert rows["verdict"].eq("reproduced from released files").all()
    assert len(rows) == 4  # heatmap, peaks of two models, ranks of one
    peaks = of(found, 2, "released file")
    assert peaks["ours"].iloc[0] == (
        "backtracking 18 (9–19); uncertainty-estimation 18 (15–18); "
        "example-testing 15 (14–18); adding-knowledge 18 (18–18)"
    )
    assert peaks["note"].iloc[1].endswith(", ".join(STEERED))  # Llama-8B: none in the middle
    assert "without layers 0-4" in peaks["where"].iloc[2]
    assert peaks["ours"].iloc[2].startswith("backtracking 2 (1–4), 12 (12–12); uncertainty")
    heatmap = of(found, 3)
    assert heatmap["ours"].item() == heatmap["published"].item()


def test_five_of_ten_files_do_not_reproduce_an_average_over_ten(released):
    found, _ = released
    rows = of(found, 0)
    assert rows["verdict"].eq("from part of the released files").all()
    assert rows["on"].str.contains("3 thinking and 2 instruct models of 5 each").all()
    assert "500 of 500 chains count exactly as their file says" in rows["note"].iloc[0]
    assert "20 of 500 chains have segments only with numbered tags" in rows["note"].iloc[2]
    assert rows["ours"].iloc[0].startswith("backtracking 4.4 (3.5–5.5) and 1.1 (0.3–2.0); ")
    assert rows["ours"].iloc[1].startswith("26.5 (")
    assert rows["ours"].iloc[3].startswith("28.4 (")


def test_the_written_ledger_reads_back(released):
    found, results = released
    read = artifacts.load_table(results / "ledger.csv").fillna("")
    assert read.equals(found)


def averages(shift: float) -> pd.DataFrame:
    """Group averages of ten models as the paper has them, ``shift`` per cent away."""
    rows = []
    for kind, (shares, total) in claims.COMPARISON["published"].items():
        for b, value in zip(claims.ORDER, shares, strict=True):
            rows.append((kind, "segment fraction", b, (value + shift) / 100))
        rows.append((kind, "segment count", "all", total))
    made = pd.DataFrame(rows, columns=["kind", "metric", "behaviour", "value"])
    return made.assign(tasks="released", low=made["value"], high=made["value"], models=5)


@pytest.mark.parametrize(
    ("shift", "verdict"), [(0.3, claims.REPRODUCED), (1.0, claims.DIFFERS)]
)
def test_all_ten_files_reproduce_the_average_or_differ(shift, verdict):
    fractions, counts = findings.released_comparison(averages(shift), "published", "note")
    assert fractions.verdict == verdict
    assert counts.verdict == claims.REPRODUCED
    assert counts.ours == "27.6 (27.6–27.6) and 14.4 (14.4–14.4)"


# -- as text, on the command line ----------------------------------------------------------


def test_markdown_is_one_line_a_row_with_the_commands_once(tmp_path):
    make_run(tmp_path, "tiny-thinker")
    found = ledger.ledger(tmp_path)
    lines = ledger.markdown(found).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(found)
    assert {line.replace("\\|", "").count("|") for line in table} == {1 + len(ledger.COLUMNS)}
    assert sum(line.startswith(f"| {CLAIMS[1]}") for line in table) == 1
    assert "run_all.sh" not in "".join(table)
    assert lines[-1].count("--model deepseek-ai/DeepSeek-R1-Distill-Qwen-14B ") == 1


def test_the_command_line_writes_and_prints(tmp_path, capsys):
    make_run(tmp_path, "tiny-thinker")
    assert ledger.main(["--results", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.out == ledger.markdown(ledger.ledger(tmp_path))
    assert printed.err.strip() == str(tmp_path / "ledger.csv")
    assert (tmp_path / "ledger.csv").is_file()


def test_the_command_line_puts_the_table_into_a_document(tmp_path, capsys):
    make_run(tmp_path / "runs", "tiny-thinker")
    document = tmp_path / "page.md"
    document.write_text("\n".join(["# Above", *ledger.MARKS, "below", ""]))
    ask = ["--results", str(tmp_path / "runs"), "--into", str(document)]
    for _ in range(2):  # the second time it replaces what the first time wrote
        assert ledger.main(ask) == 0
        table = ledger.markdown(ledger.ledger(tmp_path / "runs"))
        first, second = ledger.MARKS
        assert document.read_text() == f"# Above\n{first}\n\n{table}\n{second}\nbelow\n"
    document.write_text("no marks")
    assert ledger.main(ask) == 2
    assert "no place for the ledger" in capsys.readouterr().err


def test_the_readme_holds_the_committed_ledger():
    root = Path(__file__).resolve().parents[1]
    rows = pd.read_csv(root / "results" / "reference" / "ledger.csv", keep_default_na=False)
    text = (root / "README.md").read_text(encoding="utf-8")
    assert ledger.put(text, ledger.markdown(rows)) == text, "python -m stllms.ledger --into"


def test_a_table_without_its_columns_is_named(tmp_path, capsys):
    path = tmp_path / "tiny-thinker" / "steering.csv"
    artifacts.save_table(path, steering_table().drop(columns="p_holm"))
    with pytest.raises(BadFile, match="no column p_holm"):
        ledger.ledger(tmp_path)
    assert ledger.main(["--results", str(tmp_path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_a_missing_folder_of_released_files_is_named(tmp_path, capsys):
    assert ledger.main(["--results", str(tmp_path), "--published", str(tmp_path / "no")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_the_ledgers_behaviours_are_all_six():
    assert sorted(claims.ORDER) == sorted(BEHAVIOURS)
    assert set(evaluation.MODES) == {"plain", "positive", "negative"}


def test_released_files_of_different_questions_are_not_averaged(tmp_path):
    """Two thinking models of 100 questions and one of 6: no average of the three is cited."""
    folder = tmp_path / "released"
    folder.mkdir()
    names = [*[n for n in NAMES if "distill" in n][:3], "llama-3.1-8b-instruct"]
    for name, n in zip(names, (8, 8, 6, 8), strict=True):
        write_comparison(folder, name, chains(n))
    rows = of(ledger.ledger(tmp_path / "results", folder), 0)
    assert len(rows) == 2  # a row a treatment
    assert rows["verdict"].eq(claims.PART).all()
    assert rows["ours"].eq("").all()
    assert rows["on"].str.contains("released files of different questions: thinking").all()
    assert rows["on"].str.contains(r"8 tasks, \w{4}\), 2 models.*6 tasks, \w{4}\), 1").all()
