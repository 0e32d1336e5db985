"""Chains that failed are counted, and asked again by the next run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_run import write_notebook

from stllms.app import stages
from stllms.config import RunConfig
from stllms.models import api
from stllms.records import STEERED_KEY
from stllms.runs.store import Rows

LABELS = "02_train_vectors"
KEY = ("task_id", "annotator")


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    """Five small notebooks and an empty results folder, both used by the runner."""
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    for stage in stages.STAGES:
        write_notebook(notebooks, stage)
    monkeypatch.setenv("STLLMS_NOTEBOOKS", str(notebooks))
    monkeypatch.setenv("STLLMS_RESULTS", str(tmp_path / "results"))
    monkeypatch.delenv(stages.INSIDE, raising=False)


def label(task: str, annotator: str = "grammar", failed: str | None = None) -> dict:
    """A row of ``annotations.jsonl``."""
    empty = {"segments": [], "spans": [], "ledger": {}}
    return {"task_id": task, "annotator": annotator, **empty, "failed": failed}


def made(stage: str, config: RunConfig, rows: list[dict] | None = None) -> None:
    """A stage that left what it promises; ``rows`` are those of ``annotations.jsonl``."""
    folder = stages.folder_of(stage, config).open()
    for name in stages.ARTEFACTS[stage]:
        (folder / name).write_text("")
    if rows:
        Rows(folder.annotations, KEY).write(rows)
    stages.finish(stage, config)


def reply(name: str, status: str, key: str = "", model: str = "m") -> dict:
    """A stored row of an API."""
    asked = {"key": key or name, "name": name, "model": model, "identity": {}}
    return asked | {"status": status, "reason": None if status == "answered" else "why"}


def store(folder: Path, *rows: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / api.FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_stage_with_a_failed_chain_is_not_done(capsys):
    config = RunConfig()
    made("01_generate", config)
    made(LABELS, config, [label("a"), label("b", failed="HTTP 500")])
    assert "failed: 1 chains" in capsys.readouterr().out
    assert stages.has_run(LABELS, config)
    assert not stages.is_done(LABELS, config)
    assert stages.pending([LABELS], config) == [LABELS]
    stages.ensure("03_attribute_layers", config)  # a notebook opened alone does not ask again
    assert capsys.readouterr().out == ""
    made(LABELS, config, [label("a"), label("b"), label("b", "lexical", failed="HTTP 500")])
    assert stages.is_done(LABELS, config), "rows of another annotator do not count"
    assert stages.pending([LABELS], config) == []


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
def test_only_chains_that_a_judge_would_be_asked_for_again_count(judge, why, replies, waiting):
    config = RunConfig(judge=judge)
    store(config.folder / "judge", *replies)
    made(LABELS, config, [label("a", judge, failed=why), label("b", judge)])
    assert stages.failed(LABELS, config) == waiting


def test_the_comparison_counts_labels_and_texts_of_all_its_models():
    config = RunConfig(judge="lexical", compare=("gpt-4o", "tiny-instruct"))
    folder = stages.folder_of("05_compare", config)
    rows = [label("a", "lexical"), label("b", "lexical", failed="HTTP 500")]
    for model in config.models:
        Rows(folder.member(model).open().annotations, KEY).write(rows)
    member = folder.member("gpt-4o")
    texts = [("a", "answered", "1"), ("c", "failed", "3"), ("d", "failed", "4")]
    texts += [("d", "answered", "4"), ("e", "failed", "5"), ("e", "answered", "6")]
    name = member.config.entry.api_id
    store(member.path / "api", *(reply(*one, model=name) for one in texts))
    made("05_compare", config)
    assert stages.failed("05_compare", config) == len(config.models) + 1


def test_failed_labels_of_steered_chains_count():
    config = RunConfig()
    folder = stages.folder_of("04_steer", config).open()
    row = {"direction": "backtracking", "layer": 2, "coefficient": 1.0, "operation": "add"}
    for name in ("steered.jsonl", "sweep.jsonl"):
        labels = (label("a"), label("b", failed="HTTP 500"), None)
        Rows(folder / name, STEERED_KEY).write(
            {"task_id": str(i), **row, "annotation": one} for i, one in enumerate(labels)
        )
    (folder / "steering.csv").write_text("")
    stages.finish("04_steer", config)
    assert stages.failed("04_steer", config) == 2


def test_the_runner_knows_the_line_of_an_estimate():
    assert stages.ESTIMATE.match(str(api.Estimate("owner/m-1", 12, 3, 4500, 600, 0.25)))
