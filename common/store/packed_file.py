"""The form of a packed run, and what is checked of one before anything in it is used.

A zip file that anybody may have made::

    run.json              what is in it: rows of each table, files with their hashes
    rows/<table>.jsonl    a row a line, deflated
    files/<path>          artefacts by their path in the run's folder, as they are

Nothing is ever unpacked by its name in the zip: only what ``run.json`` declares is read, no further than it says.
"""

from __future__ import annotations

import stat
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import StoreError
from common.store.artefacts import RUNS, checked_path
from common.store.rows import TABLES

FORMAT, VERSION = "lorafleet-run", 1
MANIFEST = "run.json"

MANIFEST_BYTES = 64 << 20
DIRECTORY_BYTES = 32 << 20
ROWS_BYTES = 8 << 30
RATIO, SMALL = 250, 64 << 20
"""Rows above 64 MiB may not be more than 250 times what they take in the file."""

PRIVATE = "clients"
"""Folder in a run's where simulated clients keep what is theirs; it is neither packed nor added."""

CHUNK = 1 << 20

_END, _END_64, _PLACE_64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=2**62)]


class _Declared(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    sha256: Digest
    nbytes: Count


class PackedTable(_Declared):
    """Rows of one table."""

    rows: Count


class PackedArtefact(_Declared):
    """One file."""


class Manifest(BaseModel):
    """What a packed run says is in it; ``files`` go by their path in the run's folder."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format: str
    version: int
    tables_version: str
    run: str
    tables: dict[str, PackedTable]
    files: dict[str, PackedArtefact]


@dataclass(frozen=True)
class Packed:
    """A packed run that is what it says it is, as far as can be told without reading all of it."""

    path: Path
    manifest: Manifest
    archive: ZipFile

    def chunks(self, name: str) -> Iterator[bytes]:
        """Read an entry, no further than its declared size."""
        with told_of(self.path), self.archive.open(name) as source:
            while chunk := source.read(CHUNK):
                yield chunk


def rows_name(table: str) -> str:
    """Return the name of a table's entry."""
    return f"rows/{table}.jsonl"


def file_name(path: str) -> str:
    """Return the name of an artefact's entry."""
    return f"files/{path}"


@contextmanager
def open_packed(path: Path) -> Iterator[Packed]:
    """Open a packed run.

    Raises
    ------
    StoreError
        When it is none, is of a newer form, or declares what no packed run has.
    """
    with ExitStack() as opened:
        with told_of(path):
            file = opened.enter_context(path.open("rb"))
            length = _check_directory(file)
            archive = opened.enter_context(ZipFile(file))
            entries = _entries(archive, length)
            manifest = _manifest(archive, entries)
            check_entries(entries, manifest)
        yield Packed(path, manifest, archive)


@contextmanager
def told_of(path: Path) -> Iterator[None]:
    """Say in one line what is wrong with a packed run.

    Raises
    ------
    StoreError
        In place of what reading a zip may raise, and of :class:`Unfit`.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise StoreError(f"{path} does not exist; expected what `lorafleet runs pack` has written") from error
    except (OSError, BadZipFile, zlib.error, EOFError, NotImplementedError, struct.error, UnicodeError) as error:
        raise StoreError(f"{path} cannot be read as a packed run ({_reason(error)}); get it anew") from error
    except Unfit as error:
        raise StoreError(f"{path} is not used: {error}") from error


class Unfit(Exception):
    """A packed run holds something no packed run has."""


def check_entries(entries: dict[str, ZipInfo], manifest: Manifest) -> None:
    """Check that a zip holds what is declared, of the sizes declared, and nothing else.

    Raises
    ------
    Unfit
        When it does not.
    """
    rows = {rows_name(name): table for name, table in manifest.tables.items()}
    files = {file_name(name): file for name, file in manifest.files.items()}
    declared: dict[str, _Declared] = {**rows, **files}
    if other := sorted(entries.keys() ^ {MANIFEST, *declared}):
        raise Unfit(f"{MANIFEST} and the other entries do not agree on {other[0][:100]!r}")
    for name, what in declared.items():
        if entries[name].file_size != what.nbytes:
            raise Unfit(f"{name[:100]!r} has {entries[name].file_size:,} bytes, {MANIFEST} says {what.nbytes:,}")
    for name in files:
        if entries[name].compress_size != entries[name].file_size:
            raise Unfit(f"{name[:100]!r} is compressed, which artefacts are not")
    total, compressed = (sum(size) for size in zip(*(_sizes(entries[name]) for name in rows), (0, 0), strict=True))
    if total > ROWS_BYTES or total > max(SMALL, RATIO * compressed):
        raise Unfit(f"its rows would be {total:,} bytes, from {compressed:,}; that is more than rows may be")


def _sizes(entry: ZipInfo) -> tuple[int, int]:
    return entry.file_size, entry.compress_size


def _entries(archive: ZipFile, length: int) -> dict[str, ZipInfo]:
    infos = archive.infolist()
    twice = [name for name, count in Counter(info.filename for info in infos).items() if count > 1]
    if twice:
        raise Unfit(f"it holds {twice[0][:100]!r} more than once")
    if sum(info.compress_size for info in infos) > length:
        raise Unfit("its entries lie over one another")
    for info in infos:
        kind = stat.S_IFMT(info.external_attr >> 16)
        plain = info.filename == info.orig_filename and not info.is_dir() and kind in (0, stat.S_IFREG)
        if not plain or info.flag_bits & 1 or info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
            raise Unfit(f"{info.filename[:100]!r} is not an ordinary file")
    return {info.filename: info for info in infos}


def _manifest(archive: ZipFile, entries: dict[str, ZipInfo]) -> Manifest:
    if MANIFEST not in entries:
        raise Unfit(f"it holds no {MANIFEST}; expected what `lorafleet runs pack` has written")
    if entries[MANIFEST].file_size > MANIFEST_BYTES:
        raise Unfit(f"its {MANIFEST} is longer than {MANIFEST_BYTES:,} bytes")
    content = archive.read(MANIFEST)
    _check_version(content)
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, fault["loc"]))[:100]
        raise Unfit(f"its {MANIFEST} is wrong at {place!r} ({fault['msg'][:200]})") from error
    if unknown := manifest.tables.keys() - {table.name for table in TABLES}:
        raise Unfit(f"it has rows of an unknown table {min(unknown)[:100]!r}")
    for name in manifest.files:
        _check_path(manifest.run, name)
    return manifest


def _check_version(content: bytes) -> None:
    """Tell a newer form from a faulty one before the rest is looked at."""
    try:
        head = _Head.model_validate_json(content)
    except ValidationError as error:
        raise Unfit(f"its {MANIFEST} is none of a packed run") from error
    if head.format != FORMAT:
        raise Unfit(f"it is of the format {head.format[:50]!r}, expected {FORMAT!r}")
    if head.version > VERSION:
        raise Unfit(f"it is of the newer form {head.version}, this code knows {VERSION}; update LoRAFleet")


class _Head(BaseModel):
    format: str
    version: int


def _check_path(run: str, name: str) -> None:
    try:
        plain = checked_path(run, f"{RUNS}/{run}/{name}") == f"{RUNS}/{run}/{name}"
    except StoreError:
        plain = False
    if not plain or name.split("/")[0] == PRIVATE:
        raise Unfit(f"{name[:100]!r} is no place for an artefact of a run")


def _check_directory(file: IO[bytes]) -> int:
    """Look at the zip's end before Python does, which would read a list of any length, and return its whole length."""
    tail = _END_64.size + _PLACE_64.size + _END.size
    end = file.seek(0, 2)
    file.seek(max(0, end - tail))
    content = file.read(tail)
    if len(content) < _END.size:
        raise Unfit("it is no zip file")
    mark, *_, size, _, comment = _END.unpack(content[-_END.size :])
    if mark != b"PK\5\6" or comment:
        raise Unfit("it does not end as a packed run does; it may have been cut off: get it anew")
    if len(content) == tail:
        mark, _, place, _ = _PLACE_64.unpack(content[_END_64.size : -_END.size])
        if mark == b"PK\6\7":
            mark, *_, size, _ = _END_64.unpack(content[: _END_64.size])
            if mark != b"PK\6\6" or place != end - tail:
                raise Unfit("its list of entries is not where it should be")
    file.seek(0)
    if size > DIRECTORY_BYTES:
        raise Unfit(f"its list of entries is longer than {DIRECTORY_BYTES:,} bytes")
    return end


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())[:200]
