"""What every server optimizer must do with every aggregation strategy; runs over whatever it finds of both."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.adapter_file import read_state, state_bytes
from common.federation import ServerState
from strategies import AGGREGATION, AggregationStrategy, aggregation_strategy
from strategies.optimizers import OPTIMIZERS, ServerOptimizer
from tests.contract.test_aggregation_contract import SPEC, replies
from tests.reference import cohorts


@pytest.fixture(params=AGGREGATION.names())
def strategy(request: pytest.FixtureRequest) -> AggregationStrategy:
    return aggregation_strategy(request.param)


@pytest.fixture(params=OPTIMIZERS.names())
def optimizer(request: pytest.FixtureRequest) -> ServerOptimizer:
    return OPTIMIZERS.create(request.param)


def after_round(
    state: ServerState, strategy: AggregationStrategy, optimizer: ServerOptimizer, number: int, turn: int = 0
) -> ServerState:
    updates = replies(strategy, state, seed=number)
    return optimizer.step(state, strategy.aggregate(state, updates[turn:] + updates[:turn]), strategy)


def run(strategy: AggregationStrategy, optimizer: ServerOptimizer, rounds: int = 3, turn: int = 0) -> ServerState:
    state = strategy.init(SPEC)
    for number in range(rounds):
        state = after_round(state, strategy, optimizer, number, turn)
    return state


def test_it_says_what_it_is(optimizer: ServerOptimizer) -> None:
    for option, field in type(optimizer).model_fields.items():
        assert field.description, f"{option} has no description"
        assert not field.is_required(), f"{option} has no default"
    text = sys.modules[type(optimizer).__module__].__doc__ or ""
    assert optimizer.plugin_name == "none" or re.search(r"arXiv\s\d{4}\.\d{5}", text), "the module cites no paper"
    assert type(optimizer).__doc__


def test_rounds_run(strategy: AggregationStrategy, optimizer: ServerOptimizer) -> None:
    state = run(strategy, optimizer)
    assert state.round == 3
    assert state.base_version <= 3
    assert bool(state.start.flat.isfinite().all())
    assert bool(state.global_adapter.flat.isfinite().all())
    assert all(bool(value.isfinite().all()) for value in state.extras.values())
    assert state.start.extras.keys() == strategy.init(SPEC).start.extras.keys()
    assert (state.start.method, state.global_adapter.method) == (SPEC.method, SPEC.method)


def test_the_model_moves_otherwise_than_without(strategy: AggregationStrategy, optimizer: ServerOptimizer) -> None:
    plain = run(strategy, OPTIMIZERS.create("none"))
    moved = cohorts.bits(run(strategy, optimizer))[:2] != cohorts.bits(plain)[:2]
    assert moved == (optimizer.plugin_name != "none")


def test_what_others_remember_survives(strategy: AggregationStrategy, optimizer: ServerOptimizer) -> None:
    state = strategy.init(SPEC)
    kept = torch.tensor([1.0, 2.0])
    state = replace(state, extras={**state.extras, "somebody.else/out": kept})
    for number in range(2):
        state = after_round(state, strategy, optimizer, number)
    assert torch.equal(state.extras["somebody.else/out"], kept)


def test_nothing_given_is_changed(strategy: AggregationStrategy, optimizer: ServerOptimizer) -> None:
    before = run(strategy, optimizer, 2)
    merged = strategy.aggregate(before, replies(strategy, before, seed=2))
    wanted = state_bytes(before), state_bytes(merged)
    optimizer.step(before, merged, strategy)
    assert (state_bytes(before), state_bytes(merged)) == wanted


def test_the_order_of_replies_does_not_change_a_bit(strategy: AggregationStrategy, optimizer: ServerOptimizer) -> None:
    assert state_bytes(run(strategy, optimizer, turn=1)) == state_bytes(run(strategy, optimizer))


def test_a_run_goes_on_from_disk_with_the_same_bits(
    strategy: AggregationStrategy, optimizer: ServerOptimizer, tmp_path: Path
) -> None:
    state = run(strategy, optimizer, 2)
    (tmp_path / "state").write_bytes(state_bytes(state))
    again = read_state(tmp_path / "state", SPEC)
    assert state_bytes(again) == state_bytes(state)
    gone_on = [after_round(each, strategy, optimizer, 2) for each in (state, again)]
    assert state_bytes(gone_on[0]) == state_bytes(gone_on[1])
