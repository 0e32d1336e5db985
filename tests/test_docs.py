"""Every command in README and docs: its words are understood, and (slow) it runs.

A fence ``bash`` holds commands that run anywhere. More words say what they need: ``gpu``,
``key``, ``extra`` (an optional package), ``files`` (that are not here), ``install`` (a package
index), ``long`` (many minutes). ``extra`` is run where the package is, the others are read.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stllms import cli, estimate, pipeline, run
from stllms.config import MODELS, RunConfig, slug
from stllms.ledger import MARKS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {"gpu", "key", "extra", "files", "install", "long"}
FENCE = re.compile(r"^```(\w+) *([^\n]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
#: How a command begins that stands in a line of text.
COMMAND = re.compile(r"(\./|\.venv/bin/|stllms |python |pip |jupyter |conda |source |git )")
#: Commands of the docs that another test runs.
ELSEWHERE = {
    "./tests/run.sh": "the test suite is this one",
    "jupyter": "test_jupyterlab.py",
    "python -m stllms.colab": "test_colab.py",
}
#: What the reader of the docs runs first, and the later commands build on.
SMOKE = "./run_all.sh --profile smoke --results results/smoke"


def fences() -> list[tuple[str, frozenset[str], str]]:
    """(page, what it needs, command) of every command."""
    found = []
    for page in PAGES:
        for language, words, body in FENCE.findall(page.read_text(encoding="utf-8")):
            joined = re.sub(r"\\\n\s*", "", body) if language == "bash" else ""
            for line in joined.splitlines():
                command = line.split("  #")[0].strip()
                if command:
                    found.append((page.name, frozenset(words.split()), command))
    return found


def inline() -> list[tuple[str, str]]:
    """(page, code) of all code in lines of text; the ledger has its own tests."""
    found = []
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        before, _, rest = text.partition(MARKS[0])
        text = before + rest.split(MARKS[1])[-1]
        found += [(page.name, code) for code in INLINE.findall(text)]
    return found


COMMANDS = fences()


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)


# -- understood ------------------------------------------------------------------------------


def test_there_are_commands_and_their_needs_have_a_name():
    assert len(COMMANDS) >= 20
    for page, needs, command in COMMANDS:
        assert needs <= NEEDS, f"{page}: {command}: {sorted(needs - NEEDS)}"
        assert ("install" in needs) == (words_of(command)[0] in ("pip", "conda")), command


@pytest.mark.parametrize(("page", "needs", "command"), COMMANDS)
def test_the_words_of_a_command_are_understood(page, needs, command, monkeypatch):
    first, *rest = words_of(command)
    if first == "./run_all.sh":
        understood_by_the_runner(rest)
    elif first == "stllms" and rest[0] == "run":
        understood_by_the_runner(rest[1:])
    elif first == "stllms":
        cli.parser().parse_args(rest)
    elif first == "python":
        assert rest[0] == "-m", command
        understood_by_the_module(rest[1], rest[2:], monkeypatch)
    elif first == "pip":
        assert rest[0] == "install", command
    elif first == "source":
        assert rest == [".venv/bin/activate"]
    elif first == "jupyter":
        assert rest[0] == "lab", command
        assert (ROOT / rest[1]).exists(), command
    else:
        assert (ROOT / first).is_file(), f"{page}: no such command: {command}"


def understood_by_the_runner(rest: list[str]) -> None:
    if rest in (["--environment-only"], ["--help"]):  # the former is the script's own
        return
    given, unknown = run.parser().parse_known_args(rest)
    assert not unknown
    for name in given.model or []:
        assert name in MODELS or "/" in name or name.startswith("api:"), name
    if not (given.tasks or "").startswith("gym:"):  # the package tells which there are
        run.configurations(given)


class UnderstoodError(Exception):
    """The arguments were parsed; nothing more is to be done."""


def understood_by_the_module(name: str, rest: list[str], monkeypatch) -> None:
    """Its own parser takes the arguments; a module without one takes none."""
    module = importlib.import_module(name)
    if not hasattr(module, "argparse"):
        assert not rest, f"{name} takes no arguments"
        return
    parse = argparse.ArgumentParser.parse_args

    def only_parse(parser, given=None, namespace=None):
        parse(parser, given, namespace)
        raise UnderstoodError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    monkeypatch.setattr(sys, "argv", [name, *rest])
    with pytest.raises(UnderstoodError):
        module.main()


def test_options_of_a_module_are_looked_at(monkeypatch):
    for wrong in (["results/tiny-thinker", "--outt", "x"], ["results/tiny-thinker"]):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            understood_by_the_module("stllms.export", wrong, patch)


def test_a_command_in_a_line_of_text_is_one_of_the_fences():
    commands = [command for _, _, command in COMMANDS]
    for page, code in inline():
        if COMMAND.match(code) and " " in code:
            assert any(command.startswith(code) for command in commands), f"{page}: {code}"


def test_an_option_in_a_line_of_text_is_one_of_the_runner():
    flags = {flag for action in run.parser()._actions for flag in action.option_strings}
    named = [(page, code) for page, code in inline() if code.startswith("--")]
    assert len(named) > 10
    for page, code in named:
        flag, *value = words_of(code)
        assert flag in flags, f"{page}: {code}"
        if flag == "--option" and "NAME" not in value[0]:
            assert value[0].partition("=")[0] in RunConfig().to_dict(), f"{page}: {code}"


def test_what_needs_the_environment_comes_after_it_was_made_active():
    commands = [command for page, _, command in COMMANDS if page == "README.md"]
    active = commands.index("source .venv/bin/activate")
    needing = [place for place, c in enumerate(commands) if not c.startswith("./")]
    assert min(needing) == active


# -- paths ----------------------------------------------------------------------------------

LINK = re.compile(r"\]\(([^)#\s]+)\)")
TREE = re.compile(r"^```\n(notebooks/.*?)^```", re.DOTALL | re.MULTILINE)
#: What the runner leaves in the folder of a run, beside the artefacts of its stages.
LEFT = {"", "judge", "api", "figures", "notebooks", "report.html", "run.json"}


def paths() -> list[tuple[str, str]]:
    """(page, path from the root) of every path in links, in code and in commands."""
    top = {item.name for item in ROOT.iterdir()} | {"results"}
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        links = [link for link in LINK.findall(text) if "://" not in link]
        found += [(page.name, os.path.relpath(page.parent / link, ROOT)) for link in links]
    codes = [*inline(), *((page, command) for page, _, command in COMMANDS)]
    for page, code in codes:
        for word in re.split(r"[\s=,:]+", code):
            if "/" in word and word.removeprefix("./").split("/")[0] in top:
                found.append((page, word.removeprefix("./")))
    return found


def roots() -> list[str]:
    """The results folders that commands of the docs make, ``results`` itself last."""
    given = re.findall(r"--results (results/\S+)", "\n".join(c for _, _, c in COMMANDS))
    return [*given, "results"]


def is_made(path: str) -> bool:
    """Whether a path is what a run of the docs leaves: results folder, run folder, artefact."""
    if path.rstrip("/") in roots():
        return True
    below = [path.removeprefix(f"{root}/") for root in roots() if path.startswith(f"{root}/")]
    return any(map(_is_of_a_run, below))


def _is_of_a_run(path: str) -> bool:
    run_folder, _, rest = path.partition("/")
    if run_folder in ("comparison", "published"):
        run_folder, _, rest = rest.partition("/")
        run_folder = run_folder or "<model>"
    artefacts = {name for names in pipeline.ARTEFACTS.values() for name in names}
    named = run_folder == "<model>" or run_folder in {slug(name) for name in MODELS}
    return named and rest.strip("/") in LEFT | artefacts


def test_every_path_in_the_docs_is_there_or_is_made_by_a_command():
    named = paths()
    assert len(named) > 40
    for page, path in named:
        there = (ROOT / path).exists() and not path.startswith("results/")
        committed = path.startswith("results/reference") and (ROOT / path).exists()
        made = path.startswith("results") and is_made(path)
        assert there or committed or made, f"{page}: {path}"


def test_a_folder_that_no_run_makes_is_no_path_of_the_docs():
    for path in ("results/a", "results/smoke/nobody/judge", "results/smollm2/nothing.txt"):
        assert not is_made(path)
    for path in (
        "results/smoke",
        "results/smoke/tiny-thinker",
        "results/<model>/judge",
        "results/comparison/<model>/api",
        "results/smollm2/steered.jsonl",
    ):
        assert is_made(path)


def test_replies_are_replayed_from_the_folder_that_the_run_of_the_model_leaves():
    asked = [words_of(c) for _, _, c in COMMANDS if "replay:" in c]
    assert asked
    for words in asked:
        folder = Path(words[words.index("--judge") + 1].removeprefix("replay:"))
        config = RunConfig(model=words[words.index("--model") + 1])
        assert (folder.parent.name, folder.name) == (config.folder.name, "judge")


def test_the_tree_names_files_that_are_there():
    (tree,) = TREE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    names = re.findall(r"[\w/]+(?:\.(?:py|sh|html)|/)(?=[\s;,])", tree)
    assert len(names) > 50
    places = ("", "stllms", "tests", "notebooks")
    for name in names:
        assert any((ROOT / place / name).exists() for place in places), name


# -- the figures -----------------------------------------------------------------------------


def test_the_table_of_figures_names_what_the_notebooks_save():
    rows = re.findall(
        r"^\| (`[^|]+) \| (0\d) \|",
        (ROOT / "docs" / "reading_the_figures.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    told = {(book, name) for names, book in rows for name in re.findall(r"`(\w+)`", names)}
    saved = set()
    for path in (ROOT / "notebooks").glob("0*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            found = re.findall(r"save_figure\(\s*\"(\w+)\"", "".join(cell["source"]))
            saved |= {(path.name[:2], name) for name in found}
    assert told == saved


# -- run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A folder like a clone with its environment, and a chain of the reader's own in a file."""
    folder = tmp_path_factory.mktemp("clone")
    for item in ROOT.iterdir():
        if item.name not in (".venv", "results"):
            (folder / item.name).symlink_to(item)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "my_chain.txt").write_text(
        "Let me think about the coins. Ben has 4 and gets 3 more, so he has 7. "
        "Wait, I should check that again: 4 and 3 is 7."
    )
    return folder


@pytest.fixture(scope="module")
def small(clone) -> Path:
    """The clone of a reader who has made the small run."""
    called(SMOKE, clone)
    return clone


def called(command: str, clone: Path) -> None:
    environment = os.environ | {
        "STLLMS_RESULTS": str(clone / "results"),
        "PATH": f"{clone / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": str(clone / ".venv"),
    }
    ask = {"cwd": clone, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(["bash", "-c", command], **ask)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("needs", "command"), [(n, c) for _, n, c in COMMANDS if n <= {"extra"}]
)
def test_a_command_runs(needs, command, clone, request):
    """In a folder of its own; what builds on the small run after that."""
    for start, where in ELSEWHERE.items():
        if command.startswith(start):
            pytest.skip(f"run elsewhere: {where}")
    if "extra" in needs:
        pytest.importorskip("gguf")
    if "results/smoke" in command:
        request.getfixturevalue("small")
    called(command, clone)


def test_the_small_run_is_in_the_docs():
    assert SMOKE in [command for _, _, command in COMMANDS]


def test_the_chains_that_a_judge_is_paid_for_are_counted_as_the_page_says(tmp_path):
    def said(setup):
        made = estimate.works([(stage, setup) for stage in ("02_train_vectors", "04_steer")])
        (total,) = estimate._sum(call for work in made for call in work.calls)
        return total.calls, f"{total.cost:.2f} dollars"

    page = (ROOT / "docs" / "gpu_and_costs.md").read_text(encoding="utf-8")
    for name, layers in (
        ("DeepSeek-R1-Distill-Qwen-1.5B", 3),
        ("DeepSeek-R1-Distill-Llama-8B", 1),
    ):
        setup = RunConfig(
            model=f"deepseek-ai/{name}",
            profile="paper",
            judge="openai:gpt-4.1",
            results=str(tmp_path),
        )
        # 500 to build from, 50 plain and with four behaviours up and down, ten controls up and
        # down at every layer on ten tasks, or on all fifty.
        before = 500 + 50 * (1 + 8) + 50 * 20 * layers
        after = 500 + 50 * (1 + 8) + 10 * 20 * layers
        everywhere, here = said(replace(setup, n_control=50)), said(setup)
        indexed = said(replace(setup, judge="openai:gpt-4.1#indexed"))
        assert (everywhere[0], here[0], indexed[0]) == (before, after, after)
        row = next(
            line for line in page.splitlines() if line.startswith(f"| {name[9:]} | {before}")
        )
        cells = [f"{before} chains, {everywhere[1]}", f"{after} chains, {here[1]}", indexed[1]]
        assert [cell.strip() for cell in row.split("|")[2:-1]] == cells
