"""What tells whether anything has changed since the last look."""

from __future__ import annotations

from sqlalchemy import Connection, func, select

from common.store.models import EventRow, RunRow


def last_change(connection: Connection, run: str = "") -> str:
    """Return a text that differs after every change of a run, or of any run: signs of life are no change."""
    events, runs = (
        select(func.max(EventRow.id)),
        select(func.count(), func.max(RunRow.updated_at), func.max(RunRow.status)),
    )
    if run:
        events, runs = events.where(EventRow.run == run), runs.where(RunRow.id == run)
    count, updated, status = connection.execute(runs).one()
    return f"{connection.execute(events).scalar()}|{count}|{updated}|{status}"
