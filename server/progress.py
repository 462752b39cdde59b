"""What a run says while it goes on: one event per step, to whoever listens in this process.

Listeners are how the terminal shows progress, and how tests stop a run at an exact point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Progress:
    """One step of a run.

    Parameters
    ----------
    kind : str
        ``planned``, ``run_started``, ``round_started``, ``dispatched``, ``reply``, ``left_out``, ``aggregated``,
        ``evaluated``, ``written``, ``committed``, ``round_failed``, ``run_finished``; ``notice`` for anything worth
        a line.
    text : str
        A sentence for people.
    round : int
        0 is before training.
    client : str
        Empty when it concerns all.
    data : mapping
        Numbers that belong to it.
    """

    kind: str
    text: str
    round: int = 0
    client: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


Listener = Callable[[Progress], None]

_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


@contextmanager
def listening(*listeners: Listener) -> Iterator[None]:
    """Let listeners hear every step announced in this block (and thread)."""
    token = _listeners.set(_listeners.get() + listeners)
    try:
        yield
    finally:
        _listeners.reset(token)


def announce(kind: str, text: str, round: int = 0, client: str = "", **data: Any) -> None:
    """Tell all listeners of a step."""
    step = Progress(kind, text, round, client, data)
    for listener in _listeners.get():
        listener(step)
