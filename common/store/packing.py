"""A run in one file: its rows and its artefacts, for another home or for keeping."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

from sqlalchemy import Connection, Table

from common.errors import CorruptArtefact, StoreError
from common.store import reading, schema
from common.store.artefacts import RUNS, checked_path, run_folder
from common.store.database import Database
from common.store.entities import Run
from common.store.new_file import new_file
from common.store.packed_file import (
    CHUNK,
    FORMAT,
    MANIFEST,
    PRIVATE,
    VERSION,
    Manifest,
    PackedArtefact,
    PackedTable,
    Unfit,
    check_entries,
    file_name,
    rows_name,
)
from common.store.packed_rows import encode
from common.store.rows import TABLES, Values, read_rows

_LONG_AGO = (1980, 1, 1, 0, 0, 0)
"""Date of all entries, the first a zip can have: equal runs make equal files."""

Steps = Callable[[int, int], None]
"""Is told how many bytes are done, and of how many."""


@dataclass(frozen=True)
class PackedRun:
    """What went into a packed run.

    Attributes
    ----------
    run : Run
        The run as it stood.
    rows : mapping
        Number of rows by table.
    files, nbytes : int
        Number of artefacts, and size of the whole file.
    replies : int
        How many of the artefacts are clients' own replies.
    left_out : tuple of str
        Artefacts that are not in it.
    private : bool
        Whether the run's folder holds what clients keep to themselves, which is never packed.
    """

    run: Run
    rows: Mapping[str, int]
    files: int
    nbytes: int
    replies: int
    left_out: tuple[str, ...]
    private: bool


@dataclass
class _Named:
    """A file that rows name; ``reply``: of one client; ``spare``: it may be gone, its client is asked again."""

    sha256: str | None
    reply: bool = False
    spare: bool = False


@dataclass
class _Written:
    """What of a run is in the file so far."""

    tables: dict[str, PackedTable] = field(default_factory=dict)
    files: dict[str, PackedArtefact] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def pack_run(
    home: Path, name: str, out: Path, url: str | None = None, replies: bool = True, steps: Steps = lambda *_: None
) -> PackedRun:
    """Write a run with its artefacts into one new file; a run that goes on is packed as it stands.

    Parameters
    ----------
    home : Path
        Folder of the store.
    name : str
        Id of the run, its beginning, or ``last``.
    out : Path
        The file.
    url : str, optional
        Of the database, as for :meth:`RunStore.open`.
    replies : bool
        Also pack the clients' own replies, where the run has kept them.
    steps : callable
        Is told how far it has come.

    Raises
    ------
    UnknownNameError
        When there is no such run.
    CorruptArtefact
        When an artefact is not what was committed.
    StoreError
        When the file exists, cannot be written, or would be too large.
    """
    database = Database.open(home.absolute(), url, read_only=True)
    try:
        with new_file(out) as unfinished, ZipFile(unfinished, "w") as archive:
            with database.reading() as connection:
                run = reading.find_run(connection, name)
                folder, named, written = run_folder(home.absolute(), run.id), dict[str, _Named](), _Written()
                for table in TABLES:
                    written.tables[table.name] = _pack_table(connection, archive, table, run.id, named)
            _pack_files(archive, folder, named, replies, written, steps)
            _finish(archive, run.id, written)
        kept = sum(named[path].reply for path in written.files)
    except Unfit as error:
        raise StoreError(f"run {run.id} cannot be packed: {error}") from error
    finally:
        database.engine.dispose()
    rows = {table: packed.rows for table, packed in written.tables.items()}
    private = any((folder / PRIVATE).glob("*/memory"))
    return PackedRun(run, rows, len(written.files), out.stat().st_size, kept, tuple(written.left_out), private)


def _pack_table(
    connection: Connection, archive: ZipFile, table: Table, run_id: str, named: dict[str, _Named]
) -> PackedTable:
    rows, nbytes, digest = 0, 0, hashlib.sha256()
    with _entry(archive, rows_name(table.name), ZIP_DEFLATED) as entry:
        for row in read_rows(connection, table, run_id):
            line = encode(table, row)
            entry.write(line)
            digest.update(line)
            rows, nbytes = rows + 1, nbytes + len(line)
            _note_files(run_id, row, named)
    return PackedTable(rows=rows, nbytes=nbytes, sha256=digest.hexdigest())


def _note_files(run_id: str, row: Values, named: dict[str, _Named]) -> None:
    """Remember the file a row names, if it names one."""
    for prefix in ("adapter_", "state_", "artefact_", ""):
        if path := row.get(f"{prefix}path"):
            inside = checked_path(run_id, path).removeprefix(f"{RUNS}/{run_id}/")
            file = named.setdefault(inside, _Named(row[f"{prefix}sha256"]))
            if prefix == "artefact_":
                file.reply, file.spare = True, row["status"] == "received"


def _pack_files(
    archive: ZipFile, folder: Path, named: Mapping[str, _Named], replies: bool, written: _Written, steps: Steps
) -> None:
    wanted = {path: file for path, file in named.items() if replies or not file.reply}
    written.left_out += sorted(named.keys() - wanted.keys())
    moved = counted_steps(steps, sum(_size(folder / path) for path in wanted))
    for path, file in wanted.items():
        try:
            written.files[path] = _pack_file(archive, folder, path, file.sha256, moved)
        except CorruptArtefact as error:
            if file.spare:
                written.left_out.append(path)
                continue
            advice = "; or leave clients' replies out with --without-replies" if file.reply else ""
            raise CorruptArtefact(f"{error}{advice}") from error


def _pack_file(
    archive: ZipFile, folder: Path, path: str, sha256: str | None, moved: Callable[[int], None]
) -> PackedArtefact:
    # Opened once: a file that is written anew meanwhile does not change under its hash.
    with _whole(folder / path, sha256) as (source, found), _entry(archive, file_name(path), ZIP_STORED) as entry:
        nbytes = 0
        while chunk := source.read(CHUNK):
            entry.write(chunk)
            nbytes += len(chunk)
            moved(len(chunk))
    return PackedArtefact(sha256=found, nbytes=nbytes)


@contextmanager
def _whole(path: Path, sha256: str | None) -> Iterator[tuple[IO[bytes], str]]:
    """Open an artefact that is what was committed, and give its hash."""
    with ExitStack() as opened:
        try:
            source = opened.enter_context(path.open("rb"))
            found = hashlib.file_digest(source, "sha256").hexdigest()
            source.seek(0)
        except OSError as error:
            reason = error.strerror or str(error)
            raise CorruptArtefact(f"{path} cannot be read ({reason}); restore it from a copy") from error
        if sha256 not in (None, found):
            raise CorruptArtefact(f"{path} has sha256 {found}, expected {sha256}; restore it from a copy")
        yield source, found


def counted_steps(steps: Steps, total: int) -> Callable[[int], None]:
    """Return what is told of more bytes, and tells ``steps`` how many there are now."""
    done = 0

    def moved(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        steps(done, total)

    return moved


def _finish(archive: ZipFile, run_id: str, written: _Written) -> None:
    """Write what is in it, and make sure that it could be added again."""
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        tables_version=schema.known_versions()[-1],
        run=run_id,
        tables=written.tables,
        files=written.files,
    )
    with _entry(archive, MANIFEST, ZIP_DEFLATED) as entry:
        entry.write(manifest.model_dump_json(indent=1).encode())
    check_entries({info.filename: info for info in archive.infolist()}, manifest)


@contextmanager
def _entry(archive: ZipFile, name: str, compression: int) -> Iterator[IO[bytes]]:
    info = ZipInfo(name, _LONG_AGO)
    info.compress_type, info.external_attr = compression, 0o600 << 16
    with archive.open(info, "w", force_zip64=True) as entry:
        yield entry


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
