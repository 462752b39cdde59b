"""A real browser before a real dashboard: starting both, waiting until a page is drawn, and what a page must not do.

The browser is the system's Chromium, driven by Playwright; it reaches this machine and nothing else.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from tests.programs import AXE, find

ROOT = Path(__file__).resolve().parents[1]
Scheme = Literal["light", "dark"]
DESK, PHONE = (1280, 800), (390, 844)
NARROW = 600
"""Windows narrower than this, in pixels, are phones'."""
PATIENCE_S = 60
_HERE = ("127.0.0.1", "localhost", "[::1]", "::1")
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-proxy-server",
    # Names of other machines are never found, addresses of others lead nowhere.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
)
_PHONE_AGENT = (
    "Mozilla/5.0 (Linux; Android 10; K) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/{} Mobile Safari/537.36"
)
_SETTLED = (Path(__file__).with_name("settled.js")).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Served:
    """A dashboard that runs.

    Attributes
    ----------
    url : str
        Its address.
    process : Popen
        The server.
    log : Path
        What it says on stdout and stderr.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def check(self) -> None:
        """Assert that it lives and that nothing went wrong that no page told."""
        said = self.log.read_text()
        assert self.process.poll() is None, f"the dashboard ended: {said}"
        assert "Traceback" not in said, said


@contextmanager
def dashboard(home: Path, *options: str, **environment: str) -> Iterator[Served]:
    """Run ``lorafleet dashboard`` as a process of its own, until it answers and as long as the block lasts.

    Parameters
    ----------
    home : Path
        Folder of the runs.
    *options : str
        Of the command line, beside home and port.
    **environment : str
        Variables beside this process's.
    """
    command = [sys.executable, "-m", "lorafleet", "dashboard", "--home", str(home), "--port", "0", "--no-browser"]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LORAFLEET_", "STREAMLIT_"))}
    with TemporaryDirectory() as empty:
        log = Path(empty, "log")
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*command, *options],
                cwd=empty,
                env=kept | {"HOME": empty, "PYTHONPATH": str(ROOT)} | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        try:
            yield Served(_address(process, log), process, log)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Return where the dashboard listens, once it answers there."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and process.poll() is None:
        said = re.search(r"http://([^\s/]+:\d+)", log.read_text())
        if said and _is_healthy(said[1]):
            return said[0]
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"the dashboard does not answer: {log.read_text()}")


def _is_healthy(place: str) -> bool:
    connection = HTTPConnection(place, timeout=5)
    try:
        connection.request("GET", "/_stcore/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run the system's Chromium without a window."""
    expect.set_options(timeout=PATIENCE_S * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find("chromium"), args=list(_FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visit:
    """One reader's page and everything about it that people would not see.

    Attributes
    ----------
    page : Page
        The page.
    complaints : list of str
        Errors in the console, uncaught ones, crashes. Nothing is filtered.
    warnings : list of str
        Warnings in the console.
    outside : list of str
        Addresses beyond this machine that the page asked for.
    dialogs : list of str
        What dialogs said that a script opened.
    """

    page: Page
    complaints: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Assert that the page kept quiet and stayed at home."""
        heard = {"complaints": self.complaints, "outside": self.outside, "dialogs": self.dialogs}
        assert not any(heard.values()), heard

    def _hear(self, message: ConsoleMessage) -> None:
        kinds = {"error": self.complaints, "assert": self.complaints, "warning": self.warnings}
        if message.type in kinds:
            kinds[message.type].append(f"{message.text} ({message.location.get('url', '')})")

    def _note(self, address: str) -> None:
        parts = urlsplit(address)
        if parts.scheme in ("http", "https", "ws", "wss", "ftp") and parts.hostname not in _HERE:
            self.outside.append(address)


@contextmanager
def visit(
    browser: Browser, size: tuple[int, int] = DESK, scheme: Scheme = "light", base_url: str | None = None
) -> Iterator[Visit]:
    """Open an empty page of a new reader, without cookies, who hears of everything the page does."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme=scheme,
        base_url=base_url,
        reduced_motion="reduce",
        user_agent=_PHONE_AGENT.format(browser.version) if size[0] < NARROW else None,
    )
    context.set_default_timeout(PATIENCE_S * 1000)
    context.add_init_script(_SETTLED)
    page = context.new_page()
    visit = Visit(page)
    page.on("console", visit._hear)
    page.on("pageerror", lambda error: visit.complaints.append(str(error)))
    page.on("crash", lambda _: visit.complaints.append("the page crashed"))
    page.on("request", lambda request: visit._note(request.url))
    page.on("websocket", lambda socket: visit._note(socket.url))
    page.on("dialog", lambda dialog: (visit.dialogs.append(dialog.message), dialog.dismiss()))
    try:
        yield visit
    finally:
        context.close()


def settle(page: Page, quiet_s: float = 0.15) -> float:
    """Wait until a dashboard's page is drawn and nothing has moved for a while.

    Drawn: connected, no script running, no skeleton, no spinner, nothing grey from before, every chart painted. The
    page before a click is settled too: wait for something of the next one first.

    Returns
    -------
    float, seconds
        When it became so, by the page's own clock (``performance.now``, from the page's beginning).
    """
    found = page.wait_for_function("quiet => window.settledSince && settledSince(quiet)", arg=quiet_s * 1e3)
    return float(found.json_value()) / 1e3


def overflow(page: Page) -> list[str]:
    """Name what makes a settled page wider than its window: nothing may."""
    found: list[str] = page.evaluate("tooWide()")
    return found


@dataclass(frozen=True)
class Violation:
    """A rule of accessibility that a page breaks: ``impact`` is minor, moderate, serious or critical."""

    rule: str
    impact: str
    text: str
    elements: tuple[str, ...]


def violations(page: Page) -> list[Violation]:
    """Return what axe-core holds to be serious or critical in what a page shows now."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE.read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = page.evaluate(
        "axe.run({resultTypes: ['violations']}).then(found => found.violations)"
    )
    return [
        Violation(rule["id"], rule["impact"], rule["help"], tuple(node["html"][:200] for node in rule["nodes"]))
        for rule in found
        if rule["impact"] in ("serious", "critical")
    ]


def picture(page: Page, path: Path, whole: bool = True) -> None:
    """Take a picture; ``whole``: of all there is to scroll to, for which the window is made as high for a moment."""
    size = page.viewport_size
    assert size is not None
    if whole:
        height = int(page.evaluate("wholeHeight()"))
        page.set_viewport_size({"width": size["width"], "height": max(height, size["height"])})
        settle(page, 0.4)
    page.screenshot(path=path)
    page.set_viewport_size(size)
