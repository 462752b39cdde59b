"""Bringing an older database to this version, with a copy of it beside."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL

from common.errors import StoreError
from common.store import schema
from common.store.artefacts import RUNS
from common.store.backup import back_up, existing
from common.store.database import Database, told_in_one_line
from common.store.engine import connect, parse_url, place_of
from common.store.lock import is_locked
from common.store.packing import Steps


@dataclass(frozen=True)
class Upgrade:
    """What an upgrade did.

    Attributes
    ----------
    place : str
        The database, without a password.
    before, after : str
        Versions of its tables; equal where there was nothing to do.
    backup : Path or None
        Copy of the database as it was; None where nothing was done, and for PostgreSQL.
    """

    place: str
    before: str
    after: str
    backup: Path | None


def upgrade(home: Path, url: str | None = None, steps: Steps = lambda *_: None) -> Upgrade:
    """Bring a database to this code's version in one transaction; a SQLite database is copied first.

    Parameters
    ----------
    home : Path
        Folder of the store.
    url : str, optional
        Of the database, as for :meth:`RunStore.open`.
    steps : callable
        Is told how far the copy is.

    Raises
    ------
    StoreError
        When there is no database of ours, it is newer than this code, or a run of it is being written.
    """
    home = home.absolute()
    address = existing(parse_url(home, url))
    place = place_of(address)
    before, after = _version(address, place), schema.known_versions()[-1]
    if not schema.is_old(before, place):
        return Upgrade(place, before, after, None)
    _check_still(home)
    backup = None
    if address.drivername == "sqlite":
        backup = _free_name(Path(address.database or "").absolute(), before)
        back_up(home, backup, url, steps)
    Database.open(home, url, read_only=False).engine.dispose()
    return Upgrade(place, before, after, backup)


def _version(address: URL, place: str) -> str:
    engine = connect(address, read_only=True)
    try:
        with told_in_one_line(place), engine.connect() as connection:
            found = schema.version_of(connection, place)
    finally:
        engine.dispose()
    if found is None:
        raise StoreError(f"{place} holds no runs yet; there is nothing to upgrade")
    return found


def _check_still(home: Path) -> None:
    """Refuse to change tables under a process of the older version."""
    for folder in sorted((home / RUNS).glob("*/")):
        if is_locked(folder):
            raise StoreError(f"run {folder.name} is being written; let it end, or stop it, before the upgrade")


def _free_name(database: Path, version: str) -> Path:
    """Name a copy of this version that is not there yet: an earlier one is never written over."""
    plain = database.with_name(f"{database.name}.{version}.backup")
    found, number = plain, 1
    while found.exists():
        number += 1
        found = plain.with_name(f"{plain.name}-{number}")
    return found
