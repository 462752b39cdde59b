"""What rounds cost, in bytes and seconds, and how exactly they merged."""

from __future__ import annotations

import numpy as np
import pandas as pd
import streamlit as st

from common.store import Run
from common.wording import counted
from dashboard.charts import ROUND, Axis, bars, lines
from dashboard.palette import PHASES
from dashboard.pieces import draw, explain
from dashboard.queries.costs import discarded, effective_ranks, merges, phases, traffic
from dashboard.session import source
from dashboard.settings import setting

HEIGHT = 250
BAR = Axis("first", "round", "d", "ordinal")
DIRECTIONS = {"bytes_up": "up, from the clients", "bytes_down": "down, to the clients"}
PHASE_WORDS = {"train": "clients train", "aggregate": "server merges", "evaluate": "model is evaluated"}
NOTHING_CUT = "Nothing was cut: neither the merge nor downloads have a smaller rank than what was trained."
ENERGY_WORDS = {"discarded_energy": "by the merge", "download_discarded_energy": "in downloads, mean of the clients"}


def costs(run: Run) -> None:
    """Show bytes and seconds of each round."""
    st.header("What does it cost?")
    look = source().look(run.id)
    sent, spent = look.ask(traffic, run.id), look.ask(phases, run.id)
    left, right = st.columns(2)
    long = sent.melt(["first", "last"], list(DIRECTIONS), "series", "bytes") if len(sent) else pd.DataFrame()
    with left:
        draw(
            "Bytes per round",
            long.assign(series=long["series"].map(DIRECTIONS)) if len(long) else long,
            bars(BAR, Axis("bytes", "bytes", ".3~s"), tuple(DIRECTIONS.values())),
            "No round has ended yet.",
            key="bytes_chart",
            height=HEIGHT,
        )
    with right:
        draw(
            "Seconds per round",
            spent.assign(series=spent["phase"].map(PHASE_WORDS)) if spent["seconds"].sum() > 0 else spent.iloc[:0],
            bars(
                BAR,
                Axis("seconds", "time (s)", ".3~g"),
                tuple(PHASE_WORDS.values()),
                tuple(PHASES[phase] for phase in PHASE_WORDS),
            ),
            "No round has told yet what it spent its time on.",
            key="seconds_chart",
            height=HEIGHT,
        )
    explain(_binned(sent))


def certificate(run: Run) -> None:
    """Show how exactly rounds merged."""
    st.header("How exact is the merge?")
    look = source().look(run.id)
    absent = why_no_certificate(run)
    merged, ranks, lost = look.ask(merges, run.id), look.ask(effective_ranks, run.id), look.ask(discarded, run.id)
    first, second, third = st.columns(3)
    with first:
        _errors(merged, absent)
    with second:
        draw(
            "Effective rank of what was merged",
            ranks.assign(series="mean of the layers"),
            lines(ROUND, Axis("value", "rank", ".3~g", zero=True), ("mean of the layers",), "all layers"),
            absent,
            key="rank_chart",
            height=HEIGHT,
        )
        if len(ranks):
            explain("The pale band spans all layers.")
    with third:
        names = tuple(words for name, words in ENERGY_WORDS.items() if name in set(lost["name"]))
        draw(
            "Energy cut away",
            lost.assign(series=lost["name"].map(ENERGY_WORDS)),
            lines(ROUND, Axis("value", "share of the squared norm", ".2~%", zero=True), names),
            NOTHING_CUT if len(merged) else absent,
            key="energy_chart",
            height=HEIGHT,
        )


def why_no_certificate(run: Run) -> str:
    """Say why nothing is known of how exact a run's merges are."""
    if setting(run, "secure_aggregation.enabled") is True:
        return (
            "With secure aggregation the server sees no single update, so there is nothing to compare the merge with."
        )
    if setting(run, "evaluation.certificate") is False:
        return "Not measured: this run was made with evaluation.certificate = false."
    return "Measured after each merge: no round has merged yet, or the run is of an older version."


def _errors(merged: pd.DataFrame, absent: str) -> None:
    """Show the distance to the exact average; a strategy that is exact needs no line."""
    title = "Distance to the exact average"
    if len(merged) and merged["exact"].all():
        largest = merged["error"].astype(float).max()
        found = f" Measured: at most {largest:.0e}, which is rounding." if 0 < largest < np.inf else ""
        absent = f"**Exact by construction:** this strategy sums the updates without loss.{found}"
    shown = merged[(merged["exact"] == False) & np.isfinite(merged["error"].astype(float)) & (merged["error"] > 0)]  # noqa: E712
    draw(
        title,
        shown.assign(series="merge error"),
        lines(ROUND, Axis("error", "relative error", ".1~%", log=True), ("merge error",)),
        absent,
        key="error_chart",
        height=HEIGHT,
    )


def _binned(sent: pd.DataFrame) -> str:
    width = int((sent["last"] - sent["first"]).max()) + 1 if len(sent) else 1
    return (
        f"Each bar is the mean of {counted(width, 'round')}."
        if width > 1
        else "A bar for each round; round 0 only measures."
    )
