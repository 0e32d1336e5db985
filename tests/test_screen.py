"""What a person sees while notebooks run: messages of real kernels, plain lines, one line in a
terminal, nothing where quiet, and what Ctrl-C leaves."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from test_run import WORK, place, write_notebook  # noqa: F401 - place is a fixture

from stllms import execute, pipeline, progress, run
from stllms.config import RunConfig
from stllms.estimate import Work

DIG = """import time
from stllms import progress
with progress.token_bar(120, "digging", most=9) as bar:
    for _ in range(120):
        time.sleep(0.01)
        bar.tick(8, 1)
    time.sleep(1.5)
"""


@pytest.fixture
def digging(place):  # noqa: F811
    work = DIG + WORK.format(stage="01_generate", names=["responses.jsonl"])
    write_notebook(place / "notebooks", "01_generate", work=work)
    return place


def outputs(place) -> str:  # noqa: F811
    copy = place / "results/tiny-thinker/notebooks/01_generate.ipynb"
    cells = json.loads(copy.read_text())["cells"]
    return json.dumps([output for cell in cells for output in cell.get("outputs", ())])


def test_where_there_is_no_terminal_a_plain_line_says_how_far_the_kernel_is(
    digging, capsys, monkeypatch
):
    monkeypatch.setattr(execute, "LOOK", 0.1)
    monkeypatch.setattr(execute, "PLAIN", 0.1)
    assert run.main(["--to", "01", "--n-evaluate", "5"]) == 0
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert lines[0] == "1 of 1: 01_generate tiny-thinker"
    dug = [line for line in lines if "digging" in line]
    assert dug, lines
    assert dug[0].startswith("01_generate tiny-thinker, cell 4/5: digging ")
    assert any("/120 rows" in line and "tokens/s" in line for line in dug)
    assert "\r" not in said.err
    assert "\x1b" not in said.err
    # The estimate is there before; no speed is told, as no chain is left after these.
    assert said.out.splitlines()[1].split() == ["01_generate", "tiny-thinker", "200", "51,200"]
    assert "digging" not in outputs(digging), "no bar is kept in the notebook"


def test_quiet_says_nothing_while_it_runs(digging, capsys, monkeypatch):
    monkeypatch.setattr(execute, "LOOK", 0.1)
    monkeypatch.setattr(execute, "PLAIN", 0.1)
    assert run.main(["--to", "01", "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert {line.split(":")[0] for line in said.out.splitlines()} == {"done", "report"}
    assert "digging" not in outputs(digging)


# -- the line itself -------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


JOB = execute.Job("04_steer", RunConfig())


def state(**values) -> progress.State:
    told = {"made": 340, "tokens": 34_000, "most": 256, "rate": 2000.0, "left": 190.0}
    return progress.State("steered", 340, 1740, **{**told, **values})


def test_a_terminal_has_one_line_that_fits(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    screen = execute.Screen(tmp_path / "told", stream=stream)
    screen.begin(JOB, 31, "4 of 5")
    screen.update(9)
    progress.report(tmp_path / "told", state())
    screen.look()
    screen.update(1)
    progress.report(tmp_path / "told", state(ended=True))
    screen.look()
    screen.__exit__()
    drawn = [line.strip() for line in stream.getvalue().split("\r") if line.strip()]
    assert drawn == [
        "04_steer tiny-thinker, cell 9/31: steered 340/1,740 rows, 3:10 left",
        "04_steer tiny-thinker, cell 10/31: 0:00 in this cell",
    ]
    assert "\n" not in stream.getvalue()


def test_the_first_chains_of_a_model_tell_how_long_its_others_take(tmp_path, capsys):
    """34,000 tokens in 340 chains: 100 each; 1,400 and 260 chains are left, of which those of
    an earlier notebook and of another model are none: 166,000 tokens at 2,000 a second."""
    works = [
        Work("01_generate", "tiny-thinker", 999),
        Work("04_steer", "tiny-thinker", 1740),
        Work("05_compare", "tiny-thinker", 260),
        Work("05_compare", "smollm2", 5000),
    ]
    screen = execute.Screen(tmp_path / "told", works, stream=io.StringIO())
    screen.begin(JOB, 31, "4 of 5")
    for early in (state(made=99), state(rate=None), state(most=None)):
        progress.report(tmp_path / "told", early)
        screen.look()
    assert capsys.readouterr().out == ""
    for _ in range(2):
        progress.report(tmp_path / "told", state())
        screen.look()
    screen.__exit__()
    assert capsys.readouterr().out == (
        "tiny-thinker: at 2,000 tokens/s and 100 tokens a chain, 1,660 chains still to write "
        "take about 83 s\n"
    )


# -- stopped -----------------------------------------------------------------------------------


def test_ctrl_c_says_in_one_line_what_is_kept_and_how_to_go_on(place):  # noqa: F811
    wait = 'import time\n(folder / "responses.jsonl").write_text("{}\\n" * 7)\ntime.sleep(60)'
    write_notebook(place / "notebooks", "01_generate", work=wait)
    code = (  # who runs the tests in the background ignores SIGINT, and so would the runner
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from stllms import run\nsys.exit(run.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "--to", "01", "--quiet", "--fresh"]
    runner = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=place
    )
    written = place / "results/tiny-thinker/responses.jsonl"
    while not (written.is_file() and written.stat().st_size) and runner.poll() is None:
        time.sleep(0.1)
    runner.send_signal(signal.SIGINT)
    out, err = runner.communicate(timeout=60)
    assert (runner.returncode, out) == (130, "")
    assert err == (
        "stllms.run: interrupted in 01_generate tiny-thinker; kept: the notebooks before it, "
        "7 rows of results/tiny-thinker/responses.jsonl; the same command without --fresh goes "
        "on from there\n"
    )


def test_a_notebook_that_runs_earlier_ones_shows_how_far_they_are(digging, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "LOOK", 0.1)
    run.ensure("02_train_vectors", RunConfig())
    said = capsys.readouterr()
    assert "1 of 1: 01_generate, tiny-thinker, 200 tasks ..." in said.out
    assert "/120 rows" in said.err
    assert "digging" in said.err


def test_a_runner_that_is_called_by_a_notebook_passes_on_what_its_kernels_tell(
    place,  # noqa: F811
    monkeypatch,
):
    """A quiet runner shows nothing; who called it may listen (:func:`pipeline.ensure`)."""
    heard = place / "heard.json"
    monkeypatch.setenv(progress.CHANNEL, str(heard))
    with execute._own_kernel(quiet=True) as channel:
        assert channel == heard
    monkeypatch.delenv(progress.CHANNEL)
    with execute._own_kernel(quiet=True) as channel:
        assert not channel.is_file(), "the null device"
    assert pipeline.INSIDE not in os.environ
