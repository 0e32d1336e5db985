"""Colab copies of the notebooks, and the badges that open them.

``python -m stllms.colab`` writes ``notebooks/colab/``: the same cells without outputs, behind a
cell that installs the package. The copies are never edited. The same command renews the
badges that are in ``README.md`` and in the notebooks, so that the address of the repository
is stated once: :data:`REPOSITORY`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from stllms import provenance
from stllms.config import repository

#: Where the package is published; nothing else names it. A stand-in until it is published: the
#: maintainers then set it to a repository of their own, because the copies install what is
#: there, and run ``python -m stllms.colab``.
REPOSITORY = "https://github.com/stllms/stllms"
BRANCH = "main"

#: The first cell of a copy. ``STLLMS_WHEEL`` names another source for pip, such as a wheel of
#: a checkout. pip is told the version of the torch that is here: it keeps it, or refuses.
INSTALL = f"""# @title Installs stllms: run this first, it takes about a minute
import os
from importlib import metadata

source = os.environ.get("STLLMS_WHEEL", "git+{REPOSITORY}@{BRANCH}")
torch = metadata.version("torch")  # the one that Colab ships is kept
%pip install --quiet "torch=={{torch}}" "{{source}}"

from stllms import colab

print(colab.machine())"""

_IMAGE = "https://colab.research.google.com/assets/colab-badge.svg"
_OPEN = "https://colab.research.google.com/github"
_BADGE = re.compile(r"\[!\[Open in Colab\]\([^)\s]+\)\]\([^)\s]+/(\w+)\.ipynb\)")


def machine() -> str:
    """The GPU by name with its memory in GiB, or how to get one."""
    import torch

    if not torch.cuda.is_available():
        return "no GPU: Runtime > Change runtime type (the embedded model needs none)"
    found = torch.cuda.get_device_properties(0)
    return f"GPU: {found.name}, {found.total_memory / 2**30:.0f} GiB"


def badge(name: str) -> str:
    """The Markdown of the badge that opens the copy of notebook ``name`` (``01_generate``)."""
    owner = REPOSITORY.split("/", 3)[3]
    copy = f"{_OPEN}/{owner}/blob/{BRANCH}/notebooks/colab/{name}.ipynb"
    return f"[![Open in Colab]({_IMAGE})]({copy})"


def renewed(text: str) -> str:
    """``text`` with every badge in it pointing to :data:`REPOSITORY`."""
    return _BADGE.sub(lambda found: badge(found[1]), text)


def unbadged(text: str) -> str:
    """``text`` without the lines that hold nothing but badges, and without gaps for them."""
    lines = [line for line in text.splitlines() if not line or _BADGE.sub("", line).strip()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def copy_of(book: dict[str, Any]) -> dict[str, Any]:
    """The copy of a notebook (its JSON): install cell, then the cells without outputs.

    Of the metadata, tags and the language stay: the parameters cell is still one.
    """
    language = {"name": "python"}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    install = {
        "cell_type": "code",
        "execution_count": None,
        "id": "colab-install",
        "metadata": {"cellView": "form"},
        "outputs": [],
        "source": INSTALL.splitlines(keepends=True),
    }
    return {
        "cells": [install, *map(_stripped, book["cells"])],
        "metadata": {
            "colab": {"provenance": []},
            "kernelspec": kernel,
            "language_info": language,
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


def write(notebooks: Path, copies: Path) -> list[Path]:
    """Writes the copies of the numbered notebooks of a folder and returns their paths.

    A copy whose notebook is gone is deleted. Raises ``ValueError`` for a folder without
    notebooks, ``BadFile`` for one that cannot be read.
    """
    sources = sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))
    if not sources:
        raise ValueError(f"no notebooks in {notebooks}, expected 01_generate.ipynb and others")
    made = [copies / source.name for source in sources]
    for source, path in zip(sources, made, strict=True):
        provenance.write_json(path, copy_of(provenance.read_json(source)))
    for old in set(copies.glob("*.ipynb")) - set(made):
        old.unlink()
    return made


def renew_badges(paths: list[Path]) -> list[Path]:
    """Renews the badges in text files (a badge is the same text in a notebook's JSON).

    Returns the files that were changed.
    """
    changed = []
    for path in paths:
        old = path.read_text(encoding="utf-8")
        if renewed(old) != old:
            with provenance.replacing(path) as beside:
                beside.write_text(renewed(old), encoding="utf-8")
            changed.append(path)
    return changed


def main() -> int:
    """Writes the copies of this checkout and renews its badges; exit status 2 if refused."""
    root = repository()
    if root is None:
        print("stllms.colab: the copies are made from a checkout, not a wheel", file=sys.stderr)
        return 2
    notebooks = root / "notebooks"
    try:
        changed = renew_badges([root / "README.md", *sorted(notebooks.glob("*.ipynb"))])
        for path in [*changed, *write(notebooks, notebooks / "colab")]:
            print(path.relative_to(root))
    except (ValueError, OSError) as error:
        print(f"stllms.colab: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
