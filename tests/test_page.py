"""What the report makes of executed notebooks, of their outputs and of tables."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pandas as pd
import pytest
from reports import Page, code, made, png, prose, run_with, shown, uri

from stllms import page, report
from stllms.artifacts import Folder
from stllms.config import RunConfig


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """An empty results folder, used by every configuration of the test."""
    monkeypatch.setenv("STLLMS_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


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
    assert '<table class="dataframe"><tbody><tr><td>7</td></tr></tbody></table>' in visible
    assert "instead of it" not in visible
    assert '<pre class="error">ZeroDivision: &lt;no&gt;</pre>' in visible


@pytest.mark.parametrize(
    ("html", "seen"),
    [
        ("<script>alert(1)</script>", "the plain text"),
        ("<img src='https://elsewhere.example/x.png'>", "the plain text"),
        ('<img src="x.png">', "the plain text"),
        ("<style>@import 'x.css';</style>", "the plain text"),
        ("<iframe></iframe>", "the plain text"),
        ("<LINK rel=stylesheet href=x.css>", "the plain text"),
        ("<div id='plot'></div><script>draw('plot')</script>", "the plain text"),
        ("<p onclick = 'x()'>p</p>", "<p>p</p>"),
        ("<div style='background: url(x.png);color:red'>x</div>", "<div>x</div>"),
        ("<b>bold</b><script>alert(1)</script>", "<b>bold</b>"),
        (f"<img src='{uri(png())}'>", f'<img src="{uri(png())}">'),
        ("<br>" * 200_000, "the plain text"),
    ],
)
def test_an_output_loses_what_runs_or_loads_and_its_text_stands_in_for_nothing(
    results, html, seen
):
    folder = run_with("01_generate", code("show()", shown(html=html, plain="the plain text")))
    text = report.write(folder).read_text(encoding="utf-8")
    assert html not in text
    assert seen in text
    assert ("the plain text" in text) is (seen == "the plain text")


def test_words_that_only_look_like_markup_keep_their_colours(results):
    html = '<span style="background:#99999959">once = url(x) src=y &lt;script&gt;</span>'
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


def test_versions_are_left_to_the_end_of_the_report_and_what_was_printed_stays(results):
    value = {"output_type": "execute_result", "data": {"text/plain": "{'torch': '2.9'}"}}
    printed = {"output_type": "stream", "name": "stdout", "text": "needs notebook 01"}
    ending = "folder = run.ensure(stage)\nartifacts.versions()\n"
    page = made(run_with("01_generate", code(ending, printed, value), code("x", value)))
    assert page.text.count("{'torch': '2.9'}") == 1
    assert "needs notebook 01" in page.text


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, True),
        ({"tasks": "grammar", "batch_size": 4, "device": "cpu"}, True),
        ({"profile": "smoke"}, False),
        ({"judge": "lexical"}, False),
        ({"tasks": "messages"}, False),
        ({"n_samples": 50}, False),
        ({"objective": "published"}, False),
        ({"model": "tiny-instruct"}, False),
    ],
)
def test_readings_of_the_committed_figures_are_for_their_run_alone(results, options, kept):
    cells = [prose("# 01"), prose("What holds."), prose("Reading of ours.", "committed")]
    page = made(run_with("01_generate", *cells, **options))
    assert "What holds." in page.text
    assert ("Reading of ours." in page.text) is kept


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
