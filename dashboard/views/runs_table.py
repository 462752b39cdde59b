"""The table of runs: which rows match a filter, what stands in a row, how its columns look."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import streamlit as st
from streamlit.elements.lib.column_types import ColumnConfig

from common.store import Run, RunStatus
from common.wording import duration, size
from dashboard.findings.timelines import LONGEST_S
from dashboard.settings import number
from dashboard.states import state_words
from dashboard.views.cells import Writer
from dashboard.words import visible

JUDGED_BY = {"held_out_loss": "held-out loss", "unseen_loss": "unseen loss"}
WRITERS: Mapping[str, Writer] = {"traffic": size, "disk": size, "seconds": duration}
"""How numbers are written that have no format of their own."""
NARROW = ("open", "strategy", "loss", "traffic", "state", "rounds", "name")
"""Columns on a phone."""


@dataclass(frozen=True)
class Wanted:
    """What a reader wants to see; what is empty is not asked for.

    Parameters
    ----------
    text : str
        Every word of it must stand somewhere in a run's name, id, strategy, task, seed or reason.
    state, strategy, task : str
        As the table shows them.
    """

    text: str = ""
    state: str = ""
    strategy: str = ""
    task: str = ""

    def takes(self, run: Run, state: RunStatus) -> bool:
        """Tell whether a run is wanted."""
        said = visible(f"{run.name} {run.id} {run.strategy} {run.task} seed {run.seed} {run.reason or ''}", 2_000)
        chosen = (
            (self.state, state_words(state)),
            (self.strategy, visible(run.strategy, 60)),
            (self.task, visible(run.task, 60)),
        )
        spoken = said.casefold()
        words = all(word in spoken for word in self.text.casefold().split())
        return words and all(wanted in ("", value) for wanted, value in chosen)


@dataclass(frozen=True)
class Found:
    """What the store holds of all runs, beside the runs themselves; see :mod:`dashboard.queries.runs`."""

    totals: pd.DataFrame
    disk: pd.DataFrame
    sparks: Mapping[str, tuple[str, list[float]]] = field(default_factory=dict)


def run_rows(runs: Sequence[Run], states: Mapping[str, RunStatus], found: Found) -> pd.DataFrame:
    """Build a row per run, in the order given; what was not measured is missing."""
    costs = found.totals.set_index("run").to_dict("index")
    disk = dict(zip(found.disk["run"], found.disk["nbytes"], strict=True))
    rows = [_row(run, states[run.id], costs.get(run.id, {}), disk.get(run.id), found.sparks) for run in runs]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    for name in ("done", "loss", "epsilon", "traffic", "disk", "seconds"):
        table[name] = table[name].astype(float)
    table["started"] = pd.to_datetime(table["started"], utc=True)
    return table


def columns(timezone: str | None) -> dict[str, ColumnConfig]:
    """Say how the columns look; times are shown in the reader's zone."""
    number, text = st.column_config.NumberColumn, st.column_config.TextColumn
    return {
        "state": text("State", help="A run that nobody writes any more is interrupted; it can be resumed."),
        "name": text("Name", help="Of the experiment."),
        "strategy": text("Strategy", help="How the server merges the adapters of its clients."),
        "rounds": text("Rounds", help="Done, of those planned."),
        "done": st.column_config.ProgressColumn("Progress", format="percent", min_value=0, max_value=1, width=75),
        "loss": number("Best loss", format="%.4f", help="The lowest of all rounds; lower is better."),
        "losses": st.column_config.LineChartColumn("Loss by round", width=95),
        "epsilon": number("ε", format="%.2f", help="Largest privacy spending over the clients; empty without privacy."),
        "traffic": number("Traffic", width=74, help="All adapters sent, up and down."),
        "disk": number("On disk", width=74, help="Files of the run: states, adapters, replies."),
        "seconds": number("Duration", help="Of all rounds."),
        "started": st.column_config.DatetimeColumn("Started", format="D MMM YYYY, HH:mm", timezone=timezone),
        "judged": text("Judged by", help="Held-out: on what clients keep back. Unseen: on the server's public data."),
        "task": text("Task"),
        "seed": text("Seed", help="Every random choice of the run derives from it."),
        "id": text("Id", help="What commands take: lorafleet runs show ID"),
    }


COLUMNS = ("open", *columns(None))
BRIEF = ("state", "name", "strategy", "seed", "rounds", "loss", "started", "id")


def brief_rows(runs: Sequence[Run], states: Mapping[str, RunStatus]) -> pd.DataFrame:
    """Build a short row per run, to choose by."""
    empty = Found(pd.DataFrame(columns=["run"]), pd.DataFrame(columns=["run", "nbytes"]))
    return run_rows(runs, states, empty)[list(BRIEF)]


def brief_columns(timezone: str | None) -> dict[str, ColumnConfig]:
    """Say how the columns of a short row look."""
    return {name: config for name, config in columns(timezone).items() if name in BRIEF}


def _row(
    run: Run,
    state: RunStatus,
    costs: Mapping[str, float],
    disk: float | None,
    sparks: Mapping[str, tuple[str, list[float]]],
) -> dict[str, object]:
    judged, losses = sparks.get(run.id, ("", []))
    planned, done = run.rounds_planned, run.rounds_done
    return {
        "open": "Open",
        "state": state_words(state),
        "name": visible(run.name, 60),
        "strategy": visible(run.strategy, 60),
        "rounds": f"{done} of {planned}",
        "done": min(100, max(0, 100 * done // planned)) / 100 if planned > 0 else None,
        "loss": number(run.best_metric),
        "losses": losses,
        "judged": JUDGED_BY.get(judged, ""),
        "epsilon": number(costs.get("epsilon")),
        "traffic": _sum(costs.get("bytes_up"), costs.get("bytes_down")),
        "seconds": _time(costs.get("seconds")),
        "started": run.created_at,
        "disk": disk,
        "task": visible(run.task, 60),
        "seed": str(run.seed),
        "id": visible(run.id, 80),
    }


def _sum(*values: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _time(seconds: float | None) -> float | None:
    known = number(seconds)
    return None if known is None or not 0 <= known <= LONGEST_S else float(round(known))


def options(values: Iterable[str]) -> list[str]:
    """Return what there is to choose from, in the order of the alphabet."""
    return sorted({visible(value, 60) for value in values})
