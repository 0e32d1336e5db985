"""Notebooks, tables and pictures as HTML that needs nothing from elsewhere.

Used by :mod:`stllms.report`. Scripts, and outputs that would load something over the
network, are left out: the plain text of the output stands in for them.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import mistune
import pandas as pd
from markupsafe import Markup, escape
from nbconvert.filters import Highlight2HTML, ansi2html
from pygments.formatters import HtmlFormatter

from stllms import colab
from stllms.config import PACKAGE
from stllms.files import DPI
from stllms.provenance import read_json

#: Richest first; the first one that an output has is shown.
PICTURES = ("image/png", "image/jpeg", "image/svg+xml")
#: CSS pixels in an inch.
CSS_DPI = 96
#: What an HTML output must not hold: it would run, or ask for a file from elsewhere.
_ACTIVE = re.compile(
    r"<(script|iframe|object|embed|link|base|form|meta)\b"
    r"|<[^<>]*\s(on\w+|srcset|poster|background|data)\s*="
    r"|<[^<>]*\s(src|xlink:href)\s*=\s*[\"']?(?!data:)"
    r"|<[^<>]*(url\(|@import)|<style[^>]*>[^<]*(url\(|@import)",
    re.IGNORECASE,
)
#: The folder of the runs as papermill hands it to a notebook: only its name is shown.
_RESULTS = re.compile(r"(?m)^(results = \")[^\"]*?([^/\\\"]+\")$")
#: The tag of text that reads the committed figures and fits no other run.
COMMITTED = "committed"
#: How the code of a cell ends that shows versions; the report prints them once.
VERSIONS = "artifacts.versions()"
_SAVED = re.compile(r"save_figure\(\s*\"([^\"]+)\"")


@dataclass(frozen=True)
class Heading:
    """A line of the table of contents."""

    level: int
    anchor: str
    title: str


@dataclass(frozen=True)
class Output:
    """One output of a cell: ``picture`` (a data URI), ``html``, ``text`` or ``error``.

    ``width`` is that of a picture on the screen, in CSS pixels.
    """

    kind: str
    content: Markup
    name: str = ""
    width: int | None = None


@dataclass(frozen=True)
class Cell:
    """Prose, or code with its outputs."""

    prose: Markup | None = None
    code: Markup | None = None
    outputs: tuple[Output, ...] = ()


@dataclass
class Book:
    """A notebook as the report shows it; ``drawn`` are the saved figures that it shows."""

    headings: list[Heading] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    drawn: list[str] = field(default_factory=list)


class _Prose(mistune.HTMLRenderer):
    """Markdown with headings one level lower, noted for the contents, and no pictures."""

    def __init__(self, stem: str, headings: list[Heading]) -> None:
        super().__init__(escape=True)
        self._stem, self._headings = stem, headings

    def heading(self, text: str, level: int, **attrs: Any) -> str:
        level = min(level + 1, 6)
        anchor = f"{self._stem}-{len(self._headings)}" if self._headings else self._stem
        self._headings.append(Heading(level, anchor, Markup(text).striptags()))
        return f'<h{level} id="{anchor}">{text}</h{level}>\n'

    def image(self, text: str, url: str, title: str | None = None) -> str:
        """A picture of a notebook's text lies elsewhere: its description stands in."""
        return str(escape(text))


def book(path: Path, figures: Path, *, readings: bool = False) -> Book:
    """An executed notebook. A figure that a cell saves is taken from ``figures``, where it
    has more dots than the output. Text with the tag :data:`COMMITTED` is left out but with
    ``readings``, versions always. Raises ``BadFile`` for a file that is no notebook."""
    made = Book()
    render = mistune.create_markdown(
        renderer=_Prose(path.stem, made.headings), plugins=["table", "strikethrough"]
    )
    for cell in read_json(path)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            if COMMITTED in cell["metadata"].get("tags", ()) and not readings:
                continue
            made.cells.append(Cell(prose=Markup(render(colab.unbadged(source)))))
        elif cell["cell_type"] == "code" and source.strip():
            saved = [name for name in _SAVED.findall(source) if _png(figures, name).is_file()]
            made.drawn += saved
            _add(made.cells, _code(source, cell["outputs"], figures, saved))
    return made


def _add(cells: list[Cell], cell: Cell) -> None:
    """Code that shows nothing is joined with the code below it."""
    before = cells[-1] if cells else None
    if before and before.code is not None and not before.outputs:
        cells[-1] = Cell(code=before.code + cell.code, outputs=cell.outputs)
    else:
        cells.append(cell)


def _png(figures: Path, name: str) -> Path:
    return figures / f"{name}.png"


def _code(source: str, outputs: Sequence[Any], figures: Path, saved: Sequence[str]) -> Cell:
    """A code cell; its pictures in order are those it saved, as long as there are any."""
    if source.rstrip().endswith(VERSIONS):
        outputs = [o for o in outputs if o["output_type"] != "execute_result"]
    waiting, shown = list(saved), []
    for output in filter(None, map(_output, outputs)):
        if output.kind == "picture" and waiting:
            shown.append(picture(_png(figures, waiting.pop(0))))
        else:
            shown.append(output)
    shown += [picture(_png(figures, name)) for name in waiting]
    coloured = Highlight2HTML(pygments_lexer="python3")(_RESULTS.sub(r"\1\2", source))
    return Cell(code=Markup(coloured), outputs=tuple(shown))


def _output(output: Mapping[str, Any]) -> Output | None:
    """An output of a notebook, ``None`` for a progress bar and other live widgets."""
    kind = output["output_type"]
    if kind == "stream":
        return Output("text", _plain(output["text"]))
    if kind == "error":
        return Output("error", _plain("\n".join(output["traceback"])))
    data = output["data"]
    if "application/vnd.jupyter.widget-view+json" in data:
        return None
    for name in PICTURES:
        if name in data:
            return Output("picture", _embedded(name, "".join(data[name])))
    html = "".join(data.get("text/html", ""))
    if html and not _ACTIVE.search(html):
        return Output("html", Markup(html))
    return Output("text", _plain(data.get("text/plain", "")))


def _plain(text: str | Sequence[str]) -> Markup:
    return Markup(ansi2html("".join(text).rstrip("\n")))


def _embedded(kind: str, content: str) -> Markup:
    """A data URI; notebooks hold pictures in base64, but SVG as text."""
    if kind == "image/svg+xml":
        content = base64.b64encode(content.encode()).decode()
    return Markup("data:{};base64,{}").format(kind, "".join(content.split()))


def picture(path: Path) -> Output:
    """A figure of a run (PNG), by its name, as wide as it was drawn."""
    content = path.read_bytes()
    width = int.from_bytes(content[16:20])  # of the header, which always comes first
    uri = _embedded("image/png", base64.b64encode(content).decode())
    return Output("picture", uri, path.stem, round(width * CSS_DPI / DPI))


def table(values: pd.DataFrame) -> Markup:
    """A table with a column's name at every cell, for narrow screens; missing is empty."""
    texts = values.astype(object).where(values.notna(), "")
    head = Markup("").join(Markup("<th>{}</th>").format(name) for name in values.columns)
    rows = Markup("").join(
        Markup("<tr>{}</tr>\n").format(
            Markup("").join(
                Markup('<td data-column="{}">{}</td>').format(name, _lines(value))
                for name, value in zip(values.columns, row, strict=True)
            )
        )
        for row in texts.itertuples(index=False)
    )
    return Markup("<table><thead><tr>{}</tr></thead>\n<tbody>{}</tbody></table>").format(
        head, rows
    )


def _lines(value: Any) -> Markup:
    """A number to five digits; a text with ``; `` between its parts as lines."""
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return Markup("<br>").join(text.split("; "))


def style() -> Markup:
    """The colours of code, as CSS."""
    return Markup(HtmlFormatter(style="default").get_style_defs(".highlight"))


def render(**values: Any) -> str:
    """The page of :file:`report.html` with these values."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PACKAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(**values)
