"""Who may look: anyone on this machine, or whoever signs in where OpenID Connect is configured."""

from __future__ import annotations

import os

import streamlit as st
from streamlit.errors import StreamlitSecretNotFoundError

from dashboard import LOGIN_VARIABLE
from dashboard.login_file import UNNAMED, fault, providers
from dashboard.words import plain


def login_configured() -> bool:
    """Tell whether Streamlit's secrets have an ``[auth]`` section; secrets that cannot be read have none."""
    try:
        return "auth" in st.secrets
    except StreamlitSecretNotFoundError:
        return False


def signed_in() -> bool:
    """Tell whether the reader may look; one who may not yet is shown how to sign in.

    Where a login was configured when the dashboard began it stays needed, even if its file is gone or broken since.
    """
    configured = login_configured()
    if not (configured or os.environ.get(LOGIN_VARIABLE)):
        return True
    usable = configured and not fault(st.secrets["auth"])
    if usable and st.user.get("is_logged_in") is True:
        with st.sidebar:
            st.button("Sign out", on_click=st.logout, type="tertiary")
        return True
    st.title("LoRAFleet")
    if usable:
        _ask()
    else:
        st.error("Nobody can sign in: secrets.toml, which says how, is broken. Who runs this dashboard can mend it.")
    return False


def _ask() -> None:
    """Offer to sign in with each provider."""
    st.write("Sign in to see the runs of this federation.")
    for name in providers(st.secrets["auth"]):
        if name == UNNAMED:
            st.button("Sign in", on_click=st.login)
        else:
            st.button(f"Sign in with {plain(name, 60)}", on_click=st.login, args=(name,), key=f"login-{name}")
