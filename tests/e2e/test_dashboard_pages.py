"""Every page as a browser shows it: quiet, within its window, usable by everyone, unmoved by a hostile store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from playwright.sync_api import expect

from tests.benchmarks.fill_store import fill
from tests.browser import DESK, PHONE, Scheme, Served, Visit, dashboard, overflow, settle, violations
from tests.hostile_store import INJECTED, hostile_store

pytestmark = [pytest.mark.e2e, pytest.mark.needs("chromium")]

PAGES = {
    "runs": "Runs",
    "run": "Run",
    "clients": "Clients",
    "privacy": "Privacy",
    "layers": "Ranks and layers",
    "compare": "Compare",
}
"""The heading that each begins with, by its path."""
CROOKED = "[data-testid=stException], .vega-error, .vega-embed pre"
"""What stands where something could not be shown."""


class Store(NamedTuple):
    """A dashboard of a store, and its runs, oldest first."""

    served: Served
    runs: list[str]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A few runs with something on every page; the third spends a privacy budget, the fifth failed."""
    home = tmp_path_factory.mktemp("filled")
    runs = fill(home, runs=5, clients=5, rounds=6, layers=3, statistics_every=1)
    with dashboard(home) as served:
        yield Store(served, runs)
        served.check()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store that means harm."""
    home = tmp_path_factory.mktemp("hostile")
    runs = hostile_store(home)
    with dashboard(home) as served:
        yield Store(served, runs)
        served.check()


def show(reader: Visit, name: str, run: str) -> None:
    """Go to a page of a run by its address and wait until it is drawn."""
    reader.page.goto(f"/{name}?run={run}")
    expect(reader.page.get_by_test_id("stMain").get_by_role("heading", level=1)).to_contain_text(PAGES[name])
    settle(reader.page, 0.3)


def check(reader: Visit, usable: bool) -> None:
    """Assert that what is shown is whole, and, if wanted, that everyone can use it."""
    shown = reader.page.url
    crooked = reader.page.locator(CROOKED)
    assert crooked.count() == 0, (shown, crooked.all_inner_texts())
    assert overflow(reader.page) == [], shown
    if usable:
        assert violations(reader.page) == [], shown


@pytest.mark.needs("axe-core")
@pytest.mark.parametrize(
    ("size", "scheme"),
    [
        (DESK, "light"),
        (PHONE, "dark"),
        pytest.param(DESK, "dark", marks=pytest.mark.long),
        pytest.param(PHONE, "light", marks=pytest.mark.long),
    ],
)
def test_every_page_is_whole_and_usable(
    filled: Store, visit: Callable[..., Visit], size: tuple[int, int], scheme: Scheme
) -> None:
    reader = visit(size, scheme, filled.served.url)
    runs = filled.runs
    # What is chosen looks otherwise than what is not.
    chosen = {
        "run": "&metric=loss+of+the+worst+client&round=3",
        "clients": "&client=client-3",
        "compare": f"&runs={runs[0]},{runs[1]},{runs[3]}&x=bytes",
    }
    for name in PAGES:
        show(reader, name, runs[2] + chosen.get(name, ""))
        check(reader, usable=True)


@pytest.mark.parametrize("which", [-8, pytest.param(None, marks=pytest.mark.long)], ids=["texts", "all"])
def test_a_hostile_store_is_shown_as_text(hostile: Store, visit: Callable[..., Visit], which: int | None) -> None:
    reader = visit(PHONE if which is None else DESK, "light", hostile.served.url)
    for run in hostile.runs if which is None else [hostile.runs[which]]:
        for name in PAGES:
            show(reader, name, run)
            check(reader, usable=False)
            assert reader.page.locator(INJECTED).count() == 0, reader.page.url
            assert reader.page.evaluate("window.hacked") is None, reader.page.url
            reader.check()
