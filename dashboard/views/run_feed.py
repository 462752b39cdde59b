"""What happened in a run, in sentences, newest first."""

from __future__ import annotations

from math import ceil

import streamlit as st

from common.store import Run
from common.wording import counted
from dashboard.pieces import explain
from dashboard.queries.happenings import KINDS, happenings
from dashboard.session import source
from dashboard.words import plain

MOSTLY = "what matters"
CHOICES = (MOSTLY, *KINDS, "everything")
PAGE = 15
ICONS = {
    "committed": ":material/check_circle:",
    "failed": ":material/error:",
    "left_out": ":material/person_off:",
    "notice": ":material/info:",
    "run_finished": ":material/flag:",
    "run_failed": ":material/error:",
    "run_interrupted": ":material/pause_circle:",
    "round_started": ":material/play_circle:",
    "dispatched": ":material/send:",
    "aggregated": ":material/merge:",
}


def feed(run: Run) -> None:
    """Show it, a page at a time."""
    st.header("What happened")
    what = st.pills("Show", CHOICES, default=MOSTLY, required=True, key="kind", bind="query-params")
    place = st.container()
    look = source().look(run.id)
    _, total = look.ask(happenings, run.id, what, 0, 0)
    pages = max(1, ceil(total / PAGE))
    page = st.pagination(pages, key="events_page") if pages > 1 else 1
    rows, _ = look.ask(happenings, run.id, what, (page - 1) * PAGE, PAGE)
    with place:
        if rows.empty:
            explain("Nothing of this kind has happened.")
            return
        lines = [
            f"- {ICONS.get(kind, ':material/circle:')} `{at:%d %b %H:%M:%S}` {plain(text)}"
            for at, kind, text in zip(rows["at"], rows["kind"], rows["text"], strict=True)
        ]
        st.markdown("\n".join(lines))
        explain(f"{counted(total, 'event')}; times are UTC.")
