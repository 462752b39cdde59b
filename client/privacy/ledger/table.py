"""The ledger's one table; the database itself refuses to change or remove what is in it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Integer, inspect, select, text, type_coerce
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.sql.selectable import Select
from sqlalchemy.types import NullType


class Base(DeclarativeBase):
    """Root of the table."""


class EntryRow(Base):
    """An entry; see :class:`client.privacy.ledger.entry.Entry`."""

    __tablename__ = "entries"

    sequence: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    moment: Mapped[int]
    kind: Mapped[str]
    client: Mapped[str]
    run: Mapped[str]
    round: Mapped[int]
    attempt: Mapped[int]
    label: Mapped[str]
    fingerprint: Mapped[str]
    noise_multiplier: Mapped[float]
    sample_rate: Mapped[float]
    clipping_norm: Mapped[float]
    steps: Mapped[int]
    rounds: Mapped[int]
    delta: Mapped[float]
    epsilon: Mapped[float]
    accountant: Mapped[str]
    budget_epsilon: Mapped[float | None]
    budget_delta: Mapped[float | None]
    spent: Mapped[float]
    test_seed: Mapped[int | None]
    settles: Mapped[int | None]
    curve: Mapped[bytes]
    previous: Mapped[str]
    digest: Mapped[str]


_REFUSED = "entries of a privacy ledger stay as they are"


def make_table(connection: Connection) -> None:
    """Make the table and what guards it, where they are missing."""
    Base.metadata.create_all(connection)
    for verb in ("UPDATE", "DELETE"):
        guard = f"CREATE TRIGGER IF NOT EXISTS no_{verb.lower()} BEFORE {verb} ON entries"
        connection.execute(text(f"{guard} BEGIN SELECT RAISE(ABORT, '{_REFUSED}'); END"))


def has_table(connection: Connection) -> bool:
    """Tell whether there is a table of entries."""
    return inspect(connection).has_table(EntryRow.__tablename__)


def all_rows() -> Select[*tuple[Any, ...]]:
    """Select every entry in order, values as they lie in the file, so that nothing is mended on the way."""
    columns = (type_coerce(column, NullType()).label(column.name) for column in EntryRow.__table__.columns)
    return select(*columns).order_by(EntryRow.sequence)
