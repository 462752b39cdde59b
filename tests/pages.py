"""Where the pages' script lies, and the type of what opens one without a browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from streamlit.testing.v1 import AppTest

APP = Path(__file__).parents[1] / "dashboard" / "app.py"
Opener = Callable[..., AppTest]
