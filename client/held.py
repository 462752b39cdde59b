"""Adapters a node already holds, the global one or frames, so that they are not sent again with every order.

Versions are told apart by their hash. The file is shared by all clients on this machine; the last two versions stay,
since a late client may still work on the one before.
"""

from __future__ import annotations

import os
from pathlib import Path

from common.adapter import Adapter
from common.errors import ClientError, CorruptArtefact
from common.parcel_file import parcel_bytes, read_parcel
from common.wire import Parcel, unseal

KEPT_VERSIONS = 2
_NAMES = {"global": "the global adapter", "frames": "the frames of the core"}


def hold(folder: Path, parcel: Parcel, kind: str = "global") -> None:
    """Keep a version on disk, atomically, and drop all but the last two of its kind."""
    path = _file(folder, parcel.digest, kind)
    if path.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{id(parcel)}.tmp")
    temporary.write_bytes(parcel_bytes(parcel, ""))
    temporary.replace(path)
    for old in sorted(folder.glob(f"{kind}-*.safetensors"), key=_written, reverse=True)[KEPT_VERSIONS:]:
        old.unlink(missing_ok=True)


def held(folder: Path | None, version: str, kind: str = "global") -> Adapter:
    """Read a version the server believes this node to hold.

    Raises
    ------
    ClientError
        If it is not there any more; the server then sends it with the next order.
    """
    if folder is not None and (path := _file(folder, version, kind)).exists():
        try:
            return unseal(read_parcel(path)[0])
        except CorruptArtefact as error:
            path.unlink(missing_ok=True)
            raise ClientError(f"{error}; {_NAMES[kind]} must be sent again") from None
    raise ClientError(f"this node no longer holds {_NAMES[kind]}; it must be sent again")


def _written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # another client of this machine has just dropped it
        return 0


def _file(folder: Path, version: str, kind: str) -> Path:
    return folder / f"{kind}-{version[:32]}.safetensors"
