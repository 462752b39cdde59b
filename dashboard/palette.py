"""Colours that everybody can tell apart, on light and on dark ground.

``SERIES`` are those of Okabe and Ito (without yellow, which is too light for a line), then of Paul Tol's "muted" set.
Pages take them from the theme in ``.streamlit/config.toml``, which has a lighter set for dark ground.
"""

from __future__ import annotations

SERIES = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#332288",
    "#882255",
    "#999933",
    "#117733",
    "#AA4499",
    "#88CCEE",
)

STATUS = {
    "accepted": "#009E73",
    "received": "#56B4E9",
    "late": "#E69F00",
    "rejected": "#D55E00",
    "failed": "#CC79A7",
    "offline": "#8A94A0",
}
"""What became of a client in a round; mid tones that stand out on both grounds."""

PHASES = {
    "wait": "#A9B4C0",
    "download": "#56B4E9",
    "train": "#0F7FBF",
    "upload": "#2BA58A",
    "aggregate": "#CC79A7",
    "evaluate": "#E69F00",
    "lost": "#D55E00",
}
"""What a client or the server is busy with."""
