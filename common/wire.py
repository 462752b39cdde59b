"""The wire codec: adapters and headers as Flower records, and back. Nobody else builds or reads records.

An adapter travels as one blob, its buffer in fp32 or fp16, beside a JSON manifest with its layout and its sha256.
Nothing is unpickled; sizes are checked before a byte is interpreted. A factor ``a`` that is frozen and shared stays
away: the receiver draws it again from its seed.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from common.adapter import Adapter, Layout, tensor_bytes
from common.errors import ClientError, ConfigurationError
from common.messages import H, Header, read_header
from common.start import frozen_factors

# The numbers are read where they lie, without a copy; an adapter's buffer is never written to. torch warns of that once
# per process, so it is let do so here.
with warnings.catch_warnings(action="ignore"):
    torch.frombuffer(b"\0", dtype=torch.uint8)

WireFormat = Literal["fp32", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
STYPE = "lorafleet.flat"
HEADER, ARRAYS, BODY = "header", "arrays", "json"
MAX_MANIFEST = 1 << 23
"""Characters a manifest may have: some 50,000 layers."""


@dataclass(frozen=True)
class Parcel:
    """An adapter as it travels: manifest and blob.

    Parameters
    ----------
    layout : Layout
        Of the whole adapter, also when ``a`` stays away.
    wire : {"fp32", "fp16"}
        Number format of the blob.
    whole : bool
        False: the frozen ``a`` is not in the blob.
    data : bytes-like
        The numbers.
    sha256 : str
        Of ``data``; empty where nobody hashed it. Flower and TLS guard what travels, the store what lies on disk.
    """

    layout: Layout
    wire: WireFormat
    whole: bool
    data: bytes | memoryview
    sha256: str

    @property
    def nbytes(self) -> int:
        """Bytes of the blob."""
        return len(self.data)

    @property
    def digest(self) -> str:
        """Return the hash of the numbers, computing it if nobody has."""
        return self.sha256 or hashlib.sha256(self.data).hexdigest()

    @property
    def manifest(self) -> str:
        """Describe the blob in JSON."""
        described = {
            "layout": self.layout.to_json(),
            "wire": self.wire,
            "whole": self.whole,
            "sha256": self.sha256,
        }
        return json.dumps(described)


def seal(adapter: Adapter, wire: WireFormat = "fp32", whole: bool = True, hashed: bool = True) -> Parcel:
    """Encode an adapter; hashing costs more than all the rest, so it is left out where nobody needs it.

    Raises
    ------
    ClientError
        If a number overflows fp16.
    """
    flat = adapter.flat if whole else adapter.flat[: adapter.layout.head_numel]
    numbers = flat.to(DTYPES[wire])
    if wire == "fp16" and not bool(torch.isfinite(numbers).all()):
        raise ClientError('the adapter does not fit fp16; set federation.wire = "fp32"')
    data = tensor_bytes(numbers)
    return Parcel(adapter.layout, wire, whole, data, hashlib.sha256(data).hexdigest() if hashed else "")


def unseal(parcel: Parcel, frozen_a: int | None = None) -> Adapter:
    """Decode an adapter to fp32, after checking size and hash.

    Parameters
    ----------
    parcel : Parcel
        What arrived.
    frozen_a : int, optional
        Seed of the ``a`` that did not travel.

    Raises
    ------
    ClientError
        If the blob does not fit its manifest.
    """
    check_bytes(parcel)
    layout = parcel.layout
    flat = torch.frombuffer(parcel.data, dtype=DTYPES[parcel.wire]).float() if parcel.data else torch.empty(0)
    if not parcel.whole:
        if frozen_a is None:
            raise ClientError("the adapter came without its factors a, but none are frozen here")
        flat = torch.cat([flat, frozen_factors(layout, frozen_a)])
    return Adapter(flat, layout)


def check_bytes(parcel: Parcel) -> None:
    """Compare a parcel's blob with its manifest, before a byte is interpreted.

    Raises
    ------
    ClientError
        If its size or its hash is another.
    """
    numel = parcel.layout.numel if parcel.whole else parcel.layout.head_numel
    needed = numel * DTYPES[parcel.wire].itemsize
    if len(parcel.data) != needed:
        raise ClientError(f"the adapter has {len(parcel.data)} bytes; its layout needs {needed}")
    if parcel.sha256 and hashlib.sha256(parcel.data).hexdigest() != parcel.sha256:
        raise ClientError("the adapter's bytes do not match their hash; it was damaged on its way")


def write_message(header: Header, parcels: Mapping[str, Parcel] | None = None) -> RecordDict:
    """Build the content of a message: one header, adapters by name."""
    parcels = parcels or {}
    config: dict[str, str] = {BODY: header.model_dump_json()}
    config |= {name: parcel.manifest for name, parcel in parcels.items()}
    arrays = {
        name: Array(dtype="uint8", shape=(parcel.nbytes,), stype=STYPE, data=bytes(parcel.data))
        for name, parcel in parcels.items()
    }
    return RecordDict({HEADER: ConfigRecord(dict(config)), ARRAYS: ArrayRecord(arrays)})


def read_message(content: RecordDict, kind: type[H]) -> tuple[H, dict[str, Parcel]]:
    """Read a message's header and adapters; adapters stay encoded until ``unseal``.

    Raises
    ------
    ClientError
        If anything is missing, extra or malformed.
    """
    config, arrays = content.config_records.get(HEADER), content.array_records.get(ARRAYS)
    if config is None or arrays is None:
        raise ClientError("the message lacks its header or its arrays")
    header = read_header(kind, config.get(BODY))
    if set(arrays) != set(config) - {BODY}:
        raise ClientError("the message's arrays are not those its header names")
    if any(array.stype != STYPE for array in arrays.values()):
        raise ClientError(f"the message's arrays are not in the form {STYPE}")
    return header, {name: parcel_of(config[name], array.data) for name, array in arrays.items()}


def message_bytes(content: RecordDict) -> int:
    """Count the bytes a message's content carries: blobs, manifests and header."""
    blobs = sum(len(array.data) for record in content.array_records.values() for array in record.values())
    texts = sum(len(str(value)) for record in content.config_records.values() for value in record.values())
    return blobs + texts


def parcel_of(manifest: object, data: bytes | memoryview) -> Parcel:
    """Put a manifest and its blob together, checking the manifest.

    Raises
    ------
    ClientError
        If the manifest is not one.
    """
    if not isinstance(manifest, str) or len(manifest) > MAX_MANIFEST:
        raise ClientError("an adapter came without a readable manifest")
    try:
        raw = json.loads(manifest)
        layout = Layout.from_json(raw["layout"])
        wire, whole, digest = raw["wire"], raw["whole"], raw["sha256"]
    except (ValueError, TypeError, KeyError, RecursionError, ConfigurationError) as error:
        raise ClientError(f"an adapter's manifest cannot be read: {error}") from None
    if wire not in tuple(DTYPES) or not isinstance(whole, bool) or not isinstance(digest, str):
        raise ClientError("an adapter's manifest names an unknown format")
    return Parcel(layout, wire, whole, data, digest)
