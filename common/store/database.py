"""One opened database: its transactions, and its failures told in one line."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sqlalchemy import URL, Connection, Engine
from sqlalchemy.exc import DBAPIError

from common.errors import StoreError
from common.store import schema
from common.store.artefacts import RUNS, make_folder, sync_folder
from common.store.engine import DATABASE_FILE, URL_VARIABLE, connect, parse_url, place_of

# What a part of the driver's message means for the user, most special first.
_ADVICE = (
    ("not a database", "it is damaged or something else: restore a backup or choose another --home"),
    ("malformed", "it is damaged: restore a backup or choose another --home"),
    ("is full", "free some space, then try again"),
    ("no space left", "free some space, then try again"),
    ("disk i/o error", "check the disk and its free space, then try again"),
    ("readonly", "it may only be read: check its rights or choose another --home"),
    ("read-only", "it may only be read: check its rights or choose another account"),
    ("unable to open", "check the folder's rights or choose another --home"),
    ("locked", "another process has kept it busy too long: try again"),
    ("password", f"check user and password in {URL_VARIABLE}"),
    ("does not exist", f"create it, or check {URL_VARIABLE}"),
    ("connection", f"check that the server runs and what {URL_VARIABLE} says"),
)


@dataclass(frozen=True)
class Database:
    """A database of this code's version.

    Attributes
    ----------
    place : str
        Its name in messages, without a password.
    """

    engine: Engine
    place: str
    read_only: bool

    @classmethod
    def open(cls, home: Path, url: str | None, read_only: bool) -> Self:
        """Open the database of a home folder; for writing, both are made where they are missing.

        Raises
        ------
        StoreError
            When the folder or the database cannot be used.
        """
        address = parse_url(home, url)
        place = place_of(address)
        _check_not_lost(home, address)
        if not read_only:
            make_folder(home / RUNS)
        elif address.drivername == "sqlite" and not Path(address.database or "").exists():
            raise StoreError(f"{place} does not exist; simulate an experiment first, or choose another --home")
        engine = connect(address, read_only)
        try:
            with told_in_one_line(place):
                made = not read_only and schema.open_for_writing(engine, place)
                if read_only:
                    schema.open_for_reading(engine, place)
        except BaseException:
            engine.dispose()
            raise
        if made:
            sync_folder(home)
        return cls(engine, place, read_only)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Hold a transaction that only reads; rows that cannot be understood mean a damaged database.

        All its queries see the database as it was at the first of them.
        """
        # SQLite does so by itself, PostgreSQL when it is told.
        level = {} if self.engine.dialect.name == "sqlite" else {"isolation_level": "REPEATABLE READ"}
        try:
            with told_in_one_line(self.place), self.engine.execution_options(**level).connect() as connection:
                yield connection
        except (ValueError, TypeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise StoreError(f"{self.place} holds a damaged row ({reason}); restore a backup") from error

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Hold a transaction that is committed at the end, or undone by an error."""
        if self.read_only:
            raise StoreError(f"{self.place} was opened for reading only; open it for writing")
        engine = self.engine.execution_options(writes=True)
        with told_in_one_line(self.place), engine.begin() as connection:
            yield connection


def _check_not_lost(home: Path, address: URL) -> None:
    """Refuse to begin an empty database beside runs that another one knew."""
    if address.drivername != "sqlite" or Path(address.database or "") != home / DATABASE_FILE:
        return
    file = home / DATABASE_FILE
    known = sorted(folder.name for folder in (home / RUNS).glob("*/rounds"))
    if known and (not file.exists() or file.stat().st_size == 0):
        raise StoreError(f"{file} is lost, but {home / RUNS} still holds runs; restore it, or choose another --home")


@contextmanager
def told_in_one_line(place: str) -> Iterator[None]:
    """Turn the driver's errors into a StoreError that says what to do.

    Raises
    ------
    StoreError
        For whatever the database refuses.
    """
    try:
        yield
    except (DBAPIError, sqlite3.Error) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        message = " ".join(str(cause).split())[:300]
        advice = next((advice for part, advice in _ADVICE if part in message.lower()), "see its own log")
        raise StoreError(f"{place} failed ({message}); {advice}") from error
