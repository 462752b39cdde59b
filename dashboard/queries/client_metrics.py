"""Numbers that clients have of their own: which there are, the latest of each client, and how they changed."""

from __future__ import annotations

import pandas as pd
from sqlalchemy import ColumnElement, Connection, func, select

from common.store.models import MetricRow, RoundRow
from dashboard.queries.clients import placed
from dashboard.queries.tables import finite, table_of

LOOKED_AT = 20
"""Rounds in which the latest value of a client is looked for: not every client is in every round."""
NAMES_OF = 5


def client_metric_names(connection: Connection, run: str) -> list[str]:
    """Return the names of the numbers that clients have, as its first and its last rounds know them, sorted."""
    rounds = select(RoundRow.round).where(RoundRow.run == run)
    first = rounds.order_by(RoundRow.round).limit(NAMES_OF).subquery()
    last = rounds.order_by(RoundRow.round.desc()).limit(NAMES_OF).subquery()
    row = MetricRow
    looked = row.round.in_(select(first.c.round).union(select(last.c.round)))
    # A text that is in no index: for a column that is, SQLite would read the whole run in its order.
    statement = select(row.name + "").where(row.run == run, looked, row.client != "", row.layer == "").distinct()
    return sorted(connection.execute(statement).scalars())


def latest(connection: Connection, run: str, name: str) -> pd.DataFrame:
    """Return each client's latest value of a number: columns client, round, value; NaN and infinities too."""
    row = MetricRow
    known = (row.run == run, row.name == name, row.client != "", row.layer == "")
    rounds = _rounds_with(run, name)
    place = func.row_number().over(partition_by=row.client, order_by=row.round.desc()).label("place")
    ranked = select(row.client, row.round, row.value, place).where(*known, row.round.in_(rounds)).subquery()
    statement = select(ranked.c.client, ranked.c.round, ranked.c.value).where(ranked.c.place == 1)
    return table_of(connection, statement.order_by(ranked.c.client))


def client_curves(
    connection: Connection, run: str, name: str, clients: tuple[str, ...], points: int = 300
) -> pd.DataFrame:
    """Return how a number changed: columns client, round, value; at most so many values of each client.

    Where there are more rounds, the last value of every few is kept. NaN and infinities are left out.

    Parameters
    ----------
    connection : Connection
        To the store.
    run, name : str
        Id of the run, name of the number.
    clients : tuple of str
        Of whom; "" is the federation as a whole.
    points : int
        Most values of one client.
    """
    row, rounds = MetricRow, placed(run, points, first=0)
    same = (row.run == run) & (row.round == rounds.c.round) & (row.name == name)
    known = (row.client.in_(clients), row.layer == "", finite(row.value))
    last = func.row_number().over(partition_by=(row.client, rounds.c.place), order_by=row.round.desc()).label("last")
    found = select(row.client, row.round, row.value, last).select_from(rounds).join(row, same).where(*known).subquery()
    statement = select(found.c.client, found.c.round, found.c.value).where(found.c.last == 1)
    return table_of(connection, statement.order_by(found.c.round, found.c.client))


def _rounds_with(run: str, name: str) -> ColumnElement[int]:
    """Choose the last rounds in which clients have a number; asked of each round, since one look at its key tells."""
    row, there = MetricRow, RoundRow
    wanted = (row.run == run, row.round == there.round, row.name == name, row.client > "")
    has = select(row.round).where(*wanted).correlate(there).exists()
    return (
        select(there.round).where(there.run == run, has).order_by(there.round.desc()).limit(LOOKED_AT).scalar_subquery()
    )
