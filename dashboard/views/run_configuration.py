"""How a run was set: all settings, how they differ from another run's, and the command that runs it again."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from common.store import Run
from dashboard.commands import typed
from dashboard.findings.budget import Policy
from dashboard.findings.reproduce import recipe
from dashboard.pieces import command, explain, table
from dashboard.session import source
from dashboard.settings import differences, flat
from dashboard.views.run_choices import other_runs
from dashboard.words import code, visible

FOUND, HIGHEST = 12, 460
"""Rows of settings seen at once, and pixels of a table of more."""


def configuration(run: Run) -> None:
    """Show it."""
    st.header("How it was set")
    first, second = st.columns(2)
    with first:
        _again(run)
        _unlike(run)
    with second:
        _settings(run)


def _again(run: Run) -> None:
    """Offer the command that reproduces the run, and a file where no preset will do."""
    st.markdown("**Run it again**")
    found = recipe(run.experiment)
    file = f"{visible(run.id, 100)}.toml"
    if found is None:
        explain("This version of LoRAFleet does not understand the run's configuration; use the version that made it.")
    elif found.words:
        command(typed(source().home, *found.words))
    elif found.toml:
        explain("No preset comes close: download the experiment, then")
        command(typed(source().home, "simulate", file))
    if found is not None and found.toml:
        st.download_button(
            "Download the experiment (TOML)",
            found.toml,
            file,
            "application/toml",
            key="experiment",
            on_click="ignore",
            icon=":material/download:",
        )
    promise = "The same seed, code and library versions on a CPU give the same adapter, bit for bit."
    if not Policy.of(run).repeats:
        promise = "It will be another adapter: the noise of privacy comes from the operating system and never repeats."
    explain(f"Seed {run.seed}, code {code(run.fingerprint[:16] or 'unknown')}. {promise}")


def _unlike(run: Run) -> None:
    """Show in which settings another run differs."""
    st.markdown("**What is different in another run**")
    names = other_runs(run)
    if not names:
        explain("There is no other run yet.")
        return
    chosen = st.selectbox(
        "Compare with", list(names), index=None, key="with", bind="query-params", placeholder="Choose a run"
    )
    if chosen not in names:
        explain("Choose a run to see the settings in which it differs.")
        return
    rows = pd.DataFrame(differences(run, names[chosen]), columns=["setting", "here", "there"])
    if rows.empty:
        explain("It has the same settings; only what chance and machine bring can differ.")
    else:
        table(rows, key="differences", height="content" if len(rows) <= FOUND else HIGHEST)


def _settings(run: Run) -> None:
    """Show every setting, or those that hold what the reader looks for."""
    st.markdown("**All settings**")
    known = flat(run)
    wanted = st.text_input(
        "Find a setting", key="find", bind="query-params", placeholder="rank, learning_rate, deadline …"
    )
    rows = pd.DataFrame(
        [(path, value) for path, value in known.items() if wanted.lower() in f"{path} {value}".lower()],
        columns=["setting", "value"],
    )
    if not known or known.keys() == {""}:
        explain("The configuration of this run cannot be read.")
    elif rows.empty:
        explain("No setting holds that.")
    else:
        table(rows, key="settings", height=HIGHEST)
