"""One round: what it came to, who was busy with what, who was left out and why."""

from __future__ import annotations

import math

import pandas as pd
import streamlit as st

from common.store import ClientRound, Round, Run
from common.wording import counted, duration, size
from dashboard.findings.refusing import cause
from dashboard.findings.silence import silence, tells_times
from dashboard.pieces import explain, table
from dashboard.queries.rounds import clients_of, ended_rounds, statistic
from dashboard.queries.rounds import one_round as round_row
from dashboard.session import source
from dashboard.views.run_timeline import timeline
from dashboard.words import labels, plain, visible

LAST = "the last one"
TAKEN = ("accepted", "received")
UNITS = {"kB": 1e3, "MB": 1e6}
TRAINING = "Sent and received is what a client's training took; what evaluation takes is in the round's sum only."
HIGHEST, MOST_ROWS = 560, 15
"""Pixels of a table of more rows."""


def one_round(run: Run) -> None:
    """Show one round that the reader chooses."""
    st.header("One round")
    look = source().look(run.id)
    numbers = look.ask(ended_rounds, run.id)
    if not numbers:
        explain("No round has ended yet. The first, round 0, measures the model before training.")
        return
    left, _ = st.columns([1, 3])
    names = {str(number): number for number in numbers}
    chosen = left.selectbox("Round", [LAST, *names], key="round", bind="query-params")
    number = names.get(str(chosen), numbers[0])
    row, clients = look.ask(round_row, run.id, number), look.ask(clients_of, run.id, number)
    if row is None:
        explain(f"Round {number} is gone: the run went back to an earlier one.")
        return
    st.markdown(sentence(row, clients))
    told = look.ask(statistic, run.id, "timeline", number)
    drawing, listing = st.columns(2)
    with drawing:
        timeline(told.data if told else None, clients)
    with listing:
        _listing(row, clients)
    if clients and (hidden := silence(run)):
        drawn = "" if tells_times(run) else " What is drawn as waiting is the time from order to answer."
        explain(f"{hidden}{drawn}")


def sentence(row: Round, clients: list[ClientRound]) -> str:
    """Say in Markdown what a round came to."""
    number = "Round 0, before training" if row.round == 0 else f"Round {row.round:,}"
    took = duration(row.seconds) if math.isfinite(row.seconds) and row.seconds >= 0 else "an unknown time"
    traffic = f"{size(max(0, row.bytes_up))} up and {size(max(0, row.bytes_down))} down in {took}"
    if row.status == "failed":
        return f"**{number} failed:** {plain(row.reason or 'no reason was recorded')} ({traffic})."
    if row.round == 0:
        return f"**{number}:** {traffic}."
    taken = sum(client.status in TAKEN for client in clients)
    out = len(clients) - taken
    missing = f", {counted(out, 'client')} left out" if out else ""
    return f"**{number}:** {taken} of {len(row.cohort)} clients replied{missing}; {traffic}."


def _listing(row: Round, clients: list[ClientRound]) -> None:
    """List who did what, those that were left out first, then the slowest."""
    st.markdown("**Who did what**")
    if not clients:
        nobody = "Nobody trains in round 0: clients only measure the model."
        explain(nobody if row.round == 0 else "Nothing is recorded of single clients in this round.")
        return
    shown = labels(client.client for client in clients)
    ordered = sorted(clients, key=lambda client: (client.status in TAKEN, -_seconds(client), client.client))
    number = st.column_config.NumberColumn
    unit = "MB" if max(max(client.bytes_up, client.bytes_down) for client in clients) >= UNITS["MB"] else "kB"
    table(
        pd.DataFrame([_line(shown[client.client], client, UNITS[unit]) for client in ordered]).dropna(
            axis="columns", how="all"
        ),
        key="round_table",
        height="content" if len(clients) <= MOST_ROWS else HIGHEST,
        client=st.column_config.TextColumn("client", pinned=True),
        outcome="outcome",
        seconds=number("work (s)", format="%.2f"),
        rank=number("rank"),
        examples=number("examples", format="localized"),
        up=number(f"sent ({unit})", format="%.2f", help=TRAINING),
        down=number(f"received ({unit})", format="%.2f", help=TRAINING),
        reason=st.column_config.TextColumn("reason", width="large"),
    )
    explain(TRAINING)


def _line(label: str, client: ClientRound, unit: float) -> dict[str, object]:
    taken = client.status in TAKEN
    return {
        "client": label,
        "outcome": client.status if taken else f"{client.status}: {cause(client.status, client.reason).what}",
        "seconds": (_seconds(client) or None) if taken else None,
        "rank": client.rank,
        "examples": client.num_examples or None,
        "up": client.bytes_up / unit,
        "down": client.bytes_down / unit,
        "reason": visible(client.reason or ""),
    }


def _seconds(client: ClientRound) -> float:
    return client.seconds if math.isfinite(client.seconds) else 0.0
