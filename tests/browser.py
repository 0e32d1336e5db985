"""Headless Chromium for the slow tests: the system's browser, driven by playwright.

``pip install -e .[browser]`` brings playwright's Python package; the browser itself is the
distribution's (Debian: ``chromium``), so that nothing is downloaded by a test.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def executable() -> str:
    """The path of the browser; the test is skipped, saying why, where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    return found


@contextmanager
def chromium() -> Iterator[Any]:
    """A running browser; the test is skipped where it, or playwright, is not installed."""
    api = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: pip install -e .[browser]"
    )
    path = executable()
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
