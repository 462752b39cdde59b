"""When clients and server did what in a round, for its chart: spans in seconds since the round began.

The server sees when it sent an order and took the answer. What lies between, a client tells by its own clock, which is
believed only where it fits between the two; whatever a client tells, no span leaves that frame.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

Span = tuple[str, float, float]
"""Phase, start and end."""

TOLERANCE_S = 0.05
"""How far a client's clock may lie outside the frame and still be believed."""
DIGITS = 4


@dataclass(frozen=True)
class Told:
    """What a client tells of its work.

    Parameters
    ----------
    began : float
        When it took up the order, in seconds since the epoch of its clock; 0 where it does not say.
    seconds : float
        From then to the end of the work, not negative.
    ready : float
        From then to the beginning of what was asked for: decoding, loading and the like, not negative.
    """

    began: float
    seconds: float
    ready: float = 0.0


def spans(phase: str, sent: float, received: float, began: float, told: Told) -> list[Span]:
    """Lay out what a client did between order and answer; what nobody explains is waiting, before the work.

    Parameters
    ----------
    phase : str
        ``train`` or ``evaluate``.
    sent, received, began : float, seconds since the round began
        The server's own moments, and the client's beginning as far as its clock can be believed.
    told : Told
        Of which the lengths count here.

    Returns
    -------
    list of tuple
        In order, each beginning where the last one ended, without empty ones beside the phase itself.
    """
    work = min(told.seconds, received - sent)
    if sent - TOLERANCE_S <= began <= received - told.seconds + TOLERANCE_S:
        begin = min(max(began, sent), received - work)
    else:
        begin = received - work
    share = min(told.ready, told.seconds) / told.seconds if told.seconds else 0.0
    start, end = begin + share * work, begin + work
    found = [("wait", sent, begin), ("download", begin, start), (phase, start, end), ("upload", end, received)]
    rounded = [(name, round(first, DIGITS), round(last, DIGITS)) for name, first, last in found]
    return [span for span in rounded if span[0] == phase or span[1] < span[2]]


@dataclass
class Timeline:
    """The spans of one round.

    Parameters
    ----------
    epoch : float
        When the round began, in seconds since the epoch.
    clock : callable
        Gives seconds that never jump.
    """

    epoch: float
    clock: Callable[[], float] = time.perf_counter
    clients: dict[str, list[Span]] = field(default_factory=dict)
    server: list[Span] = field(default_factory=list)
    _asked: dict[str, tuple[float, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._zero = self.clock()

    def now(self) -> float:
        """Return the seconds since the round began."""
        return self.clock() - self._zero

    def ask(self, clients: Iterable[str]) -> None:
        """Note that orders leave now."""
        now = self.now()
        for client in clients:
            self._asked[client] = (now, len(self.clients.setdefault(client, [])))

    def answered(self, client: str, phase: str, told: Told, received: float) -> None:
        """Add what a client did for the order it was sent last; an evaluation's answer is no upload."""
        sent, _ = self._asked[client]
        found = spans(phase, sent, received, told.began - self.epoch, told)
        self.clients[client] += [span for span in found if phase == "train" or span[0] != "upload"]

    def lose(self, client: str) -> None:
        """Count all since the last order as lost; a client that was not asked has nothing to lose."""
        if client in self._asked:
            sent, before = self._asked[client]
            self.clients[client][before:] = [("lost", round(sent, DIGITS), round(self.now(), DIGITS))]

    def serve(self, phase: str, begun: float) -> float:
        """Add a phase of the server that ends now, and return how long it was."""
        ended = self.now()
        self.server.append((phase, round(begun, DIGITS), round(ended, DIGITS)))
        return ended - begun

    def data(self) -> dict[str, Any]:
        """Return what is stored; see `common.store.Statistic`."""
        return {"clients": self.clients, "server": self.server}
