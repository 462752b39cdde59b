"""One run round by round: which rounds there are, and what was measured in them.

Where there are more rounds than a chart can show, the database leaves out what lies between: charts stay small however
long a run is.
"""

from __future__ import annotations

import pandas as pd
from sqlalchemy import ColumnElement, Connection, Subquery, func, select
from sqlalchemy.orm import aliased

from common.store import ClientRound, Round, Statistic
from common.store.models import MetricRow, RoundRow
from common.store.reading import read_clients, read_rounds, read_statistics
from dashboard.queries.tables import finite, table_of

OFFERED = 2_000
"""Rounds a reader can choose from, the newest."""
POINTS = 1_000
"""Points of a line over rounds."""
SPREAD_POINTS = 200
"""Points of a band over rounds: each is made from all clients."""
LOOKED_AT = (2, 3)
"""First and last rounds that are looked at to learn what a run measures."""


def ended_rounds(connection: Connection, run: str) -> list[int]:
    """Return the numbers of the rounds that ended, newest first."""
    wanted = (RoundRow.run == run, RoundRow.status != "running")
    statement = select(RoundRow.round).where(*wanted).order_by(RoundRow.round.desc()).limit(OFFERED)
    return list(connection.execute(statement).scalars())


def one_round(connection: Connection, run: str, number: int) -> Round | None:
    """Return one round whole; None if it has not begun."""
    return next(iter(read_rounds(connection, run, number)), None)


def clients_of(connection: Connection, run: str, number: int) -> list[ClientRound]:
    """Return what clients did in one round, by name."""
    return read_clients(connection, run, number)


def statistic(connection: Connection, run: str, kind: str, number: int) -> Statistic | None:
    """Return a round's statistic of one kind; None if there is none."""
    return next(iter(read_statistics(connection, run, kind, number)), None)


def gathered(run: str, most: int, *more: ColumnElement[bool]) -> Subquery:
    """Gather a run's rounds that ended into at most so many places of equal width: columns round, place.

    By their order, not by their numbers, which may lie any distance apart.

    Parameters
    ----------
    run : str
        Id of the run.
    most : int
        Places.
    *more : conditions of RoundRow
        Which rounds count.
    """
    wanted = (RoundRow.run == run, RoundRow.status != "running", *more)
    order: ColumnElement[int] = func.row_number().over(order_by=RoundRow.round)
    count: ColumnElement[int] = func.count().over()
    numbered = select(RoundRow.round, order.label("number"), count.label("count")).where(*wanted).subquery()
    width = (numbered.c.count + most - 1) // most
    # Counted from the end, so that the last place holds the last round however many there are.
    place = -((numbered.c.count - numbered.c.number) // width)
    return select(numbered.c.round, place.label("place")).subquery()


def thinned(run: str, most: int, *more: ColumnElement[bool]) -> Subquery:
    """Choose at most so many of a run's rounds that ended, the last one among them: column round."""
    places = gathered(run, most, *more)
    return select(func.max(places.c.round).label("round")).group_by(places.c.place).subquery()


def holds(run: str, *names: str) -> ColumnElement[bool]:
    """Tell of a RoundRow whether one of these was measured in it: not every round is evaluated."""
    row = aliased(MetricRow)
    some = select(row.round).where(row.run == run, row.round == RoundRow.round, row.name.in_(names))
    return some.correlate(RoundRow).exists()


def measured(connection: Connection, run: str) -> dict[str, bool]:
    """Return the names of what is measured of a run, and whether single clients were measured too."""
    ended = select(RoundRow.round).where(RoundRow.run == run, RoundRow.status != "running")
    ways = (ended.order_by(RoundRow.round), ended.order_by(RoundRow.round.desc()))
    looked = [connection.execute(way.limit(count)).scalars() for way, count in zip(ways, LOOKED_AT, strict=True)]
    single = func.max(func.length(MetricRow.client)) > 0
    found: dict[str, bool] = {}
    for number in {number for numbers in looked for number in numbers}:
        # Round by round: for several at once the database would read all of the run's, in the order of their names.
        wanted = (MetricRow.run == run, MetricRow.round == number, MetricRow.layer == "")
        for name, clients in connection.execute(select(MetricRow.name, single).where(*wanted).group_by(MetricRow.name)):
            found[name] = found.get(name, False) or bool(clients)
    return dict(sorted(found.items()))


def federation_metric(connection: Connection, run: str, name: str, most: int = POINTS) -> pd.DataFrame:
    """Return one of the federation's numbers: columns round, value; thinned."""
    return client_metric(connection, run, name, ("",), most)[["round", "value"]]


def client_metric(
    connection: Connection, run: str, name: str, clients: tuple[str, ...], most: int = POINTS
) -> pd.DataFrame:
    """Return a metric of some clients: columns round, client, value; thinned to so many rounds of each."""
    row = MetricRow
    ended = select(RoundRow.round).where(RoundRow.run == run, RoundRow.status != "running")
    wanted = (row.run == run, row.round.in_(ended), row.name == name, row.client.in_(clients), row.layer == "")
    order: ColumnElement[int] = func.row_number().over(partition_by=row.client, order_by=row.round)
    count: ColumnElement[int] = func.count().over(partition_by=row.client)
    columns = (row.round, row.client, row.value, order.label("number"), count.label("count"))
    found = select(*columns).where(*wanted).subquery()
    kept = (found.c.count - found.c.number) % ((found.c.count + most - 1) // most) == 0
    statement = select(found.c.round, found.c.client, found.c.value).where(kept)
    return table_of(connection, statement.order_by(found.c.round, found.c.client))


def client_spread(
    connection: Connection, run: str, name: str, low: float = 0.1, high: float = 0.9, most: int = SPREAD_POINTS
) -> pd.DataFrame:
    """Return the quantiles of a client metric by round: columns round, least, low, median, high, most, clients.

    The nearest-rank quantile, which is a value some client really had, and which any database can tell. Thinned;
    values that are not finite are left out.
    """
    row = MetricRow
    some = row.round.in_(select(thinned(run, most, holds(run, name)).c.round))
    wanted = (row.run == run, some, row.name == name, row.client != "", row.layer == "", finite(row.value))
    place = func.row_number().over(partition_by=row.round, order_by=row.value).label("place")
    count = func.count().over(partition_by=row.round).label("clients")
    values = select(row.round, row.value, place, count).where(*wanted).subquery()

    def quantile(share: float, label: str) -> ColumnElement[float]:
        nearest = values.c.place >= share * values.c.clients
        return func.min(values.c.value).filter(nearest).label(label)

    columns = (
        func.min(values.c.value).label("least"),
        quantile(low, "low"),
        quantile(0.5, "median"),
        quantile(high, "high"),
        func.max(values.c.value).label("most"),
        func.max(values.c.clients).label("clients"),
    )
    return table_of(connection, select(values.c.round, *columns).group_by(values.c.round).order_by(values.c.round))
