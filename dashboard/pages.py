"""The pages by their path in the address, and the links between them."""

from __future__ import annotations

from collections.abc import Mapping

import streamlit as st
from streamlit.navigation.page import Page

PAGE = "page"
"""In the address of the front door: the page to go to."""

TITLES = {
    "runs": ("Runs", ":material/list:"),
    "run": ("Run", ":material/monitoring:"),
    "clients": ("Clients", ":material/groups:"),
    "privacy": ("Privacy", ":material/shield:"),
    "layers": ("Ranks and layers", ":material/layers:"),
    "compare": ("Compare", ":material/compare_arrows:"),
}
PATHS = frozenset(TITLES)

_SHOWN = "pages"


def register(pages: Mapping[str, Page]) -> None:
    """Let this session's links know the pages."""
    st.session_state[_SHOWN] = dict(pages)


def link(name: str, run: str = "", label: str = "", **more: str) -> None:
    """Link to a page, keeping the run in the address.

    Parameters
    ----------
    name : str
        Path of the page.
    run : str
        Id of the run it is to be about.
    label : str
        Markdown; the page's title if empty.
    **more : str
        Further parameters of the address.
    """
    title, icon = TITLES[name]
    given = {key: value for key, value in {"run": run, **more}.items() if value}
    st.page_link(st.session_state[_SHOWN][name], label=label or title, icon=icon, query_params=given)


def go(name: str, run: str = "") -> None:
    """Go to a page at once, as a link to it would."""
    st.switch_page(st.session_state[_SHOWN][name], query_params={"run": run} if run else None)


def pass_the_door() -> None:
    """Go on to the page that the front door's address names."""
    given = {key: st.query_params.get_all(key) for key in st.query_params if key != PAGE}
    name = st.query_params.get(PAGE, "")
    pages = st.session_state[_SHOWN]
    if name in pages and name != "runs":
        st.switch_page(pages[name], query_params=given)
