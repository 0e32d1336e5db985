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
from typing import TYPE_CHECKING

from stllms.registry import repository

if TYPE_CHECKING:
    from nbformat import NotebookNode

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


def unbadged(text: str) -> str:
    """``text`` without the lines that hold nothing but badges, and without gaps for them."""
    lines = [line for line in text.splitlines() if not line or _BADGE.sub("", line).strip()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


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
    from nbformat import v4

    source = f'"git+{published}@{BRANCH}"' if published else 'glob.glob("stllms-*.whl")[0]'
    install = INSTALL.replace("SOURCE", source)
    cells = [v4.new_code_cell(install, id="colab-install", metadata={"cellView": "form"})]
    for cell in book.cells:
        tags = {name: value for name, value in cell.metadata.items() if name == "tags"}
        if cell.cell_type == "code":
            cells.append(v4.new_code_cell(cell.source, id=cell.id, metadata=tags))
        else:
            text = unbadged(cell.source)
            cells.append(v4.new_markdown_cell(text, id=cell.id, metadata=tags))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"colab": {"provenance": []}, "kernelspec": kernel}
    metadata["language_info"] = {"name": "python"}
    return v4.new_notebook(cells=cells, metadata=metadata)


def write(notebooks: Path, copies: Path, published: str | None = None) -> list[Path]:
    """Writes the copies of the numbered notebooks of a folder and returns their paths; the
    notebooks get their badges, or lose them.

    A copy whose notebook is gone is deleted. Raises ``ValueError`` for a folder without
    notebooks, and for one that cannot be read.
    """
    import nbformat

    sources = sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))
    if not sources:
        raise ValueError(f"no notebooks in {notebooks}, expected 01_generate.ipynb and others")
    copies.mkdir(parents=True, exist_ok=True)
    for source in sources:
        book = nbformat.read(source, as_version=4)
        title = badged(book.cells[0].source, source.stem, published)
        if title != book.cells[0].source:
            book.cells[0].source = title
            nbformat.write(book, source)
        nbformat.write(copy_of(book, published), copies / source.name)
    made = [copies / source.name for source in sources]
    for old in set(copies.glob("*.ipynb")) - set(made):
        old.unlink()
    return made


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
