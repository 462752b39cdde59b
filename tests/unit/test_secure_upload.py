"""The upload of a secure sum: padded to the widest rank, packed, and checked when it arrives."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from common.adapter import Adapter
from common.errors import ClientError
from common.experiment import Experiment
from common.federation import Dispatch
from common.lowrank import LowRank
from common.secure.upload import masked_bytes, masked_parcel, masked_words, threshold, widened
from common.travel import take
from server.secure.refusals import secure_refusals
from strategies import aggregation_strategy

SIZES = {"first": (3, 5), "second": (4, 2)}


def adapter(rank: int, fill: float = 1.0) -> Adapter:
    """Build an adapter of a rank, clamped to its layers, with a head."""
    layers = {
        name: LowRank(torch.full((out, min(rank, out, inn)), fill), torch.full((min(rank, out, inn), inn), fill))
        for name, (out, inn) in SIZES.items()
    }
    return Adapter.pack(layers, {"head": torch.arange(3.0)})


@pytest.mark.parametrize("part", ["ab", "b", "a", "inner"])
def test_widening_pads_columns_of_b_and_rows_of_a(part: Any) -> None:
    narrow, wide = adapter(1), adapter(3)
    padded = {
        name: LowRank(
            torch.cat([one.b, torch.zeros(one.b.shape[0], more.rank - one.rank)], dim=1),  # type: ignore[union-attr]
            torch.cat([one.a, torch.zeros(more.rank - one.rank, one.a.shape[1])]),  # type: ignore[union-attr]
        )
        for (name, one), more in zip(narrow.layers.items(), wide.layers.values(), strict=True)
    }
    expected = take(Adapter.pack(padded, narrow.extras), part)
    assert torch.equal(widened(take(narrow, part), part, narrow.layout, wide.layout), expected)


def test_widening_pads_a_core_on_two_sides() -> None:
    frames = Adapter.pack({n: LowRank(torch.eye(o, 2), torch.eye(2, i)) for n, (o, i) in SIZES.items()})
    cores = {"first": torch.tensor([[7.0]]), "second": torch.tensor([[8.0]])}
    narrow = Adapter.pack({n: LowRank(torch.eye(o, 1) @ cores[n], torch.eye(1, i)) for n, (o, i) in SIZES.items()})
    numbers = take(narrow, "core", Dispatch(narrow, 1, 0, "core", frames=frames))
    padded = widened(numbers, "core", narrow.layout, frames.layout)
    assert padded.tolist() == [7, 0, 0, 0, 8, 0, 0, 0]


def test_equal_layouts_need_no_padding() -> None:
    numbers = take(adapter(2), "b")
    assert widened(numbers, "b", adapter(2).layout, adapter(2).layout) is numbers


@pytest.mark.parametrize(
    "wide",
    [
        adapter(1).layout,
        replace(adapter(3).layout, layers=adapter(3).layout.layers[:1]),
        replace(adapter(3).layout, extras=()),
        replace(adapter(3).layout, method="dora"),
        replace(adapter(3).layout, layers=(("first", 3, 5, 2**30), ("second", 4, 2, 2))),
    ],
)
def test_layouts_that_do_not_hold_the_clients_are_refused(wide: Any) -> None:
    with pytest.raises(ClientError, match="other layers, ranks or heads"):
        widened(take(adapter(2), "b"), "b", adapter(2).layout, wide)


@pytest.mark.parametrize(
    ("share", "least", "clients", "expected"),
    [
        (2 / 3, 3, 3, 3),
        (2 / 3, 2, 3, 2),
        (2 / 3, 3, 6, 4),
        (2 / 3, 3, 9, 6),
        (0.7, 2, 10, 7),
        (1, 3, 5, 5),
        (0.6, 3, 2, 3),
    ],
)
def test_the_threshold_is_a_share_but_at_least_the_smallest_cohort(
    share: float, least: int, clients: int, expected: int
) -> None:
    assert threshold(share, least, clients) == expected


def test_packed_words_come_back() -> None:
    words = np.array([0, 1, 2**64 - 1, 0x7FC00000_7FC00000], np.uint64)
    parcel = masked_parcel(words)
    assert parcel.nbytes == masked_bytes(3)
    assert np.array_equal(masked_words({"update": parcel}, 4), words)


def test_uploads_that_are_not_masked_words_are_refused() -> None:
    parcel = masked_parcel(np.arange(4, dtype=np.uint64))
    data = bytearray(parcel.data)
    data[3] ^= 1
    for wrong, words in (
        ({}, "got: none"),
        ({"update": parcel, "more": parcel}, "got: more, update"),
        ({"update": replace(parcel, sha256="")}, "not masked, or not 4 words"),
        ({"update": replace(parcel, data=bytes(data))}, "damaged"),
        ({"update": replace(parcel, data=parcel.data[:-8])}, "bytes"),
        ({"update": replace(parcel, wire="bf16")}, "not masked"),
        ({"update": replace(parcel, layout=adapter(1).layout)}, "not masked"),
        ({"update": masked_parcel(np.arange(5, dtype=np.uint64))}, "not 4 words"),
    ):
        with pytest.raises(ClientError, match=words):
            masked_words(wrong, 4)


# Refusals


def refusals(strategy: str = "fedavg", cohort: int = 4, **sections: Any) -> list[str]:
    table = {
        "task": {"name": "causal_lm"},
        "secure_aggregation": {"enabled": True},
        "strategy": {"name": strategy},
        "simulation": {"clients": 4},
    }
    return secure_refusals(Experiment.parse(table | sections), aggregation_strategy(strategy), cohort)


def test_what_fits_is_not_refused() -> None:
    assert refusals() == []
    assert refusals("flora", 1, secure_aggregation={"enabled": False}, federation={"wire": "int8"}) == []


def test_strategies_that_need_each_update_are_refused_with_those_that_fit() -> None:
    (sentence,) = refusals("flora")
    assert sentence.startswith("strategy flora merges the clients' updates one by one")
    for name in ("fedavg", "ffa_lora"):
        assert name in sentence.rpartition(":")[2]
    assert "lora_lego" not in sentence


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"robust": {"name": "median"}}, "robust rule median compares"),
        ({"federation": {"wire": "fp16"}}, "federation.wire 'fp16' cannot be"),
        ({"federation": {"max_weight_share": 0.5}}, "federation.max_weight_share looks at each"),
        ({"federation": {"max_update_norm": 1.0}}, "federation.max_update_norm looks at each"),
        ({"federation": {"keep_replies": True}}, "keep_replies would keep nothing"),
        ({"cohort": 2}, "2 clients train in a round, a secure sum must hold 3"),
    ],
)
def test_what_a_sum_cannot_serve_is_refused(sections: dict[str, Any], words: str) -> None:
    (sentence,) = refusals(**json.loads(json.dumps(sections)))
    assert words in sentence


def test_everything_wrong_is_told_at_once() -> None:
    federation = {"wire": "int4", "max_weight_share": 0.5, "keep_replies": True}
    assert len(refusals("lora_lego", 2, robust={"name": "krum"}, federation=federation)) == 6
