"""Every command in README and docs: its words are understood, and (slow) it runs.

A fence ``bash`` holds commands that run anywhere. More words say what they need: ``gpu``,
``key``, ``extra`` (an optional package), ``long`` (more than minutes); those are only read.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from stllms import cli, run
from stllms.config import MODELS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {"gpu", "key", "extra", "long"}
FENCE = re.compile(r"^```bash *([^\n]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INSTALLS = ("pip", ".venv/bin/pip", "conda", "git", "cd")


def fences() -> list[tuple[str, frozenset[str], str]]:
    """(page, what it needs, command) of every command."""
    found = []
    for page in PAGES:
        for words, body in FENCE.findall(page.read_text(encoding="utf-8")):
            joined = re.sub(r"\\\n\s*", "", body)
            for line in joined.splitlines():
                command = line.split("  #")[0].strip()
                if command:
                    found.append((page.name, frozenset(words.split()), command))
    return found


COMMANDS = fences()


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def test_there_are_commands_and_their_needs_have_a_name():
    assert len(COMMANDS) >= 10
    for page, needs, command in COMMANDS:
        assert needs <= NEEDS, f"{page}: {command}: {sorted(needs - NEEDS)}"


@pytest.mark.parametrize(("page", "needs", "command"), COMMANDS)
def test_the_words_of_a_command_are_understood(page, needs, command):
    first, *rest = words_of(command)
    if first == "./run_all.sh":
        understood_by_the_runner(rest)
    elif first in ("stllms", ".venv/bin/stllms"):
        if rest[0] == "run":
            understood_by_the_runner(rest[1:])
        else:
            cli.parser().parse_args(rest)
    elif rest[:1] == ["-m"]:
        assert importlib.util.find_spec(rest[1]) is not None, command
    elif first in INSTALLS:
        assert rest, f"{page}: {command}"
    elif first.endswith("jupyter"):
        assert (ROOT / rest[1]).exists(), command
    else:
        assert (ROOT / first).is_file(), f"{page}: no such command: {command}"


def understood_by_the_runner(rest: list[str]) -> None:
    if rest == ["--environment-only"]:  # the script's own
        return
    given, unknown = run.parser().parse_known_args(rest)
    assert not unknown
    for name in given.model or []:
        assert name in MODELS or "/" in name, f"{name} is neither registered nor an id or path"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [c for _, needs, c in COMMANDS if not needs and words_of(c)[0] not in INSTALLS]
)
def test_a_command_runs(command, tmp_path):
    """In the checkout, its runs in a folder of their own. Two are run elsewhere: the test suite
    is this one, and JupyterLab has its own test (``test_jupyterlab.py``)."""
    first = words_of(command)[0]
    if first == "./tests/run.sh" or first.endswith("jupyter"):
        pytest.skip("run elsewhere")
    python = Path(sys.executable).parent
    environment = os.environ | {
        "STLLMS_RESULTS": str(tmp_path),
        "PATH": f"{python}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": str(python.parent),
    }
    done = subprocess.run(
        command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
