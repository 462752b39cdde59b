"""What an update must be before it may be merged."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from common.adapter import Adapter
from common.errors import ConfigurationError, RejectedUpdate
from common.federation import ClientUpdate
from common.lowrank import Dense, LowRank
from strategies import aggregation_strategy
from strategies.updates import by_layer, check_update, low_rank_layers, shares
from tests.reference import cohorts

SPEC = cohorts.model_spec()
STATE = aggregation_strategy("flora").init(SPEC)
GOOD = cohorts.cohort(SPEC, [3])[0]


def with_layer(name: str, part: LowRank | Dense) -> ClientUpdate:
    layers = {**GOOD.adapter.layers, name: part}
    return replace(GOOD, adapter=Adapter.pack(layers, GOOD.adapter.extras))


def with_number(where: int, value: float) -> ClientUpdate:
    flat = GOOD.adapter.flat.clone()
    flat[where] = value
    return replace(GOOD, adapter=GOOD.adapter.with_flat(flat))


def with_heads(heads: dict[str, torch.Tensor]) -> ClientUpdate:
    return replace(GOOD, adapter=Adapter.pack(GOOD.adapter.layers, heads))


FAULTS = {
    "nan weight": (
        replace(GOOD, num_examples=math.nan),
        "client ada weighs nan; expected a positive, finite",
    ),
    "zero weight": (replace(GOOD, num_examples=0), "client ada weighs 0; expected a positive"),
    "negative weight": (replace(GOOD, num_examples=-1), "client ada weighs -1; expected a positive"),
    "infinite weight": (replace(GOOD, num_examples=math.inf), "client ada weighs inf; expected a positive"),
    "stale": (replace(GOOD, base_version=2), "client ada trained on base version 2, not on 0; it must fetch"),
    "method": (
        replace(GOOD, adapter=Adapter.pack(GOOD.adapter.layers, GOOD.adapter.extras, "dora")),
        "client ada trained the method 'dora'; this run trains 'lora'",
    ),
    "unknown layer": (
        with_layer("lm_head", LowRank(torch.ones(2, 1), torch.ones(1, 2))),
        "client ada, layer lm_head: no such target layer",
    ),
    "shape": (
        with_layer("out", LowRank(torch.ones(12, 1), torch.ones(1, 11))),
        "client ada, layer out: shape (12, 11); the model's layer is (12, 12) (out, in)",
    ),
    "dense": (
        with_layer("out", Dense(torch.ones(12, 12))),
        "client ada, layer out: a dense matrix; expected",
    ),
    "nan in b": (with_number(0, math.nan), "client ada, layer down: NaN or infinity"),
    "infinity in a": (with_number(-1, -math.inf), "client ada, layer up: NaN or infinity"),
    "nan in a head": (
        with_number(GOOD.adapter.layout.head_numel - 1, math.nan),
        "client ada, head score.weight: NaN or infinity",
    ),
    "no heads": (with_heads({}), "client ada, head score.bias: shape None; expected (3,)"),
    "other head": (
        with_heads({**GOOD.adapter.extras, "zzz": torch.ones(1)}),
        "client ada, head zzz: shape (1,); expected None",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_with_client_and_layer(fault: str) -> None:
    update, reason = FAULTS[fault]
    with pytest.raises(RejectedUpdate) as caught:
        check_update(update, STATE)
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_no_strategy_merges_a_fault(fault: str) -> None:
    with pytest.raises(RejectedUpdate):
        aggregation_strategy("flora").aggregate(STATE, [FAULTS[fault][0]])


def test_a_good_update_passes() -> None:
    check_update(GOOD, STATE)
    check_update(cohorts.cohort(SPEC, [0])[0], STATE)


def test_dense_parts_are_refused_where_factors_are_needed() -> None:
    with pytest.raises(RejectedUpdate, match="client ada, layer out: a dense matrix"):
        low_rank_layers(FAULTS["dense"][0])


def test_updates_by_layer() -> None:
    one, two = cohorts.cohort(SPEC, [1, 2])
    two = replace(two, adapter=Adapter.pack({"out": two.adapter.layers["out"]}))
    found = by_layer([two, one])
    assert list(found) == ["down", "out", "up"]
    assert {layer: list(parts) for layer, parts in found.items()} == {
        "down": ["ada"],
        "out": ["bo", "ada"],
        "up": ["ada"],
    }
    assert found["out"]["bo"].rank == 2


def test_shares_count_every_client() -> None:
    assert shares(cohorts.cohort(SPEC, [1, 1, 1])) == {"ada": 0.1, "bo": 0.3, "cy": 0.6}


def test_a_client_may_answer_once() -> None:
    with pytest.raises(ConfigurationError, match="client ada sent two updates"):
        aggregation_strategy("flora").aggregate(STATE, [GOOD, GOOD])
