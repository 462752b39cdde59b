"""A run's memory on disk: replies as they arrive, one commit per round, and where to go on.

Artefacts are written before the transaction that names them, so whatever the store knows is there.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from common.adapter_file import adapter_bytes, read_state, state_bytes, whole_adapter
from common.errors import CorruptArtefact, StoreError
from common.federation import ModelSpec, ServerState
from common.messages import TrainAnswer, read_header
from common.parcel_file import parcel_bytes, read_parcel
from common.store import (
    Artefact,
    Client,
    ClientRound,
    Event,
    Metric,
    Round,
    Run,
    RunStore,
    Statistic,
    verify,
    write_artefact,
)
from common.wire import Parcel
from server.record import RoundRecord, best_metric, sentence
from server.secure.desk import Desk

log = logging.getLogger(__name__)


class Begun(NamedTuple):
    """A round that may go on: the cohort it had, and how often it was begun, from 1."""

    cohort: tuple[str, ...]
    attempt: int


class Released(NamedTuple):
    """A committed round whose noise protects clients: noise multiplier, and the clients that have a part in it."""

    noise_multiplier: float
    clients: tuple[str, ...]


class Journal(Protocol):
    """What the round loop needs to remember."""

    def begin(self, number: int, cohort: Sequence[str], base_version: int) -> Begun:
        """Begin a round; a resumed one gets the cohort it had."""
        ...

    def meet(self, clients: Sequence[Client]) -> None:
        """Record clients that were not there before."""
        ...

    def kept(self, number: int) -> Mapping[str, tuple[TrainAnswer, Parcel]]:
        """Return the replies of an interrupted round."""
        ...

    def keep(self, number: int, answer: TrainAnswer, parcel: Parcel, rank: int) -> None:
        """Keep a reply that passed the screening."""
        ...

    def reply(self, number: int, client: str) -> tuple[TrainAnswer, Parcel]:
        """Read a kept reply again."""
        ...

    def desk(self, number: int) -> Desk:
        """Return where the answers of a round's secure sum are kept."""
        ...

    def released(self) -> Sequence[Released]:
        """Return what the rounds committed so far cost, where clients are protected."""
        ...

    def commit(self, record: RoundRecord, state: ServerState, best: bool) -> None:
        """Commit a round and its state."""
        ...


@dataclass
class StoreJournal:
    """The journal of a run in a store."""

    store: RunStore
    run: str
    keep_replies: bool = False

    def begin(self, number: int, cohort: Sequence[str], base_version: int) -> Begun:
        """Begin a round; a resumed one gets the cohort it had."""
        known = self.store.round(self.run, number) is not None
        earlier = [event for event in self.store.events(self.run) if _begins(event, number)] if known else []
        row = self.store.begin_round(self.run, number, cohort, base_version)
        return Begun(row.cohort, len(earlier) + 1)

    def meet(self, clients: Sequence[Client]) -> None:
        """Record clients; of one that a resumed run has met before, it stays the time it joined."""
        joined = {member.client: member.joined_at for member in self.store.members(self.run)}
        self.store.record_members(
            replace(client, joined_at=joined.get(client.client, client.joined_at)) for client in clients
        )

    def kept(self, number: int) -> dict[str, tuple[TrainAnswer, Parcel]]:
        """Return the replies of an interrupted round; damaged ones are left out, their clients are asked again."""
        found = {}
        for client in self.store.client_rounds(self.run, number):
            if client.status != "received" or client.artefact_path is None or client.artefact_sha256 is None:
                continue
            try:
                verify(self.store.artefact_file(self.run, client.artefact_path), client.artefact_sha256)
                found[client.client] = self.reply(number, client.client)
            except CorruptArtefact as error:
                log.warning("%s; client %s is asked again", error, client.client)
        return found

    def keep(self, number: int, answer: TrainAnswer, parcel: Parcel, rank: int) -> None:
        """Write a reply to disk, then its row."""
        content = parcel_bytes(parcel, answer.model_dump_json())
        file = write_artefact(self._folder, self._reply_name(number, answer.client), content)
        self.store.record_client(
            ClientRound(
                self.run,
                number,
                answer.client,
                "received",
                rank=rank,
                num_examples=int(answer.num_examples),
                bytes_up=parcel.nbytes,
                seconds=answer.seconds,
                artefact_path=file.path,
                artefact_sha256=file.sha256,
            )
        )

    def reply(self, number: int, client: str) -> tuple[TrainAnswer, Parcel]:
        """Read a kept reply again."""
        parcel, header, _ = read_parcel(self._folder / self._reply_name(number, client))
        return read_header(TrainAnswer, header), parcel

    def desk(self, number: int) -> Desk:
        """Return where the answers of a round's secure sum are kept."""
        return Desk(self._folder, f"rounds/{number:04d}/secure")

    def released(self) -> list[Released]:
        """Return what the rounds committed so far cost, where clients are protected.

        Raises
        ------
        StoreError
            If a round's noise is not known any more: what it cost cannot be told.
        """
        taken: dict[int, list[str]] = {}
        for row in self.store.client_rounds(self.run):
            if row.status == "accepted":
                taken.setdefault(row.round, []).append(row.client)
        noise = {each.round: each.value for each in self.store.metrics(self.run, "noise_multiplier", client="")}
        done = [each.round for each in self.store.rounds(self.run) if each.round and each.status == "committed"]
        if unknown := [number for number in done if not noise.get(number, 0.0) > 0]:
            raise StoreError(
                f"the store does not know the noise of round {unknown[0]}, so what run {self.run} has spent cannot be "
                "told; begin a new run"
            )
        return [Released(noise[number], tuple(taken.get(number, ()))) for number in done]

    def commit(self, record: RoundRecord, state: ServerState, best: bool) -> None:
        """Write state and samples, then everything else in one transaction."""
        number = record.number
        artefacts = self._kept_replies(record) if self.keep_replies else []
        place = self._state_before(number)
        if record.status == "committed":
            file = write_artefact(self._folder, f"rounds/{number:04d}/state.safetensors", state_bytes(state))
            artefacts.append(Artefact(self.run, number, "state", file.path, file.sha256, file.nbytes))
            place = (file.path, file.sha256)
        if record.samples is not None:
            made = write_artefact(self._folder, f"rounds/{number:04d}/samples.json", record.samples.encode())
            artefacts.append(Artefact(self.run, number, "samples", made.path, made.sha256, made.nbytes))
        now = datetime.now(UTC)
        row = Round(
            self.run,
            number,
            record.started_at,
            status=record.status,  # type: ignore[arg-type]
            reason=record.reason,
            cohort=record.cohort,
            base_version=record.base_version,
            bytes_up=record.bytes_up,
            bytes_down=record.bytes_down,
            seconds=(now - record.started_at).total_seconds(),
            phases=record.phases,
            error=record.error,
            epsilon=self._spent(record),
            exact=record.exact,
            state_path=place[0],
            state_sha256=place[1],
        )
        statistics = record.statistics | {"timeline": record.timeline.data()}
        changes: dict[str, Any] = {"rounds_done": number - record.repeated}
        if best:
            changes |= {"best_round": number, "best_metric": best_metric(record)}
        self.store.commit_round(
            row,
            [ClientRound(self.run, number, name, **values) for name, values in sorted(record.clients.items())],
            [Metric(self.run, number, name, value, client, layer) for name, value, client, layer in record.metrics],
            artefacts,
            [Event(self.run, record.status, sentence(record), now, number)],
            [Statistic(self.run, number, kind, data) for kind, data in statistics.items()],
            **changes,
        )
        self._forget_replies(number)

    def _kept_replies(self, record: RoundRecord) -> list[Artefact]:
        """Name the files of accepted replies in their clients' rows, and return them."""
        found = []
        for row in self.store.client_rounds(self.run, record.number):
            values = record.clients.get(row.client, {})
            if values.get("status") != "accepted" or row.artefact_path is None or row.artefact_sha256 is None:
                continue
            values |= {"artefact_path": row.artefact_path, "artefact_sha256": row.artefact_sha256}
            nbytes = self.store.artefact_file(self.run, row.artefact_path).stat().st_size
            found.append(Artefact(self.run, record.number, "reply", row.artefact_path, row.artefact_sha256, nbytes))
        return found

    def _state_before(self, number: int) -> tuple[str | None, str | None]:
        """Return path and hash of the state a round began with: a failed round changes nothing, and has no other."""
        before = self.store.round(self.run, number - 1)
        return (before.state_path, before.state_sha256) if before else (None, None)

    def _spent(self, record: RoundRecord) -> float | None:
        """Return the largest spending over all clients and rounds so far."""
        before = self.store.round(self.run, record.number - 1)
        known = [value for value in (before.epsilon if before else None, record.epsilon) if value is not None]
        return max(known, default=None)

    def _forget_replies(self, number: int) -> None:
        self.desk(number).discard()
        if not self.keep_replies:
            shutil.rmtree(self._folder / f"rounds/{number:04d}/replies", ignore_errors=True)

    def restore(self, spec: ModelSpec) -> ServerState | None:
        """Return the state after the last round that ended, or None before round 0.

        Raises
        ------
        CorruptArtefact
            If that state is damaged; the message offers an earlier round.
        """
        ended = [row for row in self.store.rounds(self.run) if row.status != "running"]
        if not ended:
            return None
        last = ended[-1]
        if last.status == "committed":
            self._forget_replies(last.round)  # a kill right after the commit leaves them
        assert last.state_path is not None and last.state_sha256 is not None
        path = self.store.artefact_file(self.run, last.state_path)
        try:
            verify(path, last.state_sha256)
            return read_state(path, spec)
        except CorruptArtefact as error:
            whole = next((row.round for row in reversed(ended[:-1]) if self._is_whole(row)), None)
            offer = f"; go on from an earlier round: lorafleet resume {self.run} --from-round {whole}"
            raise CorruptArtefact(f"{error}{offer if whole is not None else ''}") from None

    def _is_whole(self, row: Round) -> bool:
        try:
            assert row.state_path is not None and row.state_sha256 is not None
            verify(self.store.artefact_file(self.run, row.state_path), row.state_sha256)
        except CorruptArtefact:
            return False
        return True

    def publish(self, state: ServerState) -> None:
        """Write the run's adapter: global and start adapter in one."""
        name = f"adapter-{state.round:04d}.safetensors"
        file = write_artefact(self._folder, name, adapter_bytes(whole_adapter(state)))
        self.store.update_run(self.run, adapter_path=file.path, adapter_sha256=file.sha256)

    @property
    def _folder(self) -> Path:
        return self.store.run_folder(self.run)

    @staticmethod
    def _reply_name(number: int, client: str) -> str:
        return f"rounds/{number:04d}/replies/{client}.safetensors"


def _begins(event: Event, number: int) -> bool:
    return event.kind == "round_started" and event.round == number


def rewind(store: RunStore, run: str, number: int) -> Run:
    """Forget the rounds after ``number``; the best round is sought among those that stay."""
    name = "held_out_loss" if store.metrics(run, "held_out_loss", client="") else "unseen_loss"
    kept = [metric for metric in store.metrics(run, name, client="") if metric.round <= number]
    best = min(kept, key=lambda metric: (metric.value, metric.round), default=None)
    return store.rewind(run, number, best_round=best.round if best else None, best_metric=best.value if best else None)
