"""The steps of a run that goes on in other processes, read from its store."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import StoreError
from common.store import ClientRound, Round, RunStore
from server.progress import Listener, Progress

INTERVAL_S = 0.3

_ENDED = {"committed": "committed", "failed": "round_failed"}


class Follower:
    """Turns what a store learns of one run into steps, as the server would have announced them.

    Parameters
    ----------
    store : RunStore
        Opened for reading.
    run : str
        Id of the run.
    listener : callable
        Hears the steps.
    """

    def __init__(self, store: RunStore, run: str, listener: Listener) -> None:
        self._store, self._run, self._listener = store, run, listener
        self._rounds: dict[int, str] = {row.round: row.status for row in store.rounds(run) if row.status != "running"}
        self._clients: dict[tuple[int, str], str] = {}

    def look(self) -> None:
        """Announce what is new since the last look."""
        total = self._store.get_run(self._run).rounds_planned
        for row in self._store.rounds(self._run):
            known = self._rounds.get(row.round)
            if known == row.status:
                if row.status == "running":
                    self._look_at_clients(row)
                continue
            if known is None:
                text, clients = f"round {row.round} of {total}", list(row.cohort)
                self._tell("round_started", text, row.round, clients=clients, rounds=total)
            self._look_at_clients(row)
            self._rounds[row.round] = row.status
            if row.status in _ENDED:
                self._tell_end(row, total)

    def _look_at_clients(self, row: Round) -> None:
        losses = {m.client: m.value for m in self._store.metrics(self._run, "train_loss", row.round)}
        for client in self._store.client_rounds(self._run, row.round):
            key = (row.round, client.client)
            settled = "done" if client.status in ("received", "accepted") else "left out"
            if self._clients.get(key) != settled:
                self._clients[key] = settled
                self._tell_client(client, losses.get(client.client))

    def _tell_client(self, client: ClientRound, loss: float | None) -> None:
        name = client.client
        if client.status in ("received", "accepted"):
            text = f"{name} trained in {client.seconds:.1f} s"
            self._tell("reply", text, client.round, name, seconds=client.seconds, train_loss=loss)
        else:
            self._tell("left_out", f"{name} is left out: {client.reason}", client.round, name, status=client.status)

    def _tell_end(self, row: Round, total: int) -> None:
        metrics = {m.name: m.value for m in self._store.metrics(self._run, None, row.round, "") if not m.layer}
        text = f"round {row.round} failed: {row.reason}" if row.status == "failed" else f"round {row.round} committed"
        self._tell(_ENDED[row.status], text, row.round, metrics=metrics, rounds=total)

    def _tell(self, kind: str, text: str, round: int, client: str = "", **data: object) -> None:
        self._listener(Progress(kind, text, round, client, data))


@contextmanager
def following(home: Path, run: str, listener: Listener) -> Iterator[None]:
    """Follow a run in a thread while the block goes on; what it did last is announced before the end."""
    stop = threading.Event()
    with RunStore.open(home, read_only=True) as store:
        follower = Follower(store, run, listener)

        def follow() -> None:
            try:
                while not stop.wait(INTERVAL_S):
                    follower.look()
                follower.look()
            except StoreError as error:
                listener(Progress("notice", f"progress cannot be shown: {error}"))

        thread = threading.Thread(target=follow, name="follower", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
