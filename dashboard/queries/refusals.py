"""Replies that were left out of a run's rounds, and why."""

from __future__ import annotations

import pandas as pd
from sqlalchemy import Connection, func, select

from common.store.models import ClientRoundRow, EventRow
from dashboard.queries.tables import table_of

MOST = 2_000
"""Different reasons that are looked at, the newest."""


def left_out(connection: Connection, run: str, client: str | None = None) -> pd.DataFrame:
    """Return why replies were left out, newest first, a row for each client and text of a reason.

    Columns: status, reason, client, count, first and last (its rounds).
    """
    row = ClientRoundRow
    wanted = [row.run == run, row.status.not_in(("accepted", "received"))]
    if client is not None:
        wanted.append(row.client == client)
    columns = (func.count().label("count"), func.min(row.round).label("first"), func.max(row.round).label("last"))
    statement = select(row.status, row.reason, row.client, *columns).where(*wanted)
    grouped = statement.group_by(row.status, row.reason, row.client)
    return table_of(connection, grouped.order_by(func.max(row.round).desc(), row.client).limit(MOST))


def not_evaluated(connection: Connection, run: str, client: str | None = None) -> pd.DataFrame:
    """Return what was told of clients beside a round's replies, mostly that they did not evaluate.

    Columns as of :func:`left_out`, with the sentence as the reason and ``notice`` as the status.
    """
    row = EventRow
    wanted = [row.run == run, row.kind == "notice", row.client.is_not(None), row.round.is_not(None)]
    if client is not None:
        wanted.append(row.client == client)
    columns = (func.count().label("count"), func.min(row.round).label("first"), func.max(row.round).label("last"))
    grouped = select(row.text.label("reason"), row.client, *columns).where(*wanted).group_by(row.text, row.client)
    found = table_of(connection, grouped.order_by(func.max(row.round).desc(), row.client).limit(MOST))
    found.insert(0, "status", "notice")
    return found
