"""Where the programs are that tests need and pip does not install; ``.ci/run`` puts them there."""

from __future__ import annotations

import shutil
from pathlib import Path

AXE = Path(__file__).resolve().parents[1] / ".cache" / "npm" / "node_modules" / "axe-core" / "axe.min.js"
"""A script for browsers: ``npm install --prefix .cache/npm axe-core@4.14.1``."""


def find(program: str) -> str | None:
    """Return a program's file, None where it is missing."""
    if program == "axe-core":
        return str(AXE) if AXE.is_file() else None
    return shutil.which(program)
