"""A packed run that anybody may have made, as a run of this home.

Files come first, then all rows in one transaction: a kill in between leaves a folder without a row, which adding the
same run again completes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from common.errors import StoreError
from common.store import reading, schema, writing
from common.store.arriving_rows import ArrivingRows
from common.store.artefacts import LOCK_FILE, run_folder, write_artefact
from common.store.database import Database
from common.store.entities import Event, Run
from common.store.lock import RunLock
from common.store.packed_file import Packed, PackedArtefact, Unfit, file_name, open_packed
from common.store.packing import Steps, counted_steps
from common.store.rows import TABLES, insert_rows


@dataclass(frozen=True)
class AddedRun:
    """What came out of a packed run.

    Attributes
    ----------
    run : Run
        The run as it is here.
    was : str
        Its id where it was packed.
    files, nbytes : int
        Number and size of its artefacts.
    left_out : tuple of str
        Clients' replies its rows named that are not here.
    """

    run: Run
    was: str
    files: int
    nbytes: int
    left_out: tuple[str, ...]


def add_run(
    home: Path, path: Path, url: str | None = None, new_id: str | None = None, steps: Steps = lambda *_: None
) -> AddedRun:
    """Add a packed run to a store; nothing of it is trusted.

    Parameters
    ----------
    home : Path
        Folder of the store.
    path : Path
        What ``pack_run`` has written.
    url : str, optional
        Of the database, as for :meth:`RunStore.open`.
    new_id : str, optional
        Id of the run here; the one it had unless given.
    steps : callable
        Is told how far it has come.

    Raises
    ------
    StoreError
        When the file is not a whole packed run, its id is taken here, or the store cannot be written.
    """
    home = home.absolute()
    try:
        with open_packed(path) as packed:
            run_id = packed.manifest.run if new_id is None else new_id
            folder = run_folder(home, run_id)
            _check_tables(packed)
            database = Database.open(home, url, read_only=False)
            try:
                return _add(database, packed, folder, steps)
            finally:
                database.engine.dispose()
    except Unfit as error:
        raise StoreError(f"{path} is not used: {error}") from error


def _add(database: Database, packed: Packed, folder: Path, steps: Steps) -> AddedRun:
    files, run_id = packed.manifest.files, folder.name
    nbytes = sum(file.nbytes for file in files.values())
    with database.reading() as connection:
        if reading.has_run(connection, run_id):
            raise StoreError(f"there is already a run {run_id}; give this one another id with --as")
    with _claimed(folder, files) as there:
        _check_space(folder, sum(file.nbytes for path, file in files.items() if path not in there))
        moved = counted_steps(steps, nbytes)
        for path, file in files.items():
            if path in there:
                moved(file.nbytes)
            else:
                write_artefact(folder, path, partial(_unpack, packed, path, file, moved))
        arriving = ArrivingRows(packed, run_id)
        with database.writing() as connection:
            run = _insert(connection, arriving)
    return AddedRun(run, packed.manifest.run, len(files), nbytes, tuple(sorted(arriving.left_out)))


def _insert(connection: Connection, arriving: ArrivingRows) -> Run:
    manifest, run_id = arriving.packed.manifest, arriving.run_id
    try:
        for table in TABLES:
            insert_rows(connection, table, arriving.of(table))
    except IntegrityError as error:
        raise Unfit("its rows contradict one another: some are there twice, or of rounds it does not have") from error
    if unnamed := sorted(manifest.files.keys() - arriving.named):
        raise Unfit(f"no row names its file {unnamed[0][:100]!r}")
    if not reading.has_run(connection, run_id):
        raise Unfit("it holds no run")
    words = [f"it was {manifest.run} there"] if run_id != manifest.run else []
    words += ["it was running then, or had been killed"] if arriving.status == "running" else []
    if words:
        text = f"added from a packed file; {', and '.join(words)}"
        writing.put_event(connection, Event(run_id, "run_added", text, datetime.now(UTC)))
    return reading.find_run(connection, run_id)


def _unpack(packed: Packed, path: str, declared: PackedArtefact, moved: Callable[[int], None], place: Path) -> None:
    digest = hashlib.sha256()
    with place.open("wb") as target:
        for chunk in packed.chunks(file_name(path)):
            target.write(chunk)
            digest.update(chunk)
            moved(len(chunk))
    if digest.hexdigest() != declared.sha256:
        raise Unfit(f"{path[:100]!r} does not have the sha256 it was packed with; get the file anew")


@contextmanager
def _claimed(folder: Path, files: Mapping[str, PackedArtefact]) -> Iterator[set[str]]:
    """Hold the run's folder for writing and tell which files an earlier try left; a failure leaves it as it was."""
    made = not folder.exists()
    with RunLock(folder):
        try:
            yield _left(folder, files)
        except BaseException:
            if made:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _left(folder: Path, files: Mapping[str, PackedArtefact]) -> set[str]:
    """List the files that are there already, all of which must be this run's."""
    found = set()
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            inside = path.relative_to(folder).as_posix()
            if inside == LOCK_FILE:
                continue
            if inside not in files or _digest(path) != files[inside].sha256:
                raise StoreError(
                    f"{folder} has no run in the database but holds {inside!r} of another one; move the folder away, "
                    "or give this run another id with --as"
                )
            found.add(inside)
    return found


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StoreError(f"cannot read {path} ({error.strerror or error}); move its folder away") from error


def _check_tables(packed: Packed) -> None:
    manifest = packed.manifest
    if manifest.tables_version not in schema.known_versions():
        known = schema.known_versions()[-1]
        raise Unfit(f"it is of the newer version {manifest.tables_version[:20]!r}, not {known}; update LoRAFleet")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StoreError(f"the run's files take {needed:,} bytes, {folder} has room for {free:,}; free some space")
