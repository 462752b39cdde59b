"""A store of the first version, with rows in all its tables, opened by today's code."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from sqlalchemy import column, create_engine, insert, table

from common.errors import StoreError
from common.store import Client, Round, RunStore, Statistic, last_sign, shown_status
from common.store import schema as store_schema

AT = "2026-01-01 12:00:00.000000"
MOMENT = datetime(2026, 1, 1, 12, tzinfo=UTC)

ROWS: dict[str, dict[str, Any]] = {
    "runs": {
        "id": "r1",
        "name": "quickstart",
        "status": "running",
        "task": "text",
        "strategy": "flora",
        "seed": 7,
        "experiment": '{"rounds": 5}',
        "fingerprint": "f00",
        "rounds_planned": 5,
        "rounds_done": 1,
        "best_round": 1,
        "best_metric": 0.5,
        "created_at": AT,
        "updated_at": AT,
    },
    "rounds": {
        "run": "r1",
        "round": 1,
        "started_at": AT,
        "status": "committed",
        "cohort": '["ada"]',
        "base_version": 1,
        "bytes_up": 10,
        "bytes_down": 20,
        "seconds": 2.5,
        "phases": '{"train": 2.0}',
        "error": 0.25,
        "exact": 0,
        "committed_at": AT,
    },
    "client_rounds": {
        "run": "r1",
        "round": 1,
        "client": "ada",
        "status": "accepted",
        "rank": 4,
        "num_examples": 30,
        "bytes_up": 10,
        "bytes_down": 20,
        "seconds": 1.5,
        "metadata": "{}",
    },
    "metrics": {"run": "r1", "round": 1, "name": "held_out_loss", "client": "", "layer": "", "value": "nan"},
    "artefacts": {
        "run": "r1",
        "path": "runs/r1/a.bin",
        "round": 1,
        "kind": "adapter",
        "sha256": "0" * 64,
        "nbytes": 3,
    },
    "events": {"run": "r1", "round": 1, "at": AT, "kind": "committed", "text": "round 1", "data": '{"k": 1}'},
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a home whose database is as the first version left it."""
    monkeypatch.delenv("LORAFLEET_DATABASE_URL", raising=False)
    (tmp_path / "runs" / "r1").mkdir(parents=True)
    engine = create_engine(f"sqlite:///{tmp_path}/lorafleet.db")
    with engine.connect() as connection, connection.begin():
        command.upgrade(store_schema.alembic_config(connection), "0001")
        for name, row in ROWS.items():
            connection.execute(insert(table(name, *map(column, row))).values(row))
    engine.dispose()
    return tmp_path


def test_it_is_not_read_before_it_is_upgraded(home: Path) -> None:
    with pytest.raises(StoreError, match="of the older version 0001; run `lorafleet database upgrade`"):
        RunStore.open(home, read_only=True)


def test_it_keeps_its_rows_and_knows_nothing_of_what_was_not_recorded(home: Path) -> None:
    RunStore.open(home).close()
    with RunStore.open(home, read_only=True) as store:
        run = store.get_run("r1")
        assert (run.rounds_done, run.best_metric, run.created_at, run.alive_at) == (1, 0.5, MOMENT, None)
        assert (last_sign(run), shown_status(store, run)) == (MOMENT, "interrupted")
        (row,) = store.rounds("r1")
        assert (row.status, row.cohort, row.phases, row.error) == ("committed", ("ada",), {"train": 2.0}, 0.25)
        assert [(client.client, client.rank) for client in store.client_rounds("r1")] == [("ada", 4)]
        assert json.dumps([metric.value for metric in store.metrics("r1")]) == "[NaN]"
        assert [file.path for file in store.artefacts("r1")] == ["runs/r1/a.bin"]
        assert [(event.text, event.data) for event in store.events("r1")] == [("round 1", {"k": 1})]
        assert not store.members("r1")
        assert not store.statistics("r1")


def test_its_run_goes_on_with_what_is_recorded_today(home: Path) -> None:
    with RunStore.open(home) as store:
        store.mark_alive("r1")
        store.record_members([Client("r1", "ada", MOMENT, 4, "set in the experiment")])
        store.begin_round("r1", 2, ["ada"])
        row = Round("r1", 2, MOMENT, "committed", cohort=("ada",))
        store.commit_round(row, statistics=[Statistic("r1", 2, "timeline", {"clients": {}, "server": []})])
        run = store.get_run("r1")
        assert run.alive_at is not None
        assert last_sign(run) >= run.alive_at
        assert [member.client for member in store.members("r1")] == ["ada"]
        assert [(each.round, each.kind) for each in store.statistics("r1")] == [(2, "timeline")]
        assert store.add_event("r1", "note", "text") == 2
