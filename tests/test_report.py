"""The report: everything of a run in one file, from whatever the run left."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import browser
import pandas as pd
import pytest

from stllms import artifacts, page, pipeline, report, run
from stllms.artifacts import BadFile, Folder
from stllms.config import RunConfig

REFERENCE = Path(__file__).resolve().parent.parent / "results" / "reference"


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


def prose(text: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def code(text: str, *outputs: dict) -> dict:
    return {"cell_type": "code", "metadata": {}, "source": text, "outputs": list(outputs)}


def shown(**data: str) -> dict:
    names = {"png": "image/png", "html": "text/html", "plain": "text/plain"}
    return {
        "output_type": "display_data",
        "data": {names.get(name, name.replace("__", "/")): text for name, text in data.items()},
    }


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """An empty results folder, used by every configuration of the test."""
    monkeypatch.setenv("STLLMS_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


def run_with(stage: str, *cells: dict, done: bool = True, name: str | None = None) -> Path:
    """The folder of a run that has one executed notebook."""
    folder = Folder(RunConfig()).open()
    folder.notebooks.mkdir(exist_ok=True)
    path = folder.notebooks / f"{name or stage}.ipynb"
    path.write_text(json.dumps({"cells": list(cells)}), encoding="utf-8")
    if done:
        folder.mark(stage, {"files": [], "seconds": 12.5})
    return folder.path


def made(folder: Path) -> Page:
    return Page(report.write(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """The report of the committed artefacts, which came without executed notebooks."""
    results = tmp_path_factory.mktemp("reference") / "results"
    shutil.copytree(REFERENCE, results, ignore=shutil.ignore_patterns("notebooks", "*.html"))
    return report.write(results / "tiny-thinker")


# -- one file with everything ----------------------------------------------------------------


def test_every_figure_of_the_run_and_of_the_comparison_is_embedded_once(reference):
    pictures = Counter(Page(reference.read_text(encoding="utf-8")).all("img", "src"))
    folders = (reference.parent, reference.parent.parent / "comparison")
    figures = [path for folder in folders for path in folder.glob("figures/*.png")]
    assert len(figures) >= 15
    assert pictures == Counter(uri(path.read_bytes()) for path in figures)


def test_tables_ledger_configuration_and_versions_are_there(reference):
    page = Page(reference.read_text(encoding="utf-8"))
    record = json.loads((reference.parent / "run.json").read_text())
    for path in reference.parent.glob("*.csv"):
        assert f"tiny-thinker/{path.name}" in page.text
    tables = [pd.read_csv(path) for path in reference.parent.glob("*.csv")]
    rows = sum(len(table) for table in tables if "null_low" in table.columns)
    assert page.all("td", "data-column").count("null_low") == rows > 300
    for claim in pd.read_csv(REFERENCE / "ledger.csv")["claim"]:
        assert claim in page.text
    for name, version in record["versions"].items():
        assert f"{name}{version}" in page.text
    for value in record["identity"].values():
        assert ("none" if value is None else str(value)) in page.text
    assert record["commit"] in page.text
    assert "fixture" in page.text


def test_the_file_asks_for_nothing_else(reference):
    text = reference.read_text(encoding="utf-8")
    page = Page(text)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "iframe", "base"})
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert "srcset" not in attributes
        if "src" in attributes:
            assert attributes["src"].startswith("data:image/"), tag
    assert "@import" not in text
    assert not re.search(r"url\(\s*[\"']?(?!data:)", text)


def test_the_contents_lead_somewhere(results):
    cells = [prose("# 01 · One\n\n## A part\n\n### Deep\n\n## A part")]
    page = made(run_with("01_generate", *cells))
    inside = [href[1:] for href in page.all("a", "href") if href.startswith("#")]
    assert len(inside) > 8
    assert set(inside) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids)), "two parts of one name have two anchors"
    tags = [tag for tag, _ in page.elements]
    assert tags.count("h1") == 1, "the notebook's own title is one level lower"


def test_the_same_artefacts_give_the_same_bytes(reference):
    before = reference.read_bytes()
    for path in reference.parent.parent.rglob("*"):
        os.utime(path)
    assert report.write(reference.parent).read_bytes() == before


def test_no_path_of_the_machine_is_shared(results):
    place = json.dumps(str(results))
    folder = run_with("01_generate", code(f"# Parameters\nresults = {place}\nseed = 0"))
    text = report.write(folder).read_text(encoding="utf-8")
    assert str(results.parent) not in text
    assert 'results = "results"' in Page(text).text, "its name stays"


# -- executed notebooks ----------------------------------------------------------------------


def test_code_is_folded_away_and_outputs_are_not(results):
    cells = [
        prose("# 01 · One"),
        code("x = 1"),
        code(
            "print(x)", {"output_type": "stream", "name": "stdout", "text": "one & \x1b[1mtwo"}
        ),
        code(
            "table",
            shown(html="<table class='dataframe'><td>7</td></table>", plain="instead of it"),
        ),
        code("1 / 0", {"output_type": "error", "traceback": ["ZeroDivision: <no>"]}),
    ]
    text = report.write(run_with("01_generate", *cells)).read_text(encoding="utf-8")
    page = Page(text)
    assert page.all("details", "class").count("code") == 3, "silent code joins the next"
    body = text.partition("<body>")[2]
    visible = re.sub(r"<details class=\"code\">.*?</details>", "", body, flags=re.DOTALL)
    assert "print" in body
    assert "print" not in visible
    assert "one &amp; " in visible
    assert "<table class='dataframe'><td>7</td></table>" in visible
    assert "instead of it" not in visible
    assert '<pre class="error">ZeroDivision: &lt;no&gt;</pre>' in visible


@pytest.mark.parametrize(
    "html",
    [
        "<script>alert(1)</script>",
        "<img src='https://elsewhere.example/x.png'>",
        '<img src="x.png">',
        "<p onclick = 'x()'>p</p>",
        "<style>@import 'x.css';</style>",
        "<div style='background: url(x.png)'>x</div>",
        "<iframe></iframe>",
        "<LINK rel=stylesheet href=x.css>",
    ],
)
def test_an_output_that_runs_or_loads_something_is_replaced_by_its_text(results, html):
    folder = run_with("01_generate", code("show()", shown(html=html, plain="the plain text")))
    text = report.write(folder).read_text(encoding="utf-8")
    assert html not in text
    assert "the plain text" in text


def test_words_that_only_look_like_markup_keep_their_colours(results):
    html = "<span style='background:#99999959'>once = url(x) src=y &lt;script&gt;</span>"
    folder = run_with("01_generate", code("show()", shown(html=html, plain="HTML object")))
    assert html in report.write(folder).read_text(encoding="utf-8")


def test_progress_bars_badges_and_pictures_from_elsewhere_are_left_out(results):
    bar = {"application/vnd.jupyter.widget-view+json": "{}", "text/plain": "a bar"}
    cells = [
        prose(
            "# 01\n\n[![Open in Colab](https://a.example/b.svg)](https://c.example/01.ipynb)"
        ),
        prose("![a drawing](https://elsewhere.example/d.png) <img src='https://e.example'>"),
        code("go()", {"output_type": "display_data", "data": bar}),
    ]
    page = made(run_with("01_generate", *cells))
    assert "a bar" not in page.text
    assert "Open in Colab" not in page.text
    assert "a drawing" in page.text
    assert page.all("img", "src") == []


def test_a_saved_figure_is_taken_from_the_run_where_it_has_more_dots(results):
    save = 'folder.save_figure("good", figure, data)'
    small = base64.b64encode(png(1, 80)).decode()
    cells = [code(save, shown(png=small)), code("plt.plot()", shown(png=small))]
    folder = run_with("01_generate", *cells)
    (folder / "figures").mkdir()
    (folder / "figures" / "good.png").write_bytes(png(2, 300))
    page = made(folder)
    assert page.all("img", "src") == [uri(png(2, 300)), uri(png(1, 80))]
    assert page.all("img", "width") == ["192"], "300 dots at 150 an inch, 96 pixels an inch"
    assert "figure-good" in page.ids


def test_a_figure_that_no_cell_shows_is_there_all_the_same(results):
    folder = run_with("01_generate", code("x"))
    (folder / "figures").mkdir()
    (folder / "figures" / "other.png").write_bytes(png(3))
    Folder(RunConfig()).mark("01_generate", {"files": ["figures/other.png"]})
    assert made(folder).all("img", "src") == [uri(png(3))]


# -- what is missing -------------------------------------------------------------------------


def states(page: Page) -> dict[str, str]:
    found = re.findall(r"(0\d_\w+)\n?((?:done|executed|failed|not)[^\n]*)\n", page.text)
    return {stage: state.rstrip("0123456789.") for stage, state in found}


def test_each_missing_notebook_is_named(results):
    folder = run_with("01_generate", prose("# 01"))
    run_with("02_train_vectors", prose("# 02"), done=False)
    run_with(
        "03_attribute_layers", prose("# 03"), done=False, name="03_attribute_layers.failed"
    )
    page = made(folder)
    assert states(page) == {
        "01_generate": "done",
        "02_train_vectors": "executed, but not finished",
        "03_attribute_layers": "failed when it was last run",
        "04_steer": "not run",
    }
    assert "04_steer: not run." in page.text


def test_a_notebook_without_its_executed_copy_shows_figures_and_says_so(reference):
    page = Page(reference.read_text(encoding="utf-8"))
    assert page.text.count("without an executed copy: only its figures and tables.") == 5


def test_the_comparison_is_shown_only_to_models_that_are_in_it(results):
    config = RunConfig()
    comparison = Folder.comparison(config).open()
    comparison.mark("05_compare", {"files": []})
    folder = run_with("01_generate", prose("# 01"))
    assert "05_compare" not in made(folder).ids
    comparison.member("tiny-thinker").open()
    assert "05_compare" in made(folder).ids
    alone = made(comparison.path)
    assert "05_compare" in alone.ids
    assert "01_generate" not in alone.ids


def test_a_broken_file_of_another_run_is_said_in_the_report(results):
    folder = run_with("01_generate", prose("# 01"))
    (results / "other").mkdir()
    (results / "other" / "steering.csv").write_text("a,b\n1,2\n")
    page = made(folder)
    assert "There is no ledger: other/steering.csv: no column behaviour" in page.text


@pytest.mark.parametrize("content", [None, "[]", '{"stages": {}}'])
def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(BadFile, match=r"run\.json"):
        report.write(tmp_path)
    assert report.main([str(tmp_path)]) == 2
    assert "run.json" in capsys.readouterr().err
    assert not (tmp_path / report.NAME).exists()


def test_the_command_prints_the_path(results, capsys):
    folder = run_with("01_generate", prose("# 01"))
    assert report.main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"


# -- tables ----------------------------------------------------------------------------------


def test_a_table_has_its_columns_at_every_cell_and_escapes_its_text():
    values = pd.DataFrame(
        {"a": [1.23456789, float("nan")], "b": ["<b>; two", None], "n": [3, 4]}
    )
    text = str(page.table(values))
    assert '<td data-column="a">1.2346</td>' in text
    assert '<td data-column="a"></td><td data-column="b"></td>' in text
    assert "&lt;b&gt;<br>two" in text
    assert '<td data-column="n">4</td>' in text


# -- made by a run, only when something changed ------------------------------------------------


@pytest.fixture
def complete(results) -> RunConfig:
    """A results folder in which every stage is done and has left nothing."""
    config = RunConfig()
    for stage in pipeline.STAGES:
        folder = pipeline.folder_of(stage, config).open()
        folder.mark(stage, {"key": pipeline.key_of(stage, config), "files": []})
    return config


def test_a_run_prints_the_path_of_its_report_last(complete, capsys):
    assert run.main([]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "nothing to do" in said[0]
    assert said[-1] == f"report: {complete.folder / 'report.html'}"
    assert (complete.folder / "report.html").is_file()
    assert not (complete.results_folder / "comparison" / "report.html").exists()


def test_a_run_of_the_comparison_alone_has_its_report_there(complete, capsys):
    assert run.main(["--from", "05"]) == 0
    path = complete.results_folder / "comparison" / "report.html"
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {path}"
    assert path.is_file()


def test_a_notebook_that_runs_earlier_ones_makes_no_report(complete, capsys):
    assert run.main(["--configuration", json.dumps(complete.parameters()), "--to", "02"]) == 0
    assert "report" not in capsys.readouterr().out
    assert not (complete.folder / "report.html").exists()


def test_nothing_to_do_imports_nothing_slow(complete):
    assert run.main([]) == 0
    path = complete.folder / "report.html"
    before = path.stat().st_mtime_ns
    program = (
        "import sys\nfrom stllms import run\nassert run.main([]) == 0\n"
        "slow = {'torch', 'pandas', 'nbconvert', 'jinja2', 'papermill', 'matplotlib'}\n"
        "print(sorted(slow & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == [f"report: {path}", "[]"]
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "name",
    [
        "tiny-thinker/run.json",
        "another-model/run.json",
        "comparison/run.json",
        "tiny-thinker/notebooks/04_steer.ipynb",
        "comparison/notebooks/05_compare.ipynb",
        "published/heatmap.csv",
    ],
)
def test_a_report_older_than_an_input_is_made_again(complete, name):
    path = report.ensure(complete.folder)
    assert report.is_current(complete.folder)
    later = path.stat().st_mtime_ns + 1_000_000
    given = complete.results_folder / name
    given.parent.mkdir(parents=True, exist_ok=True)
    if not given.exists():
        given.write_text('{"cells": []}' if given.suffix == ".ipynb" else "")
    os.utime(given, ns=(later, later))
    assert not report.is_current(complete.folder)


def test_a_current_report_is_left_alone_and_a_stale_one_is_not(complete):
    path = report.ensure(complete.folder)
    path.write_text("mine")
    assert report.ensure(complete.folder).read_text() == "mine"
    later = path.stat().st_mtime_ns + 1_000_000
    os.utime(complete.folder / "run.json", ns=(later, later))
    assert report.ensure(complete.folder).read_text() != "mine"


def test_fresh_deletes_the_report(complete):
    assert run.main([]) == 0
    assert "report.html" in artifacts.Folder(complete).fresh()
    assert not (complete.folder / "report.html").exists()


# -- in a browser ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
def test_a_browser_asks_for_nothing_and_never_scrolls_sideways(reference, width, tmp_path):
    with browser.chromium() as started:
        view = started.new_page(viewport={"width": width, "height": 900})
        asked = []
        view.on("request", lambda request: asked.append(request.url))
        view.goto(reference.as_uri())
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        assert view.evaluate("document.documentElement.scrollWidth") == width
        broken = "[...document.images].filter(image => !image.naturalWidth).length"
        assert view.evaluate(broken) == 0
        view.screenshot(path=tmp_path / f"report-{width}.png", full_page=True)
        print(f"\nlook at {tmp_path / f'report-{width}.png'}")
