"""Who took part in which rounds of a run, what each client declared, and how long it took."""

from __future__ import annotations

import pandas as pd
from sqlalchemy import ColumnElement, Connection, Subquery, func, select
from sqlalchemy.orm import aliased

from common.store import Client
from common.store.models import ClientRoundRow, RoundRow, StatisticRow
from common.store.reading import read_members
from dashboard.findings.slowness import WINDOW, Work, work_of
from dashboard.findings.timelines import LONGEST_S, client_spans, trained
from dashboard.queries.tables import table_of

FATES = ("accepted", "rejected", "failed", "late", "offline")
"""What becomes of a client in a round; of all but the last it was asked."""


def members(connection: Connection, run: str) -> list[Client]:
    """Return the clients as the server met them, by name; empty for runs of older versions."""
    return read_members(connection, run)


def totals(connection: Connection, run: str) -> pd.DataFrame:
    """Return how often each client did what: columns client, one for each of :data:`FATES`, and asked."""
    row = ClientRoundRow
    statement = select(row.client, *_counts()).where(row.run == run).group_by(row.client).order_by(row.client)
    return _with_asked(table_of(connection, statement))


def declared(connection: Connection, run: str) -> pd.DataFrame:
    """Return what each client had in the last round it took part in: columns client, round, rank, num_examples."""
    row, other = ClientRoundRow, aliased(ClientRoundRow)
    accepted = (other.run == run, other.status == "accepted")
    last = select(other.client, func.max(other.round).label("round")).where(*accepted).group_by(other.client).subquery()
    same = (row.run == run) & (row.round == last.c.round) & (row.client == last.c.client)
    statement = select(row.client, row.round, row.rank, row.num_examples).select_from(last).join(row, same)
    return table_of(connection, statement)


def work(connection: Connection, run: str, rounds: int = WINDOW) -> dict[str, Work]:
    """Return what each client that was accepted lately needs for a round, over the last training rounds that ended.

    Of rounds without a timeline only the work itself is known, not the upload.
    """
    ended = select(RoundRow.round).where(RoundRow.run == run, RoundRow.round > 0, RoundRow.status != "running")
    recent = list(connection.execute(ended.order_by(RoundRow.round.desc()).limit(rounds)).scalars())
    kept, row = StatisticRow, ClientRoundRow
    told = select(kept.round, kept.data).where(kept.run == run, kept.kind == "timeline", kept.round.in_(recent))
    phases = {number: trained(client_spans(data)) for number, data in connection.execute(told)}
    known = (row.run == run, row.round.in_(recent), row.status == "accepted", row.seconds > 0, row.seconds < LONGEST_S)
    found: dict[int, dict[str, tuple[float, dict[str, float]]]] = {}
    for number, client, took in connection.execute(select(row.round, row.client, row.seconds).where(*known)):
        parts = phases.get(number, {}).get(client, {})
        found.setdefault(number, {})[client] = (sum(parts.values()) if parts else took, parts)
    return work_of(found.values())


def training_rounds(connection: Connection, run: str) -> int:
    """Count the rounds after round 0, which is before training."""
    statement = select(func.count()).select_from(RoundRow).where(RoundRow.run == run, RoundRow.round > 0)
    return int(connection.execute(statement).scalar_one())


def participation(connection: Connection, run: str, clients: tuple[str, ...], columns: int) -> pd.DataFrame:
    """Return what became of clients, rounds put together where there are many: a row per client and column.

    Columns of the table: client, place (of the column, from 0), one for each of :data:`FATES`, and asked.
    """
    rounds, row = placed(run, columns), ClientRoundRow
    statement = (
        select(row.client, rounds.c.place, *_counts())
        .join(rounds, row.round == rounds.c.round)
        .where(row.run == run, row.client.in_(clients))
        .group_by(row.client, rounds.c.place)
        .order_by(rounds.c.place, row.client)
    )
    return _with_asked(table_of(connection, statement))


def spans_of_columns(connection: Connection, run: str, columns: int) -> pd.DataFrame:
    """Return which rounds were put together: columns place, first, last."""
    rounds = placed(run, columns)
    ends = (func.min(rounds.c.round).label("first"), func.max(rounds.c.round).label("last"))
    return table_of(connection, select(rounds.c.place, *ends).group_by(rounds.c.place).order_by(rounds.c.place))


def fates(connection: Connection, run: str, clients: tuple[str, ...]) -> pd.DataFrame:
    """Return what became of clients round by round: columns client, round, status, reason."""
    row = ClientRoundRow
    wanted = (row.run == run, row.client.in_(clients), row.round >= 1)
    statement = select(row.client, row.round, row.status, row.reason).where(*wanted)
    return table_of(connection, statement.order_by(row.round, row.client))


def placed(run: str, columns: int, first: int = 1) -> Subquery:
    """Put a run's rounds into so many columns of equal width: round, place.

    By their order and not by their numbers, which may lie any distance apart.
    """
    wanted = (RoundRow.run == run, RoundRow.round >= first)
    order: ColumnElement[int] = func.row_number().over(order_by=RoundRow.round)
    count: ColumnElement[int] = func.count().over()
    numbered = select(RoundRow.round, order.label("number"), count.label("count")).where(*wanted).subquery()
    width = (numbered.c.count + columns - 1) // columns
    return select(numbered.c.round, ((numbered.c.number - 1) // width).label("place")).subquery()


def one_client(connection: Connection, run: str, client: str, count: int) -> pd.DataFrame:
    """Return a client's last rounds, newest first, as they are stored."""
    row = ClientRoundRow
    columns = (row.round, row.status, row.reason, row.rank, row.num_examples, row.seconds, row.bytes_up, row.bytes_down)
    statement = select(*columns).where(row.run == run, row.client == client).order_by(row.round.desc()).limit(count)
    return table_of(connection, statement)


def _counts() -> list[ColumnElement[int]]:
    row = ClientRoundRow
    return [func.count().label("rows"), *(func.count().filter(row.status == fate).label(fate) for fate in FATES)]


def _with_asked(found: pd.DataFrame) -> pd.DataFrame:
    """Count the rounds in which a client was there to be asked."""
    return found.assign(asked=found["rows"] - found["offline"]).drop(columns="rows")
