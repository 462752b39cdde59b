"""Pieces that pages are made of: charts with their table, explanations where there is no data, live parts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

import pandas as pd
import streamlit as st
from streamlit.elements.lib.column_types import ColumnConfig

from common.errors import StoreError
from common.store import Run
from dashboard.charts import Spec
from dashboard.session import REFRESH_S, chosen_run, source
from dashboard.words import code, plain

logger = logging.getLogger(__name__)

HEIGHT = 280
CLOSE = {"legend": {"offset": 10, "padding": 0, "rowPadding": 3}}
"""Little air around legends, which share a chart's height."""
PADDING = {"left": 2, "right": 20, "top": 6, "bottom": 6}
"""In the specification itself, where Streamlit puts its own; at the right for half of the last tick's text."""
CANVAS = {"embedOptions": {"renderer": "canvas"}}
"""Painted, not built of elements: several times quicker for long lines and large maps."""


def chosen_or_stop() -> Run:
    """Return the run the page is about; without one the page ends here."""
    run = chosen_run()
    if run is None:
        st.info("There is no run yet. Begin one in a terminal: " + code("lorafleet simulate quickstart"))
        st.stop()
    return run


def draw(title: str, table: pd.DataFrame, spec: Spec, why_empty: str, *, key: str, height: int = HEIGHT) -> None:
    """Draw a chart under a title, or say why there is none.

    Parameters
    ----------
    title : str
        Of our own, as all texts here.
    table : DataFrame
        Its columns are those the specification names; without rows there is no chart.
    spec : dict
        Of :mod:`dashboard.charts`.
    why_empty : str
        A sentence, in Markdown.
    key : str
        Names the chart on its page, so that a live one is changed in place.
    height : int, pixels
        Of the chart.
    """
    st.markdown(f"**{title}**")
    if table.empty:
        explain(why_empty)
    else:
        drawn = {**spec, "height": height, "padding": PADDING, "config": CLOSE, "usermeta": CANVAS}
        st.vega_lite_chart(table, drawn, width="stretch", key=key, alt=title)


def command(text: str) -> None:
    """Show a command to copy and type."""
    st.code(text, language=None, wrap_lines=True)


def explain(sentence: str) -> None:
    """Say in place of a chart why there is none."""
    st.caption(sentence)


def table(
    rows: pd.DataFrame, *, key: str, height: int | Literal["content"] | None = None, **config: ColumnConfig | str | None
) -> None:
    """Show rows as a table: text in it is shown as it is."""
    st.dataframe(
        rows, hide_index=True, width="stretch", height=height or "auto", key=key, column_config=config, placeholder="–"
    )


def guarded(body: Callable[[], None]) -> None:
    """Show a part of a page; whatever goes wrong in it is told in its place, and the rest of the page stands."""
    try:
        body()
    except StoreError as error:
        st.error(plain(error))
    except Exception as error:
        broken(error)


def broken(error: Exception) -> None:
    """Say that something cannot be shown, for a reason nobody foresaw; all about it goes to the log."""
    logger.error("a part of a page cannot be shown", exc_info=error)
    reason = plain(f"{type(error).__name__} {error}".strip(), 200)
    st.error(f"This part cannot be shown: {reason}; the other parts are not affected.")


def live(body: Callable[[], None], running: bool) -> None:
    """Show a part of a page that looks again by itself while the run goes on; only this part is sent anew."""

    def looked() -> None:
        guarded(body)
        stale()

    st.fragment(looked, run_every=REFRESH_S if running else None)()


def stale() -> None:
    """Say that the store does not answer, and how old the view is."""
    here = source()
    if here.trouble:
        since = f"{here.answered_at:%H:%M:%S} UTC" if here.answered_at else "an earlier look"
        st.warning(f"This is the view of {since}: the store does not answer. Trying again. {plain(here.trouble)}")
