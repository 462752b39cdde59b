"""Who may look: anyone on this machine, or whoever signs in where OpenID Connect is configured."""

from __future__ import annotations

import streamlit as st
from streamlit.errors import StreamlitSecretNotFoundError


def login_configured() -> bool:
    """Tell whether Streamlit's secrets have an ``[auth]`` section."""
    try:
        return "auth" in st.secrets
    except StreamlitSecretNotFoundError:
        return False


def signed_in() -> bool:
    """Tell whether the reader may look; one who may not yet is shown how to sign in."""
    if not login_configured():
        return True
    if st.user.is_logged_in:
        with st.sidebar:
            st.button("Sign out", on_click=st.logout, type="tertiary")
        return True
    st.title("LoRAFleet")
    st.write("Sign in to see the runs of this federation.")
    st.button("Sign in", on_click=st.login, type="primary")
    return False
