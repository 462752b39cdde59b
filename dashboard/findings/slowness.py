"""Which client is slow, and why, in a sentence: rules over how long clients take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, median_low

from common.wording import counted, duration
from dashboard.findings.timelines import WORK
from dashboard.words import plain

WINDOW = 20
"""Rounds, the last that ended, by which clients are compared on every page."""
STANDS_OUT = 2.0
"""How many times as long as usual a client takes that is called slow."""
LONGER_S = 0.5
"""And how many seconds longer at least: nobody waits for less."""
NAMED = 3
"""Slow clients that a sentence names."""
OFTEN_LATE = 0.1
"""Share of the rounds it was asked in from which on a client is called often late."""
MOSTLY = 0.5

_ADVICE = {
    "train": "A lower rank for it or fewer `training.steps` make its rounds shorter.",
    "download": "Much of it goes by before training: it loads the base model or receives the adapter slowly.",
    "upload": "Its line is slow: a lower rank or `federation.wire` with fewer bits make its upload smaller.",
}


@dataclass(frozen=True)
class Work:
    """What a client needs for a round, from taking its order up to its answer's arrival.

    Parameters
    ----------
    seconds : float
        Median of its rounds; of an even number the lower one of the two in the middle, so that it is of one round.
    rounds, last : int
        Rounds looked at in which it was accepted, and those of them in which it took longest of all.
    phases : mapping of str to float
        Seconds of download, train and upload of that median round; empty where no timeline tells.
    """

    seconds: float
    rounds: int
    last: int
    phases: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Pace:
    """How long one client takes.

    Parameters
    ----------
    client : str
        Its label.
    seconds : float or None
        As in :class:`Work`; None where it finished no round.
    rounds, last, phases
        As in :class:`Work`.
    asked, late : int
        Rounds it was asked in, and those in which it missed the deadline.
    """

    client: str
    seconds: float | None
    rounds: int = 0
    last: int = 0
    asked: int = 0
    late: int = 0
    phases: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Slow:
    """The clients that are slow with their seconds, slowest first, and the median of the others."""

    clients: tuple[tuple[str, float], ...]
    others: float


def work_of(rounds: Iterable[Mapping[str, tuple[float, Mapping[str, float]]]]) -> dict[str, Work]:
    """Return each client's work in its median round, from seconds and phases by round and client."""
    found: dict[str, list[tuple[float, Mapping[str, float]]]] = {}
    last: dict[str, int] = {}
    for clients in rounds:
        for client, worked in clients.items():
            found.setdefault(client, []).append(worked)
        if clients:
            longest = min(clients, key=lambda client: (-clients[client][0], client))
            last[longest] = last.get(longest, 0) + 1
    middle = {client: _middle(each) for client, each in found.items()}
    return {
        client: Work(seconds, len(found[client]), last.get(client, 0), phases)
        for client, (seconds, phases) in middle.items()
    }


def _middle(each: list[tuple[float, Mapping[str, float]]]) -> tuple[float, Mapping[str, float]]:
    """Return the median round, of those with a timeline where there are any: the others lack the upload."""
    told = sorted([one for one in each if one[1]] or each, key=lambda one: one[0])
    return told[(len(told) - 1) // 2]


def slow(seconds: Mapping[str, float]) -> Slow:
    """Find the slow ones by what each client took: the one rule of all pages."""
    if not seconds:
        return Slow((), 0.0)
    # The lower one: of four clients of which two are slow it is a quick one's.
    usual = median_low(seconds.values())
    late = {client for client, took in seconds.items() if took > STANDS_OUT * usual and took - usual > LONGER_S}
    order = sorted(late, key=lambda client: (-seconds[client], client))
    others = median(took for client, took in seconds.items() if client not in late)
    return Slow(tuple((client, seconds[client]) for client in order), others)


def named(found: Slow, shown: Callable[[str], str] = str) -> str:
    """Name the slow clients, each with its time, the first few of many."""
    names = [f"{shown(client)} ({took(seconds)})" for client, seconds in found.clients[:NAMED]]
    if len(found.clients) > NAMED:
        names.append(f"{len(found.clients) - NAMED} more")
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def slowest(paces: Sequence[Pace]) -> str:
    """Say in Markdown which clients are slow, and what the slowest one's time is spent on."""
    known = {pace.client: pace for pace in sorted(paces, key=lambda pace: -(pace.seconds or 0.0)) if pace.seconds}
    seconds = {client: pace.seconds or 0.0 for client, pace in known.items()}
    late, found = often_late(paces), slow(seconds)
    if not known:
        return late or "No client has finished a training round yet."
    (first, longest), (last, shortest) = next(iter(seconds.items())), list(seconds.items())[-1]
    if len(known) == 1:
        said = f"**{plain(first, 60)}** alone has trained so far: {took(longest)} a round."
    elif found.clients:
        said = _stands_out(known[found.clients[0][0]], found)
    else:
        said = (
            f"**No client is slow:** a round takes each between {took(shortest)} ({plain(last, 60)}) and "
            f"{took(longest)} ({plain(first, 60)})."
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
    if seconds < 1e-4:
        return "< 0.1 ms"
    return duration(seconds) if seconds >= 0.9995 else f"{1e3 * seconds:.3g} ms"


def parts(phases: Mapping[str, float]) -> str:
    """Say what a client's time is spent on; empty where nothing is known."""
    spent = {
        "training": phases.get("train", 0.0),
        "transfer and loading": phases.get("download", 0.0) + phases.get("upload", 0.0),
    }
    total = sum(spent.values())
    return ", ".join(f"{value / total:.0%} {name}" for name, value in spent.items()) if total > 0 else ""


def _stands_out(first: Pace, found: Slow) -> str:
    name, others = plain(first.client, 60), took(found.others)
    said = f"**{named(found, lambda client: plain(client, 60))} are slow:** the others need {others} a round."
    if len(found.clients) == 1:
        times = f", {found.clients[0][1] / found.others:.1f} times what the others need" if found.others else ""
        said = f"**{name} is slow:** {took(found.clients[0][1])} a round{times} ({others})."
    if first.last > 1:
        said += f" {first.last} of the {counted(first.rounds, 'round')} {name} took part in lately waited for it alone."
    if shares := parts(first.phases):
        said += f" The time of {name}: {shares}. {_advice(first.phases)}"
    return said.rstrip()


def _advice(phases: Mapping[str, float]) -> str:
    """Return what helps against the phase that takes most of a client's own time."""
    own = {phase: phases.get(phase, 0.0) for phase in WORK}
    most = max(own, key=lambda phase: own[phase])
    return _ADVICE[most] if own[most] >= MOSTLY * sum(own.values()) else ""
