"""The runner, on small notebooks that the tests write and that leave what they promise."""

from __future__ import annotations

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
from stllms.records import STEERED_KEY
from stllms.runs.artifacts import Folder
from stllms.runs.store import Rows

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
    # What these notebooks leave are no tables that a report could show.
    monkeypatch.setattr("stllms.app.report.write", lambda folder: folder)
    return tmp_path


def log(place: Path) -> list[str]:
    path = place / "results" / "log.txt"
    return path.read_text().splitlines() if path.exists() else []


def call(*arguments: str) -> int:
    return cli.main(["run", *arguments, "--quiet"])


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
    expected = [f"{stage} tiny-thinker" for stage in stages.STAGES]
    assert log(place) == expected
    results = place / "results"
    assert (results / "tiny-thinker" / "notebooks" / "04_steer.ipynb").is_file()
    assert (results / "comparison" / "notebooks" / "05_compare.ipynb").is_file()
    record = json.loads((results / "tiny-thinker" / "run.json").read_text())
    assert record["identity"]["annotator"] == "grammar"
    assert record["versions"]["torch"]
    assert sorted(record["stages"]) == list(stages.STAGES[:4])
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
    assert log(place)[4:] == [f"{stage} tiny-thinker" for stage in stages.STAGES[1:3]]


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
    work = 'import json\n(folder / "responses.jsonl").write_text(json.dumps(config.to_dict()))'
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
    seen = RunConfig.from_dict(
        json.loads((place / "results/tiny-thinker/responses.jsonl").read_text())
    )
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
    work = f"import os, sys\nsaid = sys.executable + ' ' + os.environ['{api.STARTED}']\n"
    work += '(folder / "responses.jsonl").write_text(said)'
    write_notebook(place / "notebooks", "01_generate", work=work)
    monkeypatch.chdir(place)
    assert call("--to", "01") == 0
    said = (place / "results/tiny-thinker/responses.jsonl").read_text()
    assert said == f"{sys.executable} {place}", "the second says whose .env counts"
    assert stages.INSIDE not in os.environ


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


def test_another_configuration_is_refused_by_name(place, capsys):
    assert call("--to", "01") == 0
    line = refused(capsys, "--to", "01", "--max-tokens", "99")
    for part in ("results/tiny-thinker", "max_tokens", "256", "99", "--fresh"):
        assert part in line
    assert call("--to", "01", "--max-tokens", "99", "--fresh") == 0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model", "does-not-exist"], ["does-not-exist", "stllms models"]),
        (["--model", "tiny-thinkr"], ["tiny-thinkr", "did you mean tiny-thinker"]),
        (["--profile", "papr"], ["papr", "smoke, default, full, paper (did you mean paper?)"]),
        (["--modle", "x"], ["--modle", "Did you mean", "--model"]),
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
    assert "stages.finish" in capsys.readouterr().err


def test_finish_refuses_a_stage_without_its_artefacts(place):
    config = RunConfig()
    stages.ensure("01_generate", config)
    with pytest.raises(StageError, match=r"responses\.jsonl"):
        stages.finish("01_generate", config)


# -- a notebook opened alone -------------------------------------------------------------


def test_ensure_runs_the_earlier_notebooks_once(place, capsys):
    config = RunConfig(seed=5)
    folder = stages.ensure("03_attribute_layers", config)
    assert log(place) == ["01_generate tiny-thinker", "02_train_vectors tiny-thinker"]
    assert folder.responses.read_text() == "5"
    assert "03_attribute_layers needs 01_generate, 02_train_vectors" in capsys.readouterr().out
    stages.ensure("03_attribute_layers", config)
    assert len(log(place)) == 2
    assert capsys.readouterr().out == ""


def test_ensure_reports_the_failing_notebook(place):
    write_notebook(place / "notebooks", "01_generate", work="raise ValueError('broken')")
    with pytest.raises(StageError, match=r"01_generate.*failed in cell 4(.|\n)*broken"):
        stages.ensure("02_train_vectors", RunConfig())


def test_ensure_runs_nothing_inside_the_runner(place, monkeypatch):
    monkeypatch.setenv(stages.INSIDE, "1")
    stages.ensure("02_train_vectors", RunConfig())
    assert not log(place)


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


# -- how far it is -----------------------------------------------------------------------

DIG = """import time
from stllms.terminal import token_bar
with token_bar(120, "digging", most=9) as bar:
    for _ in range(120):
        time.sleep(0.01)
        bar.tick(8, 1)
    time.sleep(1.5)
"""


@pytest.fixture
def digging(place):
    work = DIG + WORK.format(stage="01_generate", names=["responses.jsonl"])
    write_notebook(place / "notebooks", "01_generate", work=work)
    return place


def outputs(place) -> str:
    copy = place / "results/tiny-thinker/notebooks/01_generate.ipynb"
    cells = json.loads(copy.read_text())["cells"]
    return json.dumps([output for cell in cells for output in cell.get("outputs", ())])


@pytest.fixture
def often(monkeypatch):
    """Kernels are looked at, and talked about, ten times a second."""
    for module, name in ((runner, "LOOK"), (runner, "SAY"), (stages, "LOOK")):
        monkeypatch.setattr(module, name, 0.1)


@pytest.mark.usefixtures("often")
def test_lines_say_what_is_to_do_and_how_far_the_kernel_is(digging, capsys):
    assert cli.main(["run", "--to", "01", "--n-evaluate", "5"]) == 0
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert lines[0] == "1 of 1: 01_generate tiny-thinker"
    dug = [line for line in lines if "digging" in line]
    assert dug[0].startswith("01_generate tiny-thinker, cell 4/5: digging ")
    assert any("/120 rows" in line and "tokens/s" in line for line in dug)
    assert "\r" not in said.err
    assert "\x1b" not in said.err
    assert said.out.splitlines()[:2] == [
        "01_generate tiny-thinker: 200 chains to write, at most 51,200 tokens",
        "no calls to an API",
    ]
    assert "digging" not in outputs(digging), "no bar is kept in the notebook"


@pytest.mark.usefixtures("often")
def test_quiet_says_nothing_while_it_runs(digging, capsys):
    assert call("--to", "01") == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert {line.split(":")[0] for line in said.out.splitlines()} == {"done", "report"}


@pytest.mark.usefixtures("often")
def test_a_notebook_that_runs_earlier_ones_shows_how_far_they_are(digging, capsys):
    stages.ensure("02_train_vectors", RunConfig())
    said = capsys.readouterr()
    assert "1 of 1: 01_generate, tiny-thinker, 200 tasks ..." in said.out
    assert "/120 rows" in said.err
    assert "digging" in said.err


def test_ctrl_c_says_in_one_line_what_is_kept_and_how_to_go_on(place):
    wait = 'import time\n(folder / "responses.jsonl").write_text("{}\\n" * 7)\ntime.sleep(60)'
    write_notebook(place / "notebooks", "01_generate", work=wait)
    code = (  # who runs the tests in the background ignores SIGINT, and so would the runner
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from stllms.app import cli\nsys.exit(cli.main(['run', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", code, "--to", "01", "--quiet", "--fresh"]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=place
    )
    written = place / "results/tiny-thinker/responses.jsonl"
    while not (written.is_file() and written.stat().st_size) and running.poll() is None:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, "")
    assert err == (
        "stllms: interrupted in 01_generate tiny-thinker; kept: the notebooks before it, "
        "7 rows of results/tiny-thinker/responses.jsonl; the same command without --fresh goes "
        "on from there\n"
    )


# -- chains that failed are asked again -----------------------------------------------------

LABELS = "02_train_vectors"


def label(task: str, annotator: str = "grammar", failed: str | None = None) -> dict:
    """A row of ``annotations.jsonl``."""
    empty = {"segments": [], "spans": [], "ledger": {}}
    return {"task_id": task, "annotator": annotator, **empty, "failed": failed}


def made(stage: str, config: RunConfig, rows: list[dict] | None = None) -> None:
    """A stage that left what it promises; ``rows`` are those of ``annotations.jsonl``."""
    folder = stages.folder_of(stage, config).open()
    for name in stages.PROMISED[stage]:
        (folder / name).write_text("")
    if rows:
        Rows(folder.annotations, ("task_id", "annotator")).write(rows)
    stages.finish(stage, config)


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
    assert stages.has_run(LABELS, config)
    assert not stages.is_done(LABELS, config)
    assert stages.pending([LABELS], config) == [LABELS]
    made(LABELS, config, [label("a"), label("b")])
    assert stages.is_done(LABELS, config)
    assert stages.pending([LABELS], config) == []


def test_a_notebook_opened_alone_does_not_ask_again(place, capsys):
    config = RunConfig()
    made("01_generate", config)
    made(LABELS, config, [label("b", failed="HTTP 500")])
    capsys.readouterr()
    stages.ensure("03_attribute_layers", config)
    assert capsys.readouterr().out == ""


def test_rows_of_another_annotator_do_not_count(place):
    config = RunConfig()
    made(LABELS, config, [label("a"), label("a", "lexical", failed="HTTP 500")])
    assert stages.failed(LABELS, config) == 0


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
    assert stages.failed(LABELS, config) == waiting


def test_the_comparison_counts_labels_and_texts_of_all_its_models(place):
    config = RunConfig(judge="lexical", compare=("gpt-4o", "tiny-instruct"))
    folder = stages.folder_of("05_compare", config)
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
    assert stages.failed("05_compare", config) == len(config.models) + 1
    assert stages.pending(["05_compare"], config) == ["05_compare"]


def test_failed_labels_of_steered_chains_count(place):
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


# -- what the next run does ----------------------------------------------------------------

FLAKY = """import json
failed = None if (folder / "annotations.jsonl").is_file() else "HTTP 500"
empty = {"annotator": "grammar", "segments": [], "spans": [], "ledger": {}}
rows = [{"task_id": "a", "failed": None, **empty}, {"task_id": "b", "failed": failed, **empty}]
folder.rows(folder.annotations, ("task_id", "annotator")).write(rows)
import torch
from stllms.runs.files import save_tensors
made = {"directions": torch.full((1,), float(failed is None))}
save_tensors(folder.vectors, made, {})
save_tensors(folder / "controls.safetensors", made, {})
log = folder.path.parent / "log.txt"
log.open("a").write("02_train_vectors " + config.model + chr(10))"""


def test_the_next_run_asks_again_and_what_rests_on_it_is_named(place, capsys):
    """New labels give other directions: effects of the old ones are refused, never reused."""
    write_notebook(place / "notebooks", LABELS, work=FLAKY)
    ask = ["run", "--to", "03", "--quiet"]
    assert cli.main(ask) == 0
    assert f"{LABELS}: 1 chains failed; the same command asks" in capsys.readouterr().out
    assert cli.main(ask) == 2
    said = capsys.readouterr().err
    assert "layer_effects.safetensors was made with other vectors: vectors.safetensors" in said
    assert "--fresh 03_attribute_layers" in said
    assert cli.main([*ask, "--fresh", "03"]) == 0
    out = capsys.readouterr().out
    assert "chains failed" not in out
    log = (place / "results" / "log.txt").read_text().splitlines()
    again = [LABELS, "03_attribute_layers"]
    assert [line.split()[0] for line in log] == ["01_generate", *again, *again]
    assert cli.main(ask) == 0
    assert "nothing to do" in capsys.readouterr().out


# -- what it costs -------------------------------------------------------------------------


def test_the_estimate_of_costs_reaches_the_terminal(place, capsys):
    said = str(api.Estimate("owner/m-1", 12, 3, 4500, 600, 0.25))
    assert stages.ESTIMATE.match(said)
    work = f'print("not this")\nprint({said!r}, flush=True)\nprint("nor this")\n'
    work += '(folder / "responses.jsonl").write_text("")'
    write_notebook(place / "notebooks", "01_generate", work=work)
    stages.ensure(LABELS, RunConfig())  # notebook -> runner -> the process that asked for it
    out = capsys.readouterr().out
    assert out.splitlines()[1:] == ["1 of 1: 01_generate, tiny-thinker, 200 tasks ...", said]
