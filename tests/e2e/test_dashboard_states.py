"""What a reader sees where something is missing, old, broken or gone, and that pages go on by themselves afterwards."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from alembic import command
from playwright.sync_api import Locator, Page, expect
from sqlalchemy import create_engine

from common.store import RunStore
from common.store.schema import alembic_config
from tests.browser import Visit, dashboard, settle
from tests.postgresql import Cluster
from tests.small_run import RUN, commit, make_run

pytestmark = [pytest.mark.e2e, pytest.mark.needs("chromium")]


def main(page: Page) -> Locator:
    return page.get_by_test_id("stMain")


def test_a_store_appears_by_itself_and_a_failed_run_says_why_and_how_to_go_on(
    tmp_path: Path, visit: Callable[..., Visit]
) -> None:
    home = tmp_path / "home"
    with dashboard(home) as served:
        page = visit(base_url=served.url).page
        page.goto("/")
        expect(main(page)).to_contain_text("simulate")
        make_run(home)
        expect(main(page).get_by_role("heading", level=1)).to_have_text("Runs")
        with RunStore.open(home) as store:
            store.set_status(RUN, "failed", "round 2 failed: 1 valid reply of 4, 2 needed")
        page.get_by_test_id("stSidebar").get_by_role("link", name="Run", exact=True).click()
        expect(main(page)).to_contain_text("1 valid reply of 4, 2 needed")
        expect(main(page)).to_contain_text(f"lorafleet resume {RUN}")
        served.check()


def test_an_older_store_names_the_command_that_upgrades_it(tmp_path: Path, visit: Callable[..., Visit]) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/lorafleet.db")
    with engine.begin() as connection:
        command.upgrade(alembic_config(connection), "0001")
    engine.dispose()
    with dashboard(tmp_path) as served:
        page = visit(base_url=served.url).page
        page.goto("/")
        expect(main(page)).to_contain_text("lorafleet database upgrade")
        upgrade = [sys.executable, "-m", "lorafleet", "database", "upgrade", "--home", str(tmp_path)]
        subprocess.run(upgrade, check=True, capture_output=True)
        expect(main(page)).to_contain_text("No runs yet")
        served.check()


def test_a_database_that_goes_away_leaves_the_last_view_and_comes_back(
    tmp_path: Path, visit: Callable[..., Visit]
) -> None:
    with TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder))
        cluster.start()
        try:
            make_run(tmp_path, cluster.url)
            with dashboard(tmp_path, LORAFLEET_DATABASE_URL=cluster.url) as served:
                page = visit(base_url=served.url).page
                page.goto(f"/run?run={RUN}")
                rounds = main(page).get_by_test_id("stMetric").filter(has_text="Rounds done")
                expect(rounds).to_contain_text("1 of 2")
                settle(page)
                cluster.stop()
                expect(main(page)).to_contain_text("the store does not answer")
                expect(main(page)).to_contain_text(re.compile(r"the view of \d\d:\d\d:\d\d UTC"))
                expect(rounds).to_contain_text("1 of 2")
                cluster.start()
                with RunStore.open(tmp_path, cluster.url) as store:
                    store.begin_round(RUN, 2, ["ada", "ben"])
                    commit(store, 2)
                expect(rounds).to_contain_text("2 of 2")
                expect(main(page)).not_to_contain_text("the store does not answer")
                served.check()
        finally:
            cluster.stop()
