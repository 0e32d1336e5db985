"""Imports flow down (DESIGN.md, "The house"): read with ``ast``, nothing is imported."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "stllms"

#: The floors, from the ground up. A module may import from floors below its own, and from
#: its own floor too, except on the floor of the stages: stages do not import stages.
FLOORS: tuple[tuple[str, frozenset[str]], ...] = (
    ("records", frozenset({"checks", "foreign", "provenance", "records", "terminal"})),
    ("config", frozenset({"config", "gym", "registry"})),
    (
        "pure and file modules",
        frozenset(
            {
                "agreement",
                "claims",
                "artifacts",
                "coloured",
                "comparison",
                "controls",
                "detokenize",
                "effects",
                "evaluation",
                "export",
                "files",
                "findings",
                "means",
                "metrics",
                "organism",
                "doses",
                "panels",
                "plots",
                "probes",
                "progress",
                "released",
                "sampling",
                "sentences",
                "spans",
                "tables",
                "tasks",
                "vectors",
            }
        ),
    ),
    (
        "models",
        frozenset({"kvcache", "loading", "memory", "models", "prompts", "rows", "selfcheck"}),
    ),
    ("decode and api", frozenset({"api", "decode", "providers", "replies", "sending"})),
    (
        "stages",
        frozenset(
            {
                "activations",
                "annotate",
                "attribution",
                "generate",
                "likelihood",
                "remote",
                "steering",
            }
        ),
    ),
    (
        "programs",
        frozenset(
            {
                "__main__",
                "arguments",
                "bench",
                "cli",
                "colab",
                "compare",
                "demo",
                "estimate",
                "execute",
                "inputs",
                "ledger",
                "options",
                "organism.card",
                "organism.directions",
                "organism.train",
                "pairs",
                "page",
                "pipeline",
                "published",
                "published_tables",
                "questions",
                "released_effects",
                "refusals",
                "report",
                "run",
                "waiting",
                "widgets",
            }
        ),
    ),
)

LEVEL = {name: level for level, (_, names) in enumerate(FLOORS) for name in names}
STAGES = next(names for title, names in FLOORS if title == "stages")


def room_of(module: str) -> str | None:
    """The room of a module: itself if it has a floor, else the package that has one.

    ``annotate.markup`` is in ``annotate``; ``organism.train`` is a program of its own.
    """
    while module:
        if module in LEVEL:
            return module
        module = module.rpartition(".")[0]
    return None


def imported_rooms(source: str, package: tuple[str, ...]) -> set[str]:
    """The rooms that a module imports, wherever in it; ``package`` is the module's own.

    ``stllms`` itself (the version) is no room; a module without a floor stands for itself.
    """
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, _, rest = name.partition(".")
            if root == "stllms" and rest and not rest.startswith("__"):
                rooms.add(room_of(rest) or rest.split(".")[0])
    return rooms


def violations(room: str, rooms: set[str]) -> list[str]:
    """What a room imports that it must not, in words."""
    found = []
    for other in sorted(rooms - {room}):
        if other not in LEVEL:
            found.append(f"{room} imports {other}, which has no floor")
        elif LEVEL[other] > LEVEL[room]:
            found.append(f"{room} imports {other}, which is a floor above")
        elif {room, other} <= STAGES:
            found.append(f"the stage {room} imports the stage {other}")
    return found


def module_of(path: Path) -> str:
    """``annotate.markup``; a package's ``__init__`` is the package."""
    name = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
    return name.removesuffix(".__init__")


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_flow_down(path):
    room = room_of(module_of(path))
    assert room, f"{module_of(path)} has no floor yet: give it one in {Path(__file__).name}"
    package = ("stllms", *path.relative_to(PACKAGE).parts[:-1])
    rooms = imported_rooms(path.read_text(encoding="utf-8"), package)
    assert not violations(room, rooms)


def test_every_room_is_on_one_floor():
    names = [name for _, floor in FLOORS for name in floor]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("room", "source", "package", "words"),
    [
        ("steering", "from stllms import generate", ("stllms",), "the stage steering"),
        ("steering", "import stllms.generate as g", ("stllms",), "the stage steering"),
        ("annotate", "from ..steering import x", ("stllms", "annotate"), "the stage annotate"),
        (
            "vectors",
            "def f():\n    import stllms.models",
            ("stllms",),
            "a floor above",
        ),
        ("records", "from . import config", ("stllms",), "a floor above"),
        ("organism", "from stllms.organism import train", ("stllms",), "a floor above"),
        ("run", "from stllms import cellar", ("stllms",), "no floor"),
    ],
)
def test_a_wrong_import_is_found(room, source, package, words):
    found = violations(room, imported_rooms(source, package))
    assert len(found) == 1
    assert words in found[0]


def test_right_imports_pass():
    source = (
        "from stllms import __version__, artifacts\nfrom stllms.decode import decode\n"
        "import torch\nfrom stllms.organism.lexicon import words\n"
    )
    rooms = imported_rooms(source, ("stllms",))
    assert rooms == {"artifacts", "decode", "organism"}
    assert not violations("generate", rooms)
