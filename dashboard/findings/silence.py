"""What clients do not tell under differential privacy, so that a page can say why it has less to show."""

from __future__ import annotations

from common.store import Run
from dashboard.findings.budget import Policy
from dashboard.settings import setting

NO_TIMES = "Under differential privacy clients do not tell how long they work: that would tell of their rows."
NO_LOSSES = "Under differential privacy clients do not tell their losses."


def silence(run: Run) -> str:
    """Say which numbers of the clients a run does not have, and why; empty without privacy."""
    policy = Policy.of(run)
    if not policy.promises:
        return ""
    hidden = ["losses"]
    if setting(run, "privacy.row_counts") != "public":
        hidden.append("numbers of rows")
    if policy.mode == "sample":
        hidden.append("working times")
    listed = ", ".join(hidden[:-1]) + (" and " if len(hidden) > 1 else "") + hidden[-1]
    return f"Clients tell no {listed} in this run: under differential privacy those would tell of their data."


def tells_times(run: Run) -> bool:
    """Tell whether clients say how long they work."""
    return Policy.of(run).mode != "sample"
