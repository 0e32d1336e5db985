"""The runner, on small notebooks that the tests write and that leave what they promise."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from stllms.app import cli, runner, stages
from stllms.app.stages import StageError
from stllms.config import RunConfig
from stllms.models import api
from stllms.runs.artifacts import Folder

PARAMETERS = """model = "tiny-thinker"
profile = "default"
judge = "auto"
results = None
seed = 0
n_samples = None
max_tokens = None
options = {}"""

BEGIN = """from stllms.app import stages
from stllms.config import RunConfig
config = RunConfig.from_parameters(
    model, profile, judge, results, seed, n_samples, max_tokens, options)
folder = stages.ensure("{stage}", config)"""

WORK = """from stllms.runs.files import replacing
names = {names}
for name in names:
    folder.keep([folder / name])
    with replacing(folder / name) as beside:
        beside.write_text(f"{{config.seed}}")
log = folder.path.parent / "log.txt"
log.open("a").write("{stage} " + config.model + "\\n")"""


def write_notebook(folder: Path, stage: str, *, work: str | None = None, parameters=PARAMETERS):
    """A notebook of one stage; ``work`` replaces what it does."""
    names = [*stages.PROMISED[stage], f"figures_of_{stage[:2]}.txt"]
    cells = [
        nbformat.v4.new_markdown_cell(f"# {stage}"),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(BEGIN.format(stage=stage)),
        nbformat.v4.new_code_cell(work or WORK.format(stage=stage, names=names)),
        nbformat.v4.new_code_cell(f'stages.finish("{stage}", config)'),
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
    for stage in stages.STAGES:
        write_notebook(notebooks, stage)
    monkeypatch.setenv("STLLMS_NOTEBOOKS", str(notebooks))
    monkeypatch.setenv("STLLMS_RESULTS", str(results))
    monkeypatch.delenv(stages.INSIDE, raising=False)
    # What these notebooks leave are no tables that a report could show, and no directions.
    monkeypatch.setattr("stllms.app.report.write", lambda folder: folder)
    monkeypatch.setattr(stages, "has_directions", lambda _: False)
    return tmp_path


def log(place: Path) -> list[str]:
    path = place / "results" / "log.txt"
    return path.read_text().splitlines() if path.exists() else []


def call(*arguments: str) -> int:
    return cli.main(["run", *arguments, "--quiet"])


# -- running, skipping, going on ---------------------------------------------------------


def test_all_notebooks_run_once_and_a_second_run_does_nothing(place, capsys, monkeypatch):
    assert call() == 0
    expected = [f"{stage} tiny-thinker" for stage in stages.STAGES]
    assert log(place) == expected
    results = place / "results"
    assert (results / "tiny-thinker" / "notebooks" / "04_steer.ipynb").is_file()
    assert (results / "comparison" / "notebooks" / "05_compare.ipynb").is_file()
    record = json.loads((results / "tiny-thinker" / "run.json").read_text())
    assert record["identity"]["annotator"] == "grammar"
    assert record["versions"]["torch"]
    assert sorted(record["stages"]) == list(stages.STAGES[:4])
    said = capsys.readouterr()
    assert said.err == ""
    assert {line.split(":")[0] for line in said.out.splitlines()} == {"done", "report"}
    assert f"done: {results / 'tiny-thinker'}\n" in said.out
    monkeypatch.chdir(place)
    assert call() == 0
    assert "nothing to do: results/tiny-thinker, results/comparison" in capsys.readouterr().out
    assert log(place) == expected


def test_only_what_is_missing_or_changed_runs_again(place):
    names = [stage.split()[0] for stage in stages.STAGES]

    def again(*arguments: str) -> list[str]:
        before = len(log(place))
        assert call(*arguments) == 0
        return [line.split()[0] for line in log(place)[before:]]

    assert again("--to", "03") == names[:3]
    (place / "results/tiny-thinker/figures_of_02.txt").unlink()
    assert again("--to", "03") == names[1:2]
    files = ["annotations.jsonl", "vectors.safetensors", "controls.safetensors", "more.txt"]
    work = WORK.format(stage=names[1], names=files)
    write_notebook(place / "notebooks", names[1], work=work)
    assert again("--to", "03") == names[1:3]
    assert again("--to", "04") == names[3:4]
    assert again("--to", "04", "--option", "coefficients=-1,-0.5,1") == names[3:4]


def test_several_models_share_one_comparison_and_what_is_needed_runs_first(place, capsys):
    both = ("--model", "tiny-thinker", "--model", "TINY-INSTRUCT")
    assert call(*both, "--from", "02", "--to", "2") == 0
    assert call(*both, "--from", "05") == 0
    models = ("tiny-thinker", "tiny-instruct")
    first = [f"{stage} {model}" for model in models for stage in stages.STAGES[:2]]
    assert log(place) == [*first, "05_compare tiny-thinker"]
    needed = "needed first: 01_generate tiny-thinker, 01_generate tiny-instruct"
    assert needed in capsys.readouterr().out


def test_parameters_reach_a_kernel_of_this_interpreter(place, monkeypatch):
    foreign = place / "jupyter" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    argv = ["/nonexistent/python", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "foreign", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(place / "jupyter"))
    work = f"""import json, os, sys
said = [config.to_dict(), sys.executable, os.environ['{api.STARTED}'], os.getcwd()]
(folder / "responses.jsonl").write_text(json.dumps(said))"""
    write_notebook(place / "notebooks", "01_generate", work=work)
    monkeypatch.chdir(place)
    options = "--n-samples 7 --temperature 0 --option reader=published --profile smoke"
    assert call("--to", "01", *options.split()) == 0
    config, *where = json.loads((place / "results/tiny-thinker/responses.jsonl").read_text())
    seen = RunConfig.from_dict(config)
    assert (seen.n_samples, seen.temperature, seen.reader) == (7, 0.0, "published")
    assert seen.results_folder == place / "results"
    assert where == [sys.executable, str(place), str(place / "notebooks")]
    assert stages.INSIDE not in os.environ


def test_another_configuration_is_refused_and_fresh_deletes_what_the_package_wrote(
    place, capsys
):
    assert call("--to", "01") == 0
    line = refused(capsys, "--to", "01", "--max-tokens", "99")
    for part in ("results/tiny-thinker", "max_tokens", "256", "99", "--fresh"):
        assert part in line
    folder = place / "results/tiny-thinker"
    own, stale = folder / "mine.txt", folder / "vectors.safetensors"
    own.write_text("a person's file")
    stale.write_text("of an earlier notebook")
    assert call("--to", "01", "--fresh", "--seed", "3") == 0
    assert own.is_file()
    assert not stale.exists()
    assert (folder / "responses.jsonl").read_text() == "3"
    assert len(log(place)) == 2


def test_a_killed_run_goes_on_where_it_was(place):
    stage = "02_train_vectors"
    work = WORK.format(stage=stage, names=list(stages.PROMISED[stage]))
    kill = (
        "import os, signal\n"
        + "once = folder / 'once'\n"
        + (
            "if not once.exists():\n    once.write_text('')\n    os.kill(os.getppid(), 9)\n"
            "    import time; time.sleep(30)\n"
        )
    )
    write_notebook(place / "notebooks", "02_train_vectors", work=kill + work)
    command = [sys.executable, "-m", "stllms", "run", "--to", "02", "--quiet"]
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


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model", "tiny-thinkr"], ["tiny-thinkr", "did you mean tiny-thinker"]),
        (["--modle", "x"], ["--modle", "Did you mean", "--model"]),
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


def test_a_notebook_that_is_missing_or_lacks_a_parameter_is_named(place, capsys):
    (place / "notebooks" / "03_attribute_layers.ipynb").unlink()
    assert "03_attribute_layers.ipynb" in refused(capsys)
    without = "\n".join(line for line in PARAMETERS.splitlines() if "max_tokens" not in line)
    write_notebook(place / "notebooks", "02_train_vectors", parameters=without)
    line = refused(capsys, "--to", "02")
    assert "02_train_vectors.ipynb has no parameter max_tokens" in line
    assert not log(place)


def test_a_folder_in_use_is_refused_with_the_pid(place, capsys):
    config = RunConfig()
    code = (
        "import sys, time\nfrom stllms.runs.artifacts import Folder\n"
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
    lock = Folder(config).path / ".01_generate.lock"
    assert lock.read_text() == str(holder.pid)  # a stale one
    assert call("--to", "01") == 0


# -- failing -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "why"),
    [
        ("value = 1\nraise KeyError('no such layer')", "KeyError: 'no such layer'"),
        ("value = 1\nimport os\nos.write(2, b'no memory')\nos._exit(3)", "no memory"),
    ],
    ids=["an error", "a dead kernel"],
)
def test_a_failing_cell_is_reported_and_stops_the_run(place, capsys, work, why):
    write_notebook(place / "notebooks", "02_train_vectors", work=work)
    assert call() == 1
    report = capsys.readouterr().err
    copy = place / "results/tiny-thinker/notebooks/02_train_vectors.failed.ipynb"
    for part in ("02_train_vectors tiny-thinker failed in cell 4 of 5", "value = 1", why):
        assert part in report
    assert f"as executed: {copy}" in report
    assert copy.is_file()
    assert "\x1b" not in report
    assert log(place) == ["01_generate tiny-thinker"]


def test_a_notebook_that_does_not_finish_is_a_failure(place, capsys):
    path = place / "notebooks" / "01_generate.ipynb"
    book = nbformat.read(path, as_version=4)
    book.cells.pop()
    nbformat.write(book, path)
    assert call("--to", "01") == 1
    assert "stages.finish" in capsys.readouterr().err


def test_finish_refuses_a_stage_without_its_artefacts(place):
    config = RunConfig()
    stages.ensure("01_generate", config)
    with pytest.raises(StageError, match=r"responses\.jsonl"):
        stages.finish("01_generate", config)


# -- a notebook opened by hand -------------------------------------------------------------

DIG = """import time
from stllms.terminal import token_bar
with token_bar(120, "digging", most=9) as bar:
    for _ in range(120):
        time.sleep(0.01)
        bar.tick(8, 1)
    time.sleep(1.5)
"""


@pytest.fixture
def digging(place, monkeypatch):
    """A first notebook that takes its time, looked at ten times a second; it says a cost."""
    monkeypatch.setattr(runner, "SAY", 0.1)
    said = str(api.Estimate("owner/m-1", 12, 3, 4500, 600, 0.25))
    work = f'print("not this")\nprint({said!r}, flush=True)\nprint("nor this")\n{DIG}'
    work += WORK.format(stage="01_generate", names=["responses.jsonl"])
    write_notebook(place / "notebooks", "01_generate", work=work)
    return said


def in_a_kernel(stage: str, config: RunConfig) -> Folder:
    """A call in a cell: an event loop runs in its thread."""

    async def cell() -> Folder:
        return stages.ensure(stage, config)

    return asyncio.run(cell())


def test_ensure_runs_the_earlier_notebooks_once_and_says_how_far_they_are(
    place, digging, capsys
):
    config = RunConfig(seed=5)
    folder = in_a_kernel("03_attribute_layers", config)
    assert log(place) == ["01_generate tiny-thinker", "02_train_vectors tiny-thinker"]
    assert folder.responses.read_text() == "5"
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "03_attribute_layers needs 01_generate, 02_train_vectors: running this first",
        "01_generate tiny-thinker: 200 chains to write, at most 51,200 tokens",
        "no calls to an API",
        digging,
    ]
    lines = said.err.splitlines()
    assert [line for line in lines if " of 2: " in line] == [
        "1 of 2: 01_generate tiny-thinker",
        "2 of 2: 02_train_vectors tiny-thinker",
    ]
    dug = [line for line in lines if "digging" in line]
    assert dug[0].startswith("01_generate tiny-thinker, cell 4/5: digging ")
    assert any("/120 rows" in line and "tokens/s" in line for line in dug)
    assert "\r" not in said.err
    assert "\x1b" not in said.err
    copy = json.loads((folder.notebooks / "01_generate.ipynb").read_text())
    outputs = [output for cell in copy["cells"] for output in cell.get("outputs", ())]
    assert "digging" not in json.dumps(outputs), "no bar is kept in the notebook"
    in_a_kernel("03_attribute_layers", config)
    assert len(log(place)) == 2
    assert capsys.readouterr().out == ""


def test_ensure_reports_the_failing_notebook_and_runs_none_in_the_runner(place, monkeypatch):
    write_notebook(place / "notebooks", "01_generate", work="raise ValueError('broken')")
    with pytest.raises(StageError, match=r"01_generate.*failed in cell 4(.|\n)*broken"):
        in_a_kernel("02_train_vectors", RunConfig())
    monkeypatch.setenv(stages.INSIDE, "1")
    stages.ensure("02_train_vectors", RunConfig())


def test_a_stage_that_was_left_is_free_for_the_next_one_of_the_process(place):
    stages.ensure("01_generate", RunConfig())
    stages.ensure("02_train_vectors", RunConfig())
    assert log(place) == ["01_generate tiny-thinker"]


RUN = "cli.main(['run', '--to', '01', '--quiet', '--fresh'])"
CELL = """asyncio.new_event_loop().run_until_complete(cell())"""


@pytest.mark.parametrize("call", [RUN, CELL], ids=["command", "cell"])
def test_ctrl_c_stops_the_kernel_and_says_how_to_go_on(place, call):
    wait = """import os, time
(folder / "responses.jsonl").write_text(str(os.getpid()))
time.sleep(60)"""
    write_notebook(place / "notebooks", "01_generate", work=wait)
    code = f"""import asyncio, signal, sys
# who runs the tests in the background ignores SIGINT, and so would the runner
signal.signal(signal.SIGINT, signal.default_int_handler)
from stllms.app import cli, stages
from stllms.config import RunConfig
async def cell():
    try:
        stages.ensure("02_train_vectors", RunConfig())
    except KeyboardInterrupt as stop:
        sys.exit(str(stop))
sys.exit({call})"""
    command = [sys.executable, "-c", code]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=place)
    written = place / "results/tiny-thinker/responses.jsonl"
    while not (written.is_file() and written.stat().st_size) and running.poll() is None:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    with pytest.raises(ProcessLookupError):
        os.kill(int(written.read_text()), 0)
    said = "interrupted in 01_generate tiny-thinker; what was written is kept"
    if call == CELL:
        assert said in err.splitlines()
        return
    again = "the same command without --fresh goes on from there"
    assert (running.returncode, err) == (130, f"stllms: {said}; {again}\n")


# -- light ------------------------------------------------------------------------------


def test_the_runner_does_not_import_torch_or_papermill_to_look():
    code = (
        "import sys\nfrom stllms.app import cli\nassert cli.main(['models']) == 0\n"
        "from stllms.app import runner\n"
        "print(sorted({'torch', 'papermill', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "r1-distill-qwen-1.5b" in done.stdout


# -- calls that failed are made again -------------------------------------------------------

LABELS = "02_train_vectors"
FLAKY = """again = folder.vectors.is_file()
stages._to_call_again = lambda *_: int(not again)
(folder / "annotations.jsonl").write_text("")
import torch
from stllms.runs.files import save_tensors
made = {"directions": torch.full((1,), float(again))}
save_tensors(folder.vectors, made, {})
save_tensors(folder / "controls.safetensors", made, {})
log = folder.path.parent / "log.txt"
log.open("a").write("02_train_vectors " + config.model + chr(10))"""


def test_the_next_run_asks_again_and_what_rests_on_it_is_named(place, capsys):
    """New labels give other directions: effects of the old ones are refused, never reused."""
    write_notebook(place / "notebooks", LABELS, work=FLAKY)
    ask = ["run", "--to", "03", "--quiet"]
    assert cli.main(ask) == 0
    assert f"{LABELS}: 1 calls failed; the same command makes" in capsys.readouterr().out
    assert cli.main(ask) == 2
    said = capsys.readouterr().err
    assert "layer_effects.safetensors was made with other vectors: vectors.safetensors" in said
    assert "--fresh 03_attribute_layers" in said
    assert cli.main([*ask, "--fresh", "03"]) == 0
    out = capsys.readouterr().out
    assert "calls failed" not in out
    again = [LABELS, "03_attribute_layers"]
    assert [line.split()[0] for line in log(place)] == ["01_generate", *again, *again]
    assert cli.main(ask) == 0
    assert "nothing to do" in capsys.readouterr().out
