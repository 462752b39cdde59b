"""What a run told of itself: its events, a page at a time."""

from __future__ import annotations

import pandas as pd
from sqlalchemy import Connection, func, select

from common.store.models import EventRow
from dashboard.queries.tables import table_of

STEPS = ("round_started", "dispatched", "aggregated")
"""Kinds that say how far a round is; once it has ended nobody needs them."""
KINDS = {
    "rounds": ("committed", "failed", "run_finished", "run_completed", "run_failed", "run_interrupted"),
    "left out": ("left_out",),
    "notices": ("notice",),
}


def happenings(connection: Connection, run: str, what: str, skip: int, count: int) -> tuple[pd.DataFrame, int]:
    """Return a page of what happened, newest first, and how much there is in all.

    Parameters
    ----------
    what : str
        A key of :data:`KINDS`; ``everything``; anything else leaves out :data:`STEPS`.
    skip, count : int
        Which page.

    Returns
    -------
    DataFrame, int
        With columns at, kind, round, text; and the number of all events of that kind.
    """
    row = EventRow
    wanted = [row.run == run]
    if what in KINDS:
        wanted.append(row.kind.in_(KINDS[what]))
    elif what != "everything":
        wanted.append(row.kind.not_in(STEPS))
    total = connection.execute(select(func.count()).select_from(row).where(*wanted)).scalar_one()
    page = select(row.at, row.kind, row.round, row.text).where(*wanted).order_by(row.id.desc())
    return table_of(connection, page.limit(count).offset(skip)), int(total)
