"""Adapters survive the wire; anything else that arrives is refused as a ClientError, within bounded memory."""

from __future__ import annotations

import hashlib
import json
import string
import tracemalloc
from typing import Any, get_args

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from common.adapter import Adapter
from common.errors import ClientError, CorruptArtefact
from common.federation import Dispatch, Part
from common.lowrank import Dense, LowRank
from common.messages import EvaluateAnswer, EvaluateOrder, Presence, Query, TrainAnswer, TrainOrder
from common.parcel_file import parcel_bytes, read_parcel
from common.quantize import decode, encode
from common.wire import ARRAYS, BODY, HEADER, STYPE, parcel_of, read_message, seal, seal_numbers, unseal, write_message

SIZES = st.integers(1, 5)
SHAPES = st.lists(SIZES, max_size=3)
NAMES = st.text(string.ascii_letters + "._é", min_size=1, max_size=8)
PARTS = get_args(Part)
WIRES = ("fp32", "fp16", "bf16", "int8", "int4")
KINDS = [Query, Presence, TrainOrder, TrainAnswer, EvaluateOrder, EvaluateAnswer]


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=numbers)

    layers: dict[str, LowRank | Dense] = {}
    for name in draw(st.lists(NAMES, max_size=4, unique=True)):
        out, inn, rank = draw(SIZES), draw(SIZES), draw(st.integers(-1, 4))
        layers[name] = Dense(random(out, inn)) if rank < 0 else LowRank(random(out, rank), random(rank, inn))
    heads = {name: random(*draw(SHAPES)) for name in draw(st.lists(NAMES, max_size=2, unique=True))}
    return Adapter.pack(layers, heads, draw(NAMES))


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@given(adapters(), st.sampled_from(list(DTYPES)))
def test_an_adapter_comes_out_as_it_went_in(adapter: Adapter, wire: Any) -> None:
    content = write_message(Query(run="r", fingerprint="f"), {"x": seal(adapter, wire)})
    _, parcels = read_message(content, Query)
    got = unseal(parcels["x"])
    assert got.layout == adapter.layout
    assert torch.equal(got.flat, adapter.flat.to(DTYPES[wire]).float())


@given(adapters(), st.integers(0, 1000), st.sampled_from(["int8", "int4"]))
def test_a_change_comes_out_on_its_start(start: Adapter, seed: int, wire: Any) -> None:
    change = torch.randn(len(start.flat), generator=torch.Generator().manual_seed(seed))
    content = write_message(Query(run="r", fingerprint="f"), {"x": seal_numbers(change, start.layout, wire)})
    _, parcels = read_message(content, Query)
    got = unseal(parcels["x"], start=start)
    assert got.layout == start.layout
    assert torch.equal(got.flat, start.flat + decode(encode(change, wire), len(change), wire))


@given(adapters(), st.data())
def test_one_changed_byte_is_refused(adapter: Adapter, data: st.DataObject) -> None:
    parcel = seal(adapter)
    if not parcel.data:
        return
    at = data.draw(st.integers(0, len(parcel.data) - 1))
    changed = bytearray(parcel.data)
    changed[at] ^= data.draw(st.integers(1, 255))
    try:
        unseal(parcel_of(parcel.manifest, bytes(changed)))
    except ClientError:
        return
    raise AssertionError("a changed byte was taken")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([2**30, 2**31 - 1, 2**31, 2**63, -1]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
LAYOUT_PARTS = st.fixed_dictionaries(
    {
        "layers": JSON | st.lists(st.tuples(NAMES, *[st.integers(-1, 3) | JSON] * 3), max_size=3),
        "extras": JSON | st.lists(st.tuples(NAMES, st.lists(st.integers(-1, 3) | JSON, max_size=3)), max_size=2),
        "method": NAMES | JSON,
    }
)
MANIFESTS = st.one_of(
    st.text(max_size=50),
    JSON.map(json.dumps),
    st.fixed_dictionaries(
        {
            "layout": LAYOUT_PARTS.map(json.dumps) | JSON,
            "wire": st.sampled_from(WIRES) | JSON,
            "part": st.sampled_from(PARTS) | JSON,
            "density": st.none() | st.floats(0.1, 1) | JSON,
            "sha256": st.text(max_size=64) | JSON,
        }
    ).map(json.dumps),
)


def use(manifest: object, data: bytes | memoryview, frozen_a: int | None) -> None:
    """Do with a parcel what both sides do, and let only a ClientError out."""
    try:
        parcel = parcel_of(manifest, data)
        dispatch = Dispatch(Adapter.empty(), 1, 0, "ab", frozen_a, density=parcel.density)
        adapter = unseal(parcel, dispatch)
    except ClientError:
        return
    assert set(adapter.layers) == {name for name, *_ in adapter.layout.layers}
    assert set(adapter.extras) == {name for name, _ in adapter.layout.extras}


@given(MANIFESTS | JSON, st.binary(max_size=64), st.none() | st.just(3))
def test_no_manifest_does_harm(manifest: object, data: bytes, frozen_a: int | None) -> None:
    use(manifest, data, frozen_a)


@given(LAYOUT_PARTS, st.binary(max_size=64), st.none() | st.just(3), st.sampled_from(PARTS), st.sampled_from(WIRES))
def test_no_layout_does_harm_when_the_hash_is_right(
    layout: dict[str, Any], data: bytes, frozen_a: int | None, part: str, wire: str
) -> None:
    digest = hashlib.sha256(data).hexdigest()
    density = 0.5 if part == "sparse" else None
    described = {"layout": json.dumps(layout), "wire": wire, "part": part, "density": density, "sha256": digest}
    use(json.dumps(described), data, frozen_a)


VALUES = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=9) | st.binary(max_size=9)
ENTRIES = st.dictionaries(st.sampled_from([BODY, "x", "y"]), VALUES | MANIFESTS, max_size=3)
ARRAY = st.builds(
    lambda stype, data: Array(dtype="uint8", shape=(len(data),), stype=stype, data=data),
    st.sampled_from([STYPE, "numpy.ndarray", ""]),
    st.binary(max_size=16),
)


@given(
    ENTRIES, st.dictionaries(st.sampled_from(["x", "y"]), ARRAY, max_size=2), st.sampled_from(KINDS), JSON | st.none()
)
def test_no_message_does_harm(config: dict[str, Any], arrays: dict[str, Array], kind: Any, body: object) -> None:
    if body is not None:
        config = config | {BODY: json.dumps(body)}
    content = RecordDict({HEADER: ConfigRecord(config), ARRAYS: ArrayRecord(arrays)})
    try:
        _, parcels = read_message(content, kind)
    except ClientError:
        return
    for parcel in parcels.values():
        use(parcel.manifest, parcel.data, None)


def test_a_hostile_manifest_costs_little_memory() -> None:
    huge = json.dumps({"layers": [["x", 2**30, 2**30, 2**30]], "extras": [["h", [2**30, 2**30]]], "method": "lora"})
    tracemalloc.start()
    try:
        for part in PARTS:
            described = {"layout": huge, "part": part, "density": 0.5 if part == "sparse" else None, "sha256": ""}
            for wire in WIRES:
                use(json.dumps(described | {"wire": wire}), b"\0" * 1000, 3)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


@given(adapters(), st.data())
def test_a_damaged_file_is_a_corrupt_artefact(tmp_path_factory: Any, adapter: Adapter, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("parcel") / "parcel.safetensors"
    content = bytearray(parcel_bytes(seal(adapter), "header", "key"))
    path.write_bytes(content)
    parcel, header, key = read_parcel(path)
    assert (unseal(parcel).sha256(), header, key) == (adapter.sha256(), "header", "key")
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        again, _, _ = read_parcel(path)
    except CorruptArtefact:
        return
    unseal(again)  # the damage is in names or header: the numbers are whole


def test_a_file_of_another_kind_is_a_corrupt_artefact(tmp_path: Any) -> None:
    path = tmp_path / "other.safetensors"
    for content in (b"", b"text", save({"data": np.zeros(3)}), save({"x": np.zeros(3)}, {"header": "", "key": ""})):
        path.write_bytes(content)
        with pytest.raises(CorruptArtefact, match="not a readable reply"):
            read_parcel(path)
    with pytest.raises(CorruptArtefact, match="not a readable reply"):
        read_parcel(tmp_path / "missing.safetensors")
