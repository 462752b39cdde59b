"""What a run has spent of its privacy: the largest over its clients, their spread, and the noise behind it."""

from __future__ import annotations

import pandas as pd
from sqlalchemy import ColumnElement, Connection, Subquery, func, select

from common.store.models import EventRow, MetricRow, RoundRow
from dashboard.queries.client_metrics import latest
from dashboard.queries.clients import placed
from dashboard.queries.tables import finite, table_of

EPSILON, SECOND, LEFT, NOISE = "epsilon", "second_epsilon", "rounds_left", "noise_multiplier"
PROMISE = "privacy"
"""Kind of the event that says what a run's privacy protects."""
MOST_LEFT = 1e9
POINTS = 100
"""Rounds in which all clients are compared; the last one is always among them."""


def spending(connection: Connection, run: str, points: int = 1_000) -> pd.DataFrame:
    """Return the largest spending over the clients after each round: columns round, epsilon."""
    rounds, row = placed(run, points, first=0), RoundRow
    last = func.row_number().over(partition_by=rounds.c.place, order_by=row.round.desc()).label("last")
    found = (
        select(row.round, row.epsilon, last)
        .join(rounds, rounds.c.round == row.round)
        .where(row.run == run, row.epsilon.is_not(None), finite(row.epsilon))
        .subquery()
    )
    statement = select(found.c.round, found.c.epsilon).where(found.c.last == 1).order_by(found.c.round)
    return table_of(connection, statement)


def protected(connection: Connection, run: str) -> str:
    """Return what the run says one unit of its privacy is; empty where it does not."""
    row = EventRow
    newest = select(row.data).where(row.run == run, row.kind == PROMISE).order_by(row.id).limit(1)
    told = connection.execute(newest).scalar()
    unit = told.get("unit") if isinstance(told, dict) else None
    return unit if isinstance(unit, str) else ""


def least_left(connection: Connection, run: str) -> int | None:
    """Return the fewest further rounds a client's account allows, each by its last word; None where nobody says."""
    told = latest(connection, run, LEFT)["value"]
    known = told[(told >= 0) & (told < MOST_LEFT)]
    return None if known.empty else int(known.min())


def spread(connection: Connection, run: str, name: str, low: float = 0.1, high: float = 0.9) -> pd.DataFrame:
    """Return how a number of the clients is spread: columns round, low, median, high, largest, clients.

    In at most :data:`POINTS` rounds that have it; quantiles of the nearest rank, which some client really has.
    """
    rounds, row = _looked_at(run, name), MetricRow
    place = func.row_number().over(partition_by=row.round, order_by=row.value).label("place")
    count = func.count().over(partition_by=row.round).label("clients")
    known = (row.name == name, row.client != "", row.layer == "", finite(row.value))
    same = (row.run == run) & (row.round == rounds.c.round)
    ranked = select(row.round, row.value, place, count).select_from(rounds).join(row, same).where(*known).subquery()

    def quantile(share: float, label: str) -> ColumnElement[float]:
        return func.min(ranked.c.value).filter(ranked.c.place >= share * ranked.c.clients).label(label)

    columns = (quantile(low, "low"), quantile(0.5, "median"), quantile(high, "high"))
    ends = (func.max(ranked.c.value).label("largest"), func.max(ranked.c.clients).label("clients"))
    statement = select(ranked.c.round, *columns, *ends).group_by(ranked.c.round).order_by(ranked.c.round)
    return table_of(connection, statement)


def _looked_at(run: str, name: str) -> Subquery:
    """Choose the last round of each of :data:`POINTS` columns, among those in which clients have the number."""
    row, there = MetricRow, RoundRow
    wanted = (row.run == run, row.round == there.round, row.name == name, row.client > "")
    has = select(row.round).where(*wanted).correlate(there).exists()
    order, count = func.row_number().over(order_by=there.round), func.count().over()
    numbered = select(there.round, order.label("number"), count.label("count")).where(there.run == run, has).subquery()
    width = (numbered.c.count + POINTS - 1) // POINTS
    kept = (numbered.c.count - numbered.c.number) % width == 0
    return select(numbered.c.round).where(kept).subquery()
