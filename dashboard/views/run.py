"""One run: is it alive, what needs somebody, where is the adapter; then its rounds, their cost, and how it was set."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

import streamlit as st

from common.errors import StoreError
from common.store import Run
from common.store.reading import find_run
from dashboard.pieces import chosen_or_stop, guarded, live
from dashboard.queries.standing import standing, watched_clients
from dashboard.session import source, state_of
from dashboard.views.run_adapter import adapter, samples
from dashboard.views.run_configuration import configuration
from dashboard.views.run_costs import certificate, costs
from dashboard.views.run_feed import feed
from dashboard.views.run_head import Seen, head
from dashboard.views.run_metrics import metrics
from dashboard.views.run_round import one_round
from dashboard.words import plain

REDRAW_S, PER_ROUND_S = 6.0, 2.0
"""Seconds at least between two drawings of what is below the head while a run goes on: fewer in its first rounds."""
PARTS = (adapter, metrics, one_round, costs, certificate, feed, samples, configuration)


def page() -> None:
    """Show it."""
    run = chosen_or_stop()
    st.title(f"Run {plain(run.name, 60)}")
    st.caption(
        f"{plain(run.strategy, 60)} on {plain(run.task, 60)} · seed {run.seed} · "
        f"began {run.created_at:%d %b %Y, %H:%M} UTC · {plain(run.id, 100)}"
    )
    drawn, drawn_at = _seen_if_readable(run), monotonic()

    def body() -> None:
        now = seen(run)
        if drawn is None or (now.mark != drawn.mark and monotonic() - drawn_at >= _patience(now, drawn)):
            st.rerun()  # whatever is below has changed as well; it is not looked at before
        head(now)

    # Also where nothing goes on: a run that is resumed shows up by itself.
    live(body, running=True)
    for part in PARTS:
        _show(part, run)


def _patience(now: Seen, drawn: Seen) -> float:
    """Return for how many seconds what is below the head may stay as it was drawn."""
    return min(REDRAW_S, PER_ROUND_S * drawn.run.rounds_done) if now.status == drawn.status else 0.0


def _show(part: Callable[[Run], None], run: Run) -> None:
    """Show a part of the page; a choice made in it draws it anew, and nothing else."""
    st.fragment(lambda: guarded(lambda: part(run)))()


def _seen_if_readable(run: Run) -> Seen | None:
    """Look how a run stands; None where a damaged row hides it, which the head tells and other parts may not need."""
    try:
        return seen(run)
    except StoreError:
        return None


def seen(run: Run) -> Seen:
    """Look how a run stands now."""
    look, now = source().look(run.id), _as_now(run)
    return Seen(now, state_of(now), look.ask(standing, run.id), look.ask(watched_clients, run.id))


def _as_now(run: Run) -> Run:
    """Read the run's row past all that is kept: signs of life are no change. Without a store it is as it was."""
    try:
        with source().reading() as connection:
            return find_run(connection, run.id)
    except StoreError:
        return run
