"""Whether a ledger is whole: every entry as it was written, none missing, none from another copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from sqlalchemy import Connection, func, select
from sqlalchemy.exc import DBAPIError

from client.privacy.ledger.entry import FIRST, Entry, digest_of
from client.privacy.ledger.mark import Mark
from client.privacy.ledger.table import EntryRow, all_rows, has_table
from common.errors import LedgerError

ADVICE = "restore the newest copy of the ledger and its mark; until then nothing is trained on its data"


def verified(connection: Connection, mark: Mark | None, ledger: Path) -> list[Entry]:
    """Read all entries.

    Parameters
    ----------
    connection : Connection
        To the ledger's database.
    mark : Mark or None
        Read before the database was; None if there is no such file.
    ledger : Path
        Named in errors.

    Raises
    ------
    LedgerError
        Naming the entry that is missing, was changed, or is from another copy.
    """
    if not has_table(connection):
        if mark is not None and mark.entries:
            raise damaged(ledger, f"its entries are gone, {mark.entries} must be there")
        return []
    count = connection.execute(select(func.count()).select_from(EntryRow)).scalar_one()
    entries = list(_followed(_read(connection, count, ledger), count, ledger))
    _check_mark(entries, mark, ledger)
    return entries


def damaged(ledger: Path, what: str) -> LedgerError:
    """Say in one line what is wrong with a ledger."""
    return LedgerError(f"the privacy ledger {ledger} is damaged: {what}; {ADVICE}")


def _read(connection: Connection, count: int, ledger: Path) -> list[Entry]:
    found: list[Entry] = []
    try:
        for row in connection.execute(all_rows()):
            found.append(Entry(**row._mapping))
    except (DBAPIError, UnicodeError) as error:
        raise damaged(ledger, f"entry {len(found) + 1} of {count} cannot be read") from error
    return found


def _followed(entries: Iterable[Entry], count: int, ledger: Path) -> Iterator[Entry]:
    """Check that every entry is itself, and follows the one before."""
    previous = FIRST
    for number, entry in enumerate(entries, 1):
        if entry.sequence != number:
            raise damaged(ledger, f"entry {number} is missing")
        if digest_of(entry) != entry.digest:
            raise damaged(ledger, f"entry {number} of {count} was changed")
        if entry.previous != previous:
            raise damaged(ledger, f"entry {number} of {count} does not follow the one before: either was changed")
        previous = entry.digest
        yield entry


def _check_mark(entries: list[Entry], mark: Mark | None, ledger: Path) -> None:
    """Check that everything is there which was; the mark may be one write behind, after a crash."""
    if mark is None:
        if entries:
            raise damaged(ledger, f"its mark is missing, so nobody can tell whether all of {len(entries)} are there")
        return
    if missing := max(0, mark.entries - len(entries)):
        told = "1 entry is" if missing == 1 else f"{missing} entries are"
        raise damaged(ledger, f"{told} missing at the end, it is an old copy or was cut")
    if mark.entries and entries[mark.entries - 1].digest != mark.digest:
        raise damaged(ledger, f"entry {mark.entries} is not the one its mark was made for, they are of two copies")
