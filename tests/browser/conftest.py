"""A browser that reads pages from the disk only, without a network."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import ConsoleMessage, Error, Page, Request, sync_playwright

WIDE, NARROW = 1280, 400
"""Widths of a window on a desk and of a telephone, in pixels."""

HEIGHT = 900

LOCAL = ("file", "data", "blob", "about")
"""Schemes of what does not leave the machine."""


@dataclass
class Visit:
    """The page that is open, and the errors and the requests to other hosts until now."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    abroad: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return the text of the page without code."""
        return str(self.page.evaluate(TEXT))

    def broken_figures(self) -> list[str]:
        """Return the sources of the figures that are not displayed."""
        return list(self.page.evaluate(BROKEN))

    def too_wide(self, width: int) -> list[str]:
        """Return the elements that do not fit a window of this width, except those that scroll in a box."""
        self.page.set_viewport_size({"width": width, "height": HEIGHT})
        return list(self.page.evaluate(TOO_WIDE))


TEXT = """() => {
    const copy = document.body.cloneNode(true);
    copy.querySelectorAll("script, style, pre, code, mjx-container").forEach(each => each.remove());
    return copy.textContent;
}"""
BROKEN = """() => [...document.querySelectorAll("img")]
    .filter(each => !each.complete || each.naturalWidth === 0 || each.clientWidth === 0)
    .map(each => each.src)"""
TOO_WIDE = """() => {
    const root = document.querySelector("article") ?? document.body;  // a theme may let all around it scroll
    const boxed = each => each !== root &&
        (getComputedStyle(each).overflowX !== "visible" || boxed(each.parentElement));
    const out = [...root.querySelectorAll("*")].filter(each =>
        each.getBoundingClientRect().right > window.innerWidth + 1 && !boxed(each.parentElement));
    const whole = document.documentElement.scrollWidth > window.innerWidth ? [document.body] : [];
    return [...whole, ...out].map(each => `${each.tagName}: ${each.textContent.slice(0, 40)}`);
}"""


@pytest.fixture(scope="session")
def window() -> Iterator[Page]:
    """Start the browser once for all tests: a separate tab for each page takes three times as long."""
    path = shutil.which("chromium")
    assert path is not None, "bin/test-browser installs chromium"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path)
        yield browser.new_context(offline=True).new_page()
        browser.close()


@pytest.fixture
def visit(window: Page) -> Iterator[Callable[[Path], Visit]]:
    """Return a function that opens a file and returns when its formulas are rendered."""
    seen = Visit(window)

    def requested(request: Request) -> None:
        if urlsplit(request.url).scheme not in LOCAL:
            seen.abroad.append(request.url)

    def told(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            seen.complaints.append(message.text)

    def failed(error: Error) -> None:
        seen.complaints.append(str(error))

    def open_file(path: Path) -> Visit:
        window.set_viewport_size({"width": WIDE, "height": HEIGHT})
        window.goto(path.resolve().as_uri())
        window.evaluate("() => window.MathJax?.startup.promise.then(() => null)")
        return seen

    listeners = {"request": requested, "console": told, "pageerror": failed}
    for event, listener in listeners.items():
        window.on(event, listener)
    yield open_file
    window.goto("about:blank")  # pending requests of the page fail here, not in the next test
    for event, listener in listeners.items():
        window.remove_listener(event, listener)
