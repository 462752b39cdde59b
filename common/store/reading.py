"""Queries: what the tables hold, as entities."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, func, select

from common.errors import UnknownNameError
from common.store.columns import Name
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

LAST = "last"
_LISTED = 5

EntityT = TypeVar("EntityT", Run, Round, ClientRound, Client, Metric, Statistic, Artefact, Event)


def read_runs(connection: Connection, limit: int | None = None) -> list[Run]:
    """Read the runs, newest first."""
    newest = (RunRow.created_at.desc(), RunRow.id.desc())
    return _read(connection, RunRow, Run, (), newest, limit)


def find_run(connection: Connection, name: str) -> Run:
    """Read the run of that id, or whose id alone begins so, or the newest for ``last``.

    Raises
    ------
    UnknownNameError
        When none or several fit.
    """
    exact = _read(connection, RunRow, Run, (RunRow.id == name,), ())
    if exact:
        return exact[0]
    if name == LAST:
        found = read_runs(connection, limit=1)
    else:
        start = func.substr(RunRow.id, 1, len(name), type_=Name())
        found = _read(connection, RunRow, Run, (start == name,), (RunRow.id,), _LISTED) if name else []
    if len(found) == 1:
        return found[0]
    if found:
        raise UnknownNameError("run", name, [run.id for run in found], "several begin so; give more of the id")
    raise unknown_run(connection, name)


def has_run(connection: Connection, run_id: str) -> bool:
    """Tell whether there is a run of exactly that id."""
    return connection.execute(select(RunRow.id).where(RunRow.id == run_id)).first() is not None


def require_run(connection: Connection, run_id: str) -> None:
    """Check that there is a run of exactly that id.

    Raises
    ------
    UnknownNameError
        When there is none.
    """
    if not has_run(connection, run_id):
        raise unknown_run(connection, run_id)


def unknown_run(connection: Connection, name: str) -> UnknownNameError:
    """Say that there is no such run, listing the newest."""
    known = [run.id for run in read_runs(connection, _LISTED)]
    return UnknownNameError("run", name, known, "`lorafleet runs list` shows all" if known else "")


def read_rounds(connection: Connection, run_id: str, round: int | None = None) -> list[Round]:
    """Read a run's rounds in order."""
    return _read(connection, RoundRow, Round, _where(RoundRow, run=run_id, round=round), (RoundRow.round,))


def read_clients(connection: Connection, run_id: str, round: int | None = None) -> list[ClientRound]:
    """Read what clients did, by round and name."""
    criteria = _where(ClientRoundRow, run=run_id, round=round)
    return _read(connection, ClientRoundRow, ClientRound, criteria, (ClientRoundRow.round, ClientRoundRow.client))


def read_metrics(
    connection: Connection, run_id: str, name: str | None, round: int | None, client: str | None
) -> list[Metric]:
    """Read metrics by round, name, client and layer."""
    criteria = _where(MetricRow, run=run_id, name=name, round=round, client=client)
    order = (MetricRow.round, MetricRow.name, MetricRow.client, MetricRow.layer)
    return _read(connection, MetricRow, Metric, criteria, order)


def read_members(connection: Connection, run_id: str) -> list[Client]:
    """Read the clients a run has met, by name."""
    return _read(connection, ClientRow, Client, _where(ClientRow, run=run_id), (ClientRow.client,))


def read_statistics(
    connection: Connection, run_id: str, kind: str | None = None, round: int | None = None
) -> list[Statistic]:
    """Read statistics by round and kind."""
    criteria = _where(StatisticRow, run=run_id, kind=kind, round=round)
    return _read(connection, StatisticRow, Statistic, criteria, (StatisticRow.round, StatisticRow.kind))


def read_artefacts(connection: Connection, run_id: str, kind: str | None, round: int | None) -> list[Artefact]:
    """Read artefacts by round and path, those of the whole run last."""
    criteria = _where(ArtefactRow, run=run_id, kind=kind, round=round)
    order = (ArtefactRow.round.nulls_last(), ArtefactRow.path)
    return _read(connection, ArtefactRow, Artefact, criteria, order)


def read_events(connection: Connection, run_id: str, after: int, limit: int | None) -> list[Event]:
    """Read the events after an id, oldest first."""
    criteria = (EventRow.run == run_id, EventRow.id > after)
    return _read(connection, EventRow, Event, criteria, (EventRow.id,), limit)


def round_status(connection: Connection, run_id: str, round: int) -> str | None:
    """Read a round's status; None where the round has not begun."""
    criteria = _where(RoundRow, run=run_id, round=round)
    return connection.execute(select(RoundRow.status).where(*criteria)).scalar_one_or_none()


def _where(row: type[Base], **wanted: str | int | None) -> tuple[ColumnElement[bool], ...]:
    table = table_of(row)
    return tuple(table.c[name] == value for name, value in wanted.items() if value is not None)


def _read(
    connection: Connection,
    row: type[Base],
    entity: type[EntityT],
    criteria: Iterable[ColumnElement[bool]],
    order: Iterable[Any],
    limit: int | None = None,
) -> list[EntityT]:
    table = table_of(row)
    columns = [table.c[field.name] for field in fields(entity)]
    statement = select(*columns).where(*criteria).order_by(*order).limit(limit)
    return [entity(**values) for values in connection.execute(statement).mappings()]
