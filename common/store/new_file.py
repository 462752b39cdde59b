"""A single new file for the user that is there whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import StoreError
from common.store.artefacts import sync_folder


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """Give an empty file beside ``out`` to fill, readable by its owner alone, and give it its name at the end.

    Raises
    ------
    StoreError
        When there is something of that name already, or it cannot be written.
    """
    target = out.absolute()
    if os.path.lexists(target):
        raise StoreError(f"{out} exists already and is not overwritten; give another --out")
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        os.close(os.open(unfinished, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW, 0o600))
        yield unfinished
        _settle(unfinished, target)
    except OSError as error:
        raise StoreError(
            f"cannot write {out} ({error.strerror or error}); free some space there, or give another --out"
        ) from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


def _settle(unfinished: Path, target: Path) -> None:
    descriptor = os.open(unfinished, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(unfinished, target)
    sync_folder(target.parent)
