"""The page of privacy for a run that has none: what that means, what still protects, what may leak."""

from __future__ import annotations

import streamlit as st

from common.store import Run
from dashboard.settings import setting, settings


def without_privacy(run: Run) -> None:
    """Say in plain words what protects the data of this run's clients, and what does not."""
    st.markdown(
        "**This run has no differential privacy:** no noise hides what a single row, or a single client, changed in "
        "the adapter, and there is no number (ε) that bounds what can be learned about them."
    )
    left, right = st.columns(2)
    with left:
        st.markdown("**What protects the data all the same**")
        st.markdown("\n".join(f"- {sentence}" for sentence in protections(run)))
    with right:
        st.markdown("**What can be learned**")
        st.markdown("\n".join(f"- {sentence}" for sentence in risks(run)))
    st.markdown("**How to get it**")
    st.markdown(how_to_ask())


def protections(run: Run) -> list[str]:
    """List what protects the data of a run without differential privacy, by its settings."""
    found = ["The data themselves never leave a client: only numbers of the adapter and a few figures travel."]
    if not settings(run):
        return [*found, "Whether the updates were masked is not known: the settings of this run cannot be read."]
    if setting(run, "secure_aggregation.enabled") is True:
        least = setting(run, "secure_aggregation.min_cohort")
        many = f" of at least {least} clients" if isinstance(least, int) else ""
        found.append(f"Secure aggregation is on: the server learns the sum{many} and no single update.")
    else:
        found.append(
            "Secure aggregation is off: the server sees each client's update as it is. "
            "`secure_aggregation.enabled = true` would show it nothing but their sum."
        )
    if setting(run, "federation.keep_replies") is True:
        found.append("`federation.keep_replies` is on: every update stays on the server's disk after its round.")
    return found


def risks(run: Run) -> list[str]:
    """List what can be learned about the data, and by whom."""
    secure = setting(run, "secure_aggregation.enabled") is True
    update = "the sum of the updates" if secure else "a client's update"
    found = [
        f"An update is computed from the data. Whoever holds {update} may be able to tell whether a text was among "
        "them, and sometimes to rebuild parts of it, the more so from few rows and many rounds.",
        "The finished adapter carries what all clients taught it, and shows it to everybody who is given the file.",
    ]
    if not secure:
        found.append("The server also learns how many examples each client has and its loss in training.")
    places = setting(run, "evaluation.on")
    if isinstance(places, list) and "clients" in places:
        found.append('Clients report their losses on held-out data; `evaluation.on = ["server"]` would leave that out.')
    return found


def how_to_ask() -> str:
    """Say how differential privacy is asked for."""
    return (
        "Ask for it in the experiment, and start a new run: privacy cannot be added to updates that were sent without "
        'it. `privacy.mode = "sample"` makes every client train with noise and protects each row, even from the '
        'server; `privacy.mode = "client"` lets the server add noise and protects each client as a whole. '
        "`privacy.epsilon` is the budget; `lorafleet plan` shows the noise it takes, and `lorafleet simulate private` "
        "an example."
    )
