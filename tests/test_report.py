"""The report: everything of a run in one file, from whatever the run left."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import browser
import pandas as pd
import pytest
from reports import Page, code, made, png, prose, run_with, uri

from stllms import artifacts, pipeline, report, run, sampling
from stllms.artifacts import BadFile, Folder
from stllms.config import RunConfig
from stllms.records import Response

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


# -- one file with everything ----------------------------------------------------------------


def test_every_figure_of_the_run_and_of_the_comparison_is_embedded(reference):
    pictures = Counter(Page(reference.read_text(encoding="utf-8")).all("img", "src"))
    folders = (reference.parent, reference.parent.parent / "comparison")
    figures = [path for folder in folders for path in folder.glob("figures/*.png")]
    first = [reference.parent / "figures" / f"{name}.png" for name in report.FIRST]
    assert len(figures) >= 15
    assert pictures == Counter(uri(path.read_bytes()) for path in [*figures, *first])


def test_the_result_comes_before_the_notebooks(reference):
    text = reference.read_text(encoding="utf-8")
    summary = Page(text.partition("<main>")[2].partition("<section>")[0])
    for part in (
        "Profile default: directions from the chains of 200 tasks, steering tried on 60 others",
        "labelled by the annotator grammar",
        "compared with tiny-instruct and SmolLM2-135M-Instruct.",
        "effects peak in middle layers",
        "not shown on a fixture, no evidence about the paper",
    ):
        assert part in summary.text
    links = summary.all("a", "href")
    assert [link for link in links if "figure" in link] == [
        f"#figure-{name}" for name in report.FIRST
    ]
    assert {link[1:] for link in links if link.startswith("#")} <= set(Page(text).ids)
    seconds = text.index("<th>seconds</th>")
    assert seconds > text.index('id="configuration"'), "how long it took comes last"


def test_the_lines_of_the_sampling_audits_are_in_the_summary_and_nowhere_else(results):
    folder = run_with("01_generate", prose("# 01"))
    entry = sampling.entry(100, 1.0, [210.0, 200.0, 100.0, 1, 0.25])
    chain = Response("t", "c", "", (), (), "", "", 0, "", True, True, entry)
    noted = {"sampling_audit_responses": sampling.audit([chain]).recorded, "device": "cpu"}
    Folder(RunConfig()).note(**noted)
    text = report.write(folder).read_text(encoding="utf-8")
    line = "responses: sampling audit: 100 tokens; mean -log p - entropy = +0.1000 +- 0.1000"
    summary = Page(text.partition("<main>")[2].partition("<section>")[0])
    assert line in summary.text
    assert Page(text).text.count("100 tokens") == 1
    assert "devicecpu" in Page(text).text
    assert "sampling_audit" not in text


def test_a_figure_that_was_not_made_is_not_in_the_summary(results):
    folder = run_with("02_train_vectors", code('folder.save_figure("cosine_heatmap", f, d)'))
    (folder / "figures").mkdir()
    for name in ("cosine_heatmap", "steering"):  # the latter of an earlier run
        (folder / "figures" / f"{name}.png").write_bytes(png(4))
    page = made(folder)
    assert [link for link in page.all("a", "href") if "figure" in link] == [
        "#figure-cosine_heatmap"
    ]


def test_only_verdicts_about_the_run_are_in_its_summary():
    on = ["tiny-thinker, 60 tasks", "tiny-thinker and tiny-instruct, 60 tasks", "gpt-4o, 2"]
    released = "released files, 3 thinking and 2 instruct models"
    found = {
        name: [report._speaks_of(Path(name), text) for text in (*on, released)]
        for name in ("tiny-thinker", "tiny-instruct", "comparison")
    }
    assert found == {
        "tiny-thinker": [True, True, False, False],
        "tiny-instruct": [False, True, False, False],
        "comparison": [False, True, False, False],
    }


def test_every_option_is_shown_with_the_value_it_came_to_and_those_given_first(results):
    folder = run_with("01_generate", prose("# 01"), objective="published", n_compare=7)
    text = report.write(folder).read_text(encoding="utf-8")
    rows = re.findall(r"<div( class=\"given\")?><dt>(\w+)</dt><dd>(.*?)</dd></div>", text)
    assert rows[:2] == [
        (' class="given"', "n_compare", "7"),
        (' class="given"', "objective", "published"),
    ]
    assert not any(given for given, *_ in rows[2:])
    values = {name: value for _, name, value in rows}
    assert values["coefficients"] == "-1.0, 0.0, 1.0"
    assert (values["random_directions"], values["n_samples"]) == ("10", "200")
    assert (values["positions"], values["judge"], values["tasks"]) == (
        "own",
        "grammar",
        "grammar",
    )
    assert set(RunConfig().to_dict()) - {"results"} <= set(values)


def test_a_run_whose_tasks_are_gone_keeps_its_report(results, tmp_path):
    tasks = tmp_path / "own.jsonl"
    tasks.write_text('{"id": "1", "content": "question"}')
    folder = run_with(
        "01_generate", prose("# 01"), prose("A reading.", "committed"), tasks=str(tasks)
    )
    tasks.unlink()
    page = made(folder)
    assert "coefficientsnone" in page.text, "as recorded"
    assert "A reading." not in page.text


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
    assert "comparetiny-instruct, SmolLM2-135M-Instruct" in page.text
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
