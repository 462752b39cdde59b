"""What was measured of layers: ranks and how much of them is used, how alike clients are, what compression cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Connection, case, exists, func, select

from common.store.columns import clean_name
from common.store.models import MetricRow, RoundRow, StatisticRow
from common.store.reading import read_statistics
from dashboard.queries.tables import finite, table_of

Numbers = NDArray[np.float64]
KINDS = ("layers", "similarity")
MOST_NAMES = 5_000
UNREADABLE = "what is stored cannot be read"


@dataclass(frozen=True)
class LayerRanks:
    """What each client trained in each layer.

    Parameters
    ----------
    clients, layers : tuple of str
        Their names.
    rank, used : ndarray, shape (clients, layers)
        The rank trained, and how much of it holds 95 % of the energy; NaN where it is not known.
    """

    clients: tuple[str, ...]
    layers: tuple[str, ...]
    rank: Numbers
    used: Numbers


@dataclass(frozen=True)
class Likeness:
    """How alike clients' updates are.

    Parameters
    ----------
    clients : tuple of str
        Their names.
    cosine : ndarray, shape (clients, clients)
        Of their updates to each other, in [-1, 1]; NaN where it is not known.
    """

    clients: tuple[str, ...]
    cosine: Numbers


def measured_rounds(connection: Connection, run: str) -> list[int]:
    """Return the rounds that have statistics of layers, in order; without any, those whose merge was measured."""
    kept = select(StatisticRow.round).where(StatisticRow.run == run, StatisticRow.kind.in_(KINDS)).distinct()
    return sorted(connection.execute(kept).scalars()) or merged_rounds(connection, run)


def merged_rounds(connection: Connection, run: str) -> list[int]:
    """Return the rounds whose merge was measured, in order."""
    measured = exists().where(
        MetricRow.run == RoundRow.run, MetricRow.round == RoundRow.round, MetricRow.name == "effective_rank"
    )
    statement = select(RoundRow.round).where(RoundRow.run == run, measured).order_by(RoundRow.round)
    return list(connection.execute(statement).scalars())


def layer_ranks(connection: Connection, run: str, number: int) -> LayerRanks | str:
    """Return a round's ranks per client and layer; a sentence's end where they were left out, empty without any."""
    return next((read_layer_ranks(kept.data) for kept in read_statistics(connection, run, "layers", number)), "")


def likeness(connection: Connection, run: str, number: int) -> Likeness | str:
    """Return how alike a round's clients are; a sentence's end where it was left out, empty without any."""
    return next((read_likeness(kept.data) for kept in read_statistics(connection, run, "similarity", number)), "")


def of_merge(connection: Connection, run: str, number: int) -> pd.DataFrame:
    """Return what a round's merge is like: columns layer, effective_rank, merged_norm."""
    wanted = (
        MetricRow.run == run,
        MetricRow.round == number,
        MetricRow.name.in_(("effective_rank", "merged_norm")),
        MetricRow.layer != "",
        MetricRow.client == "",
        finite(MetricRow.value),
    )
    statement = select(MetricRow.layer, *(_named(name, name) for name in ("effective_rank", "merged_norm"))).where(
        *wanted
    )
    return table_of(connection, statement.group_by(MetricRow.layer).order_by(MetricRow.layer))


def norms(connection: Connection, run: str, rounds: tuple[int, ...]) -> pd.DataFrame:
    """Return how large the merge was in some rounds: columns round, layer, value."""
    wanted = (MetricRow.run == run, MetricRow.round.in_(rounds), MetricRow.name == "merged_norm", MetricRow.layer != "")
    statement = select(MetricRow.round, MetricRow.layer, MetricRow.value).where(*wanted, finite(MetricRow.value))
    return table_of(connection, statement.order_by(MetricRow.round, MetricRow.layer))


def directions(connection: Connection, run: str, number: int) -> pd.DataFrame:
    """Return where each client's update went in a round: columns client, cosine, norm; lowest cosine first."""
    wanted = (
        MetricRow.run == run,
        MetricRow.round == number,
        MetricRow.name.in_(("cosine_to_mean", "update_norm")),
        MetricRow.client != "",
        MetricRow.layer == "",
        finite(MetricRow.value),
    )
    columns = (_named("cosine_to_mean", "cosine"), _named("update_norm", "norm"))
    statement = select(MetricRow.client, *columns).where(*wanted).group_by(MetricRow.client)
    found = table_of(connection, statement.order_by(MetricRow.client))
    return found.sort_values("cosine", kind="stable", ignore_index=True)


def _named(name: str, label: str) -> ColumnElement[float | None]:
    """Pick one metric of a group as a column."""
    return func.max(case((MetricRow.name == name, MetricRow.value))).label(label)


def agreement(connection: Connection, run: str, rounds: tuple[int, ...]) -> pd.DataFrame:
    """Return how far clients agreed with the average in some rounds: columns round, low, median, high, lowest.

    ``low`` and ``high`` are the quantiles 0.1 and 0.9, ``lowest`` is the lowest cosine; all are nearest ranks, values
    that some client had.
    """
    wanted = (
        MetricRow.run == run,
        MetricRow.round.in_(rounds),
        MetricRow.name == "cosine_to_mean",
        MetricRow.client != "",
        MetricRow.layer == "",
        finite(MetricRow.value),
    )
    place = func.row_number().over(partition_by=MetricRow.round, order_by=MetricRow.value).label("place")
    count = func.count().over(partition_by=MetricRow.round).label("clients")
    ranked = select(MetricRow.round, MetricRow.value, place, count).where(*wanted).subquery()

    def quantile(share: float, label: str) -> ColumnElement[float | None]:
        reached = ranked.c.place >= share * ranked.c.clients
        return func.min(case((reached, ranked.c.value))).label(label)

    columns = (quantile(0.1, "low"), quantile(0.5, "median"), quantile(0.9, "high"), quantile(0.0, "lowest"))
    return table_of(connection, select(ranked.c.round, *columns).group_by(ranked.c.round).order_by(ranked.c.round))


def energy_left_out(connection: Connection, run: str) -> pd.DataFrame:
    """Return the shares of energy that compression left out: columns round, series, value, highest.

    ``merge`` is what the server left out of a round's merge, ``downloads`` what bounded downloads left out, a mean over
    clients; both in [0, 1].
    """
    series = case((MetricRow.client == "", "merge"), else_="downloads").label("series")
    wanted = (
        MetricRow.run == run,
        MetricRow.name.in_(("discarded_energy", "download_discarded_energy")),
        MetricRow.layer == "",
        finite(MetricRow.value),
    )
    columns = (func.avg(MetricRow.value).label("value"), func.max(MetricRow.value).label("highest"))
    statement = select(MetricRow.round, series, *columns).where(*wanted).group_by(MetricRow.round, series)
    return table_of(connection, statement.order_by(MetricRow.round, series))


def read_layer_ranks(data: Any) -> LayerRanks | str:
    """Read a statistic ``layers`` without trusting it; the end of a sentence where it holds no numbers."""
    note = _note(data)
    if note is not None:
        return note
    clients, layers = _names(data.get("clients")), _names(data.get("layers"))
    if clients is None or layers is None:
        return UNREADABLE
    rank = _matrix(data.get("rank"), len(clients), len(layers))
    used = _matrix(data.get("effective_rank"), len(clients), len(layers))
    if rank is None or used is None:
        return UNREADABLE
    rank = np.where(rank > 0, rank, np.nan)
    used = np.where((used >= 0) & (used <= rank), used, np.nan)
    return LayerRanks(clients, layers, rank, used)


def read_likeness(data: Any) -> Likeness | str:
    """Read a statistic ``similarity`` without trusting it; the end of a sentence where it holds no numbers."""
    note = _note(data)
    if note is not None:
        return note
    clients = _names(data.get("clients"))
    cosine = None if clients is None else _matrix(data.get("cosine"), len(clients), len(clients))
    if clients is None or cosine is None:
        return UNREADABLE
    return Likeness(clients, np.where(np.abs(cosine) <= 1, cosine, np.nan))


def _note(data: Any) -> str | None:
    if not isinstance(data, dict):
        return UNREADABLE
    return str(data["left_out"]) if "left_out" in data else None


def _names(value: Any) -> tuple[str, ...] | None:
    """Return names, as the store's other tables hold them, if that is what they are: some texts, no two alike."""
    if not (isinstance(value, list) and 0 < len(value) <= MOST_NAMES and _all(value, str)):
        return None
    names = tuple(map(clean_name, value))
    return names if len(set(names)) == len(names) else None


def _matrix(value: Any, rows: int, columns: int) -> Numbers | None:
    """Return a matrix of that shape, NaN for null; None if it is none."""
    if not (isinstance(value, list) and len(value) == rows and _all(value, list)):
        return None
    if not all(len(row) == columns and _all(row, int | float | None) for row in value):
        return None
    try:
        found = np.array(value, dtype=np.float64)
    except OverflowError:
        return None
    return np.where(np.isfinite(found), found, np.nan)


def _all(values: Iterable[Any], kind: Any) -> bool:
    return all(isinstance(value, kind) for value in values)
