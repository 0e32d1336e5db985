"""Notebooks 01 and 00 as a person opens them: a real JupyterLab in headless Chromium.

Slow. The paths of the screenshots are printed (run with ``-s``): look at them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browser
import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
#: Seconds until something must have happened; generous, for machines that are busy.
START, RUN, STEER = 180, 900, 300
TOKEN = "of-a-test"
#: Where the widgets of notebook 00 are, and what one press of an arrow key does.
DEMO = ".jp-OutputArea-output .widget-vbox"
SLIDER = ".widget-slider:has-text('coefficient')"
STEP = 0.25


def wait(what: str, until: Callable[[], Any], seconds: float, pause: float = 1.0) -> Any:
    """The first true answer of ``until``; an assertion that names ``what`` otherwise."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = until()
        if answer:
            return answer
        time.sleep(pause)
    raise AssertionError(f"{what}: not within {seconds} s")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the notebooks as they come from the checkout, without their outputs."""
    folder = tmp_path_factory.mktemp("jupyterlab")
    for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"):
        book = json.loads(path.read_text(encoding="utf-8"))
        for cell in book["cells"]:
            if cell["cell_type"] == "code":
                cell |= {"outputs": [], "execution_count": None}
        (folder / path.name).write_text(json.dumps(book), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The server's own files. Nobody is asked whether news should be fetched."""
    folder = tmp_path_factory.mktemp("server")
    setting = (
        folder / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    )
    setting.parent.mkdir(parents=True)
    setting.write_text('{"fetchNews": "false", "checkForUpdates": false}', encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def server(place, home) -> Iterator[str]:
    """The address of a JupyterLab that serves ``place``; its runs stay there too."""
    browser.executable()
    environment = {name: value for name, value in os.environ.items() if "JUPYTER" not in name}
    environment |= {
        "STLLMS_RESULTS": str(place / "results"),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
    }
    options = [
        "--no-browser",
        "--allow-root",
        "--ServerApp.port=0",
        f"--ServerApp.root_dir={place}",
        f"--IdentityProvider.token={TOKEN}",
    ]
    log = home / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield wait("JupyterLab starts", lambda: _address(process, home), START)
        finally:
            process.terminate()
            process.wait(60)


def _address(process: subprocess.Popen, home: Path) -> str:
    """The address that the server has noted, empty as long as it has not."""
    assert process.poll() is None, (home / "server.log").read_text()
    noted = list((home / "runtime").glob("jpserver-*.json"))
    return json.loads(noted[0].read_text() or "{}").get("url", "") if noted else ""


@pytest.fixture
def page(server) -> Iterator[Any]:
    """A window of the browser."""
    with browser.chromium() as started:
        window = started.new_page(viewport={"width": 1500, "height": 1400})
        window.set_default_timeout(START * 1000)
        yield window


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("screenshots")


def keep(window: Any, pictures: Path, name: str) -> None:
    """A screenshot; its path is printed."""
    window.screenshot(path=pictures / f"{name}.png")
    print(f"\nlook at {pictures / f'{name}.png'}")


def opened(window: Any, server: str, name: str) -> None:
    """Opens a notebook, and waits until its cells are there and its kernel is idle."""
    window.goto(f"{server}lab/tree/{name}.ipynb?token={TOKEN}&reset")
    window.locator(".jp-NotebookPanel-toolbar [data-status=idle]").first.wait_for()
    window.locator(".jp-CodeCell .jp-InputPrompt").first.click()  # a notebook without focus
    window.locator(".jp-CodeCell.jp-mod-selected").first.wait_for()  # has no Run menu


def run_all(window: Any, path: Path) -> list[dict]:
    """Runs all cells through the menu, saves, and returns the code cells of the file."""
    window.locator("#jp-MainMenu").get_by_text("Run", exact=True).click()
    window.locator("[data-command='runmenu:run-all']:not(.lm-mod-disabled)").click()

    def finished() -> list[dict]:
        window.keyboard.press("Control+s")
        try:
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        except json.JSONDecodeError:  # it is just being saved
            return []
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        failed = any(_errors(cell) for cell in code)
        return code if failed or all(cell["execution_count"] for cell in code) else []

    return wait(f"{path.name} runs", finished, RUN, pause=3)


def _errors(cell: dict) -> list[str]:
    """Tracebacks, and what was written on stderr: neither belongs into a notebook."""
    outputs = cell["outputs"]
    raised = ["\n".join(o["traceback"]) for o in outputs if o["output_type"] == "error"]
    return raised + ["".join(o["text"]) for o in outputs if o.get("name") == "stderr"]


def soundly(cells: list[dict]) -> None:
    """Every cell ran, in order, without an error and without noise."""
    assert [error for cell in cells for error in _errors(cell)] == []
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))


@pytest.mark.long
def test_notebook_01_runs_in_jupyterlab(page, server, place, pictures):
    opened(page, server, "01_generate")
    cells = run_all(page, place / "01_generate.ipynb")
    keep(page, pictures, "01_generate")
    soundly(cells)
    shown = [kind for cell in cells for o in cell["outputs"] for kind in o.get("data", {})]
    assert shown.count("image/png") >= 2
    assert "text/html" in shown
    assert page.locator(".jp-RenderedText[data-mime-type$=stderr]").count() == 0
    page.locator(".jp-OutputArea img").first.scroll_into_view_if_needed()
    keep(page, pictures, "01_generate-figure")


@pytest.mark.long
def test_the_slider_of_notebook_00_changes_the_steered_chain_only(
    page, server, place, pictures
):
    opened(page, server, "00_demo")
    soundly(run_all(page, place / "00_demo.ipynb"))
    handle = page.locator(f"{SLIDER} .noUi-handle")
    handle.scroll_into_view_if_needed()
    before = wait("the demo writes two chains", lambda: chains(page), STEER)
    assert before["baseline"] != before["steered"]
    keep(page, pictures, "00_demo-before")
    for _ in range(8):
        handle.press("ArrowLeft")
    after = wait("the steered chain changes", lambda: changed(page, before), STEER)
    keep(page, pictures, "00_demo-after")
    assert after["value"] == before["value"] - 8 * STEP
    assert after["baseline"] == before["baseline"], "nobody steers it"


def chains(window: Any) -> dict[str, Any]:
    """What the demo shows: the slider's value and the two chains; ``{}`` while it writes.

    The demo's box ends in two HTML widgets: a status line, and the view, whose second table
    holds the baseline and the steered chain, each below its title.
    """
    status, view = (window.locator(f"{DEMO} > .widget-html").nth(place) for place in (0, 1))
    if "labels:" not in status.inner_text():
        return {}
    panels = view.locator("table").nth(1).locator("td > div:first-child")
    baseline, steered = (panels.nth(place).inner_text() for place in (0, 1))
    readout = window.locator(f"{SLIDER} .widget-readout").inner_text()
    value = float(readout.replace("\N{MINUS SIGN}", "-"))
    if not steered.startswith(f"{value:+g} "):
        return {}  # still those of another coefficient
    texts = (panel.partition("\n")[2] for panel in (baseline, steered))
    return dict(zip(("baseline", "steered"), texts, strict=True), value=value)


def changed(window: Any, before: dict[str, Any]) -> dict[str, Any]:
    """Whole chains of another steered text than before, ``{}`` until there are any."""
    now = chains(window)
    return now if now and now["steered"] != before["steered"] else {}
