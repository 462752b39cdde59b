"""The wire codec: adapters and headers as Flower records, and back. Nobody else builds or reads records.

An adapter travels as one blob, the numbers of its buffer that the other side cannot know (``common/travel.py``), beside
a JSON manifest with its layout, its part and its sha256. int8 and int4 carry not the numbers but their change from
the start that both sides know. Nothing is unpickled; sizes are checked before a byte is interpreted.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from common.adapter import Adapter, Layout, tensor_bytes
from common.errors import ClientError, ConfigurationError
from common.federation import Dispatch, Part
from common.messages import H, Header, read_header
from common.quantize import LIMITS, Quantized, decode, encode, encoded_size, is_quantized
from common.travel import complete, part_numel, take

# The numbers are read where they lie, without a copy; an adapter's buffer is never written to. torch warns of that once
# per process, so it is let do so here.
with warnings.catch_warnings(action="ignore"):
    torch.frombuffer(b"\0", dtype=torch.uint8)

FloatFormat = Literal["fp32", "fp16", "bf16"]
WireFormat = FloatFormat | Quantized
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
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
        Of the whole adapter, whatever of it travels.
    wire : {"fp32", "fp16", "bf16", "int8", "int4"}
        Number format of the blob; the last two hold changes.
    part : Part
        What of the adapter is in the blob.
    density : float, optional
        Of a sparse part.
    data : bytes-like
        The numbers.
    sha256 : str
        Of ``data``; empty where nobody hashed it. Flower and TLS guard what travels, the store what lies on disk.
    """

    layout: Layout
    wire: WireFormat
    part: Part
    density: float | None
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
            "part": self.part,
            "density": self.density,
            "sha256": self.sha256,
        }
        return json.dumps(described)


def seal(
    adapter: Adapter,
    wire: FloatFormat = "fp32",
    part: Part = "ab",
    dispatch: Dispatch | None = None,
    hashed: bool = True,
) -> Parcel:
    """Encode an adapter, or a part of it; hashing costs more than all the rest and is left out where nobody needs it.

    Raises
    ------
    ClientError
        If a number overflows fp16.
    """
    return seal_numbers(take(adapter, part, dispatch), adapter.layout, wire, part, dispatch, hashed)


def seal_numbers(
    numbers: Tensor,
    layout: Layout,
    wire: WireFormat,
    part: Part = "ab",
    dispatch: Dispatch | None = None,
    hashed: bool = True,
) -> Parcel:
    """Encode what ``take`` gave, or the change of it.

    Parameters
    ----------
    numbers : Tensor, shape (part_numel(layout, part),)
        For int8 and int4 less those of the start.
    layout : Layout
        Of the whole adapter.
    wire : {"fp32", "fp16", "bf16", "int8", "int4"}
        Number format.
    part : Part
        What they are.
    dispatch : Dispatch, optional
        Knows the density of a sparse part.
    hashed : bool
        False: leave the hash empty.

    Raises
    ------
    ClientError
        If a number overflows fp16, or is not finite and cannot be quantised.
    """
    if is_quantized(wire):
        data = encode(numbers, wire)
    else:
        numbers = numbers.to(DTYPES[wire])
        if wire == "fp16" and not bool(torch.isfinite(numbers).all()):
            raise ClientError(
                'the adapter does not fit fp16; set federation.wire (up) or federation.wire_down to "bf16"'
            )
        data = tensor_bytes(numbers)
    digest = hashlib.sha256(data).hexdigest() if hashed else ""
    density = dispatch.density if part == "sparse" and dispatch is not None else None
    return Parcel(layout, wire, part, density, data, digest)


def unseal(parcel: Parcel, dispatch: Dispatch | None = None, start: Adapter | None = None) -> Adapter:
    """Decode an adapter to fp32 and make it whole, after checking size and hash.

    Parameters
    ----------
    parcel : Parcel
        What arrived.
    dispatch : Dispatch, optional
        What both sides know, where only a part travelled.
    start : Adapter, optional
        What the training began with, whole.

    Raises
    ------
    ClientError
        If the blob does not fit its manifest, or nothing tells what did not travel.
    """
    numbers = unseal_numbers(parcel)
    if parcel.part == "sparse" and (dispatch is None or parcel.density != dispatch.density):
        raise ClientError("the adapter's entries are not those of the mask that was agreed on")
    if is_quantized(parcel.wire):
        if start is None or start.layout != parcel.layout:
            raise ClientError(f"an adapter came as its change in {parcel.wire}, and nothing here tells from what")
        numbers = numbers.add_(take(start, parcel.part, dispatch))
    # What a client keeps to itself is nobody else's to fill in.
    return complete(numbers, parcel.layout, parcel.part, dispatch, None if parcel.part == "inner" else start)


def unseal_numbers(parcel: Parcel) -> Tensor:
    """Decode what ``seal_numbers`` was given to fp32, after checking size and hash.

    Raises
    ------
    ClientError
        If the blob does not fit its manifest.
    """
    check_bytes(parcel)
    if is_quantized(parcel.wire):
        return decode(parcel.data, part_numel(parcel.layout, parcel.part, parcel.density), parcel.wire)
    return torch.frombuffer(parcel.data, dtype=DTYPES[parcel.wire]).float() if parcel.data else torch.empty(0)


def wire_bytes(count: int, wire: WireFormat) -> int:
    """Count the bytes so many numbers travel in."""
    return encoded_size(count, wire) if is_quantized(wire) else count * DTYPES[wire].itemsize


def check_bytes(parcel: Parcel) -> None:
    """Compare a parcel's blob with its manifest, before a byte is interpreted.

    Raises
    ------
    ClientError
        If its size or its hash is another.
    """
    needed = wire_bytes(part_numel(parcel.layout, parcel.part, parcel.density), parcel.wire)
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
        wire, part, density, digest = raw["wire"], raw["part"], raw["density"], raw["sha256"]
    except (ValueError, TypeError, KeyError, RecursionError, ConfigurationError) as error:
        raise ClientError(f"an adapter's manifest cannot be read: {error}") from None
    if wire not in (*DTYPES, *LIMITS) or part not in get_args(Part) or not isinstance(digest, str):
        raise ClientError("an adapter's manifest names an unknown format")
    if (part == "sparse") != (isinstance(density, float) and 0 < density <= 1):
        raise ClientError("an adapter's manifest names an unknown mask")
    return Parcel(layout, wire, part, density, data, digest)
