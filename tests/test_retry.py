"""Chains that failed are asked again by the next run, and what rests on them is made again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_run import write_notebook

from stllms import api, pipeline, run
from stllms.config import RunConfig
from stllms.files import Rows
from stllms.records import STEERED_KEY

LABELS = "02_train_vectors"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Five small notebooks and an empty results folder, both used by the runner."""
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    for stage in pipeline.STAGES:
        write_notebook(notebooks, stage)
    monkeypatch.setenv("STLLMS_NOTEBOOKS", str(notebooks))
    monkeypatch.setenv("STLLMS_RESULTS", str(tmp_path / "results"))
    monkeypatch.delenv(pipeline.INSIDE, raising=False)
    return tmp_path


def label(task: str, annotator: str = "grammar", failed: str | None = None) -> dict:
    """A row of ``annotations.jsonl``."""
    empty = {"segments": [], "spans": [], "ledger": {}}
    return {"task_id": task, "annotator": annotator, **empty, "failed": failed}


def made(stage: str, config: RunConfig, rows: list[dict] | None = None) -> None:
    """A stage that left what it promises; ``rows`` are those of ``annotations.jsonl``."""
    folder = pipeline.folder_of(stage, config).open()
    for name in pipeline.ARTEFACTS[stage]:
        (folder / name).write_text("")
    if rows:
        Rows(folder.annotations, ("task_id", "annotator")).write(rows)
    run.finish(stage, config)


def reply(name: str, status: str, key: str = "", model: str = "m") -> dict:
    """A stored row of an API."""
    asked = {"key": key or name, "name": name, "model": model, "identity": {}}
    return asked | {"status": status, "reason": None if status == "answered" else "why"}


def store(folder: Path, *rows: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "replies.jsonl").write_text(text, encoding="utf-8")


# -- what counts as failed -----------------------------------------------------------------


def test_a_stage_with_a_failed_chain_is_not_done(place, capsys):
    config = RunConfig()
    made("01_generate", config)
    made(LABELS, config, [label("a"), label("b", failed="HTTP 500")])
    assert "failed: 1 chains" in capsys.readouterr().out
    assert pipeline.has_run(LABELS, config)
    assert not pipeline.is_done(LABELS, config)
    assert pipeline.pending([LABELS], config) == [LABELS]
    made(LABELS, config, [label("a"), label("b")])
    assert pipeline.is_done(LABELS, config)
    assert pipeline.pending([LABELS], config) == []


def test_a_notebook_opened_alone_does_not_ask_again(place, capsys):
    config = RunConfig()
    made("01_generate", config)
    made(LABELS, config, [label("b", failed="HTTP 500")])
    capsys.readouterr()
    run.ensure("03_attribute_layers", config)
    assert capsys.readouterr().out == ""


def test_rows_of_another_annotator_do_not_count(place):
    config = RunConfig()
    made(LABELS, config, [label("a"), label("a", "lexical", failed="HTTP 500")])
    assert pipeline.failed(LABELS, config) == 0


@pytest.mark.parametrize(
    ("judge", "why", "replies", "waiting"),
    [
        ("openai:m", "HTTP 500", [reply("a", "failed")], 1),
        ("openai:m", "no tags", [reply("a", "unusable")], 1),
        ("openai:m", "no tags", [reply("a", "unusable")] * 2, 0),
        ("openai:m#indexed", "no tags", [reply("a", "unusable")] * 2, 0),
        ("openai:m", "not in the text", [reply("a", "answered")], 0),
        ("openai:m", "part 2", [reply("a", "answered"), reply("a", "failed", "a2")], 1),
        ("openai:m", "no tags", [reply("a", "unusable", model="other")] * 2, 1),
        ("openai:m", "empty thinking", [], 0),
        ("openai:m", "not sent", [], 1),
        ("replay:somewhere", "HTTP 500", [], 0),
    ],
)
def test_only_chains_that_a_judge_would_be_asked_for_again_count(
    place, judge, why, replies, waiting
):
    config = RunConfig(judge=judge)
    store(config.folder / "judge", *replies)
    made(LABELS, config, [label("a", judge, failed=why), label("b", judge)])
    assert pipeline.failed(LABELS, config) == waiting


def test_the_reason_of_a_chain_without_text_is_the_annotators_own():
    from stllms.annotate.protocols import EMPTY

    assert EMPTY == "empty thinking"


def test_the_comparison_counts_labels_and_texts_of_all_its_models(place):
    config = RunConfig(judge="lexical", compare=("gpt-4o", "tiny-instruct"))
    folder = pipeline.folder_of("05_compare", config)
    rows = [label("a", "lexical"), label("b", "lexical", failed="HTTP 500")]
    for model in config.models:
        member = folder.member(model).open()
        Rows(member.annotations, ("task_id", "annotator")).write(rows)
    member = folder.member("gpt-4o")
    name = member.config.entry.api_id
    texts = [("a", "answered", "1"), ("c", "failed", "3"), ("d", "failed", "4")]
    again = [("d", "answered", "4"), ("e", "failed", "5"), ("e", "answered", "6")]
    store(member.path / "api", *(reply(*one, model=name) for one in texts + again))
    made("05_compare", config)
    assert pipeline.failed("05_compare", config) == len(config.models) + 1
    assert pipeline.pending(["05_compare"], config) == ["05_compare"]


def test_failed_labels_of_steered_chains_count(place):
    config = RunConfig()
    folder = pipeline.folder_of("04_steer", config).open()
    row = {"direction": "backtracking", "layer": 2, "coefficient": 1.0, "operation": "add"}
    for name in ("steered.jsonl", "sweep.jsonl"):
        labels = (label("a"), label("b", failed="HTTP 500"), None)
        Rows(folder / name, STEERED_KEY).write(
            {"task_id": str(i), **row, "annotation": one} for i, one in enumerate(labels)
        )
    (folder / "steering.csv").write_text("")
    run.finish("04_steer", config)
    assert pipeline.failed("04_steer", config) == 2


# -- what the next run does ----------------------------------------------------------------

FLAKY = """import json
failed = None if (folder / "annotations.jsonl").is_file() else "HTTP 500"
empty = {"annotator": "grammar", "segments": [], "spans": [], "ledger": {}}
rows = [{"task_id": "a", "failed": None, **empty}, {"task_id": "b", "failed": failed, **empty}]
folder.rows(folder.annotations, ("task_id", "annotator")).write(rows)
import torch
made = {"directions": torch.full((1,), float(failed is None))}
folder.save_tensors(folder.vectors, made, {})
folder.save_tensors(folder / "controls.safetensors", made, {})
log = folder.path.parent / "log.txt"
log.open("a").write("02_train_vectors " + config.model + chr(10))"""


def test_the_next_run_asks_again_and_what_rests_on_it_is_named(place, capsys):
    """New labels give other directions: effects of the old ones are refused, never reused."""
    write_notebook(place / "notebooks", LABELS, work=FLAKY)
    ask = ["--to", "03", "--quiet"]
    assert run.main(ask) == 0
    assert f"{LABELS}: 1 chains failed; the same command asks" in capsys.readouterr().out
    assert run.main(ask) == 2
    said = capsys.readouterr().err
    assert "layer_effects.safetensors was made with other vectors: vectors.safetensors" in said
    assert "--fresh 03_attribute_layers" in said
    assert run.main([*ask, "--fresh", "03"]) == 0
    out = capsys.readouterr().out
    assert "chains failed" not in out
    log = (place / "results" / "log.txt").read_text().splitlines()
    again = [LABELS, "03_attribute_layers"]
    assert [line.split()[0] for line in log] == ["01_generate", *again, *again]
    assert run.main(ask) == 0
    assert "nothing to do" in capsys.readouterr().out


# -- what it costs -------------------------------------------------------------------------


def test_the_estimate_of_costs_reaches_the_terminal(place, capsys):
    said = str(api.Estimate("owner/m-1", 12, 3, 4500, 600, 0.25))
    assert pipeline.ESTIMATE.match(said)
    work = f'print("not this")\nprint({said!r}, flush=True)\nprint("nor this")\n'
    work += '(folder / "responses.jsonl").write_text("")'
    write_notebook(place / "notebooks", "01_generate", work=work)
    run.ensure(LABELS, RunConfig())  # notebook -> runner -> the process that asked for it
    out = capsys.readouterr().out
    assert out.splitlines()[1:] == ["1 of 1: 01_generate, tiny-thinker, 200 tasks ...", said]
