"""Runs and what came of them, a row each."""

from __future__ import annotations

import pandas as pd
from sqlalchemy import Connection, func, select

from common.store import Run
from common.store.models import ArtefactRow, MetricRow, RoundRow
from common.store.reading import read_runs
from dashboard.queries.tables import table_of

LOSSES = ("held_out_loss", "unseen_loss")
"""What runs are judged by, the first that they have."""
SPARK_POINTS = 40


def runs(connection: Connection) -> list[Run]:
    """Return all runs, newest first."""
    return read_runs(connection)


def totals(connection: Connection) -> pd.DataFrame:
    """Return what each run cost: columns run, bytes_up, bytes_down, seconds, epsilon."""
    columns = (
        func.sum(RoundRow.bytes_up).label("bytes_up"),
        func.sum(RoundRow.bytes_down).label("bytes_down"),
        func.sum(RoundRow.seconds).label("seconds"),
        func.max(RoundRow.epsilon).label("epsilon"),
    )
    return table_of(connection, select(RoundRow.run, *columns).group_by(RoundRow.run))


def disk_use(connection: Connection) -> pd.DataFrame:
    """Return the bytes of each run's files: columns run, nbytes."""
    return table_of(
        connection, select(ArtefactRow.run, func.sum(ArtefactRow.nbytes).label("nbytes")).group_by(ArtefactRow.run)
    )


def sparks(connection: Connection) -> dict[str, list[float]]:
    """Return each run's loss over the rounds, thinned to a few points; the held-out one where there is one."""
    wanted = (MetricRow.name.in_(LOSSES), MetricRow.client == "", MetricRow.layer == "")
    statement = select(MetricRow.run, MetricRow.name, MetricRow.round, MetricRow.value).where(*wanted)
    found: dict[str, dict[str, list[float]]] = {}
    for run, name, _, value in connection.execute(statement.order_by(MetricRow.run, MetricRow.name, MetricRow.round)):
        found.setdefault(run, {}).setdefault(name, []).append(value)
    return {run: thinned(next(losses[name] for name in LOSSES if name in losses)) for run, losses in found.items()}


def thinned(values: list[float], most: int = SPARK_POINTS) -> list[float]:
    """Keep the first and the last value and every n-th between, at most ``most``."""
    if len(values) <= most:
        return values
    return [values[i * (len(values) - 1) // (most - 1)] for i in range(most)]
