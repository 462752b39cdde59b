"""What a reader of a run's page can put beside it."""

from __future__ import annotations

from common.store import Run
from dashboard.session import all_runs, run_label
from dashboard.words import visible

OFFERED = 200
"""Other runs to choose from, the newest."""


def other_runs(run: Run) -> dict[str, Run]:
    """Return the other runs by what each is called in a list."""
    names: dict[str, Run] = {}
    for other in [other for other in all_runs() if other.id != run.id][:OFFERED]:
        label = run_label(other)
        names[f"{label} · {visible(other.id)}" if label in names else label] = other
    return names
