"""What the pages ask, asked of PostgreSQL: the same answers as of SQLite, of a store that means harm too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from sqlalchemy import Connection

from common.store import RunStore
from dashboard.queries import comparing, runs
from tests.benchmarks.fill_store import fill
from tests.hostile_store import hostile_store
from tests.integration.test_store_postgresql import server, url  # noqa: F401

LOSS = "held_out_loss"
QUERIES: tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...] = (
    (runs.totals, ()),
    (runs.disk_use, ()),
    (runs.sparks, ()),
    (comparing.curves, ("all", LOSS)),
    (comparing.curves, ("all", LOSS, 3)),
    (comparing.ends, ("all", LOSS)),
    (comparing.reached, ("all", LOSS, 1.5)),
    (comparing.costs, ("all",)),
    (comparing.left_out, ("all",)),
    (comparing.members, ("all",)),
    (comparing.metric_names, ("all",)),
)
"""Functions and what they are asked; ``all`` stands for the ids of all runs."""


def _filled(home: Path) -> None:
    fill(home, runs=2, clients=3, rounds=6, layers=2)
    hostile_store(home)


@pytest.fixture
def both(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Connection, Connection]]:  # noqa: F811
    """Give a connection to each of two stores that hold the same."""
    _filled(tmp_path / "sqlite")
    monkeypatch.setenv("LORAFLEET_DATABASE_URL", url)
    _filled(tmp_path / "postgresql")
    monkeypatch.delenv("LORAFLEET_DATABASE_URL")
    with (
        RunStore.open(tmp_path / "sqlite", read_only=True) as one,
        RunStore.open(tmp_path / "postgresql", url, read_only=True) as other,
        one.reading() as first,
        other.reading() as second,
    ):
        yield first, second


def test_answers_are_the_same(both: tuple[Connection, Connection]) -> None:
    ids = tuple(run.id for run in runs.runs(both[0]))
    for query, given in QUERIES:
        one, other = (query(connection, *(ids if word == "all" else word for word in given)) for connection in both)
        assert len(one) > 0
        if isinstance(one, pd.DataFrame):
            pd.testing.assert_frame_equal(_sorted(one), _sorted(other))
        else:
            assert one == other


def _sorted(table: pd.DataFrame) -> pd.DataFrame:
    """Bring rows and types into one form: an order was not asked for, and a database has its own kinds of numbers."""
    keys = [name for name in ("run", "round") if name in table]
    numbers = {name: float for name in table.columns if name != "run"}
    return table.astype(numbers).sort_values(keys).reset_index(drop=True)
