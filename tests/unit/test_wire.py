"""The wire codec: what goes in comes out, and every kind of damage is refused with a sentence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from common.adapter import Adapter, Layout
from common.errors import ClientError
from common.federation import Dispatch
from common.lowrank import Dense, LowRank
from common.messages import MAX_HEADER, EvaluateAnswer, Presence, Query, TrainAnswer, read_header
from common.quantize import BLOCK, LIMITS, encoded_size
from common.start import fresh_a
from common.travel import take
from common.wire import (
    ARRAYS,
    BODY,
    HEADER,
    MAX_MANIFEST,
    STYPE,
    Parcel,
    message_bytes,
    parcel_of,
    read_message,
    seal,
    seal_numbers,
    unseal,
    unseal_numbers,
    wire_bytes,
    write_message,
)

HEADER_OF = Query(run="r", fingerprint="f")


def adapter(seed: int = 0) -> Adapter:
    """Two low-rank layers of different rank, a dense one, a layer of rank 0, two heads."""
    numbers = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=numbers)

    layers = {
        "up": LowRank(random(6, 2), random(2, 4)),
        "down": LowRank(random(4, 3), random(3, 6)),
        "dense": Dense(random(5, 3)),
        "silent": LowRank(random(4, 0), random(0, 4)),
    }
    return Adapter.pack(layers, {"head.weight": random(2, 4), "head.bias": random(2)})


def frozen(seed: int) -> Adapter:
    layers = {name: LowRank(torch.full((4, r), 0.5), fresh_a(seed, name, r, 6)) for name, r in (("p", 2), ("q", 3))}
    return Adapter.pack(layers)


def carried(parcel: Parcel) -> Parcel:
    """Send a parcel through a message."""
    header, parcels = read_message(write_message(HEADER_OF, {"update": parcel}), Query)
    assert header == HEADER_OF
    return parcels["update"]


def test_fp32_keeps_every_bit() -> None:
    sent = adapter()
    got = unseal(carried(seal(sent)))
    assert got.layout == sent.layout
    assert torch.equal(got.flat, sent.flat)
    assert got.sha256() == sent.sha256()


@pytest.mark.parametrize(("wire", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_a_float_is_the_nearest_one(wire: Any, dtype: torch.dtype) -> None:
    sent = adapter()
    parcel = carried(seal(sent, wire))
    assert parcel.nbytes == 2 * sent.layout.numel
    got = unseal(parcel)
    assert got.flat.dtype == torch.float32
    assert torch.equal(got.flat, sent.flat.to(dtype).float())


def shared(frozen_a: int | None = 7) -> Dispatch:
    return Dispatch(Adapter.empty(), 3, 0, "b", frozen_a)


@pytest.mark.parametrize("wire", ["fp32", "fp16", "bf16"])
def test_a_frozen_a_stays_away_and_is_drawn_again(wire: Any) -> None:
    sent = frozen(seed=7)
    parcel = carried(seal(sent, wire, "b"))
    assert parcel.nbytes == sent.layout.head_numel * (4 if wire == "fp32" else 2)
    assert torch.equal(unseal(parcel, shared(7)).flat, sent.flat)
    assert not torch.equal(unseal(parcel, shared(8)).flat, sent.flat)


@pytest.mark.parametrize("wire", ["int8", "int4"])
def test_whole_numbers_carry_the_change_from_the_start(wire: Any) -> None:
    start, trained = adapter(0), adapter(1)
    change = trained.flat - start.flat
    parcel = carried(seal_numbers(change, trained.layout, wire))
    assert parcel.nbytes == encoded_size(trained.layout.numel, wire)
    got = unseal(parcel, start=start)
    assert got.layout == trained.layout
    assert torch.equal(got.flat, unseal_numbers(parcel) + start.flat)
    assert float((got.flat - trained.flat).abs().max()) <= float(change.abs().max()) / LIMITS[wire]
    assert torch.equal(start.flat, adapter(0).flat)


@pytest.mark.parametrize("wire", ["int8", "int4"])
def test_a_change_of_b_alone_leaves_the_frozen_a_alone(wire: Any) -> None:
    start = frozen(seed=7)
    trained = start.with_flat(torch.cat([start.flat[: start.layout.head_numel] + 1, start.inner_factors]))
    change = take(trained, "b") - take(start, "b")
    parcel = carried(seal_numbers(change, start.layout, wire, "b"))
    got = unseal(parcel, shared(), start)
    assert torch.equal(got.inner_factors, start.inner_factors)
    # Ones in one block: a code of 127 or 7 times a scale that was rounded up.
    assert torch.allclose(got.flat, trained.flat, atol=2**-7)


@pytest.mark.parametrize("wire", ["int8", "int4"])
def test_a_change_from_an_unknown_start_is_refused(wire: Any) -> None:
    parcel = seal_numbers(adapter().flat, adapter().layout, wire)
    for start in (None, Adapter.empty(), frozen(7)):
        with pytest.raises(ClientError, match=f"its change in {wire}, and nothing here tells from what"):
            unseal(parcel, start=start)


def test_the_bytes_of_every_format() -> None:
    count = 3 * BLOCK + 1
    sizes = {wire: wire_bytes(count, wire) for wire in ("fp32", "fp16", "bf16", "int8", "int4")}  # type: ignore[arg-type]
    assert sizes == {"fp32": 1540, "fp16": 770, "bf16": 770, "int8": 385 + 8, "int4": 193 + 8}


def test_an_empty_adapter_travels() -> None:
    got = unseal(carried(seal(Adapter.empty())))
    assert (got.flat.numel(), got.layout) == (0, Layout())


def test_what_does_not_fit_fp16_is_refused_before_it_is_sent() -> None:
    too_large = Adapter.pack({"x": LowRank(torch.full((2, 1), 70_000.0), torch.ones(1, 2))})
    with pytest.raises(ClientError, match=r'federation\.wire .* federation\.wire_down to "bf16"'):
        seal(too_large, "fp16")
    assert seal(too_large).nbytes == 16


def test_a_message_counts_blobs_and_texts() -> None:
    parcel = seal(adapter())
    content = write_message(HEADER_OF, {"update": parcel})
    assert message_bytes(content) == parcel.nbytes + len(parcel.manifest) + len(HEADER_OF.model_dump_json())


def spoilt(parcel: Parcel, **changes: Any) -> Parcel:
    """Write other values into a parcel's manifest and send it."""
    described = json.loads(parcel.manifest) | changes
    return parcel_of(json.dumps(described), parcel.data)


def layout_json(**changes: Any) -> str:
    return json.dumps(json.loads(adapter().layout.to_json()) | changes)


HUGE = 2**31 - 1
LAYOUTS = {
    "a negative size": layout_json(layers=[["x", -4, 4, 1]]),
    "a rank below dense": layout_json(layers=[["x", 4, 4, -2]]),
    "a size that is no number": layout_json(layers=[["x", "4", 4, 1]]),
    "a size that is a fraction": layout_json(layers=[["x", 4.0, 4, 1]]),
    "a size that is true": layout_json(layers=[["x", True, 4, 1]]),
    "a size past 31 bits": layout_json(layers=[["x", 2**31, 4, 1]]),
    "a name that is no text": layout_json(layers=[[3, 4, 4, 1]]),
    "half a character in a name": layout_json(layers=[["\ud800", 4, 4, 1]]),
    "names out of order": layout_json(layers=[["y", 1, 1, 1], ["x", 1, 1, 1]]),
    "a name twice": layout_json(layers=[["x", 1, 1, 1], ["x", 1, 1, 1]]),
    "too few numbers": layout_json(layers=[["x", 4, 4]]),
    "layers that are a number": layout_json(layers=7),
    "a head that is no shape": layout_json(extras=[["h", 5]]),
    "a head that no memory could hold": layout_json(layers=[], extras=[["h", [0, HUGE, HUGE, HUGE]]]),
    "no method": json.dumps({"layers": [], "extras": []}),
    "a list": "[]",
    "no JSON": "{",
    "a number of a million digits": '{"layers": ' + "9" * 10**6 + "}",
    "deep nesting": '{"layers": ' + "[" * 100_000 + "]" * 100_000 + "}",
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_hostile_layout_is_refused(layout: str) -> None:
    with pytest.raises(ClientError, match="manifest cannot be read"):
        spoilt(seal(adapter()), layout=layout)


@pytest.mark.parametrize(
    "layout",
    [layout_json(layers=[["x", HUGE, HUGE, HUGE]]), layout_json(extras=[["h", [HUGE, HUGE]]]), layout_json(layers=[])],
    ids=["huge layer", "huge head", "fewer layers"],
)
def test_a_layout_that_does_not_fit_the_blob_costs_no_memory(layout: str) -> None:
    with pytest.raises(ClientError, match=r"its layout needs \d+"):
        unseal(spoilt(seal(adapter()), layout=layout))


@pytest.mark.parametrize(
    "changes",
    [
        {"wire": "fp64"},
        {"wire": None},
        {"wire": []},
        {"wire": {}},
        {"part": 1},
        {"part": "c"},
        {"part": []},
        {"sha256": 5},
    ],
    ids=str,
)
def test_an_unknown_format_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ClientError, match="unknown format"):
        spoilt(seal(adapter()), **changes)


@pytest.mark.parametrize(
    "changes",
    [{"density": 0.5}, {"part": "sparse"}, *({"part": "sparse", "density": d} for d in (0.0, -1.0, 1.5, 1, "0.5", []))],
    ids=str,
)
def test_an_unknown_mask_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ClientError, match="unknown mask"):
        spoilt(seal(adapter()), **changes)


@pytest.mark.parametrize("key", ["layout", "wire", "part", "density", "sha256"])
def test_a_manifest_without_a_part_is_refused(key: str) -> None:
    parcel = seal(adapter())
    described = json.loads(parcel.manifest)
    del described[key]
    with pytest.raises(ClientError, match="manifest cannot be read"):
        parcel_of(json.dumps(described), parcel.data)


@pytest.mark.parametrize(
    "manifest",
    [None, 5, 1.5, True, b"{}", ["{}"], "", "null", "[]", "7", '"text"', "{}", "{" * 50, "[" * 100_000, "\ud800"],
    ids=lambda manifest: repr(manifest)[:12],
)
def test_what_is_no_manifest_is_refused(manifest: object) -> None:
    with pytest.raises(ClientError, match="manifest"):
        parcel_of(manifest, b"")


def test_an_endless_manifest_is_refused_unread() -> None:
    with pytest.raises(ClientError, match="readable manifest"):
        parcel_of(" " * (MAX_MANIFEST + 1), b"")


def test_damaged_bytes_are_found_by_hash() -> None:
    parcel = seal(adapter())
    flipped = bytes([parcel.data[0] ^ 1]) + parcel.data[1:]
    with pytest.raises(ClientError, match="damaged"):
        unseal(replace(parcel, data=flipped))
    with pytest.raises(ClientError, match="damaged"):
        unseal(spoilt(parcel, sha256=hashlib.sha256(b"other").hexdigest()))


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""], ids=["shorter", "longer", "empty"]
)
def test_a_blob_of_another_size_is_refused(change: Callable[[bytes], bytes]) -> None:
    parcel = seal(adapter())
    with pytest.raises(ClientError, match="its layout needs"):
        unseal(replace(parcel, data=change(parcel.data)))


@pytest.mark.parametrize("wire", ["fp16", "bf16", "int8", "int4"])
def test_fp32_bytes_called_otherwise_are_refused(wire: str) -> None:
    with pytest.raises(ClientError, match="its layout needs"):
        unseal(spoilt(seal(adapter()), wire=wire))


@pytest.mark.parametrize("dispatch", [None, shared(None)], ids=["no dispatch", "nothing frozen"])
def test_a_missing_a_that_nobody_froze_is_refused(dispatch: Dispatch | None) -> None:
    with pytest.raises(ClientError, match="came as b alone, and nothing here tells the rest"):
        unseal(seal(frozen(3), part="b"), dispatch)


def content(config: dict[str, Any], arrays: dict[str, Array]) -> RecordDict:
    return RecordDict({HEADER: ConfigRecord(config), ARRAYS: ArrayRecord(arrays)})


def array(data: bytes = b"", stype: str = STYPE) -> Array:
    return Array(dtype="uint8", shape=(len(data),), stype=stype, data=data)


BODY_TEXT = HEADER_OF.model_dump_json()
MANIFEST = seal(Adapter.empty()).manifest
CONTENTS = {
    "nothing": (RecordDict(), "lacks its header"),
    "no arrays": (RecordDict({HEADER: ConfigRecord({BODY: BODY_TEXT})}), "lacks its header"),
    "no header": (RecordDict({ARRAYS: ArrayRecord({})}), "lacks its header"),
    "arrays as header": (RecordDict({HEADER: ArrayRecord({}), ARRAYS: ArrayRecord({})}), "lacks its header"),
    "no body": (content({}, {}), "no readable Query"),
    "a body that is a number": (content({BODY: 5}, {}), "no readable Query"),
    "a body that is too long": (content({BODY: " " * (MAX_HEADER + 1)}, {}), "no readable Query"),
    "a body that is no JSON": (content({BODY: "{"}, {}), "no Query"),
    "a body with an unknown key": (content({BODY: '{"run":"r","fingerprint":"f","x":1}'}, {}), "no Query: x"),
    "an array too many": (content({BODY: BODY_TEXT}, {"x": array()}), "not those its header names"),
    "an array too few": (content({BODY: BODY_TEXT, "x": MANIFEST}, {}), "not those its header names"),
    "an array of another name": (content({BODY: BODY_TEXT, "x": MANIFEST}, {"y": array()}), "not those"),
    "another kind of array": (content({BODY: BODY_TEXT, "x": MANIFEST}, {"x": array(stype="numpy.ndarray")}), "form"),
    "a manifest that is a number": (content({BODY: BODY_TEXT, "x": 1}, {"x": array()}), "readable manifest"),
}


@pytest.mark.parametrize(("sent", "words"), CONTENTS.values(), ids=CONTENTS)
def test_a_malformed_message_is_refused(sent: RecordDict, words: str) -> None:
    with pytest.raises(ClientError, match=words):
        read_message(sent, Query)


TRAINED = {"client": "ada", "round": 1, "base_version": 0, "num_examples": 3.0, "seconds": 1.0}
BAD_ANSWERS: dict[str, dict[str, Any]] = {
    "no round": {key: value for key, value in TRAINED.items() if key != "round"},
    "a round that is a text": TRAINED | {"round": "one"},
    "negative seconds": TRAINED | {"seconds": -1},
    "endless seconds": TRAINED | {"seconds": float("inf")},
    "seconds that are no number": TRAINED | {"seconds": float("nan")},
    "metrics that are a list": TRAINED | {"metrics": [1]},
    "a metric that is a text": TRAINED | {"metrics": {"loss": "low"}},
    "65 metrics": TRAINED | {"metrics": {str(number): 1.0 for number in range(65)}},
    "a long name": TRAINED | {"client": "x" * 65},
    "a long hash": TRAINED | {"frozen_hash": "x" * 65},
}


@pytest.mark.parametrize("answer", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_an_answer_that_is_none_is_refused(answer: dict[str, Any]) -> None:
    with pytest.raises(ClientError, match="no TrainAnswer"):
        read_header(TrainAnswer, json.dumps(answer))


def test_numbers_that_are_not_finite_travel() -> None:
    answer = TrainAnswer.model_validate(TRAINED | {"num_examples": float("inf"), "metrics": {"loss": float("nan")}})
    got = read_header(TrainAnswer, answer.model_dump_json())
    assert got.num_examples == float("inf")
    assert got.metrics["loss"] != got.metrics["loss"]


@pytest.mark.parametrize("examples", [0.0, -1.0, float("nan")])
def test_an_evaluation_of_no_examples_is_refused(examples: float) -> None:
    text = json.dumps({"client": "ada", "round": 1, "num_examples": examples, "seconds": 0.0})
    with pytest.raises(ClientError, match="num_examples"):
        read_header(EvaluateAnswer, text)


@pytest.mark.parametrize("name", ["../../etc", "a/b", ".hidden", "", "x" * 65, "a\nb", "\u202e"])
def test_a_node_whose_name_could_lead_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(ClientError, match="no Presence: client"):
        read_header(Presence, json.dumps({"client": name}))
