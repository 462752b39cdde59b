"""Which runs are compared: those the address names, those ticked before, or a proposal."""

from __future__ import annotations

from collections.abc import Mapping

import streamlit as st

from common.store import Run
from common.wording import counted
from dashboard.pieces import explain
from dashboard.session import chosen_run, state_of
from dashboard.views.runs_table import brief_columns, brief_rows
from dashboard.views.ticks import choose, chosen, follow, taken

RUNS, TABLE, OPEN = "runs", "compare_table", "compare_open"
MOST, PROPOSED = 24, 12
HEIGHT = 320


def runs_by_hand(known: Mapping[str, Run]) -> list[Run]:
    """Let the reader tick runs; the address holds them."""
    if RUNS not in st.query_params and chosen():
        st.query_params[RUNS] = ",".join(chosen())
    proposed = RUNS not in st.query_params
    named = _proposed(known) if proposed else st.query_params[RUNS].split(",")
    found = [name for name in dict.fromkeys(named) if name in known]
    # Its label and its being open must not change with the choice, or it would close at every tick.
    with st.expander("Choose runs", expanded=st.session_state.setdefault(OPEN, len(found) < 2)):
        rows = list(known.values())
        follow(TABLE, list(known), found)
        st.dataframe(
            brief_rows(rows, {run.id: state_of(run) for run in rows}),
            hide_index=True,
            width="stretch",
            height="content" if len(rows) < 8 else HEIGHT,
            column_config=brief_columns(st.context.timezone),
            key=TABLE,
            on_select=taken(TABLE, _remember),
            selection_mode="multi-row",
            alt="Runs to choose from, newest first",
            placeholder="–",
        )
        explain("Runs that differ by nothing but their seed become one line: their mean.")
    explain(_about(len(found), proposed))
    return [known[name] for name in found[:MOST]]


def _proposed(known: Mapping[str, Run]) -> list[str]:
    """Propose the newest runs of the task of the run that is looked at."""
    run = chosen_run()
    alike = [name for name, other in known.items() if run and other.task == run.task and other.rounds_done]
    return alike[:PROPOSED]


def _about(count: int, proposed: bool) -> str:
    if proposed and count:
        return f"Nothing was chosen yet: the newest {counted(count, 'run')} of one task."
    more = f", the first {MOST} of which are compared: more lines could not be told apart" if count > MOST else ""
    return f"{counted(count, 'run')} chosen{more}."


def _remember(names: list[str]) -> None:
    st.query_params[RUNS] = ",".join(names)
    choose(names)
