"""The tables of the page of clients: who there is, what became of one client, why replies were left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import streamlit as st

from common.store import Run
from common.wording import counted
from dashboard.findings.refusing import cause
from dashboard.findings.roster import Roster
from dashboard.findings.timelines import LONGEST_S
from dashboard.queries.clients import FATES
from dashboard.settings import setting
from dashboard.words import listed, visible

MEMBER_COLUMNS: dict[str, Any] = {
    "client": st.column_config.TextColumn("client", pinned=True),
    "seconds": st.column_config.NumberColumn("time (s)", format="%.2f", help="It usually needs for a round."),
    "part": st.column_config.ProgressColumn(
        "took part",
        format="%.0f %%",
        min_value=0,
        max_value=100,
        help="Rounds with a usable reply, of those it was asked in.",
    ),
    "rounds": st.column_config.TextColumn("rounds", help="Replies used, of the rounds it was asked in."),
    "left_out": st.column_config.TextColumn("left out"),
    "loss": st.column_config.NumberColumn("last loss", format="%.4f", help="On its held-out data, else in training."),
    "rank": st.column_config.NumberColumn("rank", help="Directions in which it may change each layer."),
    "why": st.column_config.TextColumn("why that rank", width="medium"),
    "examples": st.column_config.NumberColumn("examples", format="localized", help="Rows it says it trained on."),
    "share": st.column_config.NumberColumn("weight", format="%.1f %%", help="Its share of the average."),
    "device": st.column_config.TextColumn("device"),
    "memory": st.column_config.NumberColumn("free memory", format="bytes", help="As its node told when it joined."),
    "cosine": st.column_config.NumberColumn(
        "cosine", format="%.2f", help="Of its last update to the mean: 1 pulls the same way, -1 the opposite way."
    ),
    "trust": st.column_config.NumberColumn("trust", format="%.2f", help="What the robust rule left of its weight."),
}
"""By column of :func:`member_table`."""

REASON_COLUMNS: dict[str, Any] = {
    "what": st.column_config.TextColumn("what happened", pinned=True),
    "count": st.column_config.NumberColumn("times"),
    "rounds": st.column_config.TextColumn("rounds"),
    "who": st.column_config.TextColumn("clients"),
    "reason": st.column_config.TextColumn("last reason", width="medium"),
}
ROUND_COLUMNS: dict[str, Any] = {
    "round": st.column_config.NumberColumn("round"),
    "status": st.column_config.TextColumn("reply"),
    "seconds": st.column_config.NumberColumn("work (s)", format="%.2f", help="Without upload."),
    "bytes_up": st.column_config.NumberColumn("up", format="bytes"),
    "bytes_down": st.column_config.NumberColumn("down", format="bytes"),
    "num_examples": st.column_config.NumberColumn("examples", format="localized"),
    "rank": st.column_config.NumberColumn("rank"),
    "reason": st.column_config.TextColumn("reason", width="large"),
}


def member_table(roster: Roster, run: Run) -> pd.DataFrame:
    """Return a row per client, the slowest first; columns that nobody has a value in are left out."""
    names, totals, declared = roster.slowest_first, roster.totals, roster.declared
    table = pd.DataFrame(index=pd.Index(names, dtype=object))
    table["client"] = [roster.labels[name] for name in names]
    table["seconds"] = [roster.paces[name].seconds for name in names]
    table["part"] = 100 * totals["accepted"] / totals["asked"].where(totals["asked"] > 0)
    replies = [f"{used} of {asked}" for used, asked in zip(totals["accepted"], totals["asked"], strict=True)]
    table["rounds"] = pd.Series(replies, totals.index, dtype=object)
    left_out = [left_out_words(counts) or None for counts in totals.to_dict("records")]
    table["left_out"] = pd.Series(left_out, totals.index, dtype=object)
    table["loss"] = _finite(roster, "held_out_loss").reindex(names).fillna(_finite(roster, "train_loss"))
    members = [roster.members.get(name) for name in names]
    told = declared["rank"].astype(float)
    ranks = [None if member is None else member.rank for member in members]
    table["rank"] = pd.Series(ranks, table.index, dtype=float).fillna(told)
    table["why"] = [None if member is None else visible(member.rank_reason) or None for member in members]
    table["examples"] = declared["num_examples"].where(declared["num_examples"] > 0)
    shares = weights(roster, str(setting(run, "federation.weighting", "examples")))
    table["share"] = 100 * pd.Series(shares, dtype=float)
    table["device"] = [None if member is None else visible(member.device, 60) or None for member in members]
    table["memory"] = [None if member is None else member.memory_bytes or None for member in members]
    table["cosine"], table["trust"] = _finite(roster, "cosine_to_mean"), _finite(roster, "trust")
    return table.reset_index(drop=True).dropna(axis="columns", how="all")


def weights(roster: Roster, weighting: str) -> dict[str, float]:
    """Return each client's share of the average, by what it last declared; empty where that is not known."""
    declared = {name: float(value) for name, value in roster.declared["num_examples"].items() if value > 0}
    if weighting == "equal":
        declared = dict.fromkeys(roster.declared.index, 1.0)
    total = math.fsum(declared.values())
    return {name: value / total for name, value in declared.items()}


def left_out_words(counts: Mapping[str, int]) -> str:
    """Say how often a client was left out and how: ``3 late, 1 offline``."""
    return ", ".join(f"{int(counts[fate])} {fate}" for fate in FATES[1:] if counts[fate])


def reason_table(found: pd.DataFrame, labels: Mapping[str, str]) -> pd.DataFrame:
    """Put reasons of the same cause together, newest first: the same fault has another number in every text."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for status, reason, client, count, first, last in found.sort_values("last", ascending=False).itertuples(
        index=False
    ):
        text = reason if isinstance(reason, str) else ""
        known = cause(status, text)
        row = rows.setdefault(
            (status, known.what),
            {
                "what": known.what,
                "count": 0,
                "first": first,
                "last": last,
                "who": {},
                "reason": text,
                "hint": known.hint,
            },
        )
        row["count"] += int(count)
        row["first"] = min(row["first"], first)
        row["who"][labels.get(client) or visible(client, 40)] = None
    table = pd.DataFrame([_reason_row(row) for row in rows.values()], columns=[*REASON_COLUMNS, "hint"])
    return table


def hints(reasons: pd.DataFrame) -> dict[str, str]:
    """Return what helps against each cause."""
    return dict(zip(reasons["what"], reasons["hint"], strict=True))


def round_table(found: pd.DataFrame) -> pd.DataFrame:
    """Return a client's rounds as a page shows them."""
    table = found[list(ROUND_COLUMNS)].copy()
    table["reason"] = [visible(reason) if isinstance(reason, str) else None for reason in table["reason"]]
    table["seconds"] = [value if 0 < value < LONGEST_S else None for value in table["seconds"]]
    table["num_examples"] = [value if value > 0 else None for value in table["num_examples"]]
    return table.dropna(axis="columns", how="all")


def _finite(roster: Roster, number: str) -> pd.Series:
    values = roster.latest[number].astype(float)
    return values.where(values.abs() < math.inf)


def _reason_row(row: dict[str, Any]) -> dict[str, Any]:
    first, last = row.pop("first"), row.pop("last")
    who = list(row["who"])
    named = listed(who, 3) if len(who) <= 3 else f"{counted(len(who), 'client')}: {listed(who, 2)}"
    rounds = f"{last}" if first == last else f"{first} to {last}"
    return {**row, "rounds": rounds, "who": named, "reason": visible(row["reason"]) or None}
