"""Where the database is, and an engine for it: SQLite in a file, or PostgreSQL."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, NullPool, QueuePool, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError

from common.errors import StoreError

DATABASE_FILE = "lorafleet.db"
WAL_TRIES, WAL_WAIT_S = 100, 0.05
URL_VARIABLE = "LORAFLEET_DATABASE_URL"
BUSY_TIMEOUT_S = 30
CONNECT_TIMEOUT_S = 5
_EXPECTED = f"{URL_VARIABLE} must be like postgresql://user:password@host:5432/name or sqlite:///file.db"


def parse_url(home: Path, url: str | None) -> URL:
    """Return the database's address: the argument, else the environment's, else a file in the home.

    Raises
    ------
    StoreError
        When it is neither SQLite with a file nor PostgreSQL.
    """
    given = url or os.environ.get(URL_VARIABLE)
    if not given:
        return URL.create("sqlite", database=str(home / DATABASE_FILE))
    try:
        parsed = make_url(given)
    except (ArgumentError, ValueError) as error:
        raise StoreError(f"the database URL cannot be read; {_EXPECTED}") from error
    kind = parsed.drivername.partition("+")[0]
    if kind == "sqlite" and parsed.database not in (None, "", ":memory:"):
        return parsed.set(drivername="sqlite")
    if kind in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    raise StoreError(f"the database URL {_shown(parsed)} is of no kind known here; {_EXPECTED}")


def connect(url: URL, read_only: bool) -> Engine:
    """Make the engine; nothing is opened yet.

    Write transactions run under ``engine.execution_options(writes=True)``.

    Raises
    ------
    StoreError
        When PostgreSQL is asked for and its driver is not installed.
    """
    if url.drivername == "sqlite":
        return _sqlite_engine(url, read_only)
    try:
        engine = create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": CONNECT_TIMEOUT_S})
    except ImportError as error:
        raise StoreError("the driver of PostgreSQL is missing; pip install 'lorafleet[postgresql]'") from error
    return engine.execution_options(postgresql_readonly=True) if read_only else engine


def _sqlite_engine(url: URL, read_only: bool) -> Engine:
    path = Path(url.database or "").absolute()
    if read_only:
        return _with_begin(create_engine(url, poolclass=NullPool, creator=_sqlite_reader(path)))
    return _with_begin(create_engine(url, poolclass=QueuePool, creator=_sqlite_writer(path)))


def _sqlite_writer(path: Path) -> Callable[[], sqlite3.Connection]:
    def create() -> sqlite3.Connection:
        connection = _sqlite_connection(f"file:{quote(str(path))}?mode=rwc")
        _write_ahead(connection)
        # FULL: a committed round survives a power cut, not only a kill.
        connection.executescript("PRAGMA synchronous=FULL; PRAGMA foreign_keys=ON;")
        return connection

    return create


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Switch to write-ahead logging; SQLite does not wait by itself when two processes do so at once."""
    for _ in range(WAL_TRIES):
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            time.sleep(WAL_WAIT_S)
        else:
            return
    connection.execute("PRAGMA journal_mode=WAL")


def _sqlite_reader(path: Path) -> Callable[[], sqlite3.Connection]:
    log = path.with_name(path.name + "-wal")

    def create() -> sqlite3.Connection:
        # Where the folder cannot be written and no writer is about, SQLite must be told not to want its
        # shared-memory file. Asked anew for each connection, since a writer may come.
        still = not os.access(path.parent, os.W_OK) and not log.exists()
        return _sqlite_connection(f"file:{quote(str(path))}?mode=ro" + ("&immutable=1" if still else ""))

    return create


def _sqlite_connection(address: str) -> sqlite3.Connection:
    # isolation_level=None: BEGIN is ours alone, else tables would be made outside the transaction.
    return sqlite3.connect(address, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)


def _with_begin(engine: Engine) -> Engine:
    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer takes its place at once: a reader that turns writer could find the database changed.
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def place_of(url: URL) -> str:
    """Name the database for a message, without its password."""
    return f"the database {url.database if url.drivername == 'sqlite' else _shown(url)}"


def _shown(url: URL) -> str:
    """Write a URL without its password, which the query may hold as well."""
    return url.set(query={key: value for key, value in url.query.items() if key == "host"}).render_as_string()
