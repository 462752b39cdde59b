"""Runs that a reader has ticked, in whichever table; they stay ticked though rows come, go and change places."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import streamlit as st

CHOSEN = "chosen_runs"
_SHOWN, _BEFORE = "_shown", "_before"


def chosen() -> list[str]:
    """Return the ids of the chosen runs, in the order they were chosen."""
    return list(st.session_state.get(CHOSEN, []))


def choose(names: Sequence[str]) -> None:
    """Make these the chosen runs."""
    st.session_state[CHOSEN] = list(dict.fromkeys(names))


def follow(table: str, shown: Sequence[str], ticked: Sequence[str]) -> None:
    """Tick runs where they now stand; to be called before the table is shown.

    Parameters
    ----------
    table : str
        Key of the table.
    shown : sequence of str
        Ids of its rows.
    ticked : sequence of str
        Ids of the chosen runs, rows of the table or not.
    """
    places = [place for place, name in enumerate(shown) if name in set(ticked)]
    if list(shown) != st.session_state.get(table + _SHOWN) or sorted(_places(table)) != places:
        st.session_state[table] = {"selection": {"rows": places, "columns": [], "cells": []}}
    st.session_state[table + _SHOWN] = list(shown)
    st.session_state[table + _BEFORE] = list(ticked)


def taken(table: str, then: Callable[[list[str]], None] = choose) -> Callable[[], None]:
    """Return what is to be done when rows are ticked: runs that are no rows of the table stay chosen."""

    def take() -> None:
        shown: list[str] = st.session_state.get(table + _SHOWN, [])
        rows = [shown[place] for place in _places(table) if place < len(shown)]
        before = [name for name in st.session_state.get(table + _BEFORE, []) if name not in shown or name in rows]
        then([*before, *(name for name in rows if name not in before)])

    return take


def _places(table: str) -> list[int]:
    known = st.session_state.get(table, {"selection": {"rows": []}})
    return list(known["selection"]["rows"])
