"""Which client is slow, and why, in a sentence: rules over how long clients take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from common.wording import counted, duration
from dashboard.words import plain

STANDS_OUT = 1.5
"""How many times the others' median a client takes that is called slow."""
SHORTEST_S = 1e-3
OFTEN_LATE = 0.1
"""Share of the rounds it was asked in from which on a client is called often late."""
MOSTLY = 0.5

_ADVICE = {
    "train": "A lower rank for it or fewer `training.steps` make its rounds shorter.",
    "download": "Much of it goes by before training: it loads the base model or receives the adapter slowly.",
    "upload": "Its line is slow: a lower rank or `federation.wire` with fewer bits make its upload smaller.",
}


@dataclass(frozen=True)
class Pace:
    """How long one client takes.

    Parameters
    ----------
    client : str
        Its label.
    seconds : float or None
        Median of its work in a round, None where it finished none.
    rounds, last : int
        Rounds looked at in which it was accepted, and those of them that waited for it.
    asked, late : int
        Rounds it was asked in, and those in which it missed the deadline.
    phases : mapping of str to float
        Mean seconds of wait, download, train and upload; empty where no timeline tells.
    """

    client: str
    seconds: float | None
    rounds: int = 0
    last: int = 0
    asked: int = 0
    late: int = 0
    phases: Mapping[str, float] = field(default_factory=dict)

    @property
    def busy(self) -> float:
        """Seconds from order to answer without waiting: its work, and its upload where that is known."""
        return (self.seconds or 0.0) + self.phases.get("upload", 0.0)


def slowest(paces: Sequence[Pace]) -> str:
    """Say in Markdown which client is slow, and what its time is spent on."""
    known = sorted((pace for pace in paces if pace.seconds), key=lambda pace: -pace.busy)
    late = often_late(paces)
    if not known:
        return late or "No client has finished a training round yet."
    first, others = known[0], [pace.busy for pace in known[1:]]
    if not others:
        said = f"**{plain(first.client, 60)}** alone has trained so far: {took(first.busy)} a round."
    elif first.busy > STANDS_OUT * median(others):
        said = _stands_out(first, median(others))
    else:
        last = known[-1]
        said = (
            f"**No client is slow:** a round takes each between {took(last.busy)} ({plain(last.client, 60)}) and "
            f"{took(first.busy)} ({plain(first.client, 60)})."
        )
    return f"{said} {late}".rstrip()


def often_late(paces: Sequence[Pace]) -> str:
    """Say who misses the deadline often; empty where nobody does."""
    often = [pace for pace in paces if pace.late and pace.late >= OFTEN_LATE * pace.asked]
    if not often:
        return ""
    worst = max(often, key=lambda pace: (pace.late / max(1, pace.asked), pace.late))
    share = f"{plain(worst.client, 60)} missed the deadline in {worst.late} of {counted(worst.asked, 'round')}"
    more = f", and {counted(len(often) - 1, 'other client')} often, too" if len(often) > 1 else ""
    return f"{share}{more}."


def took(seconds: float) -> str:
    """Write how long a client took, short rounds in milliseconds."""
    return duration(seconds) if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def parts(phases: Mapping[str, float]) -> str:
    """Say what a client's time is spent on; empty where nothing is known."""
    spent = {
        "training": phases.get("train", 0.0),
        "transfer and loading": phases.get("download", 0.0) + phases.get("upload", 0.0),
        "waiting for its turn": phases.get("wait", 0.0),
    }
    total = sum(spent.values())
    return ", ".join(f"{value / total:.0%} {name}" for name, value in spent.items()) if total > 0 else ""


def _stands_out(first: Pace, others: float) -> str:
    times = f"{first.busy / max(others, SHORTEST_S):.1f} times what the others need ({took(others)})"
    said = f"**{plain(first.client, 60)} is the slowest:** {took(first.busy)} a round, {times}."
    if first.last > 1:
        said += f" {first.last} of its last {counted(first.rounds, 'round')} waited for it alone."
    if shares := parts(first.phases):
        said += f" Its time: {shares}. {_advice(first.phases)}"
    return said.rstrip()


def _advice(phases: Mapping[str, float]) -> str:
    """Return what helps against the phase that takes most of a client's own time."""
    own = {phase: phases.get(phase, 0.0) for phase in _ADVICE}
    most = max(own, key=lambda phase: own[phase])
    return _ADVICE[most] if own[most] >= MOSTLY * sum(own.values()) else ""
