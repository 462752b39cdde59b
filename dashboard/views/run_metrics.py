"""What was measured round by round: the federation's number, how clients spread around it, other runs beside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import streamlit as st

from common.store import Run
from dashboard.charts import ROUND, Axis, lines
from dashboard.metric_words import metric_titles, metric_words
from dashboard.pieces import HEIGHT, draw, explain
from dashboard.queries.clients import members
from dashboard.queries.rounds import (
    POINTS,
    SPREAD_POINTS,
    client_metric,
    client_spread,
    clients_of,
    ended_rounds,
    federation_metric,
    measured,
)
from dashboard.session import source
from dashboard.source import Look
from dashboard.views.run_choices import other_runs
from dashboard.words import labels

PREFERRED = ("held_out_loss", "unseen_loss", "train_loss")
LEGEND_ROW = 18
MOST_CLIENTS, MOST_RUNS = 6, 5
MEAN, MEDIAN, WORST = "weighted mean of the clients", "median client", "worst client"
BAND = "10–90 % of the clients"


@dataclass(frozen=True)
class Choice:
    """What the reader wants to see: a metric, clients by label, other runs by label."""

    name: str
    clients: dict[str, str]
    runs: dict[str, Run]


def metrics(run: Run) -> None:
    """Show a metric over the rounds."""
    st.header("Is it getting better?")
    look = source().look(run.id)
    known = look.ask(measured, run.id)
    if not known:
        explain("Nothing has been measured yet; the first numbers come with round 0, before training.")
        return
    choice = _choose(run, look, known)
    parts = {**_own(run, look, choice, known[choice.name]), **_others(choice)}
    rows = pd.concat([part.assign(series=name) for name, part in parts.items()]) if parts else pd.DataFrame()
    words = metric_words(choice.name)
    banded = "low" in rows.columns
    shown, lost = _finite(rows)
    y = Axis("value", words.axis)
    more = (Axis("clients", "clients", "d"),) if banded else ()
    spec = lines(ROUND, y, tuple(parts), BAND if banded else "", more, tuple(choice.runs))
    explained = "None of its values is a finite number." if lost else "This run has not measured it yet."
    draw(
        metric_titles(known)[choice.name].replace("_", " "),
        shown,
        spec,
        explained,
        key="metric_chart",
        height=HEIGHT + LEGEND_ROW * (len(parts) // 2),
    )
    aside = f" Left out: {lost} values that are not finite numbers." if lost else ""
    if len(look.ask(ended_rounds, run.id)) > SPREAD_POINTS:
        aside += " Of so many rounds some between are not drawn."
    pale = " The pale band spans the middle 80 % of the clients." if banded else ""
    explain(f"Round 0 is before training. {_better(choice.name)}{pale}{aside}".strip())


def _choose(run: Run, look: Look, known: dict[str, bool]) -> Choice:
    first, second, third = st.columns(3)
    titles = {name: title.replace("_", " ") for name, title in metric_titles(known).items()}
    named = {title: name for name, title in titles.items()}
    usual = next((name for name in PREFERRED if name in known), next(iter(known)))
    title = first.selectbox("Measure", list(named), list(named).index(titles[usual]), key="metric", bind="query-params")
    name = named[str(title)]
    names = labels(_clients(look, run)) if known[name] else {}
    clients = {label: client for client, label in names.items()}
    picked = second.multiselect(
        "Single clients",
        list(clients),
        key="clients",
        bind="query-params",
        max_selections=MOST_CLIENTS,
        placeholder="None" if clients else "Not measured for single clients",
    )
    runs = other_runs(run)
    over = third.multiselect(
        "Other runs beside it",
        list(runs),
        key="over",
        bind="query-params",
        max_selections=MOST_RUNS,
        placeholder="None" if runs else "There is no other run",
    )
    return Choice(name, {label: clients[label] for label in picked}, {label: runs[label] for label in over})


def _clients(look: Look, run: Run) -> list[str]:
    """Return the names of the run's clients; older runs did not record whom they met, but who was in a round."""
    met = {client.client for client in look.ask(members, run.id)}
    last = next(iter(look.ask(ended_rounds, run.id)), None)
    if not met and last is not None:
        met = {client.client for client in look.ask(clients_of, run.id, last)}
    return sorted(met)


def _own(run: Run, look: Look, choice: Choice, spread_known: bool) -> dict[str, pd.DataFrame]:
    """Return this run's lines by what they are: the mean with its band, the worst, and chosen clients."""
    found: dict[str, pd.DataFrame] = {}
    mean = look.ask(federation_metric, run.id, choice.name, SPREAD_POINTS if spread_known else POINTS)
    if not spread_known:
        return {metric_words(choice.name).title.replace("_", " "): mean} if len(mean) else {}
    spread = look.ask(client_spread, run.id, choice.name)
    extreme, words = _extreme(choice.name)
    band = spread[["round", "low", "high", "clients"]]
    if len(mean):
        found[MEAN] = mean.merge(band, on="round", how="left")
    elif len(spread):
        found[MEDIAN] = band.assign(value=spread["median"])
    if len(spread):
        found[words] = spread[["round", extreme]].rename(columns={extreme: "value"})
    if choice.clients:
        single = look.ask(client_metric, run.id, choice.name, tuple(choice.clients.values()))
        for label, client in choice.clients.items():
            found[label] = single.loc[single["client"] == client, ["round", "value"]]
    return found


def _others(choice: Choice) -> dict[str, pd.DataFrame]:
    return {
        label: source().look(other.id).ask(federation_metric, other.id, choice.name)
        for label, other in choice.runs.items()
    }


def _finite(rows: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Leave out what a chart cannot show, and tell how much it was."""
    if rows.empty:
        return rows, 0
    kept = rows[np.isfinite(rows["value"].astype(float))]
    return kept, len(rows) - len(kept)


def _extreme(name: str) -> tuple[str, str]:
    """Return which end of the clients is worth a line, and what it is."""
    if metric_words(name).more_is_better:
        return "least", WORST
    return "most", WORST if _lower_is_better(name) else "highest of the clients"


def _better(name: str) -> str:
    if metric_words(name).more_is_better:
        return "Higher is better."
    return "Lower is better." if _lower_is_better(name) else ""


def _lower_is_better(name: str) -> bool:
    return any(part in name for part in ("loss", "perplexity", "distance", "error"))
