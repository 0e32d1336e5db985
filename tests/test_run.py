"""The runner, on small notebooks that the tests write and that leave what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from stllms import artifacts, pipeline, run
from stllms.config import RunConfig

PARAMETERS = """model = "tiny-thinker"
profile = "default"
judge = "auto"
results = None
seed = 0
n_samples = None
max_tokens = None
options = {}"""

BEGIN = """from stllms import run
from stllms.config import RunConfig
config = RunConfig.from_parameters(
    model, profile, judge, results, seed, n_samples, max_tokens, options)
folder = run.ensure("{stage}", config)"""

WORK = """from stllms.provenance import replacing
names = {names}
for name in names:
    folder.keep([folder / name])
    with replacing(folder / name) as beside:
        beside.write_text(f"{{config.seed}}")
log = folder.path.parent / "log.txt"
log.open("a").write("{stage} " + config.model + "\\n")"""


def write_notebook(folder: Path, stage: str, *, work: str | None = None, parameters=PARAMETERS):
    """A notebook of one stage; ``work`` replaces what it does."""
    names = [*pipeline.ARTEFACTS[stage], f"figures_of_{stage[:2]}.txt"]
    cells = [
        nbformat.v4.new_markdown_cell(f"# {stage}"),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(BEGIN.format(stage=stage)),
        nbformat.v4.new_code_cell(work or WORK.format(stage=stage, names=names)),
        nbformat.v4.new_code_cell(f'run.finish("{stage}", config)'),
    ]
    book = nbformat.v4.new_notebook(cells=cells)
    book.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    nbformat.write(book, folder / f"{stage}.ipynb")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with five notebooks and an empty results folder, both used by the runner."""
    notebooks, results = tmp_path / "notebooks", tmp_path / "results"
    notebooks.mkdir()
    for stage in pipeline.STAGES:
        write_notebook(notebooks, stage)
    monkeypatch.setenv("STLLMS_NOTEBOOKS", str(notebooks))
    monkeypatch.setenv("STLLMS_RESULTS", str(results))
    monkeypatch.delenv(pipeline.INSIDE, raising=False)
    return tmp_path


def log(place: Path) -> list[str]:
    path = place / "results" / "log.txt"
    return path.read_text().splitlines() if path.exists() else []


def call(*arguments: str) -> int:
    return run.main([*arguments, "--quiet"])


def test_the_folder_is_called_as_a_person_in_the_working_directory_would(
    place, capsys, monkeypatch
):
    assert call("--to", "01") == 0
    path = place / "results" / "tiny-thinker"
    assert f"done: {path}\n" in capsys.readouterr().out
    monkeypatch.chdir(place)
    assert call("--to", "01") == 0
    assert "nothing to do: results/tiny-thinker complete" in capsys.readouterr().out


# -- running, skipping, going on ---------------------------------------------------------


def test_all_notebooks_run_once_and_a_second_run_does_nothing(place, capsys):
    assert call() == 0
    expected = [f"{stage} tiny-thinker" for stage in pipeline.STAGES]
    assert log(place) == expected
    results = place / "results"
    assert (results / "tiny-thinker" / "notebooks" / "04_steer.ipynb").is_file()
    assert (results / "comparison" / "notebooks" / "05_compare.ipynb").is_file()
    record = json.loads((results / "tiny-thinker" / "run.json").read_text())
    assert record["identity"]["annotator"] == "grammar"
    assert record["versions"]["torch"]
    assert sorted(record["stages"]) == list(pipeline.STAGES[:4])
    capsys.readouterr()
    assert call() == 0
    assert "nothing to do" in capsys.readouterr().out
    assert log(place) == expected


def test_only_what_is_missing_or_changed_runs_again(place):
    assert call("--to", "03") == 0
    (place / "results/tiny-thinker/figures_of_02.txt").unlink()
    assert call("--to", "03") == 0
    assert log(place)[3:] == ["02_train_vectors tiny-thinker"]
    write_notebook(
        place / "notebooks",
        "02_train_vectors",
        work=WORK.format(
            stage="02_train_vectors",
            names=["annotations.jsonl", "vectors.safetensors", "figures_of_02.txt", "more.txt"],
        ),
    )
    assert call("--to", "03") == 0
    assert log(place)[4:] == [f"{stage} tiny-thinker" for stage in pipeline.STAGES[1:3]]


def test_options_of_a_later_stage_run_only_from_there(place):
    assert call("--to", "04") == 0
    assert call("--to", "04", "--option", "coefficients=-1,-0.5,1") == 0
    assert log(place)[4:] == ["04_steer tiny-thinker"]


def test_from_a_later_notebook_runs_what_it_needs_first(place, capsys):
    assert call("--from", "02", "--to", "2") == 0
    assert log(place) == ["01_generate tiny-thinker", "02_train_vectors tiny-thinker"]
    assert "needed first: 01_generate tiny-thinker" in capsys.readouterr().out


def test_several_models_share_one_comparison(place):
    assert call("--model", "tiny-thinker", "--model", "TINY-INSTRUCT", "--to", "01") == 0
    assert call("--model", "tiny-thinker", "--model", "tiny-instruct", "--from", "05") == 0
    assert log(place) == [
        "01_generate tiny-thinker",
        "01_generate tiny-instruct",
        "05_compare tiny-thinker",
    ]


def test_parameters_reach_the_notebook_whatever_its_folder(place):
    work = 'import json\n(folder / "responses.jsonl").write_text(config.to_json())'
    write_notebook(place / "notebooks", "01_generate", work=work)
    assert (
        call(
            "--to",
            "01",
            "--n-samples",
            "7",
            "--temperature",
            "0",
            "--option",
            "reader=published",
            "--profile",
            "smoke",
        )
        == 0
    )
    seen = RunConfig.from_json((place / "results/tiny-thinker/responses.jsonl").read_text())
    assert (seen.n_samples, seen.temperature, seen.reader) == (7, 0.0, "published")
    assert seen.results_folder == place / "results"


def test_the_kernel_is_this_interpreter(place, monkeypatch):
    foreign = place / "jupyter" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    (foreign / "kernel.json").write_text(
        json.dumps(
            {
                "argv": ["/nonexistent/python", "-f", "{connection_file}"],
                "display_name": "foreign",
                "language": "python",
            }
        )
    )
    monkeypatch.setenv("JUPYTER_PATH", str(place / "jupyter"))
    work = 'import sys\n(folder / "responses.jsonl").write_text(sys.executable)'
    write_notebook(place / "notebooks", "01_generate", work=work)
    assert call("--to", "01") == 0
    assert (place / "results/tiny-thinker/responses.jsonl").read_text() == sys.executable


def test_fresh_deletes_what_the_package_wrote_and_nothing_else(place):
    assert call("--to", "01") == 0
    own = place / "results/tiny-thinker/mine.txt"
    own.write_text("a person's file")
    stale = place / "results/tiny-thinker/vectors.safetensors"
    stale.write_text("of an earlier notebook")
    assert call("--to", "01", "--fresh", "--seed", "3") == 0
    assert own.is_file()
    assert not stale.exists()
    assert (place / "results/tiny-thinker/responses.jsonl").read_text() == "3"
    assert len(log(place)) == 2


def test_a_killed_run_goes_on_where_it_was(place):
    stage = "02_train_vectors"
    work = WORK.format(stage=stage, names=list(pipeline.ARTEFACTS[stage]))
    kill = (
        "import os, signal\n"
        + "once = folder / 'once'\n"
        + (
            "if not once.exists():\n    once.write_text('')\n    os.kill(os.getppid(), 9)\n"
            "    import time; time.sleep(30)\n"
        )
    )
    write_notebook(place / "notebooks", "02_train_vectors", work=kill + work)
    command = [sys.executable, "-m", "stllms.run", "--to", "02", "--quiet"]
    assert subprocess.run(command, check=False).returncode == -9
    assert log(place) == ["01_generate tiny-thinker"]
    assert subprocess.run(command, check=False).returncode == 0
    assert log(place) == ["01_generate tiny-thinker", "02_train_vectors tiny-thinker"]


# -- refusing ----------------------------------------------------------------------------


def refused(capsys, *arguments: str) -> str:
    """The one line on stderr of a call with exit status 2."""
    assert call(*arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    return lines[0]


def test_another_configuration_is_refused_by_name(place, capsys):
    assert call("--to", "01") == 0
    line = refused(capsys, "--to", "01", "--max-tokens", "99")
    for part in ("results/tiny-thinker", "max_tokens", "256", "99", "--fresh"):
        assert part in line
    assert call("--to", "01", "--max-tokens", "99", "--fresh") == 0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model", "does-not-exist"], ["does-not-exist", "--list-models"]),
        (["--model", "tiny-thinkr"], ["tiny-thinkr", "tiny-thinker"]),
        (["--profile", "papr"], ["papr", "smoke, default, full, paper"]),
        (["--modle", "x"], ["--modle", "--model"]),
        (["--max-tokens", "-3"], ["max_tokens", "-3"]),
        (["--max-tokens", "many"], ["--max-tokens", "many"]),
        (["--option", "raeder=published"], ["raeder", "reader"]),
        (["--option", "reader"], ["reader", "NAME=VALUE"]),
        (["--from", "06"], ["06", "05_compare"]),
        (["--from", "04", "--to", "02"], ["04", "02"]),
        (["--model", "gpt-4o", "--to", "02"], ["gpt-4o", "05"]),
        (["--judge", "grammar", "--model", "smollm2"], ["grammar", "smollm2"]),
        (["--tasks", "nowhere.jsonl"], ["nowhere.jsonl"]),
    ],
)
def test_bad_usage_is_one_line_and_status_2(place, capsys, arguments, parts):
    line = refused(capsys, *arguments)
    for part in parts:
        assert part in line
    assert not (place / "results").exists()


def test_a_parameter_that_the_notebook_lacks_is_refused(place, capsys):
    without = "\n".join(line for line in PARAMETERS.splitlines() if "max_tokens" not in line)
    write_notebook(place / "notebooks", "02_train_vectors", parameters=without)
    line = refused(capsys, "--to", "02")
    assert "02_train_vectors.ipynb" in line
    assert "max_tokens" in line
    assert not log(place)


def test_a_missing_notebook_is_named(place, capsys):
    (place / "notebooks" / "03_attribute_layers.ipynb").unlink()
    assert "03_attribute_layers.ipynb" in refused(capsys)


def test_a_folder_in_use_is_refused_with_the_pid(place, capsys):
    config = RunConfig()
    code = (
        "import sys, time\nfrom stllms.artifacts import Folder\n"
        "from stllms.config import RunConfig\n"
        "with Folder(RunConfig()).lock('01_generate'):\n    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline().strip() == b"held"
        assert str(holder.pid) in refused(capsys, "--to", "01")
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    lock = artifacts.Folder(config).path / ".01_generate.lock"
    assert lock.read_text() == str(holder.pid)  # a stale one
    assert call("--to", "01") == 0


# -- failing -----------------------------------------------------------------------------


def test_a_failing_cell_is_reported_and_stops_the_run(place, capsys):
    write_notebook(
        place / "notebooks",
        "02_train_vectors",
        work="value = 1\nraise KeyError('no such layer')",
    )
    assert call() == 1
    report = capsys.readouterr().err
    for part in (
        "02_train_vectors tiny-thinker failed in cell 4 of 5",
        "value = 1",
        "KeyError: 'no such layer'",
        str(place / "results/tiny-thinker/notebooks/02_train_vectors.failed.ipynb"),
    ):
        assert part in report
    assert "\x1b" not in report
    assert log(place) == ["01_generate tiny-thinker"]
    assert (place / "results/tiny-thinker/notebooks/02_train_vectors.failed.ipynb").is_file()


def test_a_dead_kernel_is_reported(place, capsys):
    write_notebook(place / "notebooks", "01_generate", work="import os\nos._exit(3)")
    assert call("--to", "01") == 1
    report = capsys.readouterr().err
    assert "01_generate tiny-thinker failed in cell 4 of 5" in report
    assert "kernel died" in report


def test_a_notebook_that_does_not_finish_is_a_failure(place, capsys):
    path = place / "notebooks" / "01_generate.ipynb"
    book = nbformat.read(path, as_version=4)
    book.cells.pop()
    nbformat.write(book, path)
    assert call("--to", "01") == 1
    assert "run.finish" in capsys.readouterr().err


def test_finish_refuses_a_stage_without_its_artefacts(place):
    config = RunConfig()
    run.ensure("01_generate", config)
    with pytest.raises(run.StageError, match=r"responses\.jsonl"):
        run.finish("01_generate", config)


# -- a notebook opened alone -------------------------------------------------------------


def test_ensure_runs_the_earlier_notebooks_once(place, capsys):
    config = RunConfig(seed=5)
    folder = run.ensure("03_attribute_layers", config)
    assert log(place) == ["01_generate tiny-thinker", "02_train_vectors tiny-thinker"]
    assert folder.responses.read_text() == "5"
    assert "03_attribute_layers needs 01_generate, 02_train_vectors" in capsys.readouterr().out
    run.ensure("03_attribute_layers", config)
    assert len(log(place)) == 2
    assert capsys.readouterr().out == ""


def test_ensure_reports_the_failing_notebook(place):
    write_notebook(place / "notebooks", "01_generate", work="raise ValueError('broken')")
    with pytest.raises(run.StageError, match=r"01_generate.*failed in cell 4(.|\n)*broken"):
        run.ensure("02_train_vectors", RunConfig())


def test_ensure_runs_nothing_inside_the_runner(place, monkeypatch):
    monkeypatch.setenv(pipeline.INSIDE, "1")
    run.ensure("02_train_vectors", RunConfig())
    assert not log(place)


# -- light ------------------------------------------------------------------------------


def test_the_runner_does_not_import_torch_or_papermill_to_look():
    code = (
        "import sys\nfrom stllms import run\nassert run.main(['--list-models']) == 0\n"
        "print(sorted({'torch', 'papermill', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "r1-distill-qwen-1.5b" in done.stdout
