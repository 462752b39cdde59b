"""How far a run is and how long it will take: words and numbers, from plain values."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from common.wording import duration

AGES = ((86_400.0, "day"), (3_600.0, "hour"), (60.0, "minute"))
FEW_S = 10.0

STEPS = {
    "": "begins",
    "round_started": "orders go out to the clients",
    "dispatched": "clients are training",
    "aggregated": "updates are merged; the model is being evaluated",
    "committed": "done; the next one begins",
    "failed": "failed; the next one begins",
}


def time_left(recent: Sequence[float], rounds: int, elapsed: float) -> float | None:
    """Estimate the seconds to the end of a run.

    Parameters
    ----------
    recent : sequence of float, seconds
        What the last rounds took.
    rounds : int
        Rounds that have not ended, the one under way among them.
    elapsed : float, seconds
        Since the round under way began.

    Returns
    -------
    float or None
        None where no round has ended yet, which could tell.
    """
    if not recent:
        return None
    usual = median(recent)
    return max(0, rounds - 1) * usual + max(0.0, usual - elapsed) if rounds > 0 else 0.0


def time_words(recent: Sequence[float], rounds: int, elapsed: float) -> tuple[str, str]:
    """Say how long the rest will take, and what is to be said of that, with what :func:`time_left` takes."""
    left = time_left(recent, rounds, elapsed)
    if left is None:
        return "–", ""
    usual = median(recent)
    if rounds <= 0 or elapsed <= usual:
        return rough(left) if left < FEW_S else f"about {rough(left)}", ""
    return f"over {rough(left)}" if rounds > 1 else "unknown", f"past the usual {duration(usual)}"


def phase(number: int | None, step: str, replied: int, asked: int) -> str:
    """Say what a running run is doing.

    Parameters
    ----------
    number : int or None
        The newest round; None before there is any.
    step : str
        Kind of the newest event of that round that says how far it is.
    replied, asked : int
        Replies it has, clients it asked.
    """
    if number is None:
        return "waiting for clients to join"
    if number <= 0 and step not in ("committed", "failed"):
        return "measuring the model before training"
    if step == "dispatched" and asked and replied >= asked:
        return "all replies are there; they are being merged"
    return STEPS.get(step, STEPS[""])


def ago(seconds: float) -> str:
    """Say how long ago something was."""
    if seconds < 1.5:
        return "just now"
    if seconds < 60:
        return f"{seconds:.0f} s ago"
    for length, unit in AGES:
        if seconds >= length:
            count = int(seconds / length)
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return f"{duration(seconds)} ago"


def rough(seconds: float) -> str:
    """Write a duration that is an estimate: in few digits, so that it does not flicker."""
    if seconds < FEW_S:
        return "a few seconds"
    if seconds < 90:
        return f"{round(seconds, -1):.0f} s"
    if seconds < 5_400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3_600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
