"""Every command in README and docs: its words are understood, and (long) it runs.

A fence ``bash`` holds commands that run anywhere. More words say what they need: ``gpu``,
``key``, ``extra`` (an optional package), ``files`` (that are not here), ``install`` (a package
index), ``long`` (many minutes). ``extra`` is run where the package is, the others are read.
"""

from __future__ import annotations

import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import click
import pytest

from stllms.app import cli, preflight
from stllms.comparison import ledger
from stllms.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {"gpu", "key", "extra", "files", "install", "long"}
FENCE = re.compile(r"^```(\w+) *([^\n]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
#: How a command begins that stands in a line of text.
COMMAND = re.compile(r"(\./|\.venv/bin/|stllms |python |pip |jupyter |conda |source |git )")
#: Commands of the docs that another test runs.
ELSEWHERE = {
    "./tests/run.sh": "the test suite is this one",
    "jupyter": "test_jupyterlab.py",
    "python -m stllms.app.colab": "test_colab.py",
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
        before, _, rest = text.partition(ledger.MARKS[0])
        text = before + rest.split(ledger.MARKS[1])[-1]
        found += [(page.name, code) for code in INLINE.findall(text)]
    return found


COMMANDS = fences()


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def parsed(words: list[str]) -> click.Context:
    """The innermost context of ``stllms WORDS``: everything is parsed and nothing is run."""
    context = cli.cli.make_context("stllms", list(words), resilient_parsing=False)
    name, command, rest = cli.cli.resolve_command(
        context, [*context._protected_args, *context.args]
    )
    return command.make_context(name, rest, parent=context)


def test_there_are_commands_and_their_needs_have_a_name():
    assert len(COMMANDS) >= 20
    for page, needs, command in COMMANDS:
        assert needs <= NEEDS, f"{page}: {command}: {sorted(needs - NEEDS)}"
        assert ("install" in needs) == (words_of(command)[0] in ("pip", "conda")), command


@pytest.mark.parametrize(
    ("page", "command"), [(page, command) for page, _, command in COMMANDS]
)
def test_the_words_of_a_command_are_understood(page, command):
    first, *rest = words_of(command)
    if first == "./run_all.sh":
        if rest not in (["--environment-only", "smollm2"], ["--help"]):
            parsed(["run", *rest])
    elif first == "stllms":
        parsed(rest)
    elif first == "python":
        there = (
            Path(rest[0]) if rest[0] != "-m" else Path(*rest[1].split(".")).with_suffix(".py")
        )
        assert (ROOT / there).is_file(), command
    elif first in ("pip", "source", "jupyter", "conda"):
        assert rest[0] in ("install", ".venv/bin/activate", "lab", "env"), command
    else:
        assert (ROOT / first).is_file(), f"{page}: no such command: {command}"


def test_a_word_that_no_command_knows_is_found():
    for wrong in (["run", "--profil", "smoke"], ["steer"], ["verfy", "results"]):
        with pytest.raises(click.UsageError):
            parsed(wrong)


def test_a_command_in_a_line_of_text_is_one_of_the_fences():
    commands = [command for _, _, command in COMMANDS]
    for page, code in inline():
        if COMMAND.match(code) and " " in code:
            assert any(command.startswith(code) for command in commands), f"{page}: {code}"


def test_an_option_in_a_line_of_text_is_one_of_the_runner():
    flags = {flag for option in cli.cli.commands["run"].params for flag in option.opts}
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


def test_the_readme_is_short_and_its_python_runs():
    text = README.read_text(encoding="utf-8")
    assert len(text.encode()) <= 12 * 1024
    (body,) = [body for language, _, body in FENCE.findall(text) if language == "python"]
    lines = [
        line for line in body.splitlines() if line and not line.startswith(("from", "import"))
    ]
    assert len(lines) <= 9
    names: dict = {}
    exec(compile(body, str(README), "exec"), names)
    steered, baseline = names["steered"], names["baseline"]
    assert steered[0].text != baseline[0].text


LINK = re.compile(r"\]\(([^)#\s]+)")
TREE = re.compile(r"^```\n(notebooks/.*?)^```", re.DOTALL | re.MULTILINE)
DOTTED = re.compile(r"(?<![\w./-])stllms(?:\.\w+)+")
PATH = re.compile(
    r"(?<![\w./{}*-])(?:stllms|tests|docs|notebooks|benchmarks|training|messages|"
    r"results/reference)/\w[\w./*{-]*"
)
#: A key of a GGUF file, no name of the package.
KEYS = {"stllms.coefficient"}


def test_every_link_in_the_docs_leads_somewhere():
    links = [
        (page, link)
        for page in PAGES
        for link in LINK.findall(page.read_text(encoding="utf-8"))
        if "://" not in link
    ]
    assert len(links) > 20
    assert [
        (page.name, link) for page, link in links if not (page.parent / link).exists()
    ] == []


def named() -> dict[str, str]:
    """File -> where names count in it: code, docstrings and prose, of a notebook its cells."""
    folders = ("stllms", "tests", "docs", "notebooks", "benchmarks", "training", "messages")
    every = [README, *(path for folder in folders for path in (ROOT / folder).rglob("*.*"))]
    files = [path for path in every if path.suffix in (".py", ".md", ".ipynb")]
    found = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files}
    for name in [name for name in found if name.endswith(".ipynb")]:
        cells = json.loads(found[name])["cells"]
        found[name] = "\n".join("".join(cell["source"]) for cell in cells)
    return found


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or what one holds: an object, or a field of one."""
    owner, _, field = name.rpartition(".")
    with suppress(ImportError, AttributeError):
        pkgutil.resolve_name(name)
        return True
    with suppress(ImportError, AttributeError):
        return field in pkgutil.resolve_name(owner).__annotations__
    return False


def unknown(text: str) -> set[str]:
    """The names of the package and the paths of the repository in a text that lead nowhere."""
    names = {name for name in DOTTED.findall(text) if not resolves(name)} - KEYS
    paths = {path.rstrip(".") for path in PATH.findall(text) if "{" not in path}
    return names | {path for path in paths if not any(ROOT.glob(path))}


def test_every_name_and_path_that_is_mentioned_is_there():
    texts = named()
    assert len(texts) > 100
    every = "\n".join(texts.values())
    assert min(len(set(pattern.findall(every))) for pattern in (DOTTED, PATH)) > 40
    lost = {file: unknown(text) for file, text in texts.items()}
    assert {file: names for file, names in lost.items() if names} == {}


def test_a_name_and_a_path_that_are_made_up_are_found():
    gone = "nowhere"
    lost = {f"stllms.{gone}.x", f"stllms.app.demo.{gone}", f"tests/{gone}.py", f"docs/{gone}"}
    there = {"stllms.app.bench.Bench.layers", "stllms.vectors", "docs/method.md", "tests/*.py"}
    assert unknown(" ".join(lost | there)) == lost


def test_the_tree_names_files_that_are_there():
    (tree,) = TREE.findall(README.read_text(encoding="utf-8"))
    names = re.findall(r"[\w/]+(?:\.(?:py|sh|html)|/)(?=[\s;,])", tree)
    assert len(names) > 20
    for name in names:
        assert any((ROOT / place / name).exists() for place in ("", "stllms")), name


def test_the_table_of_figures_names_what_the_notebooks_save():
    page = (ROOT / "docs" / "reading_the_figures.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]+) \| (0\d) \|", page, re.MULTILINE)
    told = {(book, name) for names, book in rows for name in re.findall(r"`(\w+)`", names)}
    saved = set()
    for path in (ROOT / "notebooks").glob("0*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            found = re.findall(r"save_figure\(\s*\"(\w+)\"", "".join(cell["source"]))
            saved |= {(path.name[:2], name) for name in found}
    assert told == saved


def test_docstrings_cite_sections_that_the_method_page_has():
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    there = set(re.findall(r"^## (\d+)", page, re.MULTILINE))
    cited = set()
    for path in (ROOT / "stllms").rglob("*.py"):
        cited |= set(re.findall(r"method, sections? (\d+)", path.read_text(encoding="utf-8")))
    assert len(cited) > 5
    assert cited <= there


def test_the_chains_that_a_judge_is_paid_for_are_counted_as_the_page_says(tmp_path):
    def said(setup):
        made = preflight.works([(stage, setup) for stage in ("02_train_vectors", "04_steer")])
        calls = [call for work in made for call in work.calls]
        return sum(c.calls for c in calls), f"{sum(c.cost for c in calls):.2f} dollars"

    page = (ROOT / "docs" / "gpu_and_costs.md").read_text(encoding="utf-8")
    for name, layers in (("R1-Distill-Qwen-1.5B", 3), ("R1-Distill-Llama-8B", 1)):
        setup = RunConfig(
            model=f"deepseek-ai/DeepSeek-{name}",
            profile="paper",
            judge="openai:gpt-4.1",
            results=str(tmp_path),
        )
        # 500 to build from, a twentieth of them twice; 50 unsteered and with four behaviours up
        # and down; ten controls up and down at every layer on ten tasks, or on all fifty.
        before = 525 + 50 * (1 + 8) + 50 * 20 * layers
        after = 525 + 50 * (1 + 8) + 10 * 20 * layers
        everywhere, here = said(replace(setup, n_control=50)), said(setup)
        indexed = said(replace(setup, judge="openai:gpt-4.1#indexed"))
        assert (everywhere[0], here[0], indexed[0]) == (before, after, after)
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {name} | {before}")]
        cells = [f"{before} chains, {everywhere[1]}", f"{after} chains, {here[1]}", indexed[1]]
        assert [cell.strip() for cell in row.split("|")[2:-1]] == cells


# -- run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A folder like a clone with its environment, and a chain of the reader's own in a file."""
    folder = tmp_path_factory.mktemp("clone")
    for item in ROOT.iterdir():
        if item.name not in (".venv", "results"):
            (folder / item.name).symlink_to(item)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "results").mkdir()
    (folder / "results" / "reference").symlink_to(ROOT / "results" / "reference")
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


@pytest.mark.long
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
