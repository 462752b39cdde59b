"""What to type: commands that mean the store that is looked at."""

from __future__ import annotations

import shlex
from pathlib import Path

USUAL_HOME = "lorafleet-home"


def typed(home: Path, *words: str) -> str:
    """Write a command for a shell, with ``--home`` unless it is the folder that is taken without."""
    flag = [] if home == Path.cwd() / USUAL_HOME else ["--home", str(home)]
    return shlex.join(["lorafleet", *words, *flag])
