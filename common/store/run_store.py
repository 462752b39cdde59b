"""The store of runs: every verb is one transaction, and a kill leaves all of it or nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from sqlalchemy import Connection

from common.errors import StoreError
from common.store import reading, writing
from common.store.artefacts import file_of, make_folder, run_folder, unusable
from common.store.database import Database
from common.store.entities import Artefact, Client, ClientRound, Event, Metric, Round, Run, RunStatus, Statistic
from common.store.lock import RunLock
from common.store.writing import RunChanges


def utc_now() -> datetime:
    """Return the time, aware and in UTC."""
    return datetime.now(UTC)


class RunStore:
    """Runs, rounds, what clients did, metrics, artefacts and events of one home folder.

    Open it with :meth:`open`. It may be shared by threads, not by forked processes. Readers in other
    processes never keep the writer waiting; who writes a run holds its :class:`~common.store.lock.RunLock`.

    Raises
    ------
    StoreError
        From every verb: when the home or the database cannot be used.
    UnknownNameError
        From every verb that changes a run: when there is no run of that id.
    """

    def __init__(self, home: Path, opened: Database, clock: Callable[[], datetime]) -> None:
        self.home = home
        self._database = opened
        self._clock = clock

    @classmethod
    def open(
        cls,
        home: Path | str,
        url: str | None = None,
        read_only: bool = False,
        clock: Callable[[], datetime] = utc_now,
    ) -> Self:
        """Open a store; opened for writing it is made, or upgraded, where needed.

        Parameters
        ----------
        home : Path or str
            Folder of the artefacts and, unless a URL says otherwise, of the SQLite database.
        url : str or None
            Of a PostgreSQL database or a SQLite file; None takes ``LORAFLEET_DATABASE_URL``.
        read_only : bool
            Never to write: the database must exist and be of this code's version.
        clock : callable
            Gives the times the store takes itself.
        """
        folder = Path(home).absolute()
        return cls(folder, Database.open(folder, url, read_only), clock)

    def close(self) -> None:
        """Close the connections."""
        self._database.engine.dispose()

    def __enter__(self) -> Self:
        """Return the store."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        self.close()

    def create_run(
        self,
        run_id: str,
        *,
        name: str,
        task: str,
        strategy: str,
        seed: int,
        experiment: str,
        rounds_planned: int,
        fingerprint: str = "",
    ) -> Run:
        """Begin a run: make its folder, then its row, with status ``running``.

        Raises
        ------
        StoreError
            When the id is taken or cannot name a folder.
        """
        now = self._clock()
        run = Run(
            id=run_id,
            name=name,
            status="running",
            task=task,
            strategy=strategy,
            seed=seed,
            experiment=experiment,
            fingerprint=fingerprint,
            rounds_planned=rounds_planned,
            created_at=now,
            updated_at=now,
        )
        folder = self.run_folder(run_id)
        with self._database.writing() as connection:
            if reading.has_run(connection, run_id):
                raise StoreError(f"there is already a run {run_id}; give the new one another id")
            make_folder(folder)
            writing.add_run(connection, run)
            return reading.find_run(connection, run_id)

    def set_status(self, run_id: str, status: RunStatus, reason: str | None = None) -> Run:
        """Set a run's status and the reason for it; any but ``running`` ends the run."""
        now = self._clock()
        finished = None if status == "running" else now
        changes = {"status": status, "reason": reason, "finished_at": finished}
        with self._database.writing() as connection:
            writing.change_run(connection, run_id, now, changes)
            return reading.find_run(connection, run_id)

    def update_run(self, run_id: str, **changes: Unpack[RunChanges]) -> Run:
        """Change some of a run's fields."""
        with self._database.writing() as connection:
            writing.change_run(connection, run_id, self._clock(), writing.known(changes))
            return reading.find_run(connection, run_id)

    def get_run(self, name: str) -> Run:
        """Return the run of that id, or whose id alone begins so, or the newest for ``last``.

        Raises
        ------
        UnknownNameError
            When none or several fit; it lists some.
        """
        with self._database.reading() as connection:
            return reading.find_run(connection, name)

    def runs(self, limit: int | None = None) -> list[Run]:
        """Return the runs, newest first."""
        with self._database.reading() as connection:
            return reading.read_runs(connection, limit)

    def delete_run(self, run_id: str) -> None:
        """Delete a run's rows, then its folder.

        Raises
        ------
        StoreError
            When a living process writes the run.
        """
        folder = self.run_folder(run_id)
        with self._database.reading() as connection:
            reading.require_run(connection, run_id)
        with RunLock(folder):
            with self._database.writing() as connection:
                writing.remove_run(connection, run_id)
            try:
                shutil.rmtree(folder)
            except OSError as error:
                raise unusable(folder, error) from error

    def run_folder(self, run_id: str) -> Path:
        """Return the folder of a run's artefacts.

        Raises
        ------
        StoreError
            When the id cannot name a folder.
        """
        return run_folder(self.home, run_id)

    def artefact_file(self, run_id: str, path: str) -> Path:
        """Return where the file of a stored path lies.

        Raises
        ------
        StoreError
            When the path, or a link on its way, leads out of the run's folder.
        """
        return file_of(self.home, run_id, path)

    def begin_round(self, run_id: str, round: int, cohort: Sequence[str], base_version: int = 0) -> Round:
        """Begin a round, or return it as it is if it has begun: a resumed run finds the same cohort."""
        now = self._clock()
        begun = Round(run_id, round, now, cohort=tuple(cohort), base_version=base_version)
        with self._database.writing() as connection:
            writing.change_run(connection, run_id, now, {})
            if reading.round_status(connection, run_id, round) is None:
                writing.put_round(connection, begun, known=False)
            return reading.read_rounds(connection, run_id, round)[0]

    def rewind(self, run_id: str, round: int, **changes: Unpack[RunChanges]) -> Run:
        """Forget all rounds after one, so that the run goes on from there; their files stay until written again.

        Raises
        ------
        StoreError
            When that round has not ended.
        """
        with self._database.writing() as connection:
            if reading.round_status(connection, run_id, round) in (None, "running"):
                raise StoreError(f"run {run_id} has no round {round} to go on from")
            writing.remove_rounds_after(connection, run_id, round)
            writing.change_run(connection, run_id, self._clock(), {"rounds_done": round, **writing.known(changes)})
            return reading.find_run(connection, run_id)

    def record_client(self, client: ClientRound) -> None:
        """Record what a client did, in place of what was recorded; its artefact is already on disk.

        Raises
        ------
        RejectedUpdate
            When a reply to be kept has more metadata than can be kept.
        """
        with self._database.writing() as connection:
            writing.change_run(connection, client.run, self._clock(), {})
            if reading.round_status(connection, client.run, client.round) is None:
                raise StoreError(f"round {client.round} of run {client.run} has not begun; begin it first")
            writing.put_clients(connection, [client])

    def commit_round(
        self,
        round: Round,
        clients: Iterable[ClientRound] = (),
        metrics: Iterable[Metric] = (),
        artefacts: Iterable[Artefact] = (),
        events: Iterable[Event] = (),
        statistics: Iterable[Statistic] = (),
        **changes: Unpack[RunChanges],
    ) -> Round:
        """Commit a round with all that belongs to it and the run's changes, in one transaction.

        Parameters
        ----------
        round : Round
            ``committed`` or ``failed``; without ``committed_at`` the store's clock gives it. A failed
            round may be committed again, a committed one may not.
        clients, metrics, artefacts, events, statistics
            Of this round; the artefacts' files are already on disk.
        **changes
            Of the run: ``rounds_done``, ``best_round`` and so on.

        Raises
        ------
        StoreError
            When the round is already committed or an artefact's file is not on disk.
        RejectedUpdate
            When a reply to be kept has more metadata than can be kept.
        """
        now = self._clock()
        files = list(artefacts)
        for file in files:
            _check_on_disk(self.artefact_file(file.run, file.path), file.nbytes)
        round = _finished(round, now)
        with self._database.writing() as connection:
            writing.change_run(connection, round.run, now, writing.known(changes))
            status = reading.round_status(connection, round.run, round.round)
            if status == "committed":
                raise StoreError(f"round {round.round} of run {round.run} is committed; go on to the next")
            writing.put_round(connection, round, known=status is not None)
            writing.put_clients(connection, clients)
            writing.put_metrics(connection, round.run, round.round, metrics)
            writing.put_statistics(connection, statistics)
            writing.put_artefacts(connection, files)
            writing.put_events(connection, events)
            return reading.read_rounds(connection, round.run, round.round)[0]

    def record_members(self, clients: Iterable[Client]) -> None:
        """Record what the server knows of a run's clients, in place of what was known of each."""
        with self._database.writing() as connection:
            writing.put_members(connection, clients)

    def mark_alive(self, run_id: str) -> None:
        """Note that the process that writes a run lives."""
        with self._database.writing() as connection:
            writing.mark_alive(connection, run_id, self._clock())

    def reading(self) -> AbstractContextManager[Connection]:
        """Hold a transaction for queries of one's own over the tables of :mod:`common.store.models`."""
        return self._database.reading()

    def members(self, run_id: str) -> list[Client]:
        """Return the clients a run has met, by name."""
        with self._database.reading() as connection:
            return reading.read_members(connection, run_id)

    def statistics(self, run_id: str, kind: str | None = None, round: int | None = None) -> list[Statistic]:
        """Return statistics by round and kind."""
        with self._database.reading() as connection:
            return reading.read_statistics(connection, run_id, kind, round)

    def round(self, run_id: str, round: int) -> Round | None:
        """Return one round; None where it has not begun."""
        with self._database.reading() as connection:
            return next(iter(reading.read_rounds(connection, run_id, round)), None)

    def rounds(self, run_id: str) -> list[Round]:
        """Return a run's rounds in order."""
        with self._database.reading() as connection:
            return reading.read_rounds(connection, run_id)

    def client_rounds(self, run_id: str, round: int | None = None) -> list[ClientRound]:
        """Return what clients did, by round and name."""
        with self._database.reading() as connection:
            return reading.read_clients(connection, run_id, round)

    def metrics(
        self, run_id: str, name: str | None = None, round: int | None = None, client: str | None = None
    ) -> list[Metric]:
        """Return metrics by round, name, client and layer; the client "" is the federation."""
        with self._database.reading() as connection:
            return reading.read_metrics(connection, run_id, name, round, client)

    def artefacts(self, run_id: str, kind: str | None = None, round: int | None = None) -> list[Artefact]:
        """Return artefacts by round and path, those of the whole run last."""
        with self._database.reading() as connection:
            return reading.read_artefacts(connection, run_id, kind, round)

    def add_event(
        self,
        run_id: str,
        kind: str,
        text: str,
        *,
        round: int | None = None,
        client: str | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> int:
        """Record an event at the store's time and return its id."""
        event = Event(run_id, kind, text, self._clock(), round, client, data or {})
        with self._database.writing() as connection:
            reading.require_run(connection, run_id)
            return writing.put_event(connection, event)

    def events(self, run_id: str, after: int = 0, limit: int | None = None) -> list[Event]:
        """Return the events after an id, oldest first."""
        with self._database.reading() as connection:
            return reading.read_events(connection, run_id, after, limit)


def _finished(round: Round, now: datetime) -> Round:
    if round.status == "running":
        raise ValueError(f"round {round.round} is still running; commit it as committed or failed")
    return replace(round, committed_at=round.committed_at or now)


def _check_on_disk(file: Path, nbytes: int) -> None:
    if not file.is_file() or file.stat().st_size != nbytes:
        raise StoreError(f"{file} is not on disk with its {nbytes:,} bytes; write it before it is committed")
