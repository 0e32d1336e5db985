"""Colab copies of the notebooks, and the badges that open them.

``python -m stllms.app.colab`` writes ``notebooks/colab/``: the same cells without outputs,
behind a cell that installs the package. The copies are never edited. Where the package is
published (``[project.urls]`` of ``pyproject.toml`` has a ``Repository``), they install it from
there, and every notebook gets a badge below its title. Elsewhere there is no badge, and a copy
installs a wheel that was uploaded beside it.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from stllms.registry import repository
from stllms.runs.files import read_json, replacing

BRANCH = "main"

#: The first cell of a copy. ``STLLMS_WHEEL`` names another source for pip, such as a wheel of
#: a checkout. pip is told the version of the torch that is here: it keeps it, or refuses.
INSTALL = """# @title Installs stllms: run this first, it takes about a minute
import glob, os
from importlib import metadata

source = os.environ.get("STLLMS_WHEEL") or SOURCE
torch = metadata.version("torch")  # the one that Colab ships is kept
%pip install --quiet "torch=={torch}" "{source}"

from stllms.app import colab

print(colab.machine())"""

_COLAB = "https://colab.research.google.com"
_BADGE = re.compile(r"\[!\[Open in Colab\]\([^)\s]+\)\]\([^)\s]+\.ipynb\)")


def machine() -> str:
    """The GPU by name with its memory in GiB, or how to get one."""
    import torch

    if not torch.cuda.is_available():
        return "no GPU: Runtime > Change runtime type (the embedded model needs none)"
    found = torch.cuda.get_device_properties(0)
    return f"GPU: {found.name}, {found.total_memory / 2**30:.0f} GiB"


def address(root: Path) -> str | None:
    """Where the package is published, by the ``pyproject.toml`` of a checkout."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository")


def install(published: str | None) -> str:
    """The source of the cell that installs the package."""
    source = f'"git+{published}@{BRANCH}"' if published else 'glob.glob("stllms-*.whl")[0]'
    return INSTALL.replace("SOURCE", source)


def unbadged(text: str) -> str:
    """``text`` without the lines that hold nothing but badges, and without gaps for them."""
    lines = [line for line in text.splitlines() if not line or _BADGE.sub("", line).strip()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def badged(text: str, name: str, published: str | None) -> str:
    """``text`` of the title cell of notebook ``name`` with its badge below the first line, or
    without one if the package is not published."""
    text = unbadged(text)
    if not published:
        return text
    owner = published.split("/", 3)[3]
    image = f"{_COLAB}/assets/colab-badge.svg"
    copy = f"{_COLAB}/github/{owner}/blob/{BRANCH}/notebooks/colab/{name}.ipynb"
    title, _, rest = text.partition("\n")
    return f"{title}\n\n[![Open in Colab]({image})]({copy})\n{rest}"


def copy_of(book: dict[str, Any], published: str | None) -> dict[str, Any]:
    """The copy of a notebook (its JSON): install cell, then the cells without outputs.

    Of the metadata, tags and the language stay: the parameters cell is still one.
    """
    cell: dict[str, Any] = {
        "cell_type": "code",
        "id": "colab-install",
        "metadata": {"cellView": "form"},
    }
    cell |= {"execution_count": None, "outputs": []}
    cell["source"] = install(published).splitlines(keepends=True)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": [cell, *map(_stripped, book["cells"])],
        "metadata": {
            "colab": {"provenance": []},
            "kernelspec": kernel,
            "language_info": {"name": "python"},
        },
        "nbformat": book["nbformat"],
        "nbformat_minor": book["nbformat_minor"],
    }


def _stripped(cell: dict[str, Any]) -> dict[str, Any]:
    source = "".join(cell["source"])
    kept = {name: value for name, value in cell["metadata"].items() if name == "tags"}
    made = {"cell_type": cell["cell_type"], "id": cell["id"], "metadata": kept}
    if cell["cell_type"] == "code":
        made |= {"execution_count": None, "outputs": []}
    else:
        source = unbadged(source)
    return {**made, "source": source.splitlines(keepends=True)}


def write(notebooks: Path, copies: Path, published: str | None = None) -> list[Path]:
    """Writes the copies of the numbered notebooks of a folder and returns their paths; the
    notebooks get their badges, or lose them.

    A copy whose notebook is gone is deleted. Raises ``ValueError`` for a folder without
    notebooks, ``BadFile`` for one that cannot be read.
    """
    sources = sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))
    if not sources:
        raise ValueError(f"no notebooks in {notebooks}, expected 01_generate.ipynb and others")
    made = [copies / source.name for source in sources]
    for source, path in zip(sources, made, strict=True):
        book = read_json(source)
        title = book["cells"][0]
        text = badged("".join(title["source"]), source.stem, published)
        if text != "".join(title["source"]):
            title["source"] = text.splitlines(keepends=True)
            _save(source, book)
        _save(path, copy_of(book, published))
    for old in set(copies.glob("*.ipynb")) - set(made):
        old.unlink()
    return made


def _save(path: Path, book: dict[str, Any]) -> None:
    """As Jupyter writes a notebook."""
    with replacing(path) as beside:
        text = json.dumps(book, indent=1, ensure_ascii=False)
        beside.write_text(text + "\n", encoding="utf-8")


def main() -> int:
    """Writes the copies and badges of this checkout; exit status 2 if refused."""
    root = repository()
    if root is None:
        print("stllms.app.colab: copies are made from a checkout, not a wheel", file=sys.stderr)
        return 2
    notebooks = root / "notebooks"
    try:
        for path in write(notebooks, notebooks / "colab", address(root)):
            print(path.relative_to(root))
    except (ValueError, OSError) as error:
        print(f"stllms.app.colab: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
