"""All runs: how far they are, how good they got, what they cost, and the way to one or to a comparison of several."""

from __future__ import annotations

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from common.store import Run
from common.wording import counted, size
from dashboard.pages import go, link
from dashboard.pieces import explain, live
from dashboard.queries import runs as queries
from dashboard.session import all_runs, source, state_of
from dashboard.states import STATES
from dashboard.views.cells import written
from dashboard.views.compare_choice import MOST
from dashboard.views.runs_table import NARROW, WRITERS, Found, Wanted, columns, options, run_rows
from dashboard.views.ticks import choose, chosen, follow, taken
from dashboard.words import plain

ALL = "All"
TABLE, OPENED = "runs_table", "runs_opened"
HIGHEST, MOST_ROWS = 560, 16


def page() -> None:
    """Show it."""
    st.title("Runs")
    known = [run.id for run in all_runs()]
    wanted = _filter(all_runs())

    def body() -> None:
        runs = all_runs()
        if [run.id for run in runs] != known:
            st.rerun()  # the list beside the page grows as well
        _overview(runs, wanted)

    # Looks again even while no run goes on: one that begins shows up by itself.
    live(body, running=True)


def _filter(runs: list[Run]) -> Wanted:
    """Let the reader choose what to see; the address holds it."""
    choices = {
        "state": ("State", list(STATES.values())),
        "strategy": ("Strategy", options(run.strategy for run in runs)),
        "task": ("Task", options(run.task for run in runs)),
    }
    shown = {key: choice for key, choice in choices.items() if len(choice[1]) > 1}
    places: list[DeltaGenerator]
    if _on_phone():
        first, places = st.container(), [st.expander("Filter")] * len(shown)
    else:
        first, *places = st.columns([2, *[1] * len(shown)])
    text = first.text_input("Search", key="q", bind="query-params", placeholder="Name, id, strategy, seed, reason …")
    picked = {
        key: place.selectbox(label, [ALL, *values], key=key, bind="query-params")
        for place, (key, (label, values)) in zip(places, shown.items(), strict=True)
    }
    return Wanted(text, **{key: value for key, value in picked.items() if value != ALL})


def _overview(runs: list[Run], wanted: Wanted) -> None:
    look = source().look()
    found = Found(look.ask(queries.totals), look.ask(queries.disk_use), look.ask(queries.sparks))
    states = {run.id: state_of(run) for run in runs}
    _counts(list(states.values()), found)
    shown = [run for run in runs if wanted.takes(run, states[run.id])]
    heading, place = st.container(), st.container()
    follow(TABLE, [run.id for run in shown], chosen())
    with place:
        if shown:
            rows = run_rows(shown, states, found)
            st.dataframe(
                written(rows, WRITERS),
                hide_index=True,
                width="stretch",
                height="content" if len(shown) <= MOST_ROWS else HIGHEST,
                column_order=NARROW if _on_phone() else None,
                column_config={
                    "open": st.column_config.ButtonColumn("", type="tertiary", width=54, key=OPENED),
                    **columns(st.context.timezone),
                },
                key=TABLE,
                on_select=taken(TABLE),
                selection_mode="multi-row",
                alt="Runs, newest first",
                placeholder="–",
            )
        else:
            explain(f"None of the {counted(len(runs), 'run')} is like this. Take something out of the filter.")
    with heading:
        _ways(runs, [run.id for run in shown])
    if click := st.session_state.get(OPENED):
        go("run", shown[click["row"]].id)


def _counts(states: list[str], found: Found) -> None:
    stopped = sum(state in ("failed", "interrupted") for state in states)
    traffic = found.totals[["bytes_up", "bytes_down"]].to_numpy().sum()
    with st.container(horizontal=True, gap="medium"):
        _count("Runs", f"{len(states):,}")
        _count("Running now", f"{states.count('running'):,}")
        _count("Failed or interrupted", f"{stopped:,}")
        _count("Traffic", size(traffic), "All adapters sent, up and down, of all runs.")
        _count("On disk", size(found.disk["nbytes"].sum()), "Files of all runs; the database is not in it.")


def _count(label: str, value: str, meaning: str | None = None) -> None:
    st.metric(label, value, help=meaning, width="content")


def _ways(runs: list[Run], shown: list[str]) -> None:
    """Say how many runs are chosen, and link to what can be done with them."""
    named = {run.id: run for run in runs}
    picked = [name for name in chosen() if name in named]
    hidden = len(picked) - len(set(picked) & set(shown))
    with st.container(horizontal=True, vertical_alignment="center", height=48, border=False):
        if not picked:
            seen = counted(len(runs), "run") if len(shown) == len(runs) else f"{len(shown)} of {len(runs)} runs"
            st.markdown(f"**{seen}**, newest first. Tick some to compare them.", width="content")
            return
        aside = f", {hidden} of them not in the filter" if hidden else ""
        st.markdown(f"**{len(picked)} of {len(runs)} runs chosen**{aside}", width="content")
        if len(picked) == 1:
            run = named[picked[0]]
            link("run", run.id, f"Open {plain(run.name, 40)}")
        compared = picked[:MOST]
        which = "the first " if len(compared) < len(picked) else ""
        link("compare", compared[0], f"Compare {which}{counted(len(compared), 'run')}", runs=",".join(compared))
        st.button("Clear", key="runs_clear", type="tertiary", on_click=choose, args=([],))


def _on_phone() -> bool:
    return "Mobi" in st.context.headers.get("User-Agent", "")
