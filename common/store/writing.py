"""Statements that change the tables; the caller's transaction holds them together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from datetime import datetime
from typing import Any, TypedDict

from sqlalchemy import Connection, and_, bindparam, delete, insert, update

from common.errors import RejectedUpdate
from common.store.artefacts import checked_path
from common.store.columns import JSON_LENGTH, clean_name, to_json
from common.store.entities import Artefact, Client, ClientRound, Event, Metric, Round, Run, Statistic
from common.store.models import (
    ArtefactRow,
    Base,
    ClientRoundRow,
    ClientRow,
    EventRow,
    MetricRow,
    RoundRow,
    RunRow,
    StatisticRow,
    table_of,
)
from common.store.reading import unknown_run

Values = dict[str, Any]
_KEPT = ("received", "accepted")


class RunChanges(TypedDict, total=False):
    """The fields of a run that may change; its status changes by ``set_status``."""

    name: str
    reason: str | None
    experiment: str
    rounds_planned: int
    rounds_done: int
    best_round: int | None
    best_metric: float | None
    adapter_path: str | None
    adapter_sha256: str | None


def known(changes: RunChanges) -> Values:
    """Return the changes as they are, if a run has such fields to change.

    Raises
    ------
    TypeError
        As Python does for a wrong keyword.
    """
    fields_known = RunChanges.__optional_keys__
    unknown = changes.keys() - fields_known
    if unknown:
        raise TypeError(f"a run has no {sorted(unknown)} to change; it has {sorted(fields_known)}")
    return {**changes}


def change_run(connection: Connection, run_id: str, at: datetime, changes: Values) -> None:
    """Update a run and the time of its last change.

    Raises
    ------
    UnknownNameError
        When there is no such run.
    """
    if changes.get("adapter_path") is not None:
        changes = {**changes, "adapter_path": checked_path(run_id, changes["adapter_path"])}
    statement = update(RunRow).where(RunRow.id == run_id).values(**changes, updated_at=at)
    if connection.execute(statement).rowcount == 0:
        raise unknown_run(connection, run_id)


def add_run(connection: Connection, run: Run) -> None:
    """Insert a run."""
    connection.execute(insert(table_of(RunRow)), _values(run))


def put_round(connection: Connection, round: Round, known: bool) -> None:
    """Insert a round, or change the known one."""
    if round.state_path is not None:
        round = replace(round, state_path=checked_path(round.run, round.state_path))
    table = table_of(RoundRow)
    if known:
        place = and_(table.c.run == round.run, table.c.round == round.round)
        connection.execute(update(table).where(place).values(_values(round)))
    else:
        connection.execute(insert(table), _values(round))


def put_clients(connection: Connection, clients: Iterable[ClientRound]) -> None:
    """Insert what clients did in one round, in place of what was there of them.

    Raises
    ------
    RejectedUpdate
        When a reply to be kept has metadata that are too long to be kept.
    """
    rows = {clean_name(client.client): _client_values(client) for client in clients}
    _replace(connection, ClientRoundRow, list(rows.values()))


def put_metrics(connection: Connection, run_id: str, round: int, metrics: Iterable[Metric]) -> None:
    """Insert a round's metrics in place of all that were there; of equals the last counts."""
    rows = {
        (clean_name(metric.name), clean_name(metric.client), clean_name(metric.layer)): _values(metric)
        for metric in metrics
    }
    table = table_of(MetricRow)
    connection.execute(delete(table).where(table.c.run == run_id, table.c.round == round))
    _insert(connection, MetricRow, list(rows.values()))


def put_statistics(connection: Connection, statistics: Iterable[Statistic]) -> None:
    """Insert statistics in place of those of the same round and kind."""
    _replace(connection, StatisticRow, list({(item.round, item.kind): _values(item) for item in statistics}.values()))


def put_members(connection: Connection, clients: Iterable[Client]) -> None:
    """Insert the clients of a run in place of what was known of them."""
    _replace(connection, ClientRow, list({clean_name(item.client): _values(item) for item in clients}.values()))


def mark_alive(connection: Connection, run_id: str, at: datetime) -> None:
    """Note that the process that writes a run lives; that is no change of the run."""
    connection.execute(update(RunRow).where(RunRow.id == run_id).values(alive_at=at))


def put_artefacts(connection: Connection, artefacts: Iterable[Artefact]) -> None:
    """Insert artefacts in place of those of the same path."""
    plain = [replace(item, path=checked_path(item.run, item.path)) for item in artefacts]
    _replace(connection, ArtefactRow, list({item.path: _values(item) for item in plain}.values()))


def put_events(connection: Connection, events: Iterable[Event]) -> None:
    """Append events."""
    _insert(connection, EventRow, [_event_values(event) for event in events])


def put_event(connection: Connection, event: Event) -> int:
    """Append one event and return its id."""
    statement = insert(table_of(EventRow)).values(_event_values(event)).returning(EventRow.id)
    return connection.execute(statement).scalar_one()


def remove_rounds_after(connection: Connection, run_id: str, round: int) -> None:
    """Delete the rows of all rounds after one, those that refer to others first."""
    for row in (EventRow, ArtefactRow, StatisticRow, MetricRow, ClientRoundRow, RoundRow):
        table = table_of(row)
        connection.execute(delete(table).where(table.c.run == run_id, table.c.round > round))


def remove_run(connection: Connection, run_id: str) -> None:
    """Delete a run's rows, those that refer to others first.

    Raises
    ------
    UnknownNameError
        When there is no such run.
    """
    for table in reversed(Base.metadata.sorted_tables):
        if table.name != RunRow.__tablename__:
            connection.execute(delete(table).where(table.c.run == run_id))
    if connection.execute(delete(RunRow).where(RunRow.id == run_id)).rowcount == 0:
        raise unknown_run(connection, run_id)


def _values(entity: Run | Round | ClientRound | Client | Metric | Statistic | Artefact | Event) -> Values:
    return {field.name: getattr(entity, field.name) for field in fields(entity)}


def _client_values(client: ClientRound) -> Values:
    values = _values(client)
    if client.artefact_path is not None:
        values["artefact_path"] = checked_path(client.run, client.artefact_path)
    nbytes = len(to_json(client.metadata))
    if nbytes > JSON_LENGTH and client.status in _KEPT:
        raise RejectedUpdate(
            f"the reply of client {clean_name(client.client)!r} carries {nbytes:,} bytes of metadata,"
            f" at most {JSON_LENGTH:,} are kept; send less beside the tensors"
        )
    return values


def _event_values(event: Event) -> Values:
    values = _values(event)
    del values["id"]
    return values


def _replace(connection: Connection, row: type[Base], rows: list[Values]) -> None:
    table = table_of(row)
    keys = [column.name for column in table.primary_key.columns]
    old = and_(*(table.c[key] == bindparam(f"old_{key}") for key in keys))
    if rows:
        places = [{f"old_{key}": values[key] for key in keys} for values in rows]
        connection.execute(delete(table).where(old), places)
    _insert(connection, row, rows)


def _insert(connection: Connection, row: type[Base], rows: list[Values]) -> None:
    if rows:
        connection.execute(insert(table_of(row)), rows)
