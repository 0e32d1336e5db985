"""The rules for notebooks, checked on the files; nbval runs them."""

from __future__ import annotations

import ast
import json
import re
import statistics
from pathlib import Path

import pytest

from stllms.app.stages import STAGES
from stllms.config import PARAMETERS, RunConfig

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_stage = pytest.mark.parametrize(
    "path", [FOLDER / f"{stage}.ipynb" for stage in STAGES], ids=lambda path: path.stem
)


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code(path: Path) -> list[str]:
    return [source(cell) for cell in cells(path) if cell["cell_type"] == "code"]


def by_hand(cell: dict) -> bool:
    """Of the section that does without the package what the package does."""
    return "by-hand" in cell["metadata"].get("tags", ())


def own(cell: dict) -> bool:
    """Of the reader's own code: the function that labels, in 06."""
    return "own" in cell["metadata"].get("tags", ())


def parameters(path: Path) -> list[str]:
    return [
        source(cell) for cell in cells(path) if "parameters" in cell["metadata"].get("tags", ())
    ]


@each_stage
def test_the_parameters_are_the_agreed_literals(path):
    (found,) = parameters(path)
    values = {}
    for statement in ast.parse(found).body:
        assert isinstance(statement, ast.Assign), "only assignments of literals"
        values[statement.targets[0].id] = ast.literal_eval(statement.value)
    assert tuple(values) == PARAMETERS
    assert RunConfig.from_parameters(**values) == RunConfig(), "the embedded run by default"


@each
def test_parameters_are_at_most_eight_literals(path):
    for cell in parameters(path):
        statements = ast.parse(cell).body
        assert len(statements) <= 8
        for statement in statements:
            ast.literal_eval(statement.value)


@each_stage
def test_it_ensures_first_and_finishes_last(path):
    assert f'stages.ensure("{path.stem}", config)' in "\n".join(code(path))
    assert f'stages.finish("{path.stem}", config)' in code(path)[-1]


@each
def test_it_opens_with_a_title_in_prose(path):
    first = cells(path)[0]
    assert first["cell_type"] == "markdown"
    assert source(first).startswith("# ")


@each
def test_sizes(path):
    story = [cell for cell in cells(path) if not by_hand(cell)]
    assert len(story) <= 36, "at most about 30 cells, and a section by hand"
    assert max(len(text.splitlines()) for text in code(path)) <= 15
    lines = [len(source(one).splitlines()) for one in story if one["cell_type"] == "code"]
    assert statistics.median(lines) <= 7, "median about 6 lines"
    longest = max((line for text in code(path) for line in text.splitlines()), key=len)
    assert len(longest) <= 88, longest
    assert path.stat().st_size <= 300 * 1024


@each
def test_as_much_prose_as_code(path):
    texts = [source(cell) for cell in cells(path) if cell["cell_type"] == "markdown"]
    agreed = sum(map(len, parameters(path)))
    prose, program = sum(map(len, texts)), sum(map(len, code(path))) - agreed
    assert prose >= 0.8 * program, f"{prose} characters of prose, {program} of code"


@each
def test_the_work_is_in_the_package(path):
    forbidden = (
        ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
        | ast.For | ast.While | ast.If | ast.Try
    )  # fmt: skip
    story = [one for one in cells(path) if one["cell_type"] == "code" and not by_hand(one)]
    for text in [source(one) for one in story if not own(one)]:
        for node in ast.walk(ast.parse(text)):
            assert not isinstance(node, forbidden), f"a definition or a branch: {text}"
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("open", "plt.show"), text
                assert not name.endswith(".to"), text
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert all(alias.name != "re" for alias in node.names), text
        assert "sys.path" not in text


def test_only_the_notebook_of_ones_own_behaviour_has_code_of_ones_own():
    found = {path.stem: sum(map(own, cells(path))) for path in NOTEBOOKS}
    assert {name: n for name, n in found.items() if n} == {"06_your_own_behaviour": 1}


@each_stage
def test_a_section_by_hand_asserts_that_it_equals_the_package(path):
    if path.stem == STAGES[-1]:
        pytest.skip("a comparison has no mechanism of its own")
    found = [source(one) for one in cells(path) if by_hand(one) and one["cell_type"] == "code"]
    assert "nnsight" in "".join(found)
    assert re.search(r"^ *(assert |torch\.testing\.assert_close)", "\n".join(found), re.M)


@each
def test_outputs_are_committed_and_sound(path):
    found = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in found]
    assert counts == list(range(1, len(counts) + 1)), "run from top to bottom, then saved"
    outputs = [output for cell in found for output in cell["outputs"]]
    assert outputs, "the outputs of the embedded model's run are committed"
    assert not [one for one in outputs if one["output_type"] == "error"]
    assert "<script" not in json.dumps(outputs).lower()


@each
def test_no_path_of_a_machine_and_no_bare_nan(path):
    text = path.read_text(encoding="utf-8")
    found = re.search(r"(?<![\w.])/(home|Users|root|work|tmp|mnt|content)/[\w.-]+", text)
    assert found is None, found
    outputs = json.dumps([cell.get("outputs", []) for cell in cells(path)])
    plain_text = re.sub(r'"image/png": "[^"]*"', "", outputs)
    assert not re.search(r"(?<!\w)(nan|NaN)(?!\w)", plain_text), "missing is drawn, never NaN"


def test_the_rules_find_what_they_forbid(tmp_path):
    """Each rule fails on a notebook that breaks it."""
    bad = tmp_path / "bad.ipynb"
    cell = {
        "cell_type": "code",
        "execution_count": 3,
        "metadata": {"tags": ["parameters"]},
        "outputs": [{"output_type": "error", "ename": "x", "evalue": "", "traceback": []}],
        "source": "def f():\n    return 1\n" + "x = 1\n" * 20,
    }
    other = {**cell, "metadata": {}}
    bad.write_text(json.dumps({"cells": [cell, other], "metadata": {}, "nbformat": 4}))
    rules = (
        test_parameters_are_at_most_eight_literals,
        test_it_opens_with_a_title_in_prose,
        test_sizes,
        test_as_much_prose_as_code,
        test_the_work_is_in_the_package,
        test_outputs_are_committed_and_sound,
        test_it_ensures_first_and_finishes_last,
    )
    for rule in rules:
        with pytest.raises(AssertionError):
            rule(bad)
