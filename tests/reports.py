"""Runs with hand-made notebooks, and their reports as parsed pages."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

from bs4 import BeautifulSoup
from PIL import Image

from stllms.app import report
from stllms.config import RunConfig
from stllms.runs.artifacts import Folder


def png(grey: int = 0, width: int = 300) -> bytes:
    """A picture of one colour, one row high."""
    content = io.BytesIO()
    Image.new("L", (width, 1), grey).save(content, "PNG")
    return content.getvalue()


def uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def prose(text: str, *tags: str) -> dict:
    return {"cell_type": "markdown", "metadata": {"tags": list(tags)}, "source": text}


def code(text: str, *outputs: dict) -> dict:
    return {"cell_type": "code", "metadata": {}, "source": text, "outputs": list(outputs)}


def shown(**data: str) -> dict:
    names = {"png": "image/png", "html": "text/html", "plain": "text/plain"}
    return {
        "output_type": "display_data",
        "metadata": {},
        "data": {names.get(name, name.replace("__", "/")): text for name, text in data.items()},
    }


def run_with(
    stage: str, *cells: dict, done: bool = True, name: str | None = None, **options: object
) -> Path:
    """The folder of a run with these options that has one executed notebook."""
    folder = Folder(RunConfig(**options)).open()
    folder.notebooks.mkdir(exist_ok=True)
    path = folder.notebooks / f"{name or stage}.ipynb"
    path.write_text(json.dumps({"cells": list(cells)}), encoding="utf-8")
    if done:
        folder.mark(stage, {"files": [], "seconds": 12.5})
    return folder.path


def parsed(page: str) -> BeautifulSoup:
    return BeautifulSoup(page, "html.parser")


def made(folder: Path) -> BeautifulSoup:
    """The report of a folder."""
    return parsed(report.write(folder).read_text(encoding="utf-8"))
