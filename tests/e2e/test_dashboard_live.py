"""A reader before an empty dashboard: a real run appears, is watched round by round, compared, and taken home."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from common.store import RunStore
from tests.browser import ROOT, Visit, dashboard, settle

pytestmark = [pytest.mark.e2e, pytest.mark.needs("chromium")]

WATCHING = Path(__file__).with_name("watching.js").read_text(encoding="utf-8")
SLOW = ("federation.rounds=8", "simulation.stragglers=0.99", "simulation.straggler_delay_s=0.8")
"""Rounds of about a second that need no computing."""
QUICK = ("federation.rounds=3", "strategy.name=fedavg", *(f"clients.client-{number}.rank=4" for number in range(1, 5)))


@contextmanager
def simulation(home: Path, *settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a small federation as a process of its own; it must end well."""
    options = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "lorafleet", "simulate", "synthetic", "--home", str(home), "--quiet", *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        yield process
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said.decode()
    finally:
        process.kill()
        process.communicate()


def test_a_run_is_watched_as_it_goes_on_then_compared_and_taken_home(
    tmp_path: Path, visit: Callable[..., Visit]
) -> None:
    home = tmp_path / "home"
    with RunStore.open(home):
        pass
    with dashboard(home) as served:
        page = visit(base_url=served.url).page
        page.goto("/")
        expect(main(page)).to_contain_text("No runs yet")
        expect(main(page)).to_contain_text("lorafleet simulate quickstart")
        page.evaluate("window.stamp = 'the same page'")
        with simulation(home, *SLOW):
            expect(page.get_by_role("heading", name="Runs", exact=True)).to_be_visible()
            with simulation(home, *QUICK):
                go(page, "Run")
                watch(page)
            remembered(visit(base_url=served.url).page, page.url)
        expect(number(page, "Rounds done")).to_have_text("8 of 8")
        expect(number(page, "State")).to_have_text("Completed")
        take_the_adapter(page, home)
        compare(page)
        assert page.evaluate("window.stamp") == "the same page"
        served.check()


def watch(page: Page) -> None:
    """Choose something, scroll, and see rounds come: nothing else may move."""
    expect(number(page, "Rounds done")).to_have_text(re.compile("^[2-9] of 8"))
    # First scrolled: a list that is open closes when the page moves.
    main(page).evaluate("main => main.scrollTo(0, 400)")
    settle(page)
    choose(page, "Measure", "loss in training")
    settle(page)
    page.evaluate(WATCHING)
    page.wait_for_function("watched.rounds.length > 2")
    seen: dict[str, Any] = page.evaluate("watched")
    assert seen["rounds"] == sorted(seen["rounds"]), seen
    assert seen["top"] == [400], seen
    assert len(seen["charts"]) == len(seen["painted"]) == 1, seen
    assert seen["charts"][0] == seen["painted"][0] >= 3, seen
    assert (len(seen["metrics"]), seen["skeletons"]) == (1, 0), seen
    # What is old for half a second begins to fade; a page that is quick is new before, but not on every machine.
    assert seen["faintest"] > 0.6, seen
    expect(chooser(page, "Measure")).to_have_value("loss in training")


def remembered(page: Page, address: str) -> None:
    """Open the address of another reader's page: it holds page, run and choice."""
    page.goto(address)
    expect(number(page, "Rounds done")).to_be_visible()
    expect(chooser(page, "Measure")).to_have_value("loss in training")


def take_the_adapter(page: Page, home: Path) -> None:
    """Download what the run was for."""
    with page.expect_download() as started:
        page.get_by_role("button", name="Download (").first.click()
    with RunStore.open(home, read_only=True) as store:
        run = next(run for run in store.runs() if run.rounds_planned == 8)
    assert hashlib.sha256(started.value.path().read_bytes()).hexdigest() == run.adapter_sha256


def compare(page: Page) -> None:
    """Tick both runs, follow the link, and keep what is shown as files."""
    go(page, "Runs")
    settle(page)
    table = main(page).get_by_test_id("stDataFrame").first
    for row in (0, 1):
        table.click(position={"x": 16, "y": 35 * (row + 1) + 17})
        expect(main(page)).to_contain_text(f"{row + 1} of 2 runs chosen")
    main(page).get_by_role("link", name="Compare 2 runs").click()
    expect(page.get_by_role("heading", name="Compare", exact=True)).to_be_visible()
    settle(page)
    rows = list(csv.DictReader(io.StringIO(download(page, "Table (CSV)").decode())))
    assert len(rows) == 2, rows
    curves = list(csv.DictReader(io.StringIO(download(page, "Curves (CSV)").decode())))
    assert [sum(row["line"] == line for row in curves) for line in sorted({row["line"] for row in curves})] in (
        [4, 9],
        [9, 4],
    )
    picture = download(page, "Chart (PNG)")
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert min(struct.unpack(">II", picture[16:24])) > 400


def download(page: Page, label: str) -> bytes:
    with page.expect_download() as started:
        page.get_by_role("button", name=label).click()
    return started.value.path().read_bytes()


def go(page: Page, title: str) -> None:
    page.get_by_test_id("stSidebar").get_by_role("link", name=title, exact=True).click()
    expect(main(page).get_by_role("heading", level=1)).to_have_text(re.compile(f"^{title}( |$)"))


def choose(page: Page, label: str, option: str) -> None:
    chooser(page, label).click()
    page.get_by_role("option", name=option, exact=True).click()
    expect(chooser(page, label)).to_have_value(option)


def chooser(page: Page, label: str) -> Locator:
    return main(page).get_by_role("combobox", name=label)


def main(page: Page) -> Locator:
    return page.get_by_test_id("stMain")


def number(page: Page, label: str) -> Locator:
    return main(page).get_by_test_id("stMetric").filter(has_text=label).get_by_test_id("stMetricValue")
