"""The watch that is kept over the dashboard's pages notices what it is kept for."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Browser
from playwright.sync_api import TimeoutError as NeverSettled

from tests import browser as browsing
from tests.hostile_store import ELSEWHERE, INJECTED, MARKUP

pytestmark = [pytest.mark.e2e, pytest.mark.needs("chromium")]

APP = """
<title>page</title><link rel="icon" href="data:,">
<main data-testid="stMain" style="overflow: auto; height: 90vh">
  <div data-testid="stVerticalBlock"><h1>text</h1></div>
</main>
<div data-testid="stApp" data-test-connection-state="CONNECTED" data-test-script-state="{state}">{more}</div>
"""
"""What of Streamlit's page is looked at."""


def test_what_a_page_does_secretly_is_noticed(browser: Browser) -> None:
    with browsing.visit(browser) as reader:
        reader.page.set_content("".join(MARKUP))
        reader.page.wait_for_function("window.hacked")
        with reader.page.expect_event("pageerror"):
            reader.page.evaluate(
                "fetch('http://example.invalid/x').catch(() => setTimeout(() => { throw Error('thrown') }))"
            )
        assert reader.page.locator(INJECTED).count() == 4
        assert set(reader.dialogs) == {"1"}
        assert {f"http://{ELSEWHERE}/a.png", "http://example.invalid/x"} <= set(reader.outside)
        assert any("thrown" in complaint for complaint in reader.complaints)
        with pytest.raises(AssertionError, match=r"example\.invalid"):
            reader.check()


def test_a_page_is_settled_when_nothing_runs_waits_or_moves(browser: Browser) -> None:
    waiting = {
        "running": ("running", ""),
        "empty chart": ("notRunning", '<div data-testid="stVegaLiteChart" style="height: 9px"></div>'),
        "stale": ("notRunning", '<div data-stale="true"></div>'),
        "moving": (
            "notRunning",
            "<p></p><script>setInterval(() => { document.querySelector('p').append('.') }, 20)</script>",
        ),
    }
    with browsing.visit(browser) as reader:
        reader.page.set_default_timeout(250)
        for state, more in waiting.values():
            open_page(reader, APP.format(state=state, more=more))
            with pytest.raises(NeverSettled):
                browsing.settle(reader.page)
        open_page(
            reader, APP.format(state="notRunning", more='<div data-testid="stVegaLiteChart"><canvas></canvas></div>')
        )
        assert browsing.settle(reader.page) >= 0
        reader.check()


def test_what_is_too_wide_is_named_and_a_picture_holds_all_there_is(browser: Browser, tmp_path: Path) -> None:
    high = '<p style="height: 3000px"></p>'
    with browsing.visit(browser, browsing.PHONE) as reader:
        for more, named in (("", False), ('<p style="width: 900px">wide</p>', True)):
            open_page(reader, APP.format(state="notRunning", more="").replace("</h1>", f"</h1>{high}{more}"))
            browsing.settle(reader.page)
            assert ("P " in "".join(browsing.overflow(reader.page))) is named
        browsing.picture(reader.page, tmp_path / "page.png")
        assert (tmp_path / "page.png").read_bytes()[20:24] > (3000).to_bytes(4, "big")


@pytest.mark.needs("axe-core")
def test_what_shuts_readers_out_is_found(browser: Browser) -> None:
    with browsing.visit(browser) as reader:
        reader.page.set_content(
            '<html lang="en"><title>page</title><main><h1>x</h1><img src="data:,"><h4>y</h4></main>'
        )
        assert [(found.rule, found.impact) for found in browsing.violations(reader.page)] == [("image-alt", "critical")]


def open_page(reader: browsing.Visit, content: str) -> None:
    """Show a page as a server would send it, so that it has the scripts of every visit."""
    reader.page.route("http://localhost/", lambda route: route.fulfill(body=content, content_type="text/html"))
    reader.page.goto("http://localhost/")
    reader.page.unroute("http://localhost/")
