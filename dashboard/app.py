"""The frame around the pages: who may look, which run is looked at, and what is said when there is none."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from common.errors import OutdatedStore, StoreError
from common.store import Run
from dashboard.commands import typed
from dashboard.login import signed_in
from dashboard.pages import TITLES, link, pass_the_door, register
from dashboard.pieces import broken, command
from dashboard.session import REFRESH_S, all_runs, run_label, source
from dashboard.views import clients, compare, layers, privacy, run, runs
from dashboard.words import code, plain

VIEWS = {
    "runs": runs.page,
    "run": run.page,
    "clients": clients.page,
    "privacy": privacy.page,
    "layers": layers.page,
    "compare": compare.page,
}
STATIC = Path(__file__).with_name("static")


def frame() -> None:
    """Show the page the address names."""
    st.set_page_config("LoRAFleet", str(STATIC / "icon.svg"), layout="wide")
    st.html(STATIC / "style.css")
    if not signed_in():
        return
    shown = {
        name: st.Page(VIEWS[name], title=title, icon=icon, url_path=name) for name, (title, icon) in TITLES.items()
    }
    shown["runs"] = st.Page(VIEWS["runs"], title="Runs", icon=TITLES["runs"][1], url_path="runs", default=True)
    register(shown)
    page = st.navigation(list(shown.values()), position="hidden")
    pass_the_door()
    try:
        known = all_runs()
        if known:
            choose(known)
            page.run()
        else:
            without_runs()
    except StoreError as error:
        without_store(error)
    except Exception as error:
        broken(error)


def choose(known: list[Run]) -> None:
    """Let the reader choose page and run; the address holds both."""
    labels = {run.id: run_label(run) for run in known}
    named = st.query_params.get("run", "")
    names = list(labels)
    with st.sidebar:
        links = st.container(gap="xxsmall")
        st.divider()
        place = names.index(named) if named in labels else 0
        chosen = st.selectbox("Run", names, place, format_func=lambda name: labels.get(name, name))
        if named and named not in labels:
            st.caption(f"There is no run {plain(named, 60)} here; this is the newest.")
    if chosen != named:
        st.query_params["run"] = chosen
    with links:
        for name in TITLES:
            link(name, chosen)


def without_runs() -> None:
    """Say what to type where the store is empty."""
    st.title("No runs yet")
    st.markdown("There is nothing to see yet. Begin a run in a terminal, and it appears here as it goes on:")
    command(typed(source().home, "simulate", "quickstart"))
    wait_for_change(standing())


def without_store(error: StoreError) -> None:
    """Say why there is nothing to show, and look again."""
    if source().is_new:
        without_runs()
        return
    if isinstance(error, OutdatedStore):
        st.title("The store is of an older version")
        st.markdown("Its runs are there. Bring it to this version; a copy of the old one is kept:")
        command(typed(source().home, "database", "upgrade"))
    else:
        st.title("The store cannot be read")
        st.error(plain(error, 1_000))
        st.markdown(f"Looked for in {code(str(source().home))}.")
    wait_for_change(standing())


def standing() -> str:
    """Return why there is no page to show: the store's words, or that it has no runs; empty where there is one."""
    try:
        return "" if all_runs() else "no runs"
    except StoreError as error:
        return str(error)


@st.fragment(run_every=REFRESH_S)
def wait_for_change(shown: str) -> None:
    """Show everything again once something else is to be said."""
    if standing() != shown:
        st.rerun()
    st.caption("Looking again every two seconds.")


frame()
