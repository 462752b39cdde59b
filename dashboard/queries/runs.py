"""Runs and what came of them, a row each."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, TypeVar

import pandas as pd
from sqlalchemy import ColumnElement, Connection, Double, and_, cast, func, or_, select
from sqlalchemy.orm import aliased

from common.store import Run
from common.store.models import ArtefactRow, MetricRow, RoundRow, RunRow
from common.store.reading import read_runs
from dashboard.queries.tables import finite, summable, table_of

T = TypeVar("T")
LOSSES = ("held_out_loss", "unseen_loss")
"""What runs are judged by, the first that they have."""
SPARK_POINTS = 40
LOOKED_AT = 200
"""Rounds of a run among which the points are chosen."""


def runs(connection: Connection) -> list[Run]:
    """Return all runs, newest first."""
    return read_runs(connection)


def totals(connection: Connection) -> pd.DataFrame:
    """Return what each run cost: columns run, bytes_up, bytes_down, seconds, epsilon."""
    # As floats: a sum of whole numbers that grows past 64 bits is an error in SQLite.
    columns = (
        func.sum(cast(RoundRow.bytes_up, Double)).label("bytes_up"),
        func.sum(cast(RoundRow.bytes_down, Double)).label("bytes_down"),
        func.sum(RoundRow.seconds).filter(summable(RoundRow.seconds)).label("seconds"),
        func.max(RoundRow.epsilon).filter(finite(RoundRow.epsilon)).label("epsilon"),
    )
    return table_of(connection, select(RoundRow.run, *columns).group_by(RoundRow.run))


def disk_use(connection: Connection) -> pd.DataFrame:
    """Return the bytes of each run's files: columns run, nbytes."""
    nbytes = func.sum(cast(ArtefactRow.nbytes, Double)).label("nbytes")
    return table_of(connection, select(ArtefactRow.run, nbytes).group_by(ArtefactRow.run))


def sparks(connection: Connection) -> dict[str, tuple[str, list[float]]]:
    """Return, by run, the loss it is judged by and its values over the rounds, thinned to a few points.

    A run without a finite loss is missing.
    """
    held_out, unseen = aliased(MetricRow), aliased(MetricRow)
    step = 1 + RunRow.rounds_done // LOOKED_AT
    some = or_(RoundRow.round % step == 0, RoundRow.round == RunRow.rounds_done)
    # Outer joins: from its rounds to their losses a database goes by the key; it would scan all metrics otherwise.
    statement = (
        select(RoundRow.run, held_out.value, unseen.value)
        .join(RunRow, RunRow.id == RoundRow.run)
        .outerjoin(held_out, _loss(held_out, LOSSES[0]))
        .outerjoin(unseen, _loss(unseen, LOSSES[1]))
        .where(some)
        .order_by(RoundRow.run, RoundRow.round)
    )
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    rows: Iterable[Any] = connection.execute(statement)
    for run, *values in rows:
        for name, value in zip(LOSSES, values, strict=True):
            if value is not None and math.isfinite(value):
                found[run][name].append(value)
    judged = {run: next(name for name in LOSSES if name in losses) for run, losses in found.items()}
    return {run: (name, thinned(found[run][name])) for run, name in judged.items()}


def thinned(values: list[T], most: int = SPARK_POINTS) -> list[T]:
    """Keep the first and the last value and every n-th between, at most ``most``."""
    if len(values) <= most:
        return values
    return [values[i * (len(values) - 1) // (most - 1)] for i in range(most)]


def _loss(metric: type[MetricRow], name: str) -> ColumnElement[bool]:
    whole = and_(metric.client == "", metric.layer == "")
    return and_(metric.run == RoundRow.run, metric.round == RoundRow.round, metric.name == name, whole)
