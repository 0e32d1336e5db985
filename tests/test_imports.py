"""Imports flow down (DESIGN, "The house"): read with ``ast``, nothing is imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "stllms"

#: The floors, from the ground up. A room imports from the floors below it; rooms of the ground
#: floor may import each other.
FLOORS = (
    {"hashes", "labels", "records", "registry", "config", "stats", "terminal"},
    {"runs", "plotting"},
    {"models", "fixtures"},
    {"tasks"},
    {"generation"},
    {"annotation"},
    {"vectors"},
    {"attribution", "steering"},
    {"comparison"},
    {"app"},
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
#: Imports that go up, each inside the one function that needs it.
ALLOWED = {("runs", "generation")}  # verify computes the sampling audit again
#: Rooms that are imported without any heavy package.
LIGHT = ("stllms", *(f"stllms.{name}" for name in sorted(FLOORS[0] - {"stats"})), "stllms.runs")
HEAVY = ("torch", "transformers", "numpy", "pandas", "matplotlib", "scipy", "IPython", "tqdm")


def imported(source: str, package: tuple[str, ...]) -> set[str]:
    """The rooms that a module imports, wherever in it; ``package`` is the module's own."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        parts = [name.split(".") for name in names]
        found |= {part[1] for part in parts if part[0] == "stllms" and len(part) > 1}
    return found & set(LEVEL)


def wrong(room: str, rooms: set[str]) -> set[str]:
    """What a room imports that it must not."""
    others = rooms - {room} - {to for own, to in ALLOWED if own == room}
    return {one for one in others if LEVEL[one] > LEVEL[room] or LEVEL[one] == LEVEL[room] > 0}


MODULES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.relative_to(PACKAGE).with_suffix("").parts[0] in LEVEL
]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_flow_down(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    source = path.read_text(encoding="utf-8").split("# --- old addresses")[0]
    assert not wrong(parts[0], imported(source, ("stllms", *parts[:-1])))


@pytest.mark.parametrize(
    ("room", "source", "found"),
    [
        ("steering", "from stllms import attribution, vectors", {"attribution"}),
        ("annotation", "from ..steering import x", {"steering"}),
        ("vectors", "def f():\n    import stllms.steering.dose", {"steering"}),
        ("records", "from stllms.runs import files", {"runs"}),
        ("runs", "from stllms import __version__, registry\nimport torch", set()),
        ("runs", "from stllms.generation import sampling", set()),
        ("app", "from . import cli\nfrom stllms.comparison import groups", set()),
    ],
)
def test_a_wrong_import_is_found(room, source, found):
    assert wrong(room, imported(source, ("stllms", room))) == found


def test_light_rooms_bring_nothing_heavy():
    code = f"import sys, {', '.join(LIGHT)}\nprint([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
