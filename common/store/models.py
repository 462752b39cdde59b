"""The tables. A column bears the name of the entity's field it holds.

::

    runs ─┬─< rounds ─┬─< client_rounds
          │           ├─< metrics
          │           ├─< statistics
          │           └─< artefacts (round may be NULL)
          ├─< clients
          └─< events
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar, get_args

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from common.store.columns import Document, Json, Moment, Name, Names, Real, Sentence, Whole
from common.store.entities import ClientStatus, RoundStatus, RunStatus

NAMING = {
    "pk": "pk_%(table_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
}


class Base(DeclarativeBase):
    """Root of the tables."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map: ClassVar[Any] = {str: Name, int: Whole, float: Real, bool: Boolean, datetime: Moment}


def _one_of(literal: Any) -> CheckConstraint:
    return CheckConstraint(f"status IN {get_args(literal)}", name="status")


def _of_round() -> ForeignKeyConstraint:
    return ForeignKeyConstraint(["run", "round"], ["rounds.run", "rounds.round"], ondelete="CASCADE")


def _of_run() -> ForeignKey:
    return ForeignKey("runs.id", ondelete="CASCADE")


_DIGEST = String(64)


class RunRow(Base):
    """A run; see :class:`common.store.entities.Run`."""

    __tablename__ = "runs"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    status: Mapped[str] = mapped_column(String(20))
    reason: Mapped[str | None] = mapped_column(Sentence)
    task: Mapped[str]
    strategy: Mapped[str]
    seed: Mapped[int]
    experiment: Mapped[str] = mapped_column(Document)
    fingerprint: Mapped[str]
    rounds_planned: Mapped[int]
    rounds_done: Mapped[int]
    best_round: Mapped[int | None]
    best_metric: Mapped[float | None]
    adapter_path: Mapped[str | None] = mapped_column(Document)
    adapter_sha256: Mapped[str | None] = mapped_column(_DIGEST)
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    alive_at: Mapped[datetime | None]

    __table_args__ = (_one_of(RunStatus), Index(None, "created_at", "id"))


class RoundRow(Base):
    """A round of a run; see :class:`common.store.entities.Round`."""

    __tablename__ = "rounds"

    run: Mapped[str] = mapped_column(_of_run(), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    started_at: Mapped[datetime]
    status: Mapped[str] = mapped_column(String(20))
    reason: Mapped[str | None] = mapped_column(Sentence)
    cohort: Mapped[tuple[str, ...]] = mapped_column(Names)
    base_version: Mapped[int]
    bytes_up: Mapped[int]
    bytes_down: Mapped[int]
    seconds: Mapped[float]
    phases: Mapped[Any] = mapped_column(Json, nullable=False)
    error: Mapped[float | None]
    exact: Mapped[bool]
    epsilon: Mapped[float | None]
    committed_at: Mapped[datetime | None]
    state_path: Mapped[str | None] = mapped_column(Document)
    state_sha256: Mapped[str | None] = mapped_column(_DIGEST)

    __table_args__ = (_one_of(RoundStatus),)


class ClientRoundRow(Base):
    """A client in a round; see :class:`common.store.entities.ClientRound`."""

    __tablename__ = "client_rounds"

    run: Mapped[str] = mapped_column(primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    client: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str] = mapped_column(String(20))
    reason: Mapped[str | None] = mapped_column(Sentence)
    rank: Mapped[int | None]
    num_examples: Mapped[int]
    bytes_up: Mapped[int]
    bytes_down: Mapped[int]
    seconds: Mapped[float]
    artefact_path: Mapped[str | None] = mapped_column(Document)
    artefact_sha256: Mapped[str | None] = mapped_column(_DIGEST)
    # SQLAlchemy keeps the attribute name ``metadata`` for itself.
    metadata_: Mapped[Any] = mapped_column("metadata", Json, nullable=False)

    __table_args__ = (_of_round(), _one_of(ClientStatus))


class MetricRow(Base):
    """A number; see :class:`common.store.entities.Metric`."""

    __tablename__ = "metrics"

    run: Mapped[str] = mapped_column(primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(primary_key=True)
    client: Mapped[str] = mapped_column(primary_key=True)
    layer: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[float]

    __table_args__ = (_of_round(), Index(None, "run", "name"))


class StatisticRow(Base):
    """Many small numbers of one round; see :class:`common.store.entities.Statistic`."""

    __tablename__ = "statistics"

    run: Mapped[str] = mapped_column(primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(primary_key=True)
    data: Mapped[Any] = mapped_column(Json, nullable=False)

    __table_args__ = (_of_round(),)


class ClientRow(Base):
    """A client of a run; see :class:`common.store.entities.Client`."""

    __tablename__ = "clients"

    run: Mapped[str] = mapped_column(_of_run(), primary_key=True)
    client: Mapped[str] = mapped_column(primary_key=True)
    rank: Mapped[int | None]
    rank_reason: Mapped[str] = mapped_column(Sentence)
    device: Mapped[str]
    memory_bytes: Mapped[int]
    max_rank: Mapped[int | None]
    joined_at: Mapped[datetime]


class ArtefactRow(Base):
    """A file; see :class:`common.store.entities.Artefact`."""

    __tablename__ = "artefacts"

    run: Mapped[str] = mapped_column(_of_run(), primary_key=True)
    path: Mapped[str] = mapped_column(Document, primary_key=True)
    round: Mapped[int | None]
    kind: Mapped[str]
    sha256: Mapped[str] = mapped_column(_DIGEST)
    nbytes: Mapped[int]

    __table_args__ = (_of_round(),)


class EventRow(Base):
    """Something that happened; see :class:`common.store.entities.Event`."""

    __tablename__ = "events"

    # SQLite counts up by itself only in a column declared INTEGER.
    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    run: Mapped[str] = mapped_column(_of_run())
    round: Mapped[int | None]
    client: Mapped[str | None]
    at: Mapped[datetime]
    kind: Mapped[str]
    text: Mapped[str] = mapped_column(Sentence)
    data: Mapped[Any] = mapped_column(Json, nullable=False)

    # Without sqlite_autoincrement SQLite may give a deleted event's id again, and "after" would miss it.
    __table_args__ = (Index(None, "run", "id"), {"sqlite_autoincrement": True})


def table_of(row: type[Base]) -> Table:
    """Return a row class's table, whose columns go by the entity's field names."""
    return Base.metadata.tables[row.__tablename__]
