"""``docs/extend.md``: its blocks run in their order, and its package plugs in."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from stllms import registry

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extend.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
KINDS = ("annotator", "estimator", "operator", "metric", "model")


def blocks(language: str) -> list[str]:
    return [body for name, body in FENCE.findall(PAGE.read_text("utf-8")) if name == language]


@pytest.fixture
def forgotten():
    """What the page registers is gone behind the test."""
    before = {kind: dict(getattr(registry, kind)) for kind in KINDS}
    yield
    for kind, known in before.items():
        getattr(registry, kind)._known = known


@pytest.mark.slow
def test_every_block_runs(forgotten):
    before = {kind: set(getattr(registry, kind)) for kind in KINDS}
    names: dict = {}
    for number, body in enumerate(blocks("python"), 1):
        exec(compile(body, f"extend.md, block {number}", "exec"), names)
    added = {kind: sorted(set(getattr(registry, kind)) - before[kind]) for kind in KINDS}
    assert {kind: len(found) for kind, found in added.items()} == dict.fromkeys(KINDS, 1)


def test_every_decorator_has_an_example():
    every = "\n".join(blocks("python"))
    for kind in KINDS:
        assert every.count(f"@registry.{kind}(") == 1


def test_its_package_plugs_in(tmp_path):
    """The module of the entry point holds the page's annotator and model."""
    (toml,) = blocks("toml")
    points = tomllib.loads(toml)["project"]["entry-points"]["stllms"]
    ((name, module),) = points.items()
    package, _, inner = module.partition(".")
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    parts = [body for body in blocks("python") if "@registry.annotator" in body]
    parts += [body for body in blocks("python") if "@registry.model" in body]
    head = "import re\nimport transformers\nfrom stllms import registry\n"
    defined = [body.split("\n\n\n")[0] for body in parts]
    (tmp_path / package / f"{inner}.py").write_text(head + "\n\n\n".join(defined) + "\n")
    info = tmp_path / f"{package}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {package}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[stllms]\n{name} = {module}\n")
    code = (
        "from stllms import registry\n"
        "from stllms.config import RunConfig\n"
        "config = RunConfig(model='shallow-thinker', judge='hedges')\n"
        "print(config.entry.source, config.annotator, *registry.model)\n"
    )
    root = str(PAGE.parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{tmp_path}:{root}", "PATH": ""},
    )
    assert done.stdout.split() == ["registered", "hedges", "shallow-thinker"], done.stderr
