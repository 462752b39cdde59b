"""A ledger's files: opened for one decision at a time, verified, and appended to."""

from __future__ import annotations

import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sqlalchemy import URL, Engine, insert
from sqlalchemy.exc import DBAPIError, OperationalError

from client.privacy.ledger.book import Book
from client.privacy.ledger.chain import damaged, verified
from client.privacy.ledger.entry import FIRST, Entry, digest_of
from client.privacy.ledger.lock import alone
from client.privacy.ledger.mark import Mark, mark_of, read_mark, write_mark
from client.privacy.ledger.table import EntryRow, make_table
from common.errors import LedgerError
from common.store.artefacts import sync_folder
from common.store.engine import connect

KEPT = 256
"""Ledgers whose sums stay in memory between two decisions."""

Signature = tuple[tuple[int, int, int] | None, ...]
_verified: OrderedDict[Path, tuple[Signature, Book]] = OrderedDict()


@dataclass(eq=False)
class Ledger:
    """A ledger that nobody else can write now.

    Parameters
    ----------
    path : Path
        Its database.
    book : Book
        What is in it.
    """

    path: Path
    book: Book
    _engine: Engine
    _clock: Callable[[], float]
    _whole: bool = True

    def append(self, *drafts: Entry) -> list[Entry]:
        """Add entries, all or none; on the disk when this returns.

        Parameters
        ----------
        *drafts : Entry
            Without sequence, moment and hashes.
        """
        entries = self._bound(drafts)
        self._whole = False  # until memory says what the disk says
        with self._engine.execution_options(writes=True).begin() as connection:
            connection.execute(insert(EntryRow), [asdict(entry) for entry in entries])
        write_mark(self.path, Mark(entries=entries[-1].sequence, digest=entries[-1].digest))
        for entry in entries:
            self.book.add(entry)
        self._whole = True
        return entries

    def _bound(self, drafts: Sequence[Entry]) -> list[Entry]:
        """Bind each entry to the one before; their times never go back, whatever the clock does."""
        last, found = self.book.last, []
        now = int(self._clock() * 1_000_000)
        for draft in drafts:
            sequence, previous, then = (last.sequence, last.digest, last.moment) if last else (0, FIRST, 0)
            last = replace(draft, sequence=sequence + 1, previous=previous, moment=max(now, then))
            last = replace(last, digest=digest_of(last))
            found.append(last)
        return found


@contextmanager
def open_ledger(path: Path, clock: Callable[[], float] = time.time) -> Iterator[Ledger]:
    """Open a ledger for writing, made where it is missing.

    Raises
    ------
    LedgerError
        If another process writes it, it is damaged, or it cannot be read or written.
    """
    path = path.absolute()
    with told_in_one_line(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with alone(path):
            yield from _opened(path, clock)


def _opened(path: Path, clock: Callable[[], float]) -> Iterator[Ledger]:
    known = _verified.pop(path, None)
    unchanged = known is not None and known[0] == _signature(path)
    ledger = None
    engine = connect(URL.create("sqlite", database=str(path)), read_only=False)
    try:
        book = known[1] if known and unchanged else _whole_book(path, engine)
        ledger = Ledger(path, book, engine, clock)
        yield ledger
    finally:
        engine.dispose()
        if ledger is not None and ledger._whole:
            _remember(path, ledger.book)


def read_ledger(path: Path) -> Book:
    """Read a ledger while others may write it; its entries and its mark stay as they are.

    Raises
    ------
    LedgerError
        If it is damaged or cannot be read.
    """
    with told_in_one_line(path):
        mark = read_mark(path)  # first: the database only grows
        if not path.exists():
            _check_never_filled(path, mark)
            return Book()
        try:
            return _read_book(path, mark, read_only=True)
        except OperationalError:  # a writer was killed: SQLite undoes what it left, but not while it only reads
            with alone(path):
                return _read_book(path, mark, read_only=False)


def _read_book(path: Path, mark: Mark | None, read_only: bool) -> Book:
    engine = connect(URL.create("sqlite", database=str(path)), read_only=read_only)
    try:
        with engine.connect() as connection:
            return Book.of(verified(connection, mark, path))
    finally:
        engine.dispose()


def _whole_book(path: Path, engine: Engine) -> Book:
    """Verify everything, and bring the mark up to a commit after which its writer was killed."""
    mark = read_mark(path)
    if not path.exists():
        _check_never_filled(path, mark)
        write_mark(path, Mark())  # before the file: a ledger without a mark has lost it
        path.touch(mode=0o600)
        mark = Mark()
    with engine.execution_options(writes=True).begin() as connection:
        entries = verified(connection, mark, path)
        make_table(connection)
    sync_folder(path.parent)
    found = Mark(entries=len(entries), digest=entries[-1].digest) if entries else Mark()
    if mark != found:
        write_mark(path, found)
    return Book.of(entries)


def _check_never_filled(path: Path, mark: Mark | None) -> None:
    """Refuse to begin anew where a ledger was lost."""
    if mark is not None and mark.entries:
        raise damaged(path, f"the file is gone, {mark.entries} entries must be there")


def _signature(path: Path) -> Signature:
    """Tell whether a ledger's files are as they were left; the one who changes them on purpose is the owner."""
    return tuple(_stamp(file) for file in (path, path.with_name(f"{path.name}-wal"), mark_of(path)))


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _remember(path: Path, book: Book) -> None:
    _verified[path] = _signature(path), book
    while len(_verified) > KEPT:
        _verified.popitem(last=False)


@contextmanager
def told_in_one_line(path: Path) -> Iterator[None]:
    """Turn the system's and the database's errors into one sentence.

    Raises
    ------
    LedgerError
        Naming the ledger.
    """
    try:
        yield
    except (DBAPIError, sqlite3.Error, OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else getattr(error, "orig", error)
        told = " ".join(str(reason or error).split())[:200]
        raise LedgerError(
            f"the privacy ledger {path} cannot be used ({told}); check its rights and the disk, or restore a copy"
        ) from error
