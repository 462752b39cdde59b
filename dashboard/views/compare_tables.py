"""How a comparison's tables look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import streamlit as st
from streamlit.elements.lib.column_types import ColumnConfig

from common.wording import duration, size
from dashboard.findings.compare_lines import Line
from dashboard.findings.compare_verdict import judges
from dashboard.metric_words import metric_words
from dashboard.settings import ABSENT
from dashboard.views.cells import Writer, few_digits
from dashboard.words import visible

MARK = "★"
LONGEST_PATHS = 300
WRITERS: Mapping[str, Writer] = {
    "reached": few_digits,
    "up": size,
    "down": size,
    "seconds": duration,
    "left_out": few_digits,
}
"""How numbers are written that have no format of their own."""


def outcome_table(table: pd.DataFrame, metric: str, best: str) -> pd.DataFrame:
    """Return what is shown of :func:`dashboard.findings.compare_outcomes.outcomes`, with the best marked."""
    shown = table.assign(
        mark=[MARK if label == best else "" for label in table["label"]],
        of=[_runs(row.runs, row.unfinished) for row in table.itertuples()],
        merge=[_merge(row.exact, row.error, row.reference) for row in table.itertuples()],
    )
    sparse = {name for name in ("last_sd", "best", "reached", "epsilon", "up", "down") if table[name].isna().all()}
    hidden = sparse if judges(metric) else sparse | {"mark", "best", "reached"}
    return shown[[name for name in outcome_columns(None, metric) if name not in hidden]]


def outcome_columns(level: float | None, metric: str) -> dict[str, ColumnConfig]:
    """Say how the columns look, in their order."""
    number, text = st.column_config.NumberColumn, st.column_config.TextColumn
    goal = f"Rounds to {level:.4g}" if level is not None else "Rounds to reach"
    return {
        "mark": text("", width=30, help=f"{MARK} the lowest after the same effort, as said above"),
        "label": text("Line", help="Runs that differ by their seeds alone."),
        "of": text(
            "Runs", width=100, help="One per seed. Means are over those that were completed, or over all while none is."
        ),
        "last": number(f"Last {metric_words(metric).axis}", format="%.4f", help="Of the last round that measured it."),
        "last_sd": number("±", format="%.4f", help="Standard deviation over the runs."),
        "best": number("Lowest", format="%.4f", help="Of all rounds; mean over the runs."),
        "reached": number(goal, help="The first round at the level that every run gets to."),
        "up": number("Up per client", help="Sent by each client in all rounds."),
        "down": number("Down per client", help="Sent to each client in all rounds."),
        "seconds": number("Duration", help="Of all rounds."),
        "epsilon": number("ε", format="%.2f", help="Largest privacy spending over the clients."),
        "merge": text("Merge error", help="Distance to the exact average of the updates, as a mean over rounds."),
        "left_out": number("Left out", help="Replies that were refused or did not come, per run."),
    }


def difference_table(
    lines: Sequence[Line], paths: Sequence[str]
) -> tuple[pd.DataFrame, dict[str, ColumnConfig | str | None]]:
    """Return a row per setting and a column per line, and what the columns are called."""
    columns = {f"line{place}": line for place, line in enumerate(lines)}
    rows = {
        "setting": [visible(path, 120) for path in paths[:LONGEST_PATHS]],
        **{
            name: [visible(line.settings.get(path, ABSENT), 120) for path in paths[:LONGEST_PATHS]]
            for name, line in columns.items()
        },
    }
    titles: dict[str, ColumnConfig | str | None] = {name: line.label for name, line in columns.items()}
    return pd.DataFrame(rows), {"setting": "Setting", **titles}


def _runs(counted: int, unfinished: int) -> str:
    return f"{counted}, {unfinished} unfinished" if unfinished else str(counted)


def _merge(exact: bool, error: float, reference: bool) -> str:
    if reference:
        return ""
    return "exact" if exact else "–" if pd.isna(error) else f"{error:.2g}"
