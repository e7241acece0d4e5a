"""A real headless Chromium for tests of pages; where there is none, tests skip, but in CI they fail."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Page, expect, sync_playwright

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
expect.set_options(timeout=60_000)  # ms; a busy machine makes no page wrong


@contextmanager
def page(width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Page]:
    """A page of a fresh browser; a script error or a request to another host fails the test at the end."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("Chromium is not installed.")
    wrong: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=list(FLAGS))
        view = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        view.on("pageerror", lambda error: wrong.append(str(error)))
        view.on("request", lambda request: _local(request.url) or wrong.append(request.url))
        try:
            yield view
        finally:
            browser.close()
    assert wrong == []


def _local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "file:", "data:", "blob:"))
