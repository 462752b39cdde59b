"""Parcels on disk: a safetensors file with the blob as bytes, header and manifest as metadata."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.errors import ClientError, CorruptArtefact
from common.wire import Parcel, check_bytes, parcel_of


def parcel_bytes(parcel: Parcel, header: str, key: str = "") -> bytes:
    """Build the content of a parcel's file."""
    metadata = {"header": header, "manifest": parcel.manifest, "key": key}
    return save({"data": np.frombuffer(parcel.data, dtype=np.uint8)}, metadata)


def read_parcel(path: Path) -> tuple[Parcel, str, str]:
    """Read a parcel's file: the parcel, its header and its key.

    Raises
    ------
    CorruptArtefact
        If the file is no such file, cut short or damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
            data = file.get_tensor("data").data
        parcel, header, key = parcel_of(metadata["manifest"], data), metadata["header"], metadata["key"]
        check_bytes(parcel)
        return parcel, header, key
    except (SafetensorError, OSError, KeyError, TypeError, ClientError) as error:
        raise CorruptArtefact(f"{path} is not a readable reply ({error})") from None
