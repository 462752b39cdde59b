"""What a run's status is called on pages."""

from __future__ import annotations

from dashboard.words import visible

STATES = {
    "running": "● running",
    "completed": "✓ completed",
    "failed": "✕ failed",
    "interrupted": "◌ interrupted",
}


def state_words(status: str) -> str:
    """Return what a status is called; one that nobody knows, of another version or a damaged row, as it is."""
    return STATES.get(status) or visible(status, 40)
