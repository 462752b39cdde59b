"""One writer per run: an advisory lock that the system takes back when its process dies."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from common.errors import StoreError
from common.store.artefacts import LOCK_FILE, make_folder, remove_leftovers, unusable

# A look by is_locked holds the lock for microseconds; a writer holds it for minutes.
PATIENCE_S = 0.1
_PAUSE_S = 0.005


class RunLock:
    """Hold a run's folder for writing, ``with RunLock(store.run_folder(run_id)):``.

    The lock lives as long as its process, so a killed one leaves none behind; what it left half-written
    is removed on entering. A process forked while it is held shares it: start workers by spawn.

    Parameters
    ----------
    run_folder : Path
        ``<home>/runs/<id>``; made if it is missing.
    """

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        """Take the lock.

        Raises
        ------
        StoreError
            When another process writes the run, or the folder cannot be written.
        """
        make_folder(self._folder)
        descriptor = None
        try:
            descriptor = os.open(self._folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
            self._take(descriptor)
            sign(descriptor)
            remove_leftovers(self._folder)
        except BaseException as error:
            if descriptor is not None:
                os.close(descriptor)
            if isinstance(error, OSError):
                raise unusable(self._folder / LOCK_FILE, error) from error
            raise
        self._descriptor = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lock back; the file stays, since removing it would let two writers in."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _take(self, descriptor: int) -> None:
        if other := held_by_other(descriptor, PATIENCE_S):
            raise StoreError(f"run {self._folder.name} is being written by {other}; wait for it or stop it first")


def held_by_other(descriptor: int, patience_s: float) -> str | None:
    """Lock an open file for this process alone; return who holds it if another one does not let go in time."""
    end = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                break
            time.sleep(_PAUSE_S)
        else:
            return None
    process, _, host = os.pread(descriptor, 300, 0).decode(errors="replace").strip().partition(" ")
    return f"process {process} on {host}" if host else "another process"


def sign(descriptor: int) -> None:
    """Write into a locked file who holds it."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)


def is_locked(run_folder: Path) -> bool:
    """Tell whether a living process writes the run; a ``running`` run without one was interrupted."""
    try:
        descriptor = os.open(run_folder / LOCK_FILE, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StoreError(f"cannot read {run_folder / LOCK_FILE} ({error.strerror}); check its rights") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
