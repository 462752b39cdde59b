"""Clients: which one is slow, who took part when, what each is and told, and why replies were left out."""

from __future__ import annotations

from statistics import median

import pandas as pd
import streamlit as st

from common.store import Run
from common.wording import counted
from dashboard.findings.roster import Roster, roster
from dashboard.findings.silence import silence, tells_times
from dashboard.findings.slowness import WINDOW, often_late, slowest, took
from dashboard.pieces import chosen_or_stop, explain, live, table
from dashboard.queries import refusals
from dashboard.session import is_live, source
from dashboard.source import Look
from dashboard.views.clients_charts import over_rounds, participation, time_spent
from dashboard.views.clients_details import details
from dashboard.views.clients_tables import MEMBER_COLUMNS, REASON_COLUMNS, hints, member_table, reason_table
from dashboard.words import plain, visible

CHOSEN, ROWS = "client", "members"
"""Keys of the chosen client, which the address holds, and of the table it can be chosen in."""
ALL_ROWS = 10
"""Clients up to which the table is as high as its rows."""
WIDTH = 150
"""Of a number at the head, in pixels: two stand side by side on a phone."""


def page() -> None:
    """Show the clients of a run."""
    run = chosen_or_stop()
    st.title("Clients")

    def body() -> None:
        look = source().look(run.id)
        known = look.ask(roster, run.id)
        if known.names:
            _show(look, run, known)
        else:
            st.info("No client has joined this run yet. Each is listed as soon as its node is there.")

    live(body, is_live(run))


def _show(look: Look, run: Run, known: Roster) -> None:
    _head(run, known)
    if hidden := silence(run):
        explain(hidden)
    st.header("Who takes part")
    name = _choice(run, known)
    with st.container():
        if name is not None:
            details(look, run, known, name)
    left, right = st.columns(2)
    with left:
        participation(look, run, known)
    with right:
        time_spent(known, run)
    st.header("How each one learns")
    over_rounds(look, run, known)
    _reasons(look, run, known, name)


def _head(run: Run, known: Roster) -> None:
    """Answer which client is slow, and sum the federation up."""
    paces = [pace for name, pace in known.paces.items() if known.trains(name)]
    st.markdown(slowest(paces) if tells_times(run) else often_late(paces) or "No client misses its deadlines often.")
    training = [name for name in known.names if known.trains(name)]
    asked, used = int(known.totals["asked"].sum()), int(known.totals["accepted"].sum())
    only = len(known.names) - len(training)
    with st.container(horizontal=True):
        st.metric("Clients", len(training), help="Those that train.", width=WIDTH)
        if only:
            st.metric("Only evaluate", only, width=WIDTH)
        st.metric("Replies used", f"{used / asked:.1%}" if asked else "–", help="Of all asked for.", width=WIDTH)
        st.metric("Left out", f"{asked - used:,}", help="Replies asked for and not used; see why below.", width=WIDTH)
        needs = [work.seconds for work in known.work.values()]
        typical = took(median(needs)) if needs else "–"
        about = f"Of one client for one round, upload included: the median of all, over the last {WINDOW} rounds."
        st.metric("Typical time", typical, help=about, width=WIDTH)


def _choice(run: Run, known: Roster) -> str | None:
    """Show the table of clients and return the chosen one, from a row or from the list."""
    names = known.slowest_first
    # On the first look the list, which takes it from the address, has not been drawn yet.
    chosen = st.session_state.get(CHOSEN, st.query_params.get(CHOSEN))
    place = names.index(chosen) if chosen in names else None
    rows = member_table(known, run)
    if names != st.session_state.get(NAMES, names):
        _mark(place)  # the row that was pressed is another client's now
    st.dataframe(
        rows,
        hide_index=True,
        key=ROWS,
        height="content" if len(rows) <= ALL_ROWS else 400,
        column_config=MEMBER_COLUMNS,
        placeholder="–",
        on_select=_choose_row,
        selection_mode="single-row",
        selection_default={"selection": {"rows": [] if place is None else [place]}},
    )
    st.session_state[NAMES] = names
    return st.selectbox(
        "Client",
        known.names,
        None,
        format_func=lambda name: known.labels.get(name, visible(name, 40)),
        key=CHOSEN,
        bind="query-params",
        placeholder="choose one here or in the table: its rounds, reasons and numbers",
        on_change=_mark_row,
    )


NAMES = "members-shown"


def _choose_row() -> None:
    """Choose the client of the row that was pressed."""
    rows, names = st.session_state[ROWS]["selection"]["rows"], st.session_state[NAMES]
    st.session_state[CHOSEN] = names[rows[0]] if rows and rows[0] < len(names) else None


def _mark_row() -> None:
    """Mark the row of the client that was chosen in the list."""
    names, chosen = st.session_state[NAMES], st.session_state[CHOSEN]
    _mark(names.index(chosen) if chosen in names else None)


def _mark(place: int | None) -> None:
    st.session_state[ROWS] = {"selection": {"rows": [] if place is None else [place]}}


def _reasons(look: Look, run: Run, known: Roster, name: str | None) -> None:
    """Say why replies were left out, of all clients or of the chosen one."""
    st.header(
        "Why replies were left out" if name is None else f"Why replies of {plain(known.labels[name], 60)} were left out"
    )
    found = pd.concat(
        [look.ask(refusals.left_out, run.id, name), look.ask(refusals.not_evaluated, run.id, name)], ignore_index=True
    )
    if found.empty:
        explain("None was: every reply that was asked for came in time, passed the checks and was merged.")
        return
    reasons = reason_table(found, known.labels)
    table(reasons.drop(columns="hint"), key="reasons", **REASON_COLUMNS)
    st.markdown("\n".join(["What helps:", "", *(f"- *{what}:* {hint}" for what, hint in hints(reasons).items())]))
    if len(found) >= refusals.MOST:
        explain(f"These are the newest {counted(refusals.MOST, 'reason')}; there are more.")
