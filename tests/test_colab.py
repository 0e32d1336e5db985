"""The Colab copies: equal to what the command makes, and run in an environment of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from stllms.app import colab

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
COPIES = ROOT / "notebooks" / "colab"

PUBLISHED = "https://example.org/them/theirs"

each = pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


# -- the copies that are committed -------------------------------------------------------


def test_the_copies_are_what_the_command_makes(tmp_path):
    """Of this project, which has no address yet."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    made = colab.write(tmp_path / "notebooks", tmp_path / "copies", colab.address(ROOT))
    assert [path.name for path in made] == [path.name for path in NOTEBOOKS]
    assert {path.name for path in COPIES.glob("*")} == {path.name for path in made}
    for path in made:
        committed = COPIES / path.name
        assert committed.read_bytes() == path.read_bytes(), "run: python -m stllms.app.colab"
        source = (ROOT / "notebooks" / path.name).read_bytes()
        assert source == (tmp_path / "notebooks" / path.name).read_bytes(), "its badge"


# -- what the command does ---------------------------------------------------------------


def write_book(path: Path, *texts: str) -> None:
    metadata = {"collapsed": True, "tags": ["a"]}
    made = [v4.new_markdown_cell(text, metadata=metadata) for text in texts]
    made.append(v4.new_code_cell("1", outputs=[v4.new_output("stream", text="1")]))
    nbformat.write(v4.new_notebook(cells=made, metadata={"widgets": {}}), path)


def test_a_copy_whose_notebook_is_gone_is_deleted(tmp_path):
    copies = tmp_path / "copies"
    with pytest.raises(ValueError, match=r"no notebooks in .*01_generate\.ipynb"):
        colab.write(tmp_path, copies)
    for name in ("01_one", "02_two", "scratch"):
        write_book(tmp_path / f"{name}.ipynb", "# One")
    colab.write(tmp_path, copies)
    assert sorted(path.name for path in copies.glob("*")) == ["01_one.ipynb", "02_two.ipynb"]
    (tmp_path / "02_two.ipynb").unlink()
    colab.write(tmp_path, copies)
    assert [path.name for path in copies.glob("*")] == ["01_one.ipynb"]


def test_a_badge_is_below_the_title_where_an_address_is_configured_and_nowhere_else(tmp_path):
    path = tmp_path / "01_x.ipynb"
    write_book(path, "# 01\n\n**Question.** Why?", "Text.")
    before = path.read_bytes()
    (copy,) = colab.write(tmp_path, tmp_path / "copies", PUBLISHED)
    title, empty, badge, *rest = source(cells(path)[0]).splitlines()
    assert (title, empty, rest) == ("# 01", "", ["", "**Question.** Why?"])
    address = (
        "colab.research.google.com/github/them/theirs/blob/main/notebooks/colab/01_x.ipynb"
    )
    assert badge.startswith("[![Open in Colab](")
    assert badge.endswith(f"](https://{address})")
    assert source(cells(copy)[1]) == "# 01\n\n**Question.** Why?", "no gap in the copy"
    assert cells(copy)[1]["metadata"] == {"tags": ["a"]}
    assert cells(copy)[-1]["outputs"] == []
    assert '"git+https://example.org/them/theirs@main"' in source(cells(copy)[0])
    assert "widgets" not in json.loads(copy.read_text())["metadata"]
    colab.write(tmp_path, tmp_path / "copies", PUBLISHED.replace("theirs", "ours"))
    assert source(cells(path)[0]).count("Open in Colab") == 1
    assert "/them/ours/blob/" in source(cells(path)[0])
    (copy,) = colab.write(tmp_path, tmp_path / "copies")
    assert path.read_bytes() == before, "as Jupyter writes it, and without a badge"
    assert "git+" not in source(cells(copy)[0])
    assert 'glob.glob("stllms-*.whl")' in source(cells(copy)[0])


def test_the_machine_names_its_gpu_or_says_how_to_get_one(monkeypatch):
    import torch

    class Properties:
        name, total_memory = "Some GPU", 16 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert colab.machine() == "GPU: Some GPU, 16 GiB"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "Runtime > Change runtime type" in colab.machine()


# -- every copy in one fresh environment, from a wheel of this checkout ---------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of what is in this checkout; built from a copy, so that nothing old gets in."""
    place = tmp_path_factory.mktemp("wheel")
    for name in ("stllms", "messages", "notebooks"):
        ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(ROOT / name, place / "source" / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / "source" / name)
    _pip(sys.executable, "wheel", "--no-deps", "-w", str(place), str(place / "source"))
    (made,) = place.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def colab_like(tmp_path_factory) -> Path:
    """The python of a fresh environment that has what Colab has: torch and a kernel."""
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    torch, kernel = (f"{name}=={metadata.version(name)}" for name in ("torch", "ipykernel"))
    _pip(str(python), "install", torch, kernel)
    return python


def _pip(python: str, *arguments: str) -> None:
    command = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def kernel(tmp_path, colab_like, wheel, monkeypatch) -> None:
    """``python3`` is the kernel of the fresh environment, and pip knows the wheel.

    The pins of ``constraints.txt`` keep the test the same tomorrow.
    """
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    argv = [str(colab_like), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": argv, "display_name": "x", "language": "python"}))
    for name in [name for name in os.environ if name.startswith("STLLMS_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("STLLMS_WHEEL", str(wheel))
    monkeypatch.setenv("PIP_CONSTRAINT", str(ROOT / "constraints.txt"))


def ask(python: Path, code: str) -> str:
    """What a line of code prints in an environment, away from the checkout."""
    command = [str(python), "-I", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    return done.stdout.strip()


@pytest.mark.long
def test_the_wheel_holds_what_is_not_code(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"stllms/_notebooks/{path.name}" for path in NOTEBOOKS} <= names
    assert {f"stllms/_messages/{p.name}" for p in (ROOT / "messages").glob("*.jsonl")} <= names
    package = ROOT / "stllms"
    data = [
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    assert set(data) <= names, "package-data of pyproject.toml"
    assert "stllms/app/report.html" in data


@pytest.mark.long
@each
def test_a_copy_runs_in_a_fresh_environment_and_an_empty_folder(
    name, tmp_path, kernel, colab_like
):
    import papermill

    empty, executed = tmp_path / "empty", tmp_path / f"{name}.ipynb"
    empty.mkdir()
    torch = "from importlib.metadata import version; print(version('torch'))"
    before = ask(colab_like, torch)
    copy = str(COPIES / f"{name}.ipynb")
    known = papermill.inspect_notebook(copy)
    chosen = {"profile": "smoke"} if "profile" in known else {}
    papermill.execute_notebook(
        copy, str(executed), chosen, kernel_name="python3", cwd=str(empty), progress_bar=False
    )
    assert ask(colab_like, torch) == before
    assert "site-packages" in ask(colab_like, "import stllms; print(stllms.__file__)")
    install = json.dumps(cells(executed)[0]["outputs"])
    assert "GPU: " in install or "no GPU: Runtime > Change runtime type" in install
    errors = [
        output
        for cell in cells(executed)
        for output in cell.get("outputs", [])
        if output["output_type"] == "error"
    ]
    assert not errors
    if name == "00_demo":  # it works on the vectors of the package, and leaves no run behind
        shown = json.dumps([cell.get("outputs") for cell in cells(executed)])
        assert "text/html" in shown
        assert "backtracking" in shown
    else:
        assert sorted((empty / "results").glob("*/figures/*.png")), "made in the empty folder"
