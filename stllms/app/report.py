"""A run as one file to share: ``results/<slug>/report.html``.

Made from what a run leaves: ``run.json``, executed notebooks, figures, tables, and the ledger
of the results folder. The same artefacts give the same bytes; a notebook that was not run is
named.

A run may be a stranger's: no text in it is trusted. The template escapes every value
(:file:`report.html`); what is HTML already keeps the tags and attributes of :data:`TAGS` and
:data:`ATTRIBUTES` alone (``nh3``); and the page begins with a content-security policy under
which a browser runs no script and asks for no file, whatever got through.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nh3
import pandas as pd
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbformat import NotebookNode, ValidationError, from_dict, v4
from pygments.formatters import HtmlFormatter

from stllms.annotation import annotators
from stllms.app import stages
from stllms.app.colab import unbadged
from stllms.comparison.ledger import display, ledger
from stllms.config import RunConfig
from stllms.labels import PAPER, LabelSet
from stllms.plotting import text
from stllms.registry import MODELS
from stllms.runs.files import BadFile, load_table, read_json, replacing
from stllms.runs.store import Rows
from stllms.steering import dose, measures
from stllms.terminal import plain

NAME = "report.html"
COMPARISON, STEERING = "comparison", "steering.csv"
#: The figures of the summary, as far as they were made.
FIRST = ("steering", "layer_effects_grid", "cosine_heatmap")
#: The tag of text that reads the committed figures and fits no other run.
COMMITTED = "committed"
#: The tags that stay, with their text. The text of :data:`GONE` goes with them.
TAGS = {
    "a", "b", "blockquote", "br", "code", "dd", "del", "div", "dl", "dt", "em", "h1", "h2",
    "h3", "h4", "h5", "h6", "hr", "i", "img", "li", "ol", "p", "pre", "s", "small", "span",
    "strong", "sub", "sup", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "u", "ul",
}  # fmt: skip
GONE = {
    "script", "style", "title", "iframe", "object", "noscript", "template", "svg", "math",
}  # fmt: skip
#: Tag -> the attributes that stay, as far as :data:`_VALUES` has their value.
ATTRIBUTES: dict[str, set[str]] = {
    "*": {"style", "title"},
    "a": {"href"},
    "img": {"src", "alt", "width", "height"},
    **{name: {"colspan", "rowspan"} for name in ("td", "th")},
}
#: What a style may set: nothing that lays an element over the page or loads something.
STYLES = {
    "background", "background-color", "border", "color", "display", "font-family", "font-size",
    "font-style", "font-weight", "height", "line-height", "margin", "max-width", "opacity",
    "padding", "text-align", "vertical-align", "white-space", "width",
}  # fmt: skip
#: A style calls no function but that of a colour, a link leads to the web, a picture is in the
#: file itself.
_VALUES = {
    "style": re.compile(
        r"(?!.*[:\s]-[\d.])(?:[^()\\@<>&]|\b(?:rgb|hsl)a?\([\d\s.,%/]*\))*", re.DOTALL
    ),
    "href": re.compile(r"https?://[^\s\x00-\x20]*", re.IGNORECASE),
    "src": re.compile(r"data:image/(?:png|jpeg|gif|webp);base64,[A-Za-z0-9+/=\s]*"),
}
#: Letters of an HTML output that are looked at; a longer one is shown as its plain text.
LONGEST = 500_000
#: The folder of the runs as papermill hands it to a notebook: only its name is shown.
_RESULTS = re.compile(r"(?m)^(results = \")[^\"]*?([^/\\\"]+\")$")


def write(folder: str | Path) -> Path:
    """Writes the report of a run's folder, or of ``results/comparison``; returns its path.

    Raises ``BadFile`` for a folder without ``run.json``, and for a notebook, a table or a
    figure that cannot be read.
    """
    folder = Path(folder).resolve()
    record = _record(folder)
    places = _places(folder)
    sections = [section for place in places for section in _sections(place)]
    rows = load_table(folder / STEERING) if (folder / STEERING).is_file() else None
    labels = PAPER if rows is None else _labels(folder, record, rows)
    effects, broken = (None, []) if rows is None else _steering(folder, rows, labels)
    page = {
        "title": _title(folder, record),
        "sentence": _sentence(record, labels),
        "effects": effects,
        "warnings": [*_warnings(record, sections), *_never(folder, record, labels), *broken],
        "figures": _pictures(folder, [f"figures/{name}.png" for name in FIRST]),
        "ledger": _ledger(folder, record),
        "tables": list(_tables(places)),
        "details": _details(record),
        "light": HtmlFormatter(style="default").get_style_defs(".highlight"),
        "dark": HtmlFormatter(style="monokai").get_style_defs(".highlight"),
    }
    exporter = HTMLExporter(
        template_file=NAME,
        extra_template_paths=[str(Path(__file__).parent)],
        exclude_anchor_links=True,
    )
    exporter.environment.autoescape = True
    exporter.register_filter("clean", clean)
    book = v4.new_notebook(cells=list(_cells(sections, _is_committed(record))))
    html, _ = exporter.from_notebook_node(book, resources={"page": page})
    with replacing(folder / NAME, record=False) as beside:
        beside.write_text(plain(html), encoding="utf-8")
    return folder / NAME


def clean(html: str) -> Markup:
    """HTML of which :data:`TAGS` and :data:`ATTRIBUTES` are left; empty where nothing is left
    to see, or where the text is too long to look at.
    """
    if len(html) > LONGEST:
        return Markup("")

    def attribute(_tag: str, name: str, value: str) -> str | None:
        pattern = _VALUES.get(name)
        return value if pattern is None or pattern.fullmatch(value.strip()) else None

    kept = nh3.clean(
        plain(html),
        tags=TAGS,
        clean_content_tags=GONE,
        attributes=ATTRIBUTES,
        attribute_filter=attribute,
        url_schemes={"http", "https", "data"},
        filter_style_properties=STYLES,
    )
    seen = Markup(kept).striptags() or " src=" in kept or " alt=" in kept
    return Markup(kept if seen else "")


# --- the summary -------------------------------------------------------------------------


def _record(folder: Path) -> dict[str, Any]:
    """``run.json`` of a folder; :class:`BadFile` if it is not that of a run."""
    path = folder / "run.json"
    if not path.is_file():
        raise BadFile(f"{folder}: not the folder of a run, it has no run.json")
    record = read_json(path)
    if not isinstance(record, dict) or "configuration" not in record:
        raise BadFile(f"{path}: not written by stllms (it has no configuration)")
    return record


def _places(folder: Path) -> list[Path]:
    """The folders that a report shows: the run's, and the comparison if the run is in it."""
    comparison = folder.parent / COMPARISON
    compared = (comparison / "run.json").is_file() and (comparison / folder.name).is_dir()
    return [folder, comparison] if compared else [folder]


def _title(folder: Path, record: Mapping[str, Any]) -> str:
    name = record["configuration"]["model"]
    title = MODELS[name].display if name in MODELS else Path(name).name
    return f"{title} and what it is compared with" if folder.name == COMPARISON else title


def _labels(folder: Path, record: Mapping[str, Any], rows: pd.DataFrame) -> LabelSet:
    """The labels of a run and its targets, as its steered chains were measured with them: the
    file that they came from may be gone."""
    own = record.get("identity", {}).get("labels")
    if not own:
        return PAPER
    try:
        of = {name: part["behaviour"].unique() for name, part in rows.groupby("metric")}
        values = {
            "labels": dict.fromkeys(of[measures.SHARE]),
            "targets": [*of[measures.FRACTION]],
        }
        return LabelSet.from_dict({"name": own.rpartition(":")[0] or own, **values})
    except (KeyError, ValueError, AttributeError) as error:
        raise BadFile(f"{folder / STEERING}: not measured with labels ({error})") from None


def _sentence(record: Mapping[str, Any], labels: LabelSet) -> str:
    """What was run: profile, tasks, annotator, labels of a person's own, limits, device."""
    identity = record.get("identity", {})
    own = f"{labels.name} with the targets {', '.join(labels.targets)}"
    parts = {
        "directions from the responses to {} tasks": identity.get("n_build"),
        "steering tried on {} others": identity.get("n_evaluate"),
        "task set {}": identity.get("tasks"),
        "annotator {}": identity.get("annotator"),
        "labels {}": None if labels is PAPER else own,
        "at most {} new tokens": identity.get("max_tokens"),
        "temperature {}": identity.get("temperature"),
        "on {}": record.get("recorded", {}).get("device"),
    }
    words = [part.format(value) for part, value in parts.items() if value is not None]
    return f"Profile {record['configuration'].get('profile')}: {', '.join(words)}."


def _steering(folder: Path, rows: pd.DataFrame, labels: LabelSet) -> tuple[Markup, list[str]]:
    """The effects (own token fraction of the baseline and under +1 and -1) on the targets, and
    the coefficients that break the text.
    """
    try:
        bars = measures.bars(rows, labels=labels)
        lines = dose.warning(rows, labels=labels).splitlines()
    except KeyError as error:
        path, what = folder / STEERING, error.args[0]
        raise BadFile(f"{path}: not a table of steering, it has no {what}") from None
    table = text.intervals(bars, ["behaviour"], "mode").rename(columns={"plain": "baseline"})
    for place, mode in ((2, "positive"), (4, "negative")):
        null = bars[bars["mode"] == mode][["null_low", "null_high"]].to_numpy(float)
        words = [f"{low:.2f} to {high:.2f}" if low == low else "none" for low, high in null]
        table.insert(place, f"null interval, {mode}", words)
    return _html(table.reset_index()), [line for line in lines if "breaks the text:" in line]


def _warnings(record: Mapping[str, Any], sections: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know before the numbers."""
    entry = MODELS.get(record["configuration"]["model"])
    found = []
    if entry is not None and entry.source == "embedded":
        found.append(
            "A fixture: this model was built to be steerable. Its numbers show that the "
            "pipeline works, and never that a claim of the paper holds."
        )
    found += [f"{one['stage']}: {one['state']}" for one in sections if one["state"] != "done"]
    remarks = record.get("recorded", {}).get("remarks") or ()
    return found + [f"The model: {remark}" for remark in remarks]


def _never(folder: Path, record: Mapping[str, Any], labels: LabelSet) -> list[str]:
    """A line about the labels that no chain has of those that directions are built from."""
    annotator = str(record.get("identity", {}).get("annotator"))
    rows = annotators.load(Rows(folder / "annotations.jsonl", annotators.KEY), annotator)
    chains = [one for one in rows if one.failed is None]
    found = {segment.label for one in chains for segment in one.segments}
    lacking = [name for name in labels.names if name not in found]
    if not chains or not lacking:
        return []
    return [f"In none of {len(chains)} chains: {', '.join(lacking)}"]


def _is_committed(record: Mapping[str, Any]) -> bool:
    """Whether the run is the one that the committed notebooks show and their readings are
    about: every option that could change a number is the default.
    """

    def decisive(config: RunConfig) -> list[dict[str, Any]]:
        return [config.identity(), *map(config.stage_options, stages.STAGES)]

    try:
        return decisive(RunConfig.from_dict(record["configuration"])) == decisive(RunConfig())
    except (ValueError, OSError):  # of a model or of tasks that are no longer there
        return False


def _details(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Configuration, identity, versions and the rest of ``run.json`` as names and values."""
    recorded = {
        name: value["line"] if isinstance(value, dict) and "line" in value else value
        for name, value in record.get("recorded", {}).items()
    }
    return {
        "Configuration (None: left to the profile or the model)": record["configuration"],
        "What identifies the run": record.get("identity", {}),
        "Versions": record.get("versions", {}),
        "Recorded": {name: record.get(name) for name in ("commit", "seed", "started")}
        | recorded,
    }


# --- the notebooks -----------------------------------------------------------------------


def _sections(folder: Path) -> list[dict[str, Any]]:
    """The stages of a folder: how each stands, its executed notebook, else its figures."""
    done = _record(folder).get("stages", {})
    found = []
    for stage in stages.STAGES[-1:] if folder.name == COMPARISON else stages.STAGES[:-1]:
        path = folder / "notebooks" / f"{stage}.ipynb"
        marker, executed = done.get(stage, {}), path.is_file()
        if path.with_suffix(".failed.ipynb").is_file():
            state = "failed when it was last run"
        elif executed:
            state = "done" if stage in done else "executed, but not finished"
        elif stage in done:
            state = "done, without an executed copy: only its figures and tables"
        else:
            state = "not run"
        saved = [name for name in marker.get("files", []) if name.endswith(".png")]
        found.append(
            {
                "stage": stage,
                "state": state,
                "seconds": marker.get("seconds"),
                "figures": [] if executed else _pictures(folder, saved),
                "notebook": str(path) if executed else None,
            }
        )
    return found


def _cells(sections: Sequence[dict[str, Any]], readings: bool) -> Iterator[NotebookNode]:
    """A heading for every stage, and the cells of its executed notebook. Text with the tag
    :data:`COMMITTED` is left out but with ``readings``.
    """
    for section in sections:
        # Cells of a notebook are made anew below: none of them can pass for a heading.
        yield v4.new_markdown_cell(metadata={"section": section})
        if section["notebook"]:
            yield from _notebook(Path(section["notebook"]), readings)


def _notebook(path: Path, readings: bool) -> Iterator[NotebookNode]:
    try:
        for cell in v4.rwbase.rejoin_lines(from_dict(read_json(path))).cells:
            if cell.cell_type == "markdown":
                if readings or COMMITTED not in cell.metadata.get("tags", ()):
                    yield v4.new_markdown_cell(unbadged(cell.source))
            elif cell.cell_type == "code" and cell.source.strip():
                source = _RESULTS.sub(r"\1\2", cell.source)
                yield v4.new_code_cell(source, outputs=cell.outputs)
    except (KeyError, TypeError, AttributeError, RecursionError, ValidationError) as error:
        words = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise BadFile(f"{path}: not a Jupyter notebook of version 4 ({words})") from None


def _pictures(folder: Path, names: Sequence[str]) -> list[dict[str, str]]:
    """The names and the contents, in base64, of those figures that are in the folder itself."""
    paths = [folder / name for name in names]
    return [
        {"name": path.stem, "content": base64.b64encode(path.read_bytes()).decode()}
        for path in paths
        if path.is_file() and path.resolve() == folder / "figures" / path.name
    ]


# --- tables ------------------------------------------------------------------------------


def _html(table: pd.DataFrame) -> Markup:
    html = table.to_html(
        index=False, border=0, na_rep="", float_format="{:.5g}".format, max_rows=5000
    )
    return Markup(html)


def _tables(places: Sequence[Path]) -> Iterator[tuple[str, Markup]]:
    """The tables of a run that are not the data of a figure: name and HTML."""
    for path in (path for place in places for path in sorted(place.glob("*.csv"))):
        # A link leads elsewhere, and a table without a column has nothing to show.
        if path.resolve() == path and path.read_bytes().strip():
            yield f"{path.parent.name}/{path.name}", _html(load_table(path))


def _ledger(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The claims that this run speaks to and all others, or why there is no ledger: a broken
    file of another run does not keep this one from its report.
    """
    results = folder.parent
    if record["configuration"].get("labels") is not None:
        return {"problem": "this run has labels of its own, the claims are about the paper's"}
    try:
        found = ledger(results)
    except BadFile as error:
        return {"problem": str(error).replace(f"{results}/", "")}
    names = found["on"].str.split(", ").str[0].str.split(" and ")
    if folder.name == COMPARISON:
        own = found[names.str.len() > 1]
    else:
        own = found[[display(folder.name) in of for of in names]]
    own = own[["claim", "where", "ours", "verdict"]]
    return {"own": _html(own) if len(own) else None, "all": _html(found)}
