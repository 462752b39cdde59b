"""Files of a run, written so that a kill leaves either the whole file or none.

A file is written under a hidden name in its own folder, flushed to the disk, renamed, and the folder
flushed. Only then may its path and hash be committed. Give each committed file a name of its own (the
round is part of it): a name written again between two commits would leave the first one without its file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from common.errors import CorruptArtefact, StoreError
from common.store.columns import clean, clean_name
from common.store.reading import LAST

RUNS = "runs"
LOCK_FILE = "lock"
PATH_LENGTH = 1_000
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

_ADVICE = {
    errno.ENOSPC: "free some space there, then resume the run",
    errno.EDQUOT: "free some space there, then resume the run",
    errno.EROFS: "choose a folder that can be written with --home",
    errno.EACCES: "choose a folder that can be written with --home",
    errno.EPERM: "choose a folder that can be written with --home",
}


@dataclass(frozen=True, slots=True)
class ArtefactFile:
    """A file that is safely on disk.

    Attributes
    ----------
    path : str
        Relative to the home folder.
    sha256 : str
        Hexadecimal digest of its content.
    nbytes : int
        Its size.
    """

    path: str
    sha256: str
    nbytes: int


def run_folder(home: Path, run_id: str) -> Path:
    """Return the folder of a run's artefacts.

    Raises
    ------
    StoreError
        When the id cannot name a folder.
    """
    if not _RUN_ID.fullmatch(run_id) or run_id == LAST:
        raise StoreError(f"{run_id[:100]!r} cannot be a run's id; use at most 100 letters, digits, '.', '_' and '-'")
    return home / RUNS / run_id


def write_artefact(folder: Path, name: str, data: bytes | Callable[[Path], object]) -> ArtefactFile:
    """Write a file into a run's folder so that it is there whole, or not at all.

    Parameters
    ----------
    folder : Path
        The run's folder, ``<home>/runs/<id>``.
    name : str
        File name inside it, which may name sub-folders: ``rounds/3/state.safetensors``.
    data : bytes or callable
        The content, or a function that writes it to the path it is given.

    Returns
    -------
    ArtefactFile
        With its path relative to the home folder.

    Raises
    ------
    StoreError
        When the name leaves the folder, the disk is full or the folder cannot be written.
    """
    path = checked_path(folder.name, f"{RUNS}/{folder.name}/{name}")
    target = folder.joinpath(*PurePosixPath(path).parts[2:])
    _check_inside(folder, target.parent)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        make_folder(target.parent)
        digest, nbytes = _write(temporary, data)
        os.replace(temporary, target)
        sync_folder(target.parent)
    except Exception as error:
        # What cannot be removed here is removed by the run's next writer.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = _os_error(error)
        if cause is None:
            raise
        raise unusable(target, cause) from error
    return ArtefactFile(path, digest, nbytes)


def file_of(home: Path, run_id: str, path: str) -> Path:
    """Return where the file of a stored path lies.

    Raises
    ------
    StoreError
        When the path, or a link on its way, leads out of the run's folder.
    """
    file = home / checked_path(run_id, path)
    _check_inside(home / RUNS / run_id, file)
    return file


def verify(path: Path, sha256: str) -> None:
    """Check that a file still has the content it was committed with.

    Raises
    ------
    CorruptArtefact
        When it is missing, unreadable or differs.
    """
    advice = "restore it from a copy, or resume from an earlier round"
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CorruptArtefact(f"{path} is unreadable ({_reason(error)}), expected sha256 {sha256}; {advice}") from error
    if found != sha256:
        raise CorruptArtefact(f"{path} has sha256 {found}, expected {sha256}; {advice}")


def checked_path(run_id: str, path: str) -> str:
    """Return a stored path in its plain form if it names a file inside the run's folder.

    Raises
    ------
    StoreError
        When it leads elsewhere, is hidden, is the lock, or is not plain text of at most 1,000 characters.
    """
    parts = PurePosixPath(path).parts
    inside = parts[2:] if parts[:2] == (RUNS, run_id) else ()
    ordinary = all(not part.startswith(".") and part == clean(part) for part in inside)
    if not inside or not ordinary or inside == (LOCK_FILE,) or len(path) > PATH_LENGTH:
        raise StoreError(
            f"the path {clean_name(path)!r} must name a file under {RUNS}/{run_id}/,"
            f" not hidden, without '..' and of at most {PATH_LENGTH} characters"
        )
    return "/".join(parts)


def _check_inside(folder: Path, target: Path) -> None:
    if not target.resolve().is_relative_to(folder.resolve()):
        raise StoreError(f"{target} leads out of the run's folder {folder}; remove the link on its way")


def remove_leftovers(folder: Path) -> None:
    """Delete the hidden files that killed writers left in a run's folder."""
    for leftover in folder.rglob(".*"):
        if leftover.is_file():
            leftover.unlink()


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each flushed to the disk.

    Raises
    ------
    StoreError
        When that cannot be done.
    """
    missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
    try:
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            sync_folder(path.parent)
    except OSError as error:
        raise unusable(folder, error) from error


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a renamed or new file survives a power cut."""
    _flush(folder)


def unusable(path: Path, error: OSError) -> StoreError:
    """Say in one line why a file or folder cannot be used and what to do."""
    advice = _ADVICE.get(error.errno or 0, "check the folder, or choose another with --home")
    return StoreError(f"cannot write {path} ({_reason(error)}); {advice}")


def _write(path: Path, data: bytes | Callable[[Path], object]) -> tuple[str, int]:
    if callable(data):
        data(path)
        _flush(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size
    with ThreadPoolExecutor(1) as pool:  # hash while the disk works
        digest = pool.submit(hashlib.sha256, data)
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return digest.result().hexdigest(), len(data)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _os_error(error: Exception) -> OSError | None:
    """Find the system's error; libraries written in Rust, safetensors among them, tell it in their text."""
    if isinstance(error, OSError):
        return error
    told = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(told[1]), os.strerror(int(told[1]))) if told else None


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
