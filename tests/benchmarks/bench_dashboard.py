"""How long the dashboard's pages take from a click or an address to the last chart, and what twenty viewers cost a run.

The store holds 10 runs of 100 clients and 500 rounds; it is filled once and kept in ``.cache/dashboard``. Pages are
read in headless Chromium, which draws without a graphics processor and shares the cores with the server. The viewers
of the live run are sessions that draw nothing: readers' browsers are on machines of their own, and twenty on this one
would measure Chromium.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

from playwright.sync_api import Browser, Page
from reporting import ROOT, report

from common.store import RunStore
from tests.benchmarks.fill_store import fill
from tests.benchmarks.viewers import watched
from tests.browser import DESK, Served, chromium, dashboard, settle, visit

PAGES = {
    "runs": "Runs",
    "run": "Run",
    "clients": "Clients",
    "privacy": "Privacy",
    "layers": "Ranks and layers",
    "compare": "Compare",
}
HOME = ROOT / ".cache" / "dashboard"
REPEATS = 4
QUIET_S = 0.4
"""How long a page must have been still to count as drawn; the time itself is that of its last movement."""
VIEWERS = 20
LIVE = ("federation.rounds=6", "training.steps=1200", "simulation.workers=1")
"""Rounds of some seconds, which keep one core busy."""

BEGUN = """title => {
  const heading = document.querySelector('[data-testid="stMain"] h1');
  return heading && new RegExp(`^${title}( |$)`).test(heading.innerText.trim());
}"""
LISTEN = "addEventListener('click', () => { window.clickedAt = performance.now() / 1e3 }, true)"


def drawn(page: Page, name: str) -> float:
    """Wait until a page is drawn; return when it was, in seconds by its own clock."""
    page.wait_for_function(BEGUN, arg=PAGES[name])
    return settle(page, QUIET_S)


def cold(browser: Browser, served: Served, name: str, run: str) -> float:
    """Return the seconds from an address to the last chart, for a browser that was never here."""
    with visit(browser, DESK, "light", served.url) as reader:
        reader.page.goto(f"/{name}?run={run}")
        taken = drawn(reader.page, name)
        reader.check()
        return taken


def warm(page: Page, name: str) -> float:
    """Return the seconds from a click in the navigation to the last chart."""
    link = page.get_by_test_id("stSidebar").get_by_role("link", name=PAGES[name], exact=True)
    link.click()
    return drawn(page, name) - float(page.evaluate("clickedAt"))


def pages(browser: Browser, home: Path) -> tuple[list[list[object]], float]:
    """Measure every page; return the table's rows, and the very first page of a server that was just started."""
    with RunStore.open(home, read_only=True) as store:
        runs = [run.id for run in store.runs()]
    with dashboard(home) as served:
        first = cold(browser, served, "run", runs[0])
        colds = {name: [cold(browser, served, name, run) for run in runs[1 : 1 + REPEATS]] for name in PAGES}
    unasked: dict[str, list[float]] = {name: [] for name in PAGES}
    asked: dict[str, list[float]] = {name: [] for name in PAGES}
    with dashboard(home) as served, visit(browser, DESK, "light", served.url) as reader:
        reader.page.goto(f"/run?run={runs[0]}")
        drawn(reader.page, "run")
        for run in runs[1 : 1 + REPEATS]:
            reader.page.goto(f"/runs?run={run}")
            drawn(reader.page, "runs")
            reader.page.evaluate(LISTEN)
            for lap in (unasked, asked):
                for name in [*PAGES][1:] + [*PAGES][:1]:
                    lap[name].append(warm(reader.page, name))
        reader.check()
    return [[title, *map(spread, (colds[name], unasked[name], asked[name]))] for name, title in PAGES.items()], first


def spread(taken: Sequence[float]) -> str:
    return f"{statistics.median(taken):.2f} s ({max(taken):.2f} s)"


def live(viewers: int) -> tuple[float, list[float]]:
    """Run a federation that is watched; return its seconds from the first committed round, and of the refreshes."""
    options = [word for setting in LIVE for word in ("--set", setting)]
    with TemporaryDirectory() as folder:
        home = Path(folder)
        with RunStore.open(home):
            pass
        with dashboard(home) if viewers else nullcontext() as served:
            command = [
                sys.executable,
                "-m",
                "lorafleet",
                "simulate",
                "synthetic",
                "--quiet",
                "--home",
                folder,
                *options,
            ]
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
            run = _begun(home)
            taken = watched(served.url, run, viewers, lambda: process.poll() is not None) if served else []
            if process.wait():
                raise RuntimeError("the run failed")
        with RunStore.open(home, read_only=True) as store:
            return sum(row.seconds for row in store.rounds(run)[2:]), taken


def _begun(home: Path) -> str:
    """Wait for the run's first round."""
    while True:
        with RunStore.open(home, read_only=True) as store:
            if (runs := store.runs()) and runs[0].rounds_done:
                return runs[0].id
        time.sleep(0.1)


def main() -> None:
    """Measure, and write the results down."""
    fill(HOME)
    with chromium() as browser:
        rows, first = pages(browser, HOME)
    alone, watched_by = [], []
    refreshes: list[float] = []
    for _ in range(2):
        alone.append(live(0)[0])
        seconds, taken = live(VIEWERS)
        watched_by.append(seconds)
        refreshes += taken
    p95 = statistics.quantiles(refreshes, n=20)[-1]
    slower = min(watched_by) / min(alone) - 1
    report(
        "dashboard",
        "Pages of the dashboard",
        "SQLite, 10 runs × 100 clients × 500 rounds; headless Chromium on the server's machine (load "
        f"{os.getloadavg()[1]:.1f} when done). From the address typed or the link clicked to the last chart: median of "
        f"{REPEATS} (worst). Cold: a browser that was never here, a run nobody has asked for. The first page of a "
        f"server that was just started, Run: {first:.1f} s.\n\n"
        f"{VIEWERS} viewers of one live run (`synthetic`, {', '.join(LIVE)}; sessions that draw nothing): a refresh "
        f"takes {statistics.median(refreshes):.2f} s, p95 {p95:.2f} s, of {len(refreshes)}; the run takes "
        f"{min(alone):.1f} s alone and {min(watched_by):.1f} s watched ({slower:+.0%}; the better of two each).",
        ["page", "cold", "click, first look at a run", "click, looked at before"],
        rows,
    )


if __name__ == "__main__":
    main()
