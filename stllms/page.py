"""Notebooks, tables and pictures as HTML that needs nothing from elsewhere and runs nothing.

Used by :mod:`stllms.report`. A run may be a stranger's: no text in it is trusted. Three walls
stand one behind the other. Text is escaped, by jinja2 and markupsafe. What is HTML already
(outputs of cells, and what Markdown, code and colours were turned into) keeps the tags and
attributes of :data:`TAGS` and :data:`ATTRIBUTES` and loses all others (``nh3``); where nothing
is left to see, the plain text of the output stands in. And the page begins with a
content-security policy (:file:`report.html`) under which a browser runs no script and asks for
no file, whatever got through.
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
import nh3
import pandas as pd
from markupsafe import Markup, escape
from nbconvert.filters import Highlight2HTML, ansi2html
from pygments.formatters import HtmlFormatter

from stllms import colab
from stllms.config import PACKAGE
from stllms.files import DPI
from stllms.provenance import BadFile, read_json

#: Richest first; the first one that an output has is shown.
PICTURES = ("image/png", "image/jpeg", "image/svg+xml")
#: CSS pixels in an inch.
CSS_DPI = 96
#: The tags that stay, with their text. The text of :data:`GONE` goes with them.
TAGS = frozenset({
    "a", "abbr", "b", "blockquote", "br", "caption", "code", "col", "colgroup", "dd",
    "del", "div", "dl", "dt", "em", "h2", "h3", "h4", "h5", "h6", "hr", "i", "img", "ins",
    "kbd", "li", "mark", "ol", "p", "pre", "s", "samp", "small", "span", "strong", "sub",
    "sup", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "u", "ul", "var",
})  # fmt: skip
GONE = frozenset({
    "script", "style", "title", "iframe", "object", "noscript", "template", "svg", "math",
})  # fmt: skip
#: Tag -> the attributes that stay, as far as :func:`_attribute` lets their value through.
ATTRIBUTES: dict[str, set[str]] = {
    "*": {"class", "style", "title", "align", "valign"},
    "a": {"href"},
    "img": {"src", "alt", "width", "height"},
    "table": {"border"},
    **{name: {"colspan", "rowspan", "scope", "headers"} for name in ("td", "th")},
    **{f"h{level}": {"id"} for level in range(2, 7)},
}
#: What a style may set: nothing that lays an element over the page or loads something.
STYLES = frozenset({
    "background", "background-color", "border", "border-bottom", "border-collapse",
    "border-left", "border-right", "border-spacing", "border-top", "color", "display",
    "font-family", "font-size", "font-style", "font-weight", "height", "letter-spacing",
    "line-height", "margin", "margin-bottom", "margin-left", "margin-right", "margin-top",
    "max-width", "min-width", "opacity", "padding", "padding-bottom", "padding-left",
    "padding-right", "padding-top", "text-align", "text-decoration", "vertical-align",
    "white-space", "width", "word-break",
})  # fmt: skip
#: Values of attributes: a style calls no function but that of a colour, a link leads to the web
#: or into the page, a picture is in the file itself. SVG in an ``img`` runs no script.
_VALUES: dict[str, re.Pattern[str]] = {
    "style": re.compile(
        r"(?!.*[:\s]-[\d.])(?:[^()\\@<>&]|\b(?:rgb|hsl)a?\([\d\s.,%/]*\))*", re.DOTALL
    ),
    "href": re.compile(r"(?:https?://|#)[^\s\x00-\x20]*", re.IGNORECASE),
    "src": re.compile(r"data:image/(?:png|jpeg|gif|webp|svg\+xml);base64,[A-Za-z0-9+/=\s]*"),
}
#: Letters of an HTML output that are looked at; a longer one is shown as its plain text.
LONGEST = 500_000
#: A name that a figure may have; no other leads out of its folder.
_FIGURE = re.compile(r"[a-z0-9][a-z0-9._-]*")
#: Characters that HTML cannot hold, or that a viewer would obey: controls, half surrogates.
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
#: The folder of the runs as papermill hands it to a notebook: only its name is shown.
_RESULTS = re.compile(r"(?m)^(results = \")[^\"]*?([^/\\\"]+\")$")
#: The tag of text that reads the committed figures and fits no other run.
COMMITTED = "committed"
#: How the code of a cell ends that shows versions; the report prints them once.
VERSIONS = "artifacts.versions()"
_SAVED = re.compile(r"save_figure\(\s*\"([^\"]+)\"")


def _attribute(_tag: str, name: str, value: str) -> str | None:
    """The value of an attribute, ``None`` if it must go."""
    pattern = _VALUES.get(name)
    return value if pattern is None or pattern.fullmatch(value.strip()) else None


def _cleaner(attributes: Mapping[str, set[str]], **more: Any) -> nh3.Cleaner:
    return nh3.Cleaner(
        tags=set(TAGS),
        clean_content_tags=set(GONE),
        attributes=dict(attributes),
        attribute_filter=_attribute,
        url_schemes={"http", "https", "data"},
        filter_style_properties=set(STYLES),
        **more,
    )


#: Of what this module made out of a text: classes and anchors are its own.
_MADE = _cleaner(ATTRIBUTES)
#: Of what a cell showed: it has no anchor, and of the classes only that of pandas, so that it
#: cannot dress up as a part of the page.
_SHOWN = _cleaner(
    {tag: names - {"class", "id"} for tag, names in ATTRIBUTES.items()},
    allowed_classes={"table": {"dataframe"}},
)


def clean(html: str, cleaner: nh3.Cleaner = _MADE) -> Markup:
    """HTML of which only :data:`TAGS` and :data:`ATTRIBUTES` are left."""
    return Markup(cleaner.clean(legible(html)))


def legible(text: str) -> str:
    """A text without what HTML cannot hold: each such character is a replacement mark."""
    return _NO_TEXT.sub("\ufffd", text)


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
    content = read_json(path)
    try:
        return _book(content, path.stem, figures, readings)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        said = f"{type(error).__name__}: {error}"
        raise BadFile(f"{path}: not a Jupyter notebook of version 4 ({said})") from None


def _book(content: Any, stem: str, figures: Path, readings: bool) -> Book:
    made = Book()
    render = mistune.create_markdown(
        renderer=_Prose(stem, made.headings), plugins=["table", "strikethrough"]
    )
    for cell in content["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            if COMMITTED in cell["metadata"].get("tags", ()) and not readings:
                continue
            made.cells.append(Cell(prose=clean(render(colab.unbadged(source)))))
        elif cell["cell_type"] == "code" and source.strip():
            saved = [name for name in _SAVED.findall(source) if is_figure(figures, name)]
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


def is_figure(figures: Path, name: str) -> bool:
    """Whether a run has this figure: a file that is in its own folder, too."""
    path = _png(figures, name)
    if not _FIGURE.fullmatch(name) or not path.is_file():
        return False
    return path.resolve().parent == figures.resolve()


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
    return Cell(code=clean(coloured), outputs=tuple(shown))


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
    if html := _seen("".join(data.get("text/html", ""))):
        return Output("html", html)
    return Output("text", _plain(data.get("text/plain", "")))


def _seen(html: str) -> Markup | None:
    """An HTML output as the report shows it, ``None`` if nothing of it is to be seen."""
    if len(html) > LONGEST:
        return None
    kept = clean(html, _SHOWN)
    return kept if kept.striptags() or " src=" in kept else None


def _plain(text: str | Sequence[str]) -> Markup:
    return clean(ansi2html("".join(text).rstrip("\n")))


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
    return legible(environment.get_template("report.html").render(**values))
