"""A copy of the database as it is at one moment, while others write it; artefacts are files beside it and stay there.

SQLite is copied page by page inside one read transaction, PostgreSQL row by row into a SQLite file.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL, Connection, create_engine, func, select

from common.errors import StoreError
from common.store import schema
from common.store.database import Database, told_in_one_line
from common.store.engine import connect, parse_url, place_of
from common.store.models import RunRow
from common.store.new_file import new_file
from common.store.packing import Steps
from common.store.rows import TABLES, insert_rows, read_rows

PAGES = 2_048
"""Copied at a time, between two words on how far it is."""


@dataclass(frozen=True)
class Backup:
    """A copy of a database.

    Attributes
    ----------
    place : str
        The database, without a password.
    version : str
        Version of its tables.
    runs : int
        Number of runs in the copy.
    nbytes : int
        Size of the copy.
    """

    place: str
    version: str
    runs: int
    nbytes: int


def back_up(home: Path, out: Path, url: str | None = None, steps: Steps = lambda *_: None) -> Backup:
    """Copy the database into a new SQLite file, checked and on the disk when this returns.

    A SQLite database of any known version is copied as it is; one of PostgreSQL must be of this version.

    Parameters
    ----------
    home : Path
        Folder of the store.
    out : Path
        The copy; a SQLite file, readable by its owner alone.
    url : str, optional
        Of the database, as for :meth:`RunStore.open`.
    steps : callable
        Is told how many pages, or tables, are done, and of how many.

    Raises
    ------
    StoreError
        When there is no such database, it is damaged, or the copy cannot be written.
    """
    address = parse_url(home.absolute(), url)
    place = place_of(address)
    with new_file(out) as unfinished:
        if address.drivername == "sqlite":
            version = _copy_pages(address, place, unfinished, steps)
        else:
            version = _copy_rows(home.absolute(), url, unfinished, steps)
        runs = _checked(unfinished, place)
    return Backup(place, version, runs, out.stat().st_size)


def existing(address: URL) -> URL:
    """Return the address of a database that is there; only of a SQLite file can that be told beforehand.

    Raises
    ------
    StoreError
        When there is no such file.
    """
    if address.drivername == "sqlite" and not Path(address.database or "").is_file():
        raise StoreError(f"{place_of(address)} does not exist; name its --home or --database-url")
    return address


def _copy_pages(address: URL, place: str, unfinished: Path, steps: Steps) -> str:
    engine = connect(existing(address), read_only=True)
    try:
        with told_in_one_line(place), engine.connect() as connection:
            version = schema.version_of(connection, place)
            if version is None:
                raise StoreError(f"{place} holds no runs yet; there is nothing to keep")
            # The transaction begun above goes on: what others commit meanwhile is not seen, and copying never restarts.
            source = connection.connection.driver_connection
            assert isinstance(source, sqlite3.Connection)
            with told_in_one_line(f"the copy of {place}"), closing(sqlite3.connect(unfinished)) as copy:
                source.backup(copy, pages=PAGES, progress=lambda _, left, total: steps(total - left, total))
                copy.execute("PRAGMA journal_mode=DELETE")  # one file that needs none beside it
    finally:
        engine.dispose()
    return version


def _copy_rows(home: Path, url: str | None, unfinished: Path, steps: Steps) -> str:
    database = Database.open(home, url, read_only=True)
    copy = create_engine(URL.create("sqlite", database=str(unfinished)))
    try:
        with database.reading() as connection:
            schema.open_for_writing(copy, f"the copy {unfinished}")
            with told_in_one_line(f"the copy {unfinished}"), copy.begin() as target:
                for done, table in enumerate(TABLES, 1):
                    insert_rows(target, table, read_rows(connection, table))
                    steps(done, len(TABLES))
    finally:
        copy.dispose()
        database.engine.dispose()
    return schema.known_versions()[-1]


def _checked(copy: Path, place: str) -> int:
    """Check a copy in all its pages and references, and count its runs."""
    engine = connect(URL.create("sqlite", database=str(copy)), read_only=True)
    try:
        with told_in_one_line(place), engine.connect() as connection:
            if fault := _fault(connection):
                raise StoreError(f"{place} is damaged ({fault}): nothing was copied; go back to an earlier backup")
            return connection.execute(select(func.count()).select_from(RunRow)).scalar_one()
    finally:
        engine.dispose()


def _fault(connection: Connection) -> str:
    found = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar()
    if found != "ok":
        return " ".join(str(found).split())[:200]
    loose = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
    return f"rows of {loose[0]} refer to others that are gone" if loose else ""
