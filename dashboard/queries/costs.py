"""What a run's rounds cost and how exactly they merged, thinned or as means where there are many."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pandas as pd
from sqlalchemy import Connection, Double, cast, func, or_, select

from common.store.models import MetricRow, RoundRow
from dashboard.findings.timelines import LONGEST_S
from dashboard.queries.rounds import POINTS, SPREAD_POINTS, gathered, holds, thinned
from dashboard.queries.tables import finite, table_of
from dashboard.settings import positive

BARS = 120
"""Bars of a chart over rounds; where there are more rounds, a bar stands for several."""
PHASES = ("train", "aggregate", "evaluate")
"""Phases of the server whose seconds a round keeps."""
ENERGIES = ("discarded_energy", "download_discarded_energy")


def traffic(connection: Connection, run: str) -> pd.DataFrame:
    """Return the bytes of a round, as means over each bar: columns first, last, bytes_up, bytes_down."""
    bars = gathered(run, BARS)
    columns = (
        func.min(RoundRow.round).label("first"),
        func.max(RoundRow.round).label("last"),
        # As whole numbers, sums of lying sizes would pass what 64 bits hold.
        func.avg(cast(RoundRow.bytes_up, Double)).label("bytes_up"),
        func.avg(cast(RoundRow.bytes_down, Double)).label("bytes_down"),
    )
    joined = select(*columns).select_from(bars).join(RoundRow, RoundRow.round == bars.c.round)
    return table_of(connection, joined.where(RoundRow.run == run).group_by(bars.c.place).order_by(bars.c.place))


def phases(connection: Connection, run: str) -> pd.DataFrame:
    """Return the seconds of a round by phase, as means over each bar: columns first, last, phase, seconds."""
    bars = gathered(run, BARS)
    joined = select(bars.c.place, RoundRow.round, RoundRow.phases).select_from(bars)
    statement = joined.join(RoundRow, RoundRow.round == bars.c.round).where(RoundRow.run == run)
    found: dict[int, list[tuple[int, Any]]] = defaultdict(list)
    for place, number, told in connection.execute(statement.order_by(RoundRow.round)):
        found[place].append((number, told if isinstance(told, dict) else {}))
    rows = [
        (rounds[0][0], rounds[-1][0], phase, sum(_seconds(told.get(phase)) for _, told in rounds) / len(rounds))
        for rounds in found.values()
        for phase in PHASES
    ]
    return pd.DataFrame(rows, columns=["first", "last", "phase", "seconds"])


def merges(connection: Connection, run: str) -> pd.DataFrame:
    """Return how far merges were from the exact average: columns round, error, exact; rounds that merged, thinned."""
    some = thinned(run, POINTS)
    joined = select(RoundRow.round, RoundRow.error, RoundRow.exact).select_from(some)
    statement = joined.join(RoundRow, RoundRow.round == some.c.round).where(RoundRow.run == run)
    merged = or_(RoundRow.exact.is_(True), RoundRow.error.is_not(None))
    return table_of(connection, statement.where(merged).order_by(RoundRow.round))


def effective_ranks(connection: Connection, run: str) -> pd.DataFrame:
    """Return the effective rank of what was merged, over the layers: columns round, value, low, high; thinned."""
    some = thinned(run, SPREAD_POINTS, holds(run, "effective_rank"))
    same = (MetricRow.run == run) & (MetricRow.round == some.c.round) & (MetricRow.name == "effective_rank")
    value = MetricRow.value
    columns = (func.avg(value).label("value"), func.min(value).label("low"), func.max(value).label("high"))
    joined = select(some.c.round, *columns).select_from(some).join(MetricRow, same)
    wanted = (MetricRow.client == "", MetricRow.layer != "", finite(value))
    return table_of(connection, joined.where(*wanted).group_by(some.c.round).order_by(some.c.round))


def discarded(connection: Connection, run: str) -> pd.DataFrame:
    """Return the share of energy that was cut away: columns round, name, value; of downloads the clients' mean."""
    some = thinned(run, SPREAD_POINTS, holds(run, *ENERGIES))
    same = (MetricRow.run == run) & (MetricRow.round == some.c.round) & MetricRow.name.in_(ENERGIES)
    mean = func.avg(MetricRow.value).label("value")
    joined = select(some.c.round, MetricRow.name, mean).select_from(some).join(MetricRow, same)
    wanted = joined.where(MetricRow.layer == "", finite(MetricRow.value))
    return table_of(connection, wanted.group_by(some.c.round, MetricRow.name).order_by(some.c.round, MetricRow.name))


def _seconds(told: Any) -> float:
    """Read a number of seconds that may be anything."""
    return min(positive(told) or 0.0, LONGEST_S)
