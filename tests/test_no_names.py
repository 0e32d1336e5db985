"""No behaviour of the paper is written into the package where a person's own might stand.

The places that are about the paper name them: its label set, the fixtures, the published
steering layers, what was released, the claims, the cue words of its labels and the annotator
that was trained on them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import stllms
from stllms.labels import PAPER

ROOT = Path(stllms.__file__).parent
ABOUT_THE_PAPER = {
    "labels.py",
    "registry.py",
    "annotation/offline_card.json",
    "annotation/sentences.py",
    "comparison/ledger.py",
    "comparison/paper.json",
    "comparison/released.py",
}
GONE = {"BEHAVIOURS", "STEERED", "HEATMAP", "COLOURS"}
NAME = re.compile("|".join(name.replace("-", "[-_ ]") for name in PAPER.names), re.IGNORECASE)


def files() -> list[pytest.param]:
    """The files of the package that a person's labels go through."""
    found = []
    for path in sorted(ROOT.rglob("*")):
        name = path.relative_to(ROOT).as_posix()
        ours = name.startswith("fixtures/") or name in ABOUT_THE_PAPER
        if path.suffix in {".py", ".html", ".json"} and not ours:
            found.append(pytest.param(name, id=name))
    return found


def documents(tree: ast.AST) -> set[int]:
    """The nodes that are docstrings: they may give an example."""
    bodies = [node.body for node in ast.walk(tree) if hasattr(node, "body")]
    first = [body[0] for body in bodies if isinstance(body, list) and body]
    return {id(node.value) for node in first if isinstance(node, ast.Expr)}


def written(text: str) -> Iterator[str]:
    """Everything in a module but its comments and docstrings: texts, and names of all kinds."""
    tree = ast.parse(text)
    prose = documents(tree)
    for node in ast.walk(tree):
        if id(node) in prose:
            continue
        for _, value in ast.iter_fields(node):
            if isinstance(value, str):
                yield value


def named(text: str) -> set[str]:
    return {match[0] for part in written(text) for match in NAME.finditer(part)}


@pytest.mark.parametrize("name", files())
def test_no_behaviour_of_the_paper_is_named(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    found = named(text) if name.endswith(".py") else {m[0] for m in NAME.finditer(text)}
    assert not found, f"{name} names {', '.join(sorted(found))}: take it from the label set"


@pytest.mark.parametrize("name", files())
def test_the_names_of_the_paper_are_taken_from_a_set_alone(name):
    if name.endswith(".py"):
        found = GONE & set(written((ROOT / name).read_text(encoding="utf-8")))
        assert not found, f"{name}: {', '.join(sorted(found))}: take labels: LabelSet = PAPER"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('"""deduction"""\nx = 1  # backtracking', set()),
        ('def f():\n    """backtracking"""\n    return "deduction"', {"deduction"}),
        ('f"{x} Adding knowledge {y}"', {"Adding knowledge"}),
        ("def f(backtracking=2): ...", {"backtracking"}),
        ("f(example_testing=2)", {"example_testing"}),
        ("b'deduction', 3, None", set()),
    ],
)
def test_a_name_is_found_in_code_and_not_in_prose(text, found):
    assert named(text) == found


def test_the_places_that_are_about_the_paper_are_there_and_name_it():
    for name in ABOUT_THE_PAPER - {"comparison/released.py", "comparison/ledger.py"}:
        assert NAME.search((ROOT / name).read_text(encoding="utf-8")), name
    assert all((ROOT / name).is_file() for name in ABOUT_THE_PAPER)
