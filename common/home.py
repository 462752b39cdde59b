"""Where runs are kept when nobody says otherwise."""

from __future__ import annotations

import os
from pathlib import Path

HOME_VARIABLE = "LORAFLEET_HOME"


def default_home() -> Path:
    """Return the folder named by ``LORAFLEET_HOME``, or ``lorafleet-home`` in the working directory."""
    return Path(os.environ.get(HOME_VARIABLE) or "lorafleet-home").absolute()
