"""The report: everything of a run in one file, from whatever the run left."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import browser
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from reports import code, made, parsed, png, prose, run_with, shown, uri

from stllms.app import cli, report
from stllms.config import RunConfig
from stllms.labels import PAPER
from stllms.runs.artifacts import Folder
from stllms.runs.files import BadFile

REFERENCE = Path(__file__).resolve().parent.parent / "results" / "reference"


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """An empty results folder, used by every configuration of the test."""
    monkeypatch.setenv("STLLMS_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """The report of the committed artefacts, which came without executed notebooks."""
    results = tmp_path_factory.mktemp("reference") / "results"
    shutil.copytree(REFERENCE, results, ignore=shutil.ignore_patterns("notebooks", "*.html"))
    return report.write(results / "tiny-thinker")


@pytest.fixture(scope="module")
def page(reference) -> BeautifulSoup:
    return parsed(reference.read_text(encoding="utf-8"))


def summary(page: BeautifulSoup) -> str:
    """What stands before the first notebook."""
    return parsed(str(page.main).partition('<h2 class="part"')[0]).get_text()


def all_of(page: BeautifulSoup, attribute: str) -> list[str]:
    return [one[attribute] for one in page.find_all(attrs={attribute: True})]


# -- one file with everything ----------------------------------------------------------------


def test_every_figure_table_and_version_of_the_run_is_in_the_file(reference, page):
    folders = (reference.parent, reference.parent.parent / "comparison")
    figures = [path for folder in folders for path in folder.glob("figures/*.png")]
    first = [reference.parent / "figures" / f"{name}.png" for name in report.FIRST]
    assert len(figures) >= 15
    assert sorted(all_of(page, "src")) == sorted(uri(p.read_bytes()) for p in figures + first)
    assert len(page.find_all("tr")) > len(pd.read_csv(reference.parent / "steering.csv"))
    record = json.loads((reference.parent / "run.json").read_text())
    said = [f"tiny-thinker/{path.name}" for path in reference.parent.glob("*.csv")]
    said += [f"{name}{version}" for name, version in record["versions"].items()]
    said += map(str, record["identity"].values())
    said += [record["commit"], record["recorded"]["sampling_audit_steered"]["line"]]
    said += pd.read_csv(REFERENCE / "ledger.csv")["claim"].to_list()
    assert [words for words in said if words not in page.get_text()] == []


def test_the_result_and_its_verdicts_come_before_the_notebooks(reference, page):
    seen = summary(page)
    for part in (
        "directions from the responses to 200 tasks, steering tried on 60 others",
        "annotator grammar",
        "A fixture: this model was built to be steerable.",
        "The model: no embedding for",
        "04_steer: done, without an executed copy",
        "effects peak in middle layers",
    ):
        assert part in seen
    rows = pd.read_csv(reference.parent / "figures" / "steering.csv").set_index("mode")
    positive, baseline = rows.loc["positive"].iloc[0], rows.loc["plain"].iloc[0]
    table = [[c.text for c in row.find_all("td")] for row in page.select(".effects tbody tr")]
    effect = "{0.value:.2f} ({0.low:.2f} to {0.high:.2f})"
    null = "{0.null_low:.2f} to {0.null_high:.2f}"
    assert table[0][:4] == [
        "backtracking", effect.format(baseline), effect.format(positive), null.format(positive),
    ]  # fmt: skip
    assert [name for name, *_ in table] == list(PAPER.targets)
    ledger = pd.read_csv(REFERENCE / "ledger.csv").groupby("claim")["on"].agg(" ".join)
    own = ledger.str.contains("tiny-thinker")
    assert {claim: claim in seen for claim in ledger.index} == own.to_dict()


def test_a_coefficient_that_breaks_the_text_is_among_the_warnings(reference, tmp_path):
    folder = tmp_path / "results" / "tiny-thinker"
    shutil.copytree(reference.parent, folder)
    rows = pd.read_csv(folder / "steering.csv")
    own = (rows["direction"] == "backtracking") & (rows["coefficient"] == 1)
    rows.loc[own & (rows["metric"] == "loops"), "value"] = 0.9
    rows.to_csv(folder / "steering.csv", index=False)
    record = json.loads((folder / "run.json").read_text())
    del record["artefacts"]["steering.csv"]
    (folder / "run.json").write_text(json.dumps(record))
    assert "backtracking +1 breaks the text: loops 0.90" in summary(made(folder))


def with_own_labels(reference, tmp_path) -> Path:
    """The committed run as if it had labels of a person's own, whose file is gone."""
    folder = tmp_path / "results" / "tiny-thinker"
    shutil.copytree(reference.parent, folder)
    rows = pd.read_csv(folder / "steering.csv")
    names = dict(zip(PAPER.names, ("a", "b", "c", "d", "planning", "refusal"), strict=True))
    rows = rows.replace({"behaviour": names, "direction": names})
    kept = ~rows["behaviour"].isin(["c", "d"]) | (rows["metric"] != "token fraction")
    rows[kept].to_csv(folder / "steering.csv", index=False)
    record = json.loads((folder / "run.json").read_text())
    del record["artefacts"]["steering.csv"]
    record["identity"]["labels"] = "mine:0123456789ab"
    record["configuration"]["labels"] = str(tmp_path / "gone.yaml")
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_own_labels_and_their_targets_are_in_the_summary_and_nothing_is_said_of_the_paper(
    reference, tmp_path
):
    page = parsed(report.write(with_own_labels(reference, tmp_path)).read_text("utf-8"))
    seen = summary(page)
    assert "labels mine with the targets refusal, planning," in seen
    table = [row.find("td").text for row in page.select(".effects tbody tr")]
    assert table == ["refusal", "planning"]
    assert "In none of 200 chains: a, b, c, d, planning, refusal" in seen
    assert "effects peak in middle layers" not in seen, "no row in the ledger"
    paper = summary(parsed(reference.read_text("utf-8")))
    assert "with the targets" not in paper
    assert "In none of" not in paper


def test_a_label_that_never_occurs_is_named(reference, tmp_path):
    folder = tmp_path / "results" / "tiny-thinker"
    shutil.copytree(reference.parent, folder)
    path = folder / "annotations.jsonl"
    path.write_text(path.read_text().replace('"label": "backtracking"', '"label": "deduction"')
                    .replace('"label":"backtracking"', '"label":"deduction"'))  # fmt: skip
    record = json.loads((folder / "run.json").read_text())
    del record["artefacts"]["annotations.jsonl"]
    (folder / "run.json").write_text(json.dumps(record))
    seen = summary(parsed(report.write(folder).read_text("utf-8")))
    assert "In none of 200 chains: backtracking" in seen


def test_the_file_asks_for_nothing_else_and_its_contents_lead_somewhere(reference, page):
    assert page.find_all(["script", "link", "iframe", "base"]) == []
    attributes = {name for one in page.find_all() for name in one.attrs}
    assert not [name for name in attributes if name.startswith("on") or name == "srcset"]
    assert all(source.startswith("data:image/") for source in all_of(page, "src"))
    text = reference.read_text(encoding="utf-8")
    assert "@import" not in text
    assert not re.search(r"url\(\s*[\"']?(?!data:)", text)
    inside = [href[1:] for href in all_of(page, "href") if href.startswith("#")]
    ids = all_of(page, "id")
    assert len(inside) > 8
    assert set(inside) <= set(ids)
    assert len(ids) == len(set(ids))


def test_the_command_gives_the_same_bytes_of_the_same_artefacts(reference, capsys):
    before = reference.read_bytes()
    assert cli.main(["report", str(reference.parent)]) == 0
    assert capsys.readouterr().out == f"{reference}\n"
    assert reference.read_bytes() == before


def test_no_path_of_the_machine_is_shared(results):
    place = json.dumps(str(results))
    folder = run_with("01_generate", code(f"# Parameters\nresults = {place}\nseed = 0"))
    text = report.write(folder).read_text(encoding="utf-8")
    assert str(results.parent) not in text
    assert 'results = "results"' in parsed(text).get_text(), "its name stays"


# -- executed notebooks ----------------------------------------------------------------------


def test_code_is_folded_away_and_outputs_are_not(results):
    stream = {"output_type": "stream", "name": "stdout", "text": ["one & \x1b[1mtwo"]}
    error = {"output_type": "error", "ename": "Z", "evalue": "", "traceback": ["Zero: <no>"]}
    table = "<table class='dataframe'><td>7</td></table>"
    cells = [
        prose("# 01 · One"),
        code("print(x)", stream),
        code("table", shown(html=table, plain="instead of it")),
        code("1 / 0", error),
        code("plt.plot()", shown(png=uri(png()).partition(",")[2], plain="a figure")),
    ]
    text = report.write(run_with("01_generate", *cells)).read_text(encoding="utf-8")
    body = text.partition("<body>")[2]
    visible = re.sub(r"<details class=\"code\">.*?</details>", "", body, flags=re.DOTALL)
    assert '<span class="nb">print</span>' in body
    assert '<span class="nb">print</span>' not in visible
    assert "<pre>one &amp; two</pre>" in visible
    assert "<table><tbody><tr><td>7</td></tr></tbody></table>" in visible
    assert "instead of it" not in visible
    assert '<pre class="error">Zero: &lt;no&gt;</pre>' in visible
    assert all_of(parsed(text), "src") == [uri(png())]
    assert "01 · One" in visible


@pytest.mark.parametrize(
    ("html", "seen"),
    [
        ("<script>alert(1)</script>", "the plain text"),
        ("<p onclick = 'x()'>p</p>", "<p>p</p>"),
        ("<div style='background: url(x.png);color:red'>x</div>", "<div>x</div>"),
        ("<b>bold</b><script>alert(1)</script>", "<b>bold</b>"),
        ("<br>" * 200_000, "the plain text"),
    ],
)
def test_an_output_loses_what_runs_or_loads_and_its_text_stands_in_for_nothing(
    results, html, seen
):
    kept = '<span style="background:#99999959">once = url(x) src=y &lt;script&gt;</span>'
    outputs = [shown(html=html, plain="the plain text"), shown(html=kept, plain="HTML object")]
    folder = run_with("01_generate", code("show()", *outputs))
    text = report.write(folder).read_text(encoding="utf-8")
    assert html not in text
    assert seen in text
    assert ("the plain text" in text) is (seen == "the plain text")
    assert kept in text, "words that only look like markup"


def test_progress_bars_badges_and_pictures_from_elsewhere_are_left_out(results):
    bar = shown(plain="a bar", **{"application/vnd.jupyter.widget-view+json": "{}"})
    badge = "[![Open in Colab](https://a.example/b.svg)](https://c.example/01.ipynb)"
    cells = [
        prose(f"# 01\n\n{badge}"),
        prose("![a drawing](https://elsewhere.example/d.png) <img src='https://e.example'>"),
        code("go()", bar),
    ]
    page = made(run_with("01_generate", *cells))
    assert "a bar" not in page.get_text()
    assert "Open in Colab" not in page.get_text()
    assert all_of(page, "src") == []
    assert "a drawing" in all_of(page, "alt")


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, True),
        ({"tasks": "grammar", "batch_size": 4, "device": "cpu"}, True),
        ({"profile": "smoke"}, False),
        ({"judge": "lexical"}, False),
        ({"objective": "published"}, False),
        ({"model": "tiny-instruct"}, False),
        ({"tasks": "gone.jsonl"}, False),
    ],
)
def test_readings_of_the_committed_figures_are_for_their_run_alone(
    results, tmp_path, monkeypatch, options, kept
):
    monkeypatch.chdir(tmp_path)
    own = Path("gone.jsonl")
    own.write_text('{"id": "1", "content": "question"}')
    cells = [prose("# 01"), prose("What holds."), prose("Reading of ours.", "committed")]
    folder = run_with("01_generate", *cells, **options)
    own.unlink()
    text = made(folder).get_text()
    assert "What holds." in text
    assert ("Reading of ours." in text) is kept


# -- what is missing -------------------------------------------------------------------------


def test_each_missing_notebook_is_named(results):
    folder = run_with("01_generate", prose("# 01"))
    run_with("02_train_vectors", prose("# 02"), done=False)
    name = "03_attribute_layers"
    run_with(name, prose("# 03"), done=False, name=f"{name}.failed")
    seen = summary(made(folder))
    for state in (
        "02_train_vectors: executed, but not finished",
        "03_attribute_layers: failed when it was last run",
        "04_steer: not run",
    ):
        assert state in seen
    assert "01_generate:" not in seen


def test_the_comparison_is_shown_only_to_models_that_are_in_it(results):
    comparison = Folder.comparison(RunConfig()).open()
    comparison.mark("05_compare", {"files": []})
    folder = run_with("01_generate", prose("# 01"))
    assert "05_compare" not in all_of(made(folder), "id")
    comparison.member("tiny-thinker").open()
    assert {"01_generate", "05_compare"} <= set(all_of(made(folder), "id"))
    alone = all_of(made(comparison.path), "id")
    assert "05_compare" in alone
    assert "01_generate" not in alone


def test_a_broken_table_of_another_run_is_told_and_one_of_the_run_itself_is_refused(results):
    folder = run_with("01_generate", prose("# 01"))
    (results / "other").mkdir()
    (results / "other" / "steering.csv").write_text("a,b\n1,2\n")
    assert (
        "There is no ledger: other/steering.csv: no column behaviour" in made(folder).get_text()
    )
    baseline = "metric,direction,behaviour,coefficient,value\nloops,x,,1,0\n"
    for content in ("a,b\n1,2\n", baseline.replace("metric", "m"), baseline):
        (folder / "steering.csv").write_text(content)
        with pytest.raises(BadFile, match=r"/steering\.csv: not a table of steering"):
            report.write(folder)


@pytest.mark.parametrize("content", [None, "[]", '{"stages": {}}'])
def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "run.json" in capsys.readouterr().err
    assert not (tmp_path / report.NAME).exists()


# -- in a browser ------------------------------------------------------------------------------


@pytest.mark.long
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
        ground = "getComputedStyle(document.body).backgroundColor"
        light = view.evaluate(ground)
        view.emulate_media(color_scheme="dark")
        assert view.evaluate(ground) != light
