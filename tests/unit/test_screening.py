"""Screening: an honest answer becomes an update, and each kind of bad one is refused with its own reason."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from flwr.app import Message, MessageType, RecordDict

from common.adapter import Adapter, tensor_bytes
from common.errors import RejectedUpdate
from common.experiment import FederationSettings
from common.federation import ClientInfo, ClientUpdate, Dispatch, ModelSpec, ServerState
from common.flower import identify_task
from common.lowrank import Dense, LowRank
from common.messages import TrainAnswer, TrainOrder
from common.start import fresh_a, starting_adapter
from common.wire import Parcel, seal
from server.orders import Order
from server.screening import screen
from strategies import AggregationStrategy, aggregation_strategy

identify_task(1)  # a message belongs to a run

SPEC = ModelSpec({"down": (6, 4), "up": (5, 6)}, seed=3, heads={"head.bias": torch.zeros(2)})
RANK = 3


class Case:
    """One client's honest answer to one order, to be spoilt."""

    def __init__(self, strategy: AggregationStrategy) -> None:
        self.state: ServerState = strategy.init(SPEC)
        self.dispatch: Dispatch = strategy.dispatch(self.state, ClientInfo("ada", RANK))
        start = starting_adapter(self.dispatch, SPEC)
        self.adapter = start.with_flat(start.flat.clone())
        self.adapter.flat[: start.layout.head_numel] += 0.5
        self.settings = FederationSettings()
        self.answer: dict[str, Any] = {"client": "ada", "round": 2, "base_version": 0, "num_examples": 10.0}
        self.answer |= {"seconds": 1.0, "metrics": {"train_loss": 2.0}}
        self.parcels: Mapping[str, Parcel] | None = None
        if self.frozen:
            digest = hashlib.sha256(tensor_bytes(self.adapter.inner_factors)).hexdigest()
            self.answer["frozen_hash"] = digest

    @property
    def frozen(self) -> bool:
        return self.dispatch.frozen_a is not None

    def screened(self) -> ClientUpdate:
        order = TrainOrder(
            run="r",
            round=2,
            attempt=1,
            rounds=5,
            fingerprint="f",
            client="ada",
            base_version=self.state.base_version,
            global_hash="0" * 64,
            rank=self.dispatch.rank,
            seed=self.dispatch.seed,
            trains=self.dispatch.trains,
            frozen_a=self.dispatch.frozen_a,
        )
        sent = seal(self.dispatch.start, part=self.dispatch.receives, dispatch=self.dispatch)
        whole = Order("ada", Message(RecordDict(), 1, MessageType.TRAIN), order, self.dispatch, sent, SPEC)
        parcels = self.parcels if self.parcels is not None else {"update": self.sealed()}
        return screen(whole, TrainAnswer.model_validate(self.answer), parcels, self.state, self.settings)

    def sealed(self) -> Parcel:
        return seal(self.adapter, part=self.dispatch.sends, dispatch=self.dispatch)

    def refused(self, words: str) -> None:
        with pytest.raises(RejectedUpdate, match=words):
            self.screened()


@pytest.fixture
def case() -> Case:
    return Case(aggregation_strategy("flora"))


@pytest.fixture
def frozen_case() -> Case:
    return Case(aggregation_strategy("ffa_lora"))


def layers(adapter: Adapter) -> dict[str, Any]:
    return dict(adapter.layers)


def test_an_honest_answer_becomes_an_update(case: Case) -> None:
    update = case.screened()
    assert (update.client, update.num_examples, update.base_version) == ("ada", 10.0, 0)
    assert update.metrics == {"train_loss": 2.0}
    assert update.adapter.sha256() == case.adapter.sha256()


def test_an_honest_answer_over_a_frozen_a_becomes_an_update(frozen_case: Case) -> None:
    assert frozen_case.screened().adapter.sha256() == frozen_case.adapter.sha256()


def test_the_weight_may_be_the_same_for_all(case: Case) -> None:
    case.settings = FederationSettings(weighting="equal")
    assert case.screened().num_examples == 1.0


def test_metrics_that_are_not_finite_are_dropped(case: Case) -> None:
    case.answer["metrics"] = {"train_loss": math.nan, "last_loss": math.inf, "other": 1.0}
    assert case.screened().metrics == {"other": 1.0}


def test_another_name_is_refused(case: Case) -> None:
    case.answer["client"] = "eve"
    case.refused("signed 'eve', expected 'ada'")


def test_another_round_is_refused(case: Case) -> None:
    case.answer["round"] = 1
    case.refused("for round 1, this is round 2")


def test_another_base_version_is_refused(case: Case) -> None:
    case.answer["base_version"] = 4
    case.refused("base version 4, not on 0")


@pytest.mark.parametrize("examples", [0.0, -1.0, math.nan, math.inf, -math.inf, 1e12])
def test_a_weight_that_is_none_is_refused(case: Case, examples: float) -> None:
    case.answer["num_examples"] = examples
    case.refused("examples, expected 1 to 10000000")


def test_the_largest_weight_is_an_option(case: Case) -> None:
    case.settings = FederationSettings(max_num_examples=9)
    case.refused("10.0 examples, expected 1 to 9")


@pytest.mark.parametrize("names", [[], ["update", "more"], ["other"]], ids=str)
def test_other_adapters_than_one_update_are_refused(case: Case, names: list[str]) -> None:
    case.parcels = {name: seal(case.adapter) for name in names}
    case.refused("expected one adapter named update")


def test_a_missing_layer_is_refused(case: Case) -> None:
    only = {"up": case.adapter.layers["up"]}
    case.adapter = Adapter.pack(only, case.adapter.extras)
    case.refused(r"lacks layer down \(1 in all\)")


def test_an_extra_layer_is_refused(case: Case) -> None:
    case.adapter = Adapter.pack(layers(case.adapter) | {"x" * 300: case.adapter.layers["up"]}, case.adapter.extras)
    case.refused(r"unknown layer 'x{100}' \(1 in all\)")


def test_a_misshapen_layer_is_refused(case: Case) -> None:
    wide = LowRank(torch.ones(5, RANK), torch.ones(RANK, 7))
    case.adapter = Adapter.pack(layers(case.adapter) | {"up": wide}, case.adapter.extras)
    case.refused(r"layer up is \(out, in, rank\) \(5, 7, 3\), expected \(5, 6, 3\)")


@pytest.mark.parametrize("rank", [2, 4])
def test_another_rank_is_refused(case: Case, rank: int) -> None:
    other = LowRank(torch.ones(5, rank), torch.ones(rank, 6))
    case.adapter = Adapter.pack(layers(case.adapter) | {"up": other}, case.adapter.extras)
    case.refused(rf"\(5, 6, {rank}\), expected \(5, 6, 3\)")


def test_a_dense_layer_is_refused(case: Case) -> None:
    case.adapter = Adapter.pack(layers(case.adapter) | {"up": Dense(torch.ones(5, 6))}, case.adapter.extras)
    case.refused(r"\(5, 6, -1\), expected \(5, 6, 3\)")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("place", "named"), [(0, "layer down"), (-1, "layer up"), (3 * 6 + 3 * 5, "head head.bias")])
def test_a_number_that_is_not_finite_is_refused(case: Case, value: float, place: int, named: str) -> None:
    case.adapter.flat[place] = value
    case.refused(f"{named}: NaN or infinity")


def test_a_number_no_sum_can_hold_is_refused(case: Case) -> None:
    case.adapter.flat[0] = 1e30
    case.refused("norm is beyond float32")


def test_another_method_is_refused(case: Case) -> None:
    case.adapter = Adapter.pack(case.adapter.layers, case.adapter.extras, method="dora")
    case.refused("method 'dora'; this run trains 'lora'")


def test_a_frozen_a_that_differs_is_refused(frozen_case: Case) -> None:
    frozen_case.answer["frozen_hash"] = hashlib.sha256(b"other").hexdigest()
    frozen_case.refused("frozen factor differs")


def test_a_frozen_a_nobody_vouches_for_is_refused(frozen_case: Case) -> None:
    frozen_case.answer["frozen_hash"] = None
    frozen_case.refused("frozen factor differs")


def test_a_frozen_a_must_not_travel(frozen_case: Case) -> None:
    frozen_case.parcels = {"update": seal(frozen_case.adapter)}
    frozen_case.refused("sent the part 'ab' of its adapter, expected 'b'")


def test_the_hash_of_another_seed_is_refused(frozen_case: Case) -> None:
    other = [fresh_a(99, name, RANK, inn).reshape(-1) for name, (_, inn) in SPEC.layers.items()]
    frozen_case.answer["frozen_hash"] = hashlib.sha256(tensor_bytes(torch.cat(other))).hexdigest()
    frozen_case.refused("frozen factor differs")


def test_an_update_beyond_the_norm_bound_is_refused(case: Case) -> None:
    norm = float(case.adapter.flat.norm())
    case.settings = FederationSettings(max_update_norm=norm * 1.001)
    assert case.screened().client == "ada"
    case.settings = FederationSettings(max_update_norm=norm * 0.999)
    case.refused("exceeds federation.max_update_norm")


@pytest.mark.parametrize(
    ("heads", "named"),
    [
        ({}, r"'head.bias' has shape None, expected \(2,\)"),
        ({"head.bias": torch.zeros(3)}, r"'head.bias' has shape \(3,\), expected \(2,\)"),
        (
            {"head.bias": torch.zeros(2), "head.weight": torch.zeros(1)},
            r"'head.weight' has shape \(1,\), expected None",
        ),
    ],
    ids=["missing", "misshapen", "extra"],
)
def test_other_heads_are_refused(case: Case, heads: dict[str, torch.Tensor], named: str) -> None:
    case.adapter = Adapter.pack(case.adapter.layers, heads)
    case.refused(named)


def test_ranks_above_a_layer_are_expected_clamped() -> None:
    strategy = aggregation_strategy("flora")
    case = Case(strategy)
    case.dispatch = strategy.dispatch(case.state, ClientInfo("ada", 64))
    case.adapter = starting_adapter(case.dispatch, SPEC)
    update = case.screened()
    assert {name: part.rank for name, part in layers(update.adapter).items()} == {"down": 4, "up": 5}
