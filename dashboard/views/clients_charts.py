"""The charts of the page of clients: who took part when, what their time went into, how their numbers changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import streamlit as st

from common.store import Run
from dashboard.charts import ROUND, Axis, Spec, cells, gantt, lines, mapped, ranking
from dashboard.findings.roster import Roster, worst_first
from dashboard.findings.silence import NO_TIMES, tells_times
from dashboard.findings.slowness import WINDOW
from dashboard.findings.timelines import WORK
from dashboard.metric_words import KNOWN, MetricWords, metric_titles, metric_words
from dashboard.palette import PHASES, STATUS
from dashboard.pieces import draw, explain
from dashboard.queries import client_metrics, clients
from dashboard.source import Look
from dashboard.words import visible

FEW = 30
"""Clients whose cells are drawn without being asked for all."""
MOST = 100
CELLS = 3_000
COLUMNS = 60
RANKED = 20
WORST, POINTS = 5, 2_400
DOTS = 60
"""Values of a line up to which each is marked by a dot."""
FATE_COLOURS = mapped({fate: STATUS[fate] for fate in clients.FATES})
ALL = "all clients together"
NO_NUMBERS = (
    "No client has told a number of its own in this run: clients tell their loss when they evaluate "
    '(`evaluation.on = ["clients"]`), and nothing of the kind under differential privacy.'
)


def participation(look: Look, run: Run, roster: Roster) -> None:
    """Draw a cell per client and round, or few rounds: what became of its replies."""
    known = [name for name in roster.names if name in roster.totals.index]
    chart, below = st.container(), st.container()
    offer = f"Show {'all' if len(known) <= MOST else MOST} clients"
    every = len(known) > FEW and below.toggle(offer, key="everyone", bind="query-params")
    kept = known if len(known) <= FEW else worst_first(known, roster.totals)[: MOST if every else FEW]
    rounds = look.ask(clients.training_rounds, run.id)
    columns = max(12, min(COLUMNS, CELLS // max(1, len(kept))))
    table, spec = participation_chart(look, run, roster.labels, kept, rounds, columns)
    title = "Who took part" if len(kept) == len(known) else f"Who took part: the {len(kept)} left out most"
    empty = "No round has been committed yet; a cell per client and round appears with the first one."
    with chart:
        draw(title, table, spec, empty, key="participation", height=_height(len(kept)))
        if rounds > columns and not table.empty:
            explain("A cell is several rounds: blue where every reply was used, orange where none was.")


def participation_chart(
    look: Look, run: Run, named: Mapping[str, str], kept: Sequence[str], rounds: int, columns: int
) -> tuple[pd.DataFrame, Spec]:
    """Return the table and how to draw it: single rounds by what became of them, several by the share used."""
    who, rows = Axis("client", "client", kind="nominal"), tuple(named[name] for name in kept)
    if rounds <= columns:
        table = look.ask(clients.fates, run.id, tuple(kept))
        table = table[["client", "round", "status", "reason"]].assign(
            client=table["client"].map(named), reason=[_text(reason) for reason in table["reason"]]
        )
        status = Axis("status", "reply", kind="nominal")
        reason = Axis("reason", "reason", kind="nominal")
        return table, cells(Axis("round", "round", kind="ordinal"), who, status, rows, FATE_COLOURS, (reason,))
    table = look.ask(clients.participation, run.id, tuple(kept), columns)
    table = table[table["asked"] > 0].merge(look.ask(clients.spans_of_columns, run.id, columns), on="place")
    table = table.assign(
        client=table["client"].map(named),
        share=table["accepted"] / table["asked"],
        rounds=[f"{first} to {last}" for first, last in zip(table["first"], table["last"], strict=True)],
    )
    more = (
        Axis("rounds", "rounds", kind="nominal"),
        *(Axis(key, key, "d") for key in ("asked", *clients.FATES)),
    )
    share = Axis("share", "replies used", ".0%")
    return table, cells(Axis("first", "from round", kind="ordinal"), who, share, rows, (), more)


def time_spent(roster: Roster, run: Run) -> None:
    """Draw the slowest clients with what their time goes into, or their median seconds where no timeline tells."""
    table, spec, over = time_chart(roster)
    kept = table["name"].nunique()
    title = "Seconds of a round" if kept == len(roster.work) else f"Seconds of a round: the {kept} slowest"
    empty = "No client has finished a training round yet, so there is nothing to compare."
    empty = empty if tells_times(run) else NO_TIMES
    draw(title, table, spec, empty, key="seconds", height=_height(kept))
    if not table.empty:
        explain(over)


def time_chart(roster: Roster) -> tuple[pd.DataFrame, Spec, str]:
    """Return the table, how to draw it, and over what it is taken."""
    order = [name for name in roster.slowest_first if name in roster.work][:RANKED]
    over = f"Each client's median round of the last {WINDOW}"
    if all(roster.work[client].phases for client in order):
        more = "without waiting for its turn. Download is also loading the model"
        return *_phases(roster, order), f"{over}, {more}."
    rows = [(roster.labels[client], roster.work[client].seconds) for client in order]
    table = pd.DataFrame(rows, columns=["name", "seconds"])
    spec = ranking(Axis("name", "client", kind="nominal"), Axis("seconds", "time (s)", ".3~g"))
    return table, spec, f"{over}. Not all of these rounds kept a timeline, so transfer may be missing."


def _phases(roster: Roster, order: Sequence[str]) -> tuple[pd.DataFrame, Spec]:
    """Lay the phases of clients end to end."""
    rows = []
    for client in order:
        ends = 0.0
        for phase in WORK:
            start, ends = ends, ends + roster.work[client].phases[phase]
            rows.append((roster.labels[client], phase, start, ends, ends - start))
    more = (Axis("seconds", "time (s)", ".3~g"),)
    spec = gantt(mapped({phase: PHASES[phase] for phase in WORK}), more, "seconds of a round")
    return pd.DataFrame(rows, columns=["name", "phase", "start", "end", "seconds"]), spec


def over_rounds(look: Look, run: Run, roster: Roster) -> None:
    """Draw a number of some clients over the rounds; which number and which clients is in the address."""
    names = look.ask(client_metrics.client_metric_names, run.id)
    if not names:
        explain(NO_NUMBERS)
        return
    left, right = st.columns([1, 2])
    name = left.selectbox(
        "Number",
        names,
        names.index("held_out_loss") if "held_out_loss" in names else 0,
        format_func=lambda one: metric_titles([one])[one],
        key="number",
        bind="query-params",
    )
    chosen = right.multiselect(
        "Clients",
        roster.names,
        format_func=lambda client: roster.labels.get(client, visible(client, 40)),
        key="lines",
        bind="query-params",
        max_selections=12,
        placeholder=f"the {WORST} worst and the best",
    )
    words = metric_words(name)
    shown = chosen or extremes(look.ask(client_metrics.latest, run.id, name), words.more_is_better)
    table, spec = curves(look, run, roster.labels, name, shown, words)
    title = f"Each client's {words.title}" if name in KNOWN else "Each client's number"
    draw(title, table, spec, "None of these clients has a finite value of it.", key="client-number", height=340)
    missing = sum(not (table["series"] == roster.labels.get(client)).any() for client in shown)
    explain(f"{missing} of these clients have no finite value to draw." if missing else "Round 0 is before training.")


def curves(
    look: Look, run: Run, named: Mapping[str, str], name: str, shown: Sequence[str], words: MetricWords
) -> tuple[pd.DataFrame, Spec]:
    """Return clients' values over the rounds, with those of all together, and how to draw them."""
    points = POINTS // (len(shown) + 1)
    table = look.ask(client_metrics.client_curves, run.id, name, ("", *shown), points)
    series = (ALL, *(named.get(client, visible(client, 40)) for client in shown))
    table = table.assign(series=table["client"].map(dict(zip(("", *shown), series, strict=True))))
    there = tuple(one for one in series if (table["series"] == one).any())
    dots = len(table) <= DOTS * len(there)
    spec = lines(ROUND, Axis("value", words.axis), there, dashed=(ALL,), dots=dots)
    return table[["round", "series", "value"]], spec


def extremes(latest: pd.DataFrame, more_is_better: bool, worst: int = WORST) -> list[str]:
    """Return the clients of the worst last values and of the best one, worst first; what is no number is worst."""
    value = latest["value"].where(latest["value"].abs() < float("inf"))
    order = latest.assign(value=value).sort_values(["value", "client"], ascending=more_is_better, na_position="first")
    names = list(order["client"])
    return names if len(names) <= worst else [*names[:worst], names[-1]]


def _height(rows: int) -> int:
    """Return how high a chart of rows is, with its axis and legend: pixels."""
    return 150 + rows * (21 if rows <= FEW else 7)


def _text(reason: object) -> str:
    return visible(reason, 120) if isinstance(reason, str) else ""
