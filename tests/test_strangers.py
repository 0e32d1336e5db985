"""A run of somebody else: whatever its texts say, its report runs nothing and loads nothing.

The page is read by ``html5lib``, which builds the tree that a browser builds, and (slow) by a
browser. Each payload is first shown to be one: the reader of this test finds it in a bare page,
and the browser runs it there.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import browser
import pytest
from bs4 import BeautifulSoup
from reports import code, png, prose, shown

from stllms.app import report
from stllms.config import RunConfig
from stllms.plotting import text
from stllms.records import Annotation, PlacedSegment, Response
from stllms.runs.artifacts import Folder
from stllms.runs.files import BadFile

#: What every payload does as soon as it runs.
RUN = "document.documentElement.dataset.ran=1"
SVG = f"<svg xmlns='http://www.w3.org/2000/svg' onload='{RUN}'><script>{RUN}</script></svg>"
PAGE = base64.b64encode(f"<script>top.{RUN}</script>".encode()).decode()
ELSEWHERE = "http://elsewhere.invalid/x"

#: Those that run, or ask for something, when the page is opened.
AT_ONCE = {
    "script": f"<script>{RUN}</script>",
    "image": f"<img src=x onerror={RUN}>",
    "slash": f"<svg/onload={RUN}>",
    "slashes": f"<img/src=x/onerror={RUN}>",
    "glued": f'<img src="data:,x"onerror={RUN}>',
    "quoted >": f'<img title=">" src="data:,x" onerror={RUN}>',
    "quoted <": f'<img title="<" src="data:,x" onerror={RUN}>',
    "animate": f"<svg><animate/onbegin={RUN} attributeName=x dur=1s>",
    "body": f"</pre></td></table></div><body onload={RUN}>",
    "details": f"<details open ontoggle={RUN}>d</details>",
    "quote": f"\"'><img src=x onerror={RUN}>",
    "comment": f"<!--><img src=x onerror={RUN}>-->",
    "mutation": f"<math><mtext><table><mglyph><style><!--</style><img src=x onerror={RUN}>",
    "noscript": f'<noscript><p title="</noscript><img src=x onerror={RUN}>">',
    "title": f"</title></style></textarea><script>{RUN}</script>",
    "svg": SVG,
    "srcdoc": f'<iframe srcdoc="<script>parent.{RUN}</script>"></iframe>',
    "refresh": f'<meta http-equiv="refresh" content="0;url={ELSEWHERE}">',
    "embed": f"<embed src={ELSEWHERE}>",
    "object": f"<object data={ELSEWHERE}></object>",
    "style": f"<style>body {{ background: url({ELSEWHERE}) }}</style>",
    "entity": f'<p/style="background:u&#114;l({ELSEWHERE})">u</p>',
    "url": f'<p style="background:url({ELSEWHERE})">u</p>',
    "sheet": f'<link rel="stylesheet" href="{ELSEWHERE}">',
    "srcset": f'<img srcset="{ELSEWHERE} 2x">',
    "poster": f'<video poster="{ELSEWHERE}"></video>',
    "audio": f'<audio src="{ELSEWHERE}" autoplay></audio>',
}
#: Those that wait for somebody to click, or for another element.
ON_CLICK = {
    "link": f'<a href="javascript:{RUN}">l</a>',
    "spaced": f'<a href=" java&#10;script:{RUN}">l</a>',
    "data": f'<a href="data:text/html;base64,{PAGE}">l</a>',
    "markdown": f"[l](javascript:{RUN}) ![p](javascript:{RUN}) <javascript:{RUN}>",
    "xlink": f'<svg><a xlink:href="javascript:{RUN}"><text y="9">l</text></a></svg>',
    "form": f'<form action="{ELSEWHERE}"><button>b</button></form>',
    "formaction": f'<button formaction="javascript:{RUN}">b</button>',
    "base": f'<base href="{ELSEWHERE}">',
    "cover": '<div style="position:fixed;inset:0">your session ended</div>',
    "above": '<p style="margin-top:-9999px">over what stands above</p>',
    "area": f'<map><area shape="default" href="javascript:{RUN}"></map>',
}
PAYLOADS = AT_ONCE | ON_CLICK
ALL = "\n\n".join(PAYLOADS.values())

#: What stands in the page itself, and nowhere else in it.
OWN_META = ["utf-8", "width=device-width, initial-scale=1", "no-referrer"]
ALLOWED = {
    "html", "head", "body", "meta", "title", "style", "nav", "main", "section", "figure",
    "figcaption", "details", "summary", "a", "img", "h1", "h2", "h3", "h4", "h5", "h6", "p",
    "pre", "code", "div", "span", "table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd",
    "ul", "ol", "li", "strong", "em", "b", "i", "del", "br", "hr", "blockquote",
}  # fmt: skip
ATTRIBUTES = {
    "class", "style", "title", "href", "src", "alt", "id", "rel", "width", "height", "border",
    "colspan", "rowspan", "data-column", "aria-label", "charset", "name", "content", "lang",
    "http-equiv", "open",
}  # fmt: skip


def dangers(text: str) -> list[str]:
    """What in a page is no plain part of a report: elements, attributes and addresses."""
    soup = BeautifulSoup(text, "html5lib")
    found = [f"<{one.name}>" for one in soup.find_all() if one.name not in ALLOWED]
    found += ["a style in the body" for _ in soup.body.find_all("style")]
    for one in soup.find_all("meta"):
        policy = one.get("http-equiv") == "Content-Security-Policy"
        if not policy and (one.get("content") or one.get("charset")) not in OWN_META:
            found.append(f"meta {one.attrs}")
    for one in soup.find_all():
        for name, value in one.attrs.items():
            value = " ".join(value) if isinstance(value, list) else value
            if name not in ATTRIBUTES:
                found.append(f"{one.name} {name}")
            elif name == "href" and not value.startswith(("#", "https://", "http://")):
                found.append(f"href {value}")
            elif name == "src" and not value.startswith("data:image/"):
                found.append(f"src {value}")
            elif name == "style" and any(x in value for x in ("url(", "position", ":-", "@")):
                found.append(f"style {value}")
    return found


@pytest.mark.parametrize("name", [name for name in PAYLOADS if name not in ("markdown",)])
def test_the_reader_of_this_test_sees_a_payload(name):
    assert dangers(f"<!doctype html><body>{PAYLOADS[name]}</body>")


# -- the run of a stranger ---------------------------------------------------------------------


def chains() -> str:
    """HTML of the package's own, as notebooks show it, of a model that writes payloads."""
    segments = (
        PlacedSegment(ALL, ALL[:200], 0, 200),
        PlacedSegment("backtracking", ALL[200:], 200, len(ALL)),
    )
    response = Response(ALL, ALL, ALL, (), (), ALL, ALL, 0, ALL, closed=True, finished=True)
    panel = text.Panel(ALL, ALL, segments, [0.5] * 6, ALL)
    return (
        text.html_chains([response], [Annotation(ALL, ALL, segments)])
        + text.html_panels([panel])
        + text.html_line(ALL, wrong=True)
        + text.html_pairs({ALL: None})
    )


def cells() -> list[dict]:
    """Prose, code and every kind of output, each with every payload."""
    stream = {"output_type": "stream", "name": "stdout", "text": f"\x1b]8;;x\x07{ALL}\x1b[31m"}
    error = {"output_type": "error", "ename": ALL, "evalue": ALL, "traceback": [ALL, "\ud800"]}
    made = [prose(f"# {ALL}"), prose(ALL), prose(f"## t\n\n| a |\n|--|\n| {ALL} |")]
    made += [prose(f"# {one}\n\n- {one}\n\n```{one}\n{one}\n```") for one in PAYLOADS.values()]
    made += [code("show()", shown(html=one, plain=one)) for one in PAYLOADS.values()]
    made += [
        code(f'# {ALL}\nfolder.save_figure("\'><script>", f, d)', stream, error),
        code("svg", shown(image__svg__xml=SVG), shown(**{"image/svg+xml": ALL})),
        code("pictures", shown(png=ALL), shown(**{"image/jpeg": f'" onerror="{RUN}'})),
        code("chains", shown(html=chains(), plain="chains")),
        code("other", shown(**{"text/markdown": ALL, "application/javascript": RUN})),
        code('folder.save_figure("../../secret", f, d)', shown(plain="a figure")),
    ]
    return made


@pytest.fixture
def stranger(tmp_path, monkeypatch) -> Path:
    """The folder of a run in which every text is every payload."""
    monkeypatch.setenv("STLLMS_RESULTS", str(tmp_path / "results"))
    folder = Folder(RunConfig()).open()
    folder.notebooks.mkdir()
    (folder.notebooks / "01_generate.ipynb").write_text(json.dumps({"cells": cells()}))
    folder.figures.mkdir()
    (folder.figures / "good.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png(7))
    (tmp_path / "results" / "secret.png").write_bytes(png(7))
    (folder.figures / "link.png").symlink_to(tmp_path / "secret.png")
    (folder.figures / "steering.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "secret.csv").write_text("password")
    (folder / "link.csv").symlink_to(tmp_path / "secret.csv")
    quoted = '"' + ALL.replace('"', '""') + '"'
    (folder / "own.csv").write_text(f"{quoted},b\n{quoted},{quoted}\n")
    (folder.figures / "own.csv").write_text(f"{quoted}\n{quoted}\n")
    names = ["figures/good.png", "figures/link.png", "../../secret.png", f"figures/{ALL}.png"]
    record = json.loads(folder.run.read_text())
    texts = {ALL: ALL, "device": ALL, "list": [ALL]}
    record |= {"identity": texts, "versions": texts, "recorded": texts, "commit": ALL}
    record["configuration"] |= {"model": ALL, "profile": ALL, "judge": ALL, ALL: [ALL]}
    record["stages"] = {"02_train_vectors": {"files": names, "seconds": ALL}}
    folder.run.write_text(json.dumps(record))
    comparison = Folder.comparison(RunConfig()).open()
    comparison.member("tiny-thinker").open()
    (comparison / "comparison.csv").write_text(f"model,{quoted}\n{quoted},{quoted}\n")
    return folder.path


def test_a_stranger_s_run_gives_a_page_without_anything_that_runs_or_loads(stranger):
    page = report.write(stranger).read_text(encoding="utf-8")
    assert dangers(page) == []
    soup = BeautifulSoup(page, "html5lib")
    shown_text = soup.get_text()
    assert shown_text.count(PAYLOADS["script"]) > 10, "what is text is shown, as text"
    assert "your session ended" in shown_text
    policy = soup.find_all("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    rules = dict(rule.split(maxsplit=1) for rule in policy["content"].split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert not [name for name in rules if name.startswith("script")]
    secret, own = (base64.b64encode(png(grey)).decode() for grey in (7, 0))
    assert any(own in one.get("src", "") for one in soup.find_all("img"))
    assert secret not in page, "a picture from outside of the run"
    assert "password" not in page


def report_of(tmp_path: Path, monkeypatch, cells: object) -> Path:
    """The report of a run whose first notebook has ``cells``."""
    monkeypatch.setenv("STLLMS_RESULTS", str(tmp_path / "results"))
    folder = Folder(RunConfig()).open()
    folder.notebooks.mkdir()
    (folder.notebooks / "01_generate.ipynb").write_text(json.dumps({"cells": cells}))
    return report.write(folder.path)


def test_ids_of_a_stranger_lead_nobody_astray(tmp_path, monkeypatch):
    html = '<h2 id="ledger" class="note bad">mine</h2><table class="dataframe ledger"></table>'
    page = report_of(tmp_path, monkeypatch, [code("x", shown(html=html, plain="x"))])
    soup = BeautifulSoup(page.read_text(encoding="utf-8"), "html5lib")
    assert [one.get_text() for one in soup.find_all(id="ledger")] == ["The claims of the paper"]
    (mine,) = (one for one in soup.find_all("h2") if one.get_text() == "mine")
    assert mine.attrs == {}


@pytest.mark.parametrize(
    "cells",
    [
        3,
        [{}],
        [{"cell_type": "code", "source": "x"}],
        [{"cell_type": "code", "source": "x", "outputs": [{"output_type": "stream"}]}],
        [{"cell_type": "markdown", "source": [1]}],
    ],
)
def test_a_file_that_is_no_notebook_is_named(tmp_path, monkeypatch, cells):
    with pytest.raises(BadFile, match=r"01_generate\.ipynb: not a Jupyter notebook"):
        report_of(tmp_path, monkeypatch, cells)


# -- in a browser ------------------------------------------------------------------------------


def opened(view, page: Path, text: str) -> tuple[bool, list[str]]:
    """Whether anything ran in a page that was opened, unfolded and clicked through; and what
    it asked for, but for what the policy kept from being sent."""
    asked, kept = [], []
    page.write_text(text, encoding="utf-8", errors="surrogatepass")
    view.on("request", lambda request: asked.append(request.url))
    view.on("requestfailed", lambda one: "csp" in one.failure and kept.append(one.url))
    view.on("dialog", lambda dialog: dialog.dismiss())
    view.goto(page.as_uri(), wait_until="load")
    view.wait_for_timeout(300)
    view.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    view.evaluate(
        "document.querySelectorAll('a[href], button, area').forEach(one => {"
        "if (!/^(#|https?:)/.test(one.getAttribute('href') || '')) one.click() })"
    )
    view.wait_for_timeout(300)
    ran = view.evaluate("'ran' in document.documentElement.dataset")
    own = ("data:", page.as_uri())
    return ran, [url for url in asked if url not in kept and not url.startswith(own)]


@pytest.mark.long
def test_a_browser_runs_nothing_of_a_stranger_s_report(stranger, tmp_path):
    page = report.write(stranger).read_text(encoding="utf-8")
    with browser.chromium() as started:
        assert opened(started.new_page(), tmp_path / "report.html", page) == (False, [])


@pytest.mark.long
def test_the_policy_alone_stops_what_a_browser_runs_without_it(stranger, tmp_path):
    page = report.write(stranger).read_text(encoding="utf-8")
    head = page[: page.index("<title>")]
    bare = "<!doctype html><html><head><meta charset='utf-8'>"
    with browser.chromium() as started:
        for name in ("script", "image", "slash", "srcdoc", "mutation", "title", "link"):
            body = f"<title>t</title></head><body>{PAYLOADS[name]}</body></html>"
            ran, _ = opened(started.new_page(), tmp_path / f"{name}.html", bare + body)
            assert ran, f"{name} is no payload"
            ran, asked = opened(started.new_page(), tmp_path / f"{name}.html", head + body)
            assert (ran, asked) == (False, []), name
