"""The steps of a run that goes on in other processes, read from its store."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import StoreError
from common.store import Event, RunStore
from server.progress import Listener, Progress

INTERVAL_S = 0.3


class Follower:
    """Tells what a store learns of one run as the steps the server announces.

    Most steps are events there; replies are rows of their round.

    Parameters
    ----------
    store : RunStore
        Opened for reading.
    run : str
        Id of the run; what it did before is not told.
    listener : callable
        Hears the steps.
    """

    def __init__(self, store: RunStore, run: str, listener: Listener) -> None:
        self._store, self._run, self._listener = store, run, listener
        self._last = max((event.id for event in store.events(run)), default=0)
        self._round: int | None = None
        self._replied: set[str] = set()

    def look(self) -> None:
        """Tell what is new since the last look."""
        for event in self._store.events(self._run, after=self._last):
            self._last = event.id
            self._tell(event)
        self._tell_replies()

    def _tell(self, event: Event) -> None:
        kind, number, data = event.kind, event.round or 0, dict(event.data)
        if kind == "round_started":
            self._round, self._replied = number, set()
        elif kind == "aggregated":
            self._tell_replies()  # a merge comes after what it merges
        elif kind in ("committed", "failed"):
            self._tell_replies()
            kind = "committed" if kind == "committed" else "round_failed"
            metrics = self._store.metrics(self._run, round=number, client="")
            row = self._store.round(self._run, number)
            data["seconds"] = row.seconds if row else 0.0
            if row and row.epsilon is not None:
                data |= {"epsilon": row.epsilon, "rounds_left": self._rounds_left(number)}
            data["metrics"] = {metric.name: metric.value for metric in metrics if not metric.layer}
        self._listener(Progress(kind, event.text, number, event.client or "", data))

    def _rounds_left(self, number: int) -> int | None:
        """Return the fewest further rounds a client's privacy budget allows."""
        told = [m.value for m in self._store.metrics(self._run, round=number) if m.name == "rounds_left" and m.client]
        return int(min(told)) if told else None

    def _tell_replies(self) -> None:
        if self._round is None:
            return
        for row in self._store.client_rounds(self._run, self._round):
            if row.status in ("received", "accepted") and row.client not in self._replied:
                self._replied.add(row.client)
                text = f"{row.client} trained" + (f" in {row.seconds:.1f} s" if row.seconds else "")
                self._listener(Progress("reply", text, row.round, row.client, {"seconds": row.seconds}))


@contextmanager
def following(home: Path, run: str, listener: Listener) -> Iterator[None]:
    """Follow a run in a thread while the block goes on; what it did last is told before the end."""
    stop = threading.Event()

    def follow(follower: Follower) -> None:
        try:
            while not stop.wait(INTERVAL_S):
                follower.look()
            follower.look()
        except StoreError as error:
            listener(Progress("notice", f"progress cannot be shown: {error}"))

    with RunStore.open(home, read_only=True) as store:
        thread = threading.Thread(target=follow, args=[Follower(store, run, listener)], name="follower", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
