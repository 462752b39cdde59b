"""What to type: commands that mean the store that is looked at."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

PROGRAM_VARIABLE = "LORAFLEET_PROGRAM"
"""In the environment: how the program was called that started the pages, as a shell would read it."""
USUAL_HOME = "lorafleet-home"


def typed(home: Path, *words: str) -> str:
    """Write a command for a shell, with ``--home`` unless it is the folder that is taken without."""
    flag = [] if home == Path.cwd() / USUAL_HOME else ["--home", str(home)]
    return f"{os.environ.get(PROGRAM_VARIABLE, 'lorafleet')} {shlex.join([*words, *flag])}"
