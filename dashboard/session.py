"""What a reader has before them: the store, and the run the address names."""

from __future__ import annotations

import os
from pathlib import Path

import streamlit as st

from common.errors import StoreError
from common.home import default_home
from common.store import Run, RunStatus, shown_status
from dashboard.queries import runs
from dashboard.source import Source
from dashboard.words import visible

REFRESH_S = 2.0
"""How often what shows a live run looks again."""


@st.cache_resource(show_spinner=False)
def _opened(home: str, url: str | None) -> Source:
    return Source(Path(home), url)


def source() -> Source:
    """Return the store of this dashboard, one for all sessions; where it is, ``launch`` put into the environment."""
    return _opened(str(default_home()), os.environ.get("LORAFLEET_DATABASE_URL"))


def all_runs() -> list[Run]:
    """Return all runs, newest first.

    Raises
    ------
    StoreError
        If the store does not answer and never did.
    """
    return source().look().ask(runs.runs)


def chosen_run() -> Run | None:
    """Return the run the address names, or the newest; None if there is none."""
    known = all_runs()
    name = st.query_params.get("run", "")
    return next((run for run in known if run.id == name), known[0] if known else None)


def state_of(run: Run) -> RunStatus:
    """Return a run's status as it is now: one that is ``running`` but that nobody writes was interrupted."""
    try:
        return shown_status(source().store, run)
    except StoreError:
        return run.status


def is_live(run: Run) -> bool:
    """Tell whether somebody writes a run now, so that what shows it has to look again by itself."""
    return state_of(run) == "running"


def run_label(run: Run) -> str:
    """Name a run in a list: how and when."""
    return visible(f"{run.strategy} · {run.created_at:%d %b %H:%M} · seed {run.seed} · {run.name} · {run.id[-4:]}")
