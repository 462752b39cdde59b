"""Several runs beside one another: one metric's curves, where they ended, what they cost."""

from __future__ import annotations

import pandas as pd
from sqlalchemy import ColumnElement, Connection, Double, Subquery, and_, case, cast, func, select

from common.store.models import ClientRoundRow, ClientRow, MetricRow, RoundRow, RunRow
from dashboard.queries.tables import finite, summable, table_of

POINTS = 250
"""Rounds of a curve that are drawn."""


def curves(connection: Connection, runs: tuple[str, ...], name: str, points: int = POINTS) -> pd.DataFrame:
    """Return a metric of the federation over the rounds in which it was measured, the same rounds for all runs.

    Returns
    -------
    DataFrame
        Columns run, round, value, and what it took until then: nbytes (up and down), seconds, epsilon.
    """
    found = _measured(runs, name)
    whole = select(*found.c, func.max(found.c.place).over().label("places")).subquery()
    step = 1 + (whole.c.places - 1) // points
    kept = ((whole.c.place - 1) % step == 0) | (whole.c.from_end == 1)
    columns = [whole.c[name] for name in ("run", "round", "value", "nbytes", "seconds", "epsilon")]
    return table_of(connection, select(*columns).where(kept).order_by(whole.c.run, whole.c.round))


def ends(connection: Connection, runs: tuple[str, ...], name: str) -> pd.DataFrame:
    """Return where a metric began, ended and was lowest: columns run, first, last, last_round, best, best_round.

    What is no number is never the lowest.
    """
    found = _measured(runs, name)

    def value_where(condition: ColumnElement[bool], column: str) -> ColumnElement[float]:
        return func.max(case((condition, found.c[column])))

    columns = (
        value_where(found.c.from_start == 1, "value").label("first"),
        value_where(found.c.from_end == 1, "value").label("last"),
        func.max(found.c.round).label("last_round"),
        func.min(found.c.value).filter(finite(found.c.value)).label("best"),
        value_where(and_(found.c.from_best == 1, finite(found.c.value)), "round").label("best_round"),
    )
    return table_of(connection, select(found.c.run, *columns).group_by(found.c.run).order_by(found.c.run))


def reached(connection: Connection, runs: tuple[str, ...], name: str, level: float) -> pd.DataFrame:
    """Return when a metric was first at or below a level: columns run, round; runs that never were are missing."""
    found = _measured(runs, name)
    statement = select(found.c.run, func.min(found.c.round).label("round"))
    below = and_(finite(found.c.value), found.c.value <= level)
    return table_of(connection, statement.where(below).group_by(found.c.run))


def costs(connection: Connection, runs: tuple[str, ...]) -> pd.DataFrame:
    """Return what each run took.

    Returns
    -------
    DataFrame
        Columns run, bytes_up, bytes_down, seconds, epsilon (largest), error (mean over rounds, relative to the exact
        average), rounds and how many of them were exact by construction.
    """
    trained = and_(RoundRow.round > 0, RoundRow.status == "committed")
    columns = (
        func.sum(cast(RoundRow.bytes_up, Double)).label("bytes_up"),
        func.sum(cast(RoundRow.bytes_down, Double)).label("bytes_down"),
        func.sum(RoundRow.seconds).filter(summable(RoundRow.seconds)).label("seconds"),
        func.max(RoundRow.epsilon).filter(finite(RoundRow.epsilon)).label("epsilon"),
        func.avg(RoundRow.error).filter(summable(RoundRow.error)).label("error"),
        func.count().filter(trained).label("rounds"),
        func.count().filter(trained, RoundRow.exact).label("exact"),
    )
    return table_of(connection, select(RoundRow.run, *columns).where(RoundRow.run.in_(runs)).group_by(RoundRow.run))


def left_out(connection: Connection, runs: tuple[str, ...]) -> dict[str, int]:
    """Count the replies by run that were refused or did not come."""
    row = ClientRoundRow
    lost = (row.run.in_(runs), row.status.not_in(("received", "accepted")))
    counted = select(row.run, func.count()).where(*lost).group_by(row.run)
    return {row[0]: row[1] for row in connection.execute(counted)}


def members(connection: Connection, runs: tuple[str, ...]) -> dict[str, int]:
    """Count the clients that each run has met."""
    counted = select(ClientRow.run, func.count()).where(ClientRow.run.in_(runs)).group_by(ClientRow.run)
    return {row[0]: row[1] for row in connection.execute(counted)}


def metric_names(connection: Connection, runs: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the metrics of each run's federation, as its first, best and last round have them."""
    marks = select(RunRow.id, RunRow.best_round, RunRow.rounds_done).where(RunRow.id.in_(runs))
    found: dict[str, list[str]] = {}
    for run, best, done in connection.execute(marks).all():
        names: set[str] = set()
        # One round at a time: with several the database would read all metrics of the run.
        for number in {0, best or 0, done}:
            wanted = (MetricRow.run == run, MetricRow.round == number, MetricRow.client == "", MetricRow.layer == "")
            names.update(connection.execute(select(MetricRow.name).where(*wanted)).scalars())
        found[run] = sorted(names)
    return found


def _measured(runs: tuple[str, ...], name: str) -> Subquery:
    """Select the rounds that measured a metric, with what was spent so far, and their places from several sides."""
    row = RoundRow

    def so_far(number: ColumnElement[float]) -> ColumnElement[float]:
        return func.sum(number).over(partition_by=row.run, order_by=row.round)

    metric = and_(MetricRow.run == row.run, MetricRow.round == row.round, MetricRow.name == name)
    columns = (
        row.run,
        row.round,
        row.epsilon,
        MetricRow.value,
        so_far(cast(row.bytes_up, Double) + cast(row.bytes_down, Double)).label("nbytes"),
        so_far(case((summable(row.seconds), row.seconds), else_=0.0)).label("seconds"),
    )
    # An outer join: from its rounds to their metrics a database goes by the key.
    joined = select(*columns).outerjoin(MetricRow, and_(metric, MetricRow.client == "", MetricRow.layer == ""))
    every = joined.where(row.run.in_(runs)).subquery()
    of_run = every.c.run
    places = (
        func.dense_rank().over(order_by=every.c.round).label("place"),
        func.row_number().over(partition_by=of_run, order_by=every.c.round).label("from_start"),
        func.row_number().over(partition_by=of_run, order_by=every.c.round.desc()).label("from_end"),
        func.row_number().over(partition_by=of_run, order_by=(every.c.value, every.c.round)).label("from_best"),
    )
    return select(*every.c, *places).where(every.c.value.is_not(None)).subquery()
