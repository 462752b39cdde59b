"""The version of the tables: made, checked and upgraded when a store is opened.

Versions are the numbers that the files of ``migrations/versions`` begin with, one after the other. To add
one, change ``models.py`` and write the next file by hand, or have alembic draft it::

    from alembic import command
    from common.store import schema
    command.revision(schema.alembic_config(connection), "what it does", autogenerate=True, rev_id="0002")
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine, inspect, text

from common.errors import OutdatedStore, StoreError

if TYPE_CHECKING:
    from alembic.config import Config

MIGRATIONS = Path(__file__).with_name("migrations")
_UPGRADE_KEY = 0x10_7A_F1_EE7


def known_versions() -> list[str]:
    """Return the versions this code knows, oldest first."""
    return _versions_in(MIGRATIONS / "versions")


@cache
def _versions_in(folder: Path) -> list[str]:
    return sorted(file.name.partition("_")[0] for file in folder.glob("[0-9]*_*.py"))


def open_for_reading(engine: Engine, place: str) -> None:
    """Check that the tables are those this code knows.

    Raises
    ------
    StoreError
        When they are missing, older, newer or something else.
    """
    with engine.connect() as connection:
        found = version_of(connection, place)
    if found is None:
        raise StoreError(f"{place} holds no runs yet; simulate an experiment first")
    if is_old(found, place):
        raise OutdatedStore(f"{place} is of the older version {found}; run `lorafleet database upgrade`")


def open_for_writing(engine: Engine, place: str) -> bool:
    """Make the tables, or bring them to this code's version, in one transaction; tell if that was needed.

    Raises
    ------
    StoreError
        When they are newer than this code or something else.
    """
    with engine.connect() as connection:
        found = version_of(connection, place)
    if found is not None and not is_old(found, place):
        return False
    with engine.execution_options(writes=True).connect() as connection:
        _upgrade(connection, place)
    return True


def version_of(connection: Connection, place: str) -> str | None:
    """Read the version of the tables; None where there are none yet.

    Raises
    ------
    StoreError
        When they are something else than ours.
    """
    tables = inspect(connection).get_table_names()
    if not tables:
        return None
    if "alembic_version" in tables and "runs" in tables:
        found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
        if found is not None:
            return str(found)
    raise StoreError(f"{place} holds tables that are not LoRAFleet's; choose another database or --home")


def is_old(found: str, place: str) -> bool:
    """Tell whether a version is older than this code's.

    Raises
    ------
    StoreError
        When it is newer.
    """
    known = known_versions()
    if found not in known:
        raise StoreError(f"{place} is of the newer version {found}, this code knows {known[-1]}; update LoRAFleet")
    return found != known[-1]


def alembic_config(connection: Connection) -> Config:
    """Return alembic's settings for work on an open connection."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _upgrade(connection: Connection, place: str) -> None:
    from alembic import command

    sqlite = connection.dialect.name == "sqlite"
    if sqlite:
        _foreign_keys(connection, on=False)
    with connection.begin():
        if not sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _UPGRADE_KEY})
        # Another process may have done it while this one waited for its turn.
        found = version_of(connection, place)
        if found is None or is_old(found, place):
            command.upgrade(alembic_config(connection), "head")
    if sqlite:
        _foreign_keys(connection, on=True)


def _foreign_keys(connection: Connection, on: bool) -> None:
    # Alembic changes a SQLite table by copying and dropping it, which with foreign keys on would delete
    # all rows that refer to it. SQLite ignores this setting inside a transaction.
    driver = connection.connection.driver_connection
    if driver is not None:
        driver.execute(f"PRAGMA foreign_keys={'ON' if on else 'OFF'}")
