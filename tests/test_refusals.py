"""What would stop a notebook is refused before the first one starts, in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from stllms import checks, compare, pipeline, released, run
from stllms.config import RunConfig
from stllms.provenance import BadFile


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty results folder; a notebook that were to run fails the test."""
    monkeypatch.setenv("STLLMS_RESULTS", str(tmp_path / "results"))
    monkeypatch.delenv(pipeline.INSIDE, raising=False)
    monkeypatch.setattr(run, "_execute", lambda *_, **__: pytest.fail("a notebook would run"))
    return tmp_path


def refused(capsys, *arguments: str) -> str:
    """The one line on stderr of a call with exit status 2."""
    assert run.main([*arguments, "--quiet"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# -- tasks ---------------------------------------------------------------------------------


def write_tasks(path, n: int, *more: str):
    rows = [json.dumps({"id": str(i), "content": f"question {i}"}) for i in range(n)]
    path.write_text("\n".join([*rows, *more]))
    return str(path)


def test_too_few_tasks_name_the_numbers_and_their_options(place, capsys):
    path = write_tasks(place / "own.jsonl", 20)
    ask = ["--model", "smollm2", "--tasks", path, "--profile", "smoke"]
    line = refused(capsys, *ask)
    for part in ("own.jsonl, evaluate: 24 tasks asked for", "20 can be had", "from 16 tasks"):
        assert part in line
    for flag in ("--n-samples N", "--n-evaluate N", "--option n_compare=N"):
        assert flag in line
    assert not (place / "results").exists()


def test_tasks_are_counted_for_the_notebooks_that_run(place, monkeypatch):
    path = write_tasks(place / "own.jsonl", 20)
    ran = []
    monkeypatch.setattr(run, "_execute", lambda chosen, *_, **__: ran.append(chosen))
    monkeypatch.setattr(run, "_report", lambda *_: None)
    assert run.main(["--tasks", path, "--profile", "smoke", "--to", "02", "--quiet"]) == 0
    assert len(ran) == 1


def test_a_line_that_is_no_task_is_named(place, capsys):
    path = write_tasks(place / "own.jsonl", 30, '{"id": "x"}')
    line = refused(capsys, "--tasks", path, "--profile", "smoke", "--from", "04")
    assert "own.jsonl, line 31, field 'content': missing" in line


def test_too_many_tasks_of_a_set_that_ships_are_refused(place, capsys):
    line = refused(capsys, "--tasks", "messages", "--n-samples", "501")
    assert "501 tasks asked for" in line
    assert "--n-samples N" in line


def test_a_failed_run_without_rows_does_not_block_the_corrected_one(place, capsys):
    first = RunConfig(tasks=write_tasks(place / "own.jsonl", 30))
    folder = pipeline.folder_of("01_generate", first).open()
    folder.keep([folder.notebooks / "01_generate.failed.ipynb"])
    folder.notebooks.mkdir()
    (folder.notebooks / "01_generate.failed.ipynb").write_text("{}")
    corrected = RunConfig(tasks=write_tasks(place / "own.jsonl", 400))
    opened = run.ensure("01_generate", corrected)
    assert opened.record()["identity"] == corrected.identity()
    assert not folder.notebooks.exists()
    folder.responses.write_text('{"task_id": "0"}\n')
    third = RunConfig(tasks=write_tasks(place / "own.jsonl", 401))
    with pytest.raises(ValueError, match=r"tasks was .* and is now"):
        run.ensure("01_generate", third)


def test_compared_rows_are_kept_and_folders_without_any_are_not(place):
    old, new = RunConfig(seed=1), RunConfig(seed=2)
    member = pipeline.folder_of("05_compare", old).member("tiny-instruct").open()
    pipeline.check("05_compare", new)
    run.ensure("05_compare", new)
    assert not member.run.is_file()
    member.open()
    member.responses.write_text('{"task_id": "0"}\n')
    with pytest.raises(ValueError, match="seed was 1 and is now 2"):
        pipeline.check("05_compare", new)


# -- released files ------------------------------------------------------------------------


def test_a_missing_folder_of_released_files_is_refused_first(place, capsys):
    line = refused(capsys, "--model", "tiny-thinker", "--published", str(place / "nope"))
    assert "nope: there is no such folder" in line
    assert not (place / "results").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("reasoning_comparison_x.json", "[]", "an empty list"),
        ("mean_vectors_x.pt", "", "the file is empty"),
        ("layer_effects_x.pt", "nonsense", "not a whole file"),
        ("notes.txt", "hello", "no released file"),
    ],
)
def test_a_bad_released_file_is_refused_first(place, capsys, name, content, words):
    folder = place / "released"
    folder.mkdir()
    (folder / name).write_text(content)
    line = refused(capsys, "--model", "tiny-thinker", "--published", str(folder))
    assert words in line or name in line
    shutil.rmtree(folder)


def test_an_annotation_that_is_no_text_is_named_with_its_row(tmp_path):
    good = {
        "response": "",
        "thinking_process": "",
        "label_counts": {},
        "annotated_response": "",
    }
    path = tmp_path / "reasoning_comparison_x.json"
    path.write_text(json.dumps([good, {**good, "annotated_response": None}]))
    for read in (released.load_comparison, lambda p: compare.of_released(p, "tolerant")):
        with pytest.raises(BadFile, match=r"_x\.json: chain 1: annotated_response is no text"):
            read(path)


# -- where the runs go -------------------------------------------------------------------------


@pytest.mark.parametrize("ask", [(), ("--fresh",), ("--model", "smollm2")])
def test_results_that_are_a_file_are_refused_with_the_cure(place, capsys, ask):
    (place / "results").write_text("a file")
    line = refused(capsys, "--to", "01", *ask)
    assert f"cannot write runs to {place / 'results'}" in line
    assert "(Not a directory): choose another --results" in line


def test_results_where_no_folder_can_be_made_are_refused_with_the_cure(place, capsys):
    line = refused(capsys, "--to", "01", "--results", "/proc/ro")
    assert "cannot write runs to /proc/ro/tiny-thinker (No such file or directory)" in line
    assert "choose another --results" in line


def test_results_that_may_not_be_written_are_refused_with_the_cure(place, capsys, monkeypatch):
    monkeypatch.setattr(run.os, "access", lambda *_: False)
    line = refused(capsys, "--to", "01")
    assert "(no permission to write): choose another --results" in line


def test_released_files_need_a_place_for_what_is_drawn(place, capsys):
    (place / "results").write_text("a file")
    assert run.main(["--published", str(place)]) == 2
    assert "choose another --results" in capsys.readouterr().err


# -- devices -------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("ask", [("--quantization", "8bit"), ("--device", "cuda:0")])
def test_cuda_that_is_not_there_is_refused(place, capsys, ask):
    line = refused(capsys, "--model", "tiny-thinker", *ask)
    assert f"{ask[0][2:]}: '{ask[1]}'" in line
    assert "CUDA" in line
    assert not (place / "results").exists()


def test_quantization_needs_its_package(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"'4bit' needs bitsandbytes: pip install"):
        checks.hardware("auto", "4bit")
    with pytest.raises(ValueError, match="needs a CUDA device and device is 'cpu'"):
        checks.hardware("cpu", "4bit")
    checks.hardware("cuda", None)


def test_a_model_behind_an_api_needs_no_device(place, monkeypatch):
    monkeypatch.setattr(checks, "hardware", lambda *_: pytest.fail("no device is used"))
    run._check_inputs([("05_compare", RunConfig("gpt-4o", quantization="8bit"))])


def test_a_limit_that_an_api_does_not_take_is_refused(place, capsys):
    ask = ["--model", "claude-3.7-sonnet", "--judge", "lexical", "--max-tokens", "10"]
    assert "max_tokens_compare: 10" in refused(capsys, *ask)
