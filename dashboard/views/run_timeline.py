"""The chart of a round: who was busy with what, in seconds since the round began."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import streamlit as st

from common.store import ClientRound
from dashboard.charts import Axis, gantt, mapped
from dashboard.findings.refusing import cause
from dashboard.findings.slowness import slow
from dashboard.findings.timelines import Spans, client_spans, trained
from dashboard.palette import PHASES
from dashboard.pieces import draw, explain
from dashboard.words import labels, visible

SHOWN = 24
"""Clients drawn before the reader asks for all."""
ROW, AROUND = 26, 130
"""Pixels of a client's row, and of axis and legend."""
SERVER, STRAGGLER, LEFT_OUT = "the server", "straggler", "left out"
COLOURS = {
    "wait": PHASES["wait"],
    "download": PHASES["download"],
    "train": PHASES["train"],
    STRAGGLER: "#AA4499",
    "upload": PHASES["upload"],
    "aggregate": PHASES["aggregate"],
    "evaluate": PHASES["evaluate"],
    LEFT_OUT: PHASES["lost"],
}
TRAINING = ("download", "train", "upload", "lost")
REASON = Axis("note", "outcome", kind="nominal")
COLUMNS = ["name", "phase", "start", "end", "note"]


def timeline(data: Any, clients: list[ClientRound]) -> None:
    """Draw a round.

    Parameters
    ----------
    data : JSON value
        Of the round's statistic ``timeline``; None where there is none.
    clients : list of ClientRound
        What clients did in the round.
    """
    spans, server = client_spans(data), server_spans(data)
    names = by_end(spans)
    asked = st.container()
    shown = names
    if len(names) > SHOWN and not asked.toggle(f"Show all {len(names)} clients", key="everyone", bind="query-params"):
        shown = names[:SHOWN]
    rows = bars(spans, server, shown, clients)
    used = {phase: colour for phase, colour in COLOURS.items() if phase in set(rows["phase"])}
    height = ROW * (len(shown) + bool(server)) + AROUND
    draw(
        "Who was busy with what",
        rows,
        gantt(mapped(used), (REASON,)),
        _why_empty(data),
        key="round_timeline",
        height=height,
    )
    if len(shown) < len(names):
        explain(
            f"{SHOWN} of {len(names)} clients: those that were left out, then those that ended their training last."
        )
    elif names:
        explain("Clients that were left out come first, then those that ended their training last.")


def bars(spans: Spans, server: Spans, shown: list[str], clients: list[ClientRound]) -> pd.DataFrame:
    """Return a row per span: columns name, phase, start, end, note; the server first, then clients as listed."""
    names, notes, late = labels(shown), _notes(clients), stragglers(spans, clients)
    rows = [
        (SERVER, "wait" if phase == "train" else phase, start, end, "waits for the clients" if phase == "train" else "")
        for parts in server.values()
        for phase, start, end in parts
        if phase in PHASES
    ]
    for client in shown:
        label = names[client] if names[client] != SERVER else f"{SERVER} (a client)"
        for phase, start, end in spans[client]:
            if phase in PHASES:
                special = {"lost": LEFT_OUT, "train": STRAGGLER if client in late else "train"}
                rows.append((label, special.get(phase, phase), start, end, notes.get(client, "")))
    return pd.DataFrame(rows, columns=COLUMNS)


def by_end(spans: Spans) -> list[str]:
    """Return the clients: those that were left out, then who ended training last; who only measured comes last."""

    def order(client: str) -> tuple[bool, float, str]:
        ends = [end for phase, _, end in spans[client] if phase in TRAINING]
        return all(phase != "lost" for phase, _, _ in spans[client]), -max(ends, default=0.0), client

    return sorted(spans, key=order)


def stragglers(spans: Spans, clients: list[ClientRound]) -> set[str]:
    """Return the clients that were slow in one round."""
    used = {client.client for client in clients if client.status in ("accepted", "received")}
    took = {client: sum(parts.values()) for client, parts in trained(spans).items() if client in used}
    return {client for client, _ in slow(took).clients}


def server_spans(data: Any) -> Spans:
    """Return the spans of the server in the data of a statistic ``timeline``, under one name."""
    own = data.get("server") if isinstance(data, dict) else None
    return client_spans({"clients": {SERVER: own}})


def _notes(clients: list[ClientRound]) -> Mapping[str, str]:
    """Say what became of each client."""
    return {
        client.client: "accepted"
        if client.status in ("accepted", "received")
        else visible(f"{cause(client.status, client.reason).what}: {client.reason or 'no reason was recorded'}", 200)
        for client in clients
    }


def _why_empty(data: Any) -> str:
    if isinstance(data, dict) and "left_out" in data:
        return "The timeline of this round was too large to keep."
    return (
        "This round kept no timeline: it is of an older version, or it was resumed. The table says how long each took."
    )
