"""Colab copies of the notebooks, and the badges that open them.

``python -m stllms.app.colab`` writes ``notebooks/colab/``: the same cells without outputs,
behind a cell that installs the package. The copies are never edited. Where the package is
published (``[project.urls]`` of ``pyproject.toml`` has a ``Repository``), they install it from
there, and every notebook gets a badge below its title. Elsewhere there is no badge, and a copy
installs a wheel that was uploaded beside it.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import nbformat
from nbformat import NotebookNode, v4

from stllms.registry import repository

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
_BADGE = re.compile(r"\n*\[!\[Open in Colab\]\([^)\s]+\)\]\([^)\s]+\)\n*")


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


def unbadged(text: str) -> str:
    """``text`` without its badge, and without a gap for it."""
    return _BADGE.sub("\n\n", text).strip("\n")


def badged(text: str, name: str, published: str | None) -> str:
    """``text`` of the title cell of notebook ``name`` with its badge below the first line, or
    without one if the package is not published.
    """
    text = unbadged(text)
    if not published:
        return text
    owner = published.split("/", 3)[3]
    image = f"{_COLAB}/assets/colab-badge.svg"
    copy = f"{_COLAB}/github/{owner}/blob/{BRANCH}/notebooks/colab/{name}.ipynb"
    title, _, rest = text.partition("\n")
    return f"{title}\n\n[![Open in Colab]({image})]({copy})\n{rest}"


def copy_of(book: NotebookNode, published: str | None) -> NotebookNode:
    """The copy of a notebook: install cell, then the cells without outputs.

    Of the metadata, tags and the language stay: the parameters cell is still one.
    """
    source = f'"git+{published}@{BRANCH}"' if published else 'glob.glob("stllms-*.whl")[0]'
    install = INSTALL.replace("SOURCE", source)
    cells = [v4.new_code_cell(install, id="colab-install", metadata={"cellView": "form"})]
    for cell in book.cells:
        code = cell.cell_type == "code"
        text = cell.source if code else unbadged(cell.source)
        tags = {name: value for name, value in cell.metadata.items() if name == "tags"}
        new = v4.new_code_cell if code else v4.new_markdown_cell
        cells.append(new(text, id=cell.id, metadata=tags))
    metadata = {
        "colab": {"provenance": []},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return v4.new_notebook(cells=cells, metadata=metadata)


def write(notebooks: Path, published: str | None = None) -> list[Path]:
    """Writes the copies of the numbered notebooks of a folder into its ``colab``, in place of
    those that were there, and returns their paths; the notebooks get their badges, or lose
    them.
    """
    copies = notebooks / "colab"
    copies.mkdir(exist_ok=True)
    for old in copies.glob("*.ipynb"):
        old.unlink()
    sources = sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))
    for source in sources:
        book = nbformat.read(source, as_version=4)
        title = badged(book.cells[0].source, source.stem, published)
        if title != book.cells[0].source:
            book.cells[0].source = title
            nbformat.write(book, source)
        nbformat.write(copy_of(book, published), copies / source.name)
    return [copies / source.name for source in sources]


def main() -> None:
    """Writes the copies and badges of this checkout."""
    root = repository()
    if root is None:
        sys.exit("stllms.app.colab: copies are made from a checkout, not a wheel")
    for path in write(root / "notebooks", address(root)):
        print(path.relative_to(root))


if __name__ == "__main__":
    main()
