"""Whether a run that is said to be running has somebody who runs it."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta

from common.store.entities import Run, RunStatus
from common.store.lock import is_locked
from common.store.run_store import RunStore

STALE_AFTER = timedelta(seconds=60)
"""Age of a sign of life beyond which nobody is taken to write the run; the writer gives one every few seconds."""


def shown_status(store: RunStore, run: Run, now: datetime | None = None) -> RunStatus:
    """Return a run's status; one that is ``running`` but that no living process writes was interrupted.

    Where the run's folder is, its lock tells. On another machine that reads the same database only the signs of life
    do, and where there was none, as in runs of older versions, the status stands as it is.

    Parameters
    ----------
    store : RunStore
        Where the run is.
    run : Run
        The run.
    now : datetime, optional
        The time; the system's unless given.
    """
    if run.status != "running":
        return run.status
    folder = store.run_folder(run.id)
    if os.access(folder, os.R_OK | os.X_OK):
        lives = is_locked(folder)
    else:
        lives = run.alive_at is None or (now or datetime.now(UTC)) - run.alive_at <= STALE_AFTER
    return "running" if lives else "interrupted"


def last_sign(run: Run) -> datetime:
    """Return when a run was last heard of: its last change or its last sign of life."""
    return max(run.updated_at, run.alive_at or run.updated_at)
