"""Runs with hand-made notebooks, and their reports as parsed pages."""

from __future__ import annotations

import base64
import json
import zlib
from html.parser import HTMLParser
from pathlib import Path

from stllms.app import report
from stllms.config import RunConfig
from stllms.runs.artifacts import Folder


class Page(HTMLParser):
    """The elements of a page: names, ids, addresses, and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str, name: str) -> list[str]:
        return [a[name] or "" for t, a in self.elements if t == tag and name in a]

    @property
    def ids(self) -> list[str]:
        return [a["id"] or "" for _, a in self.elements if "id" in a]


def png(grey: int = 0, width: int = 300) -> bytes:
    """A picture of one colour, one row high."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data).to_bytes(4)
        return len(data).to_bytes(4) + kind + data + check

    size = width.to_bytes(4) + (1).to_bytes(4) + bytes([8, 0, 0, 0, 0])
    row = zlib.compress(b"\0" + bytes([grey]) * width)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", row) + chunk(b"IEND", b"")
    )


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


def made(folder: Path) -> Page:
    return Page(report.write(folder).read_text(encoding="utf-8"))
