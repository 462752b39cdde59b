"""To be written."""

from __future__ import annotations

import streamlit as st


def page() -> None:
    """Show it."""
    st.title("clients")
