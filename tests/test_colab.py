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
import papermill
import pytest
from nbformat import v4

from stllms.app import colab

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
COPIES = ROOT / "notebooks" / "colab"

PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")
PUBLISHED = "https://example.org/them/theirs"


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


# -- what the command makes --------------------------------------------------------------


def test_the_committed_copies_are_what_the_command_makes(tmp_path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    old = tmp_path / "notebooks" / "colab" / "99_gone.ipynb"
    old.write_text("")
    made = colab.write(tmp_path / "notebooks", colab.address(ROOT))
    assert [path.name for path in made] == [path.name for path in NOTEBOOKS]
    assert not old.exists(), "its notebook is gone"
    assert {path.name for path in COPIES.glob("*")} == {path.name for path in made}
    for path in made:
        committed = COPIES / path.name
        assert committed.read_bytes() == path.read_bytes(), "run: python -m stllms.app.colab"
        source = (ROOT / "notebooks" / path.name).read_bytes()
        assert source == (tmp_path / "notebooks" / path.name).read_bytes(), "its badge"


def test_a_badge_is_below_the_title_where_an_address_is_configured_and_nowhere_else(tmp_path):
    path = tmp_path / "01_x.ipynb"
    metadata = {"collapsed": True, "tags": ["a"]}
    texts = ("# 01\n\n**Question.** Why?", "Text.")
    made = [v4.new_markdown_cell(text, metadata=metadata) for text in texts]
    made.append(v4.new_code_cell("1", outputs=[v4.new_output("stream", text="1")]))
    nbformat.write(v4.new_notebook(cells=made, metadata={"widgets": {}}), path)
    before = path.read_bytes()
    (copy,) = colab.write(tmp_path, PUBLISHED)
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
    colab.write(tmp_path, PUBLISHED.replace("theirs", "ours"))
    assert source(cells(path)[0]).count("Open in Colab") == 1
    assert "/them/ours/blob/" in source(cells(path)[0])
    (copy,) = colab.write(tmp_path)
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


def run(*command: object, **options: object) -> str:
    """What a command prints; its errors are shown where it fails."""
    words = list(map(str, command))
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of what is in this checkout; built from a copy, so that nothing old gets in."""
    place = tmp_path_factory.mktemp("wheel")
    for name in ("stllms", "messages", "notebooks"):
        ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(ROOT / name, place / "source" / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / "source" / name)
    run(sys.executable, *PIP, "wheel", "--no-deps", "-w", place, place / "source")
    (made,) = place.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def colab_like(tmp_path_factory) -> Path:
    """The python of a fresh environment that has what Colab has: torch and a kernel."""
    place = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", place)
    python = place / "bin" / "python"
    torch, kernel = (f"{name}=={metadata.version(name)}" for name in ("torch", "ipykernel"))
    run(python, *PIP, "install", torch, kernel)
    return python


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
@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])
def test_a_copy_runs_in_a_fresh_environment_and_an_empty_folder(
    name, tmp_path, kernel, colab_like
):
    empty, executed = tmp_path / "empty", tmp_path / f"{name}.ipynb"
    empty.mkdir()

    def ask(code: str) -> str:  # away from the checkout
        return run(colab_like, "-I", "-c", code, cwd="/")

    torch = "from importlib.metadata import version; print(version('torch'))"
    before = ask(torch)
    copy = str(COPIES / f"{name}.ipynb")
    known = papermill.inspect_notebook(copy)
    chosen = {"profile": "smoke"} if "profile" in known else {}
    papermill.execute_notebook(
        copy, str(executed), chosen, kernel_name="python3", cwd=str(empty), progress_bar=False
    )
    assert ask(torch) == before
    assert "site-packages" in ask("import stllms; print(stllms.__file__)")
    install = json.dumps(cells(executed)[0]["outputs"])
    assert "GPU: " in install or "no GPU: Runtime > Change runtime type" in install
    if name in ("00_demo", "06_your_own_behaviour"):  # they leave no run behind
        shown = json.dumps([cell.get("outputs") for cell in cells(executed)])
        assert "text/html" in shown
        assert {"00_demo": "backtracking", "06_your_own_behaviour": "first-person"}[
            name
        ] in shown
    else:
        assert sorted((empty / "results").glob("*/figures/*.png")), "made in the empty folder"
