"""Adapters a node already holds, the global one or frames, so that they are not sent again with every order.

The files are shared by all clients on this machine and told apart by their hash; where downloads are bounded, clients
hold different ones of one base version. Those of the last two base versions stay, since a late client may still work on
the one before.
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


def hold(folder: Path, parcel: Parcel, base_version: int, kind: str = "global") -> None:
    """Keep an adapter on disk, atomically, and drop those of all but the last two base versions of its kind."""
    if _find(folder, parcel.digest, kind):
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}-{base_version:08d}-{parcel.digest[:32]}.safetensors"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{id(parcel)}.tmp")
    temporary.write_bytes(parcel_bytes(parcel, ""))
    temporary.replace(path)
    files = sorted(folder.glob(f"{kind}-*.safetensors"), key=_written, reverse=True)
    kept = list(dict.fromkeys(_base_version(file) for file in files))[:KEPT_VERSIONS]
    for old in files:
        if _base_version(old) not in kept:
            old.unlink(missing_ok=True)


def held(folder: Path | None, digest: str, kind: str = "global") -> Adapter:
    """Read an adapter the server believes this node to hold.

    Raises
    ------
    ClientError
        If it is not there any more; the server then sends it with the next order.
    """
    if folder is not None and (path := _find(folder, digest, kind)):
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


def _find(folder: Path, digest: str, kind: str) -> Path | None:
    return next(folder.glob(f"{kind}-*-{digest[:32]}.safetensors"), None)


def _base_version(file: Path) -> str:
    return file.name.split("-")[1]
