"""One client of the page of clients: what it is, its rounds, its numbers."""

from __future__ import annotations

import math

import pandas as pd
import streamlit as st

from common.store import Run
from common.wording import number, size
from dashboard.charts import ROUND, Axis, lines
from dashboard.findings.roster import Roster
from dashboard.findings.silence import NO_LOSSES, NO_TIMES, silence, tells_times
from dashboard.findings.slowness import parts, took
from dashboard.findings.timelines import LONGEST_S
from dashboard.metric_words import metric_words
from dashboard.pieces import draw, explain, table
from dashboard.queries import clients
from dashboard.source import Look
from dashboard.views.clients_charts import DOTS, curves
from dashboard.views.clients_tables import ROUND_COLUMNS, left_out_words, round_table
from dashboard.words import plain

WIDTH = 150
LAST = 100
"""Rounds of one client that are shown."""


def details(look: Look, run: Run, roster: Roster, name: str) -> None:
    """Show all that is known of a client."""
    st.subheader(plain(roster.labels[name], 60))
    _facts(roster, name)
    st.markdown(about(roster, name))
    rounds = look.ask(clients.one_client, run.id, name, LAST)
    left, right = st.columns(2)
    with left:
        _loss(look, run, roster, name)
    with right:
        _seconds(rounds, "It has finished no round yet." if tells_times(run) else NO_TIMES)
    if rounds.empty:
        explain("It was not asked to train in any round that was committed.")
    else:
        table(round_table(rounds), key="client-rounds", height=None if len(rounds) < 8 else 320, **ROUND_COLUMNS)
        explain(f"Its last {LAST} rounds, newest first." if len(rounds) == LAST else "Its rounds, newest first.")


def about(roster: Roster, name: str) -> str:
    """Say in Markdown what a client is and why it has its rank."""
    member, pace = roster.members.get(name), roster.paces[name]
    said = []
    if member is None:
        said.append("This run kept no record of its device.")
    elif member.rank is None:
        said.append(f"It trains nothing: {plain(member.rank_reason) or 'it only evaluates'}.")
    else:
        most = f" Its device could carry rank {member.max_rank}." if member.max_rank else ""
        said.append(f"It trains rank {member.rank}: {plain(member.rank_reason) or 'no reason was recorded'}.{most}")
    if member is not None:
        joined = f"It joined on {member.joined_at:%d %b %H:%M:%S} UTC"
        said.append(f"{joined}, on {plain(member.device, 80)}." if member.device.strip() else f"{joined}.")
    if name in roster.totals.index and (left_out := left_out_words(roster.totals.loc[name].to_dict())):
        said.append(f"Left out: {left_out}.")
    if shares := parts(pace.phases):
        said.append(f"Its time: {shares}.")
    return " ".join(said)


def _facts(roster: Roster, name: str) -> None:
    member, pace = roster.members.get(name), roster.paces[name]
    counts = roster.totals.loc[name] if name in roster.totals.index else None
    examples = int(roster.declared.at[name, "num_examples"]) if name in roster.declared.index else 0
    loss = float(roster.latest["held_out_loss"].get(name, math.nan))
    took_part = "–" if counts is None else f"{int(counts['accepted'])} of {int(counts['asked'])}"
    shown = {
        "Took part": took_part,
        "Typical time": "–" if pace.seconds is None else took(pace.seconds),
        "Last loss": number(loss if math.isfinite(loss) else None),
        "Examples": f"{examples:,}" if examples > 0 else "–",
        "Free memory": size(member.memory_bytes) if member is not None and member.memory_bytes > 0 else "–",
    }
    with st.container(horizontal=True):
        for label, value in shown.items():
            st.metric(label, value, width=WIDTH)


def _loss(look: Look, run: Run, roster: Roster, name: str) -> None:
    words = metric_words("held_out_loss")
    found, spec = curves(look, run, roster.labels, "held_out_loss", [name], words)
    empty = NO_LOSSES if silence(run) else "It has told no loss; clients do when they evaluate."
    draw("Its loss on held-out data", found, spec, empty, key="client-loss", height=220)


def _seconds(rounds: pd.DataFrame, empty: str) -> None:
    done = rounds["seconds"].astype(float).between(0, LONGEST_S, inclusive="neither")
    found = rounds[done][["round", "seconds"]].assign(series="work")
    spec = lines(ROUND, Axis("seconds", "work (s)", ".3~g", zero=True), ("work",), dots=len(found) <= DOTS)
    draw(
        "Its work in a round, without upload",
        found,
        spec,
        empty,
        key="client-seconds",
        height=220,
    )
