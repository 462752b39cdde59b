"""Whole tables and whole runs as rows, a batch at a time: what backups and packed runs are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from sqlalchemy import Connection, Table, insert, select

from common.store.models import (
    ArtefactRow,
    ClientRoundRow,
    ClientRow,
    EventRow,
    MetricRow,
    RoundRow,
    RunRow,
    StatisticRow,
    table_of,
)

Values = dict[str, Any]
BATCH = 1_000

TABLES: tuple[Table, ...] = tuple(
    table_of(row)
    for row in (RunRow, RoundRow, ClientRow, ClientRoundRow, MetricRow, StatisticRow, ArtefactRow, EventRow)
)
"""All tables, those that others refer to first."""


def read_rows(connection: Connection, table: Table, run_id: str | None = None) -> Iterator[Values]:
    """Read a table's rows in the order of its key, those of one run if one is named; memory holds one batch."""
    statement = select(table).order_by(*table.primary_key.columns).execution_options(yield_per=BATCH)
    if run_id is not None:
        statement = statement.where(run_column(table) == run_id)
    with connection.execute(statement) as result:
        for row in result.mappings():
            yield dict(row)


def insert_rows(connection: Connection, table: Table, rows: Iterable[Values]) -> int:
    """Insert rows that are new to a table, and count them."""
    left, count = iter(rows), 0
    while batch := list(islice(left, BATCH)):
        connection.execute(insert(table), batch)
        count += len(batch)
    return count


def run_column(table: Table) -> Any:
    """Return the column that tells which run a row is of."""
    return table.c.id if table.name == RunRow.__tablename__ else table.c.run
