"""One run round by round: the federation's numbers, its clients' spread, what each round cost."""

from __future__ import annotations

import pandas as pd
from sqlalchemy import ColumnElement, Connection, func, select

from common.store import Event, Round, Statistic
from common.store.models import EventRow, MetricRow, RoundRow
from common.store.reading import read_events, read_rounds, read_statistics
from dashboard.queries.tables import table_of


def rounds(connection: Connection, run: str) -> pd.DataFrame:
    """Return a run's rounds in order, with bytes and seconds so far: a row per round that has begun."""
    row = RoundRow
    statement = (
        select(
            row.round,
            row.status,
            row.reason,
            row.bytes_up,
            row.bytes_down,
            row.seconds,
            row.error,
            row.exact,
            row.epsilon,
            row.started_at,
            func.sum(row.bytes_up + row.bytes_down).over(order_by=row.round).label("bytes_so_far"),
            func.sum(row.seconds).over(order_by=row.round).label("seconds_so_far"),
        )
        .where(row.run == run)
        .order_by(row.round)
    )
    return table_of(connection, statement)


def one_round(connection: Connection, run: str, number: int) -> Round | None:
    """Return one round whole; None if it has not begun."""
    return next(iter(read_rounds(connection, run, number)), None)


def federation_metrics(connection: Connection, run: str) -> pd.DataFrame:
    """Return the federation's numbers: columns round, name, value."""
    wanted = (MetricRow.run == run, MetricRow.client == "", MetricRow.layer == "")
    statement = select(MetricRow.round, MetricRow.name, MetricRow.value).where(*wanted).order_by(MetricRow.round)
    return table_of(connection, statement)


def client_spread(connection: Connection, run: str, name: str, low: float = 0.1, high: float = 0.9) -> pd.DataFrame:
    """Return the quantiles of a client metric by round: columns round, low, median, high, clients.

    The nearest-rank quantile, which is a value some client really had, and which any database can tell.
    """
    wanted = (MetricRow.run == run, MetricRow.name == name, MetricRow.client != "", MetricRow.layer == "")
    place = func.row_number().over(partition_by=MetricRow.round, order_by=MetricRow.value).label("place")
    count = func.count().over(partition_by=MetricRow.round).label("clients")
    ranked = select(MetricRow.round, MetricRow.value, place, count).where(*wanted).subquery()

    def quantile(share: float, label: str) -> ColumnElement[float]:
        nearest = ranked.c.place >= share * ranked.c.clients
        return func.min(ranked.c.value).filter(nearest).label(label)

    columns = [quantile(low, "low"), quantile(0.5, "median"), quantile(high, "high")]
    statement = select(ranked.c.round, *columns, func.max(ranked.c.clients).label("clients"))
    return table_of(connection, statement.group_by(ranked.c.round).order_by(ranked.c.round))


def client_metric(connection: Connection, run: str, name: str, clients: tuple[str, ...]) -> pd.DataFrame:
    """Return a metric of some clients: columns round, client, value."""
    wanted = (MetricRow.run == run, MetricRow.name == name, MetricRow.client.in_(clients), MetricRow.layer == "")
    statement = select(MetricRow.round, MetricRow.client, MetricRow.value).where(*wanted)
    return table_of(connection, statement.order_by(MetricRow.round, MetricRow.client))


def statistic(connection: Connection, run: str, kind: str, number: int) -> Statistic | None:
    """Return a round's statistic of one kind; None if there is none."""
    return next(iter(read_statistics(connection, run, kind, number)), None)


def newest_events(connection: Connection, run: str, count: int) -> list[Event]:
    """Return the last events, newest first."""
    found = select(EventRow.id).where(EventRow.run == run).order_by(EventRow.id.desc()).limit(count)
    first = min(connection.execute(found).scalars(), default=0)
    return read_events(connection, run, first - 1, None)[::-1]
