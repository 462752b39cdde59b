"""A comparison as files: its table, its curves, its chart."""

from __future__ import annotations

from functools import partial

import streamlit as st

from dashboard.exporting import csv_of, png_of
from dashboard.findings.compare_lines import Choice, Compared
from dashboard.session import source
from dashboard.source import Source
from dashboard.views.compare_findings import BAND, find

UNITS = {"round": "", "bytes": "megabytes_per_client", "seconds": "seconds", "epsilon": "epsilon"}
"""What curves are drawn over, as a file calls it."""


def offer(compared: Compared, choice: Choice) -> None:
    """Offer the files; they are made of what the store holds when somebody wants them.

    To be called outside of a part that looks again by itself: a file of the look before would be gone.
    """
    files = (
        ("Table (CSV)", _table, "comparison.csv", "text/csv"),
        ("Curves (CSV)", _curves, "comparison-curves.csv", "text/csv"),
        ("Chart (PNG)", _chart, "comparison.png", "image/png"),
    )
    with st.container(horizontal=True):
        for label, make, name, kind in files:
            made = partial(make, source(), compared, choice)
            icon = ":material/download:"
            st.download_button(label, made, name, kind, key=f"keep_{name}", on_click="ignore", icon=icon)


def _table(here: Source, compared: Compared, choice: Choice) -> bytes:
    found = find(here, compared, choice)
    level = f"{found.level:.4g}" if found.level is not None else "level"
    names = {
        "last": f"last_{choice.metric}",
        "best": f"lowest_{choice.metric}",
        "reached": f"rounds_to_{level}",
        "up": "bytes_up_per_client",
        "down": "bytes_down_per_client",
        "error": "merge_error",
        "left_out": "replies_left_out",
    }
    spreads = {f"{name}_sd": f"{title}_sd" for name, title in names.items()}
    return csv_of(found.table.rename(columns=names | spreads))


def _curves(here: Source, compared: Compared, choice: Choice) -> bytes:
    found = find(here, compared, choice).curves
    names = {"series": "line", "x": UNITS[choice.over], "y": "mean", "n": "runs"}
    return csv_of(found.drop(columns=["x"] if choice.over == "round" else []).rename(columns=names))


def _chart(here: Source, compared: Compared, choice: Choice) -> bytes:
    found = find(here, compared, choice)
    note = f"Bands: {BAND} over seeds" if found.banded else ""
    return png_of(found.title, note, *found.drawing())
