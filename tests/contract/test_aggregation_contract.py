"""What every aggregation strategy must do; runs over whatever strategies it finds."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from common.adapter import Adapter
from common.errors import ConfigurationError, RejectedUpdate
from common.federation import ClientInfo, ClientUpdate, Dispatch, ServerState
from common.lowrank import Dense, LowRank
from common.start import starting_adapter
from common.travel import complete, take
from strategies import AGGREGATION, AggregationStrategy, aggregation_strategy
from strategies.aggregation import Capabilities
from tests.reference import cohorts

NAMES = AGGREGATION.names()
SPEC = cohorts.model_spec()
WEIGHTS = dict(zip(cohorts.NAMES, (10, 30, 60, 5, 17, 1, 2, 3), strict=True))


def owners(strategy: AggregationStrategy, count: int = 3) -> list[ClientInfo]:
    """Return clients of ranks the strategy can serve."""
    ranks = [2, 5, 3, 4, 6, 1, 2, 2] if strategy.capabilities.mixed_ranks else [3] * 8
    return [ClientInfo(name, rank) for name, rank in zip(cohorts.NAMES[:count], ranks, strict=False)]


def train(strategy: AggregationStrategy, state: ServerState, client: ClientInfo, seed: int = 0) -> ClientUpdate:
    """Move the numbers that travel a little, as a client would; all others are what both sides know."""
    dispatch = strategy.dispatch(state, client)
    start = starting_adapter(dispatch, SPEC)
    generator = torch.Generator().manual_seed(seed + sum(map(ord, client.name)))
    numbers = take(start, dispatch.sends, dispatch)
    moved = numbers + 0.1 * torch.randn(numbers.shape, generator=generator)
    known = start if dispatch.sends in ("a", "b") else None
    adapter = complete(moved, start.layout, dispatch.sends, dispatch, known)
    return ClientUpdate(client.name, adapter, WEIGHTS[client.name], state.base_version)


def replies(strategy: AggregationStrategy, state: ServerState, count: int = 3, seed: int = 0) -> list[ClientUpdate]:
    return [train(strategy, state, client, seed) for client in owners(strategy, count)]


def run(strategy: AggregationStrategy, rounds: int = 2) -> ServerState:
    state = strategy.init(SPEC)
    for number in range(rounds):
        state = strategy.aggregate(state, replies(strategy, state, seed=number))
    return state


def tensors(value: Any) -> Iterator[Tensor]:
    """Find every tensor an accumulator holds."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Adapter):
        yield value.flat
    elif is_dataclass(value):
        for each in fields(value):
            yield from tensors(getattr(value, each.name))
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors(each)


def held_bytes(strategy: AggregationStrategy, state: ServerState, updates: Sequence[ClientUpdate]) -> int:
    accumulated = strategy.begin(state)
    for update in updates:
        accumulated = strategy.add(accumulated, update)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(accumulated))


@pytest.fixture(params=NAMES)
def strategy(request: pytest.FixtureRequest) -> AggregationStrategy:
    return aggregation_strategy(request.param)


def test_it_says_what_it_is(strategy: AggregationStrategy) -> None:
    """Capabilities, options with a description and a default, and the paper it follows."""
    assert isinstance(strategy.capabilities, Capabilities)
    assert all(isinstance(value, bool) for value in strategy.capabilities.as_dict().values())
    for option, field in type(strategy).model_fields.items():
        assert field.description, f"{option} has no description"
        assert not field.is_required(), f"{option} has no default"
    assert type(strategy)() == strategy
    text = sys.modules[type(strategy).__module__].__doc__ or ""
    assert re.search(r"arXiv \d{4}\.\d{5}", text), "the module's docstring cites no paper"
    assert type(strategy).__doc__
    json.dumps(strategy.model_dump())
    with pytest.raises(ConfigurationError, match="unknown key 'no_such_option'"):
        aggregation_strategy(strategy.plugin_name, no_such_option=1)


def test_two_rounds_run(strategy: AggregationStrategy) -> None:
    state = run(strategy)
    assert state.round == 2
    assert state.base_version in (0, 2)
    assert (state.base_version == 2) == bool(state.global_adapter.layers)
    assert bool(state.start.flat.isfinite().all())
    assert bool(state.global_adapter.flat.isfinite().all())
    personal = strategy.capabilities.client_memory
    assert (state.merged is None) == personal
    assert state.merged is None or state.merged.layers.keys() == SPEC.layers.keys()
    assert state.start.extras.keys() == (set() if personal else SPEC.heads.keys())
    assert (state.start.method, state.global_adapter.method) == (SPEC.method, SPEC.method)
    assert json.loads(json.dumps(state.metrics)) == dict(state.metrics)
    assert all(math.isfinite(value) for value in state.metrics.values())


def test_the_state_after_a_merge_starts_every_client(strategy: AggregationStrategy) -> None:
    for state in (strategy.init(SPEC), run(strategy), run(strategy, 4)):
        for client in owners(strategy, 8):
            dispatch = strategy.dispatch(state, client)
            assert isinstance(dispatch, Dispatch)
            assert (dispatch.rank, 0 <= dispatch.seed < 2**63) == (client.rank, True)
            assert all(
                isinstance(part, Dense) if dispatch.density else part.rank <= client.rank
                for part in dispatch.start.layers.values()
            )
            start = starting_adapter(dispatch, SPEC)
            for layer, part in start.layers.items():
                assert isinstance(part, LowRank) == (dispatch.density is None)
                frame = dispatch.frames.layers[layer] if dispatch.frames is not None else None
                held = frame.rank if isinstance(frame, LowRank) else client.rank
                assert not isinstance(part, LowRank) or part.rank == SPEC.layer_rank(layer, min(client.rank, held))
            assert start.extras.keys() == SPEC.heads.keys()
            assert (dispatch.frozen_a is not None) == strategy.capabilities.shared_frozen_factor
            assert (dispatch.receives, dispatch.sends) == strategy.travels(state.round + 1)
            assert dispatch.keeps_b == strategy.capabilities.client_memory


def test_downloads_are_no_larger_than_planned(strategy: AggregationStrategy) -> None:
    clients = owners(strategy)
    ranks = [client.rank for client in clients]
    for merges in range(3):
        state = run(strategy, merges)
        for client in clients:
            start, total = strategy.expected_ranks(client.rank, ranks, merges)
            sent = strategy.dispatch(state, client).start
            assert all(part.rank <= start for part in sent.layers.values() if isinstance(part, LowRank))
            assert bool(sent.layers) == bool(start)
            merged = state.global_adapter.layers.values()
            assert all(part.rank <= total for part in merged if isinstance(part, LowRank))
            assert bool(merged) == bool(total)


def test_training_starts_from_what_was_merged(strategy: AggregationStrategy) -> None:
    """Global adapter and start of the widest client together are the merged model."""
    state = strategy.init(SPEC)
    after = strategy.aggregate(state, replies(strategy, state))
    if after.merged is None:
        assert strategy.capabilities.client_memory
        return
    widest = max(owners(strategy), key=lambda client: client.rank)
    start = starting_adapter(strategy.dispatch(after, widest), SPEC)
    for layer in SPEC.layers:
        model = start.layers[layer].dense()
        if layer in after.global_adapter.layers:
            model = model + after.global_adapter.layers[layer].dense()
        torch.testing.assert_close(model, after.merged.layers[layer].dense(), rtol=1e-4, atol=1e-5)


def test_the_order_of_replies_does_not_change_a_bit(strategy: AggregationStrategy) -> None:
    state = run(strategy, 1)
    updates = replies(strategy, state, 5)
    wanted = cohorts.bits(strategy.aggregate(state, updates))
    for turn in range(1, 5):
        assert cohorts.bits(strategy.aggregate(state, updates[turn:] + updates[:turn])) == wanted
    assert cohorts.bits(strategy.aggregate(state, updates[::-1])) == wanted


def test_folding_one_by_one_is_the_same_as_all_at_once(strategy: AggregationStrategy) -> None:
    state = run(strategy, 1)
    updates = replies(strategy, state)
    accumulated = strategy.begin(state)
    for update in updates:
        accumulated = strategy.add(accumulated, update)
    one_by_one = strategy.finish(state, accumulated)
    assert cohorts.bits(one_by_one) == cohorts.bits(strategy.aggregate(state, updates))


def test_state_goes_in_and_comes_out(strategy: AggregationStrategy) -> None:
    """Nothing given is changed, nothing is kept between calls, and the same run gives the same bits."""
    state = run(strategy, 1)
    updates = replies(strategy, state)
    before = cohorts.bits(state), [update.adapter.sha256() for update in updates], strategy.model_dump()
    first = strategy.aggregate(state, updates)
    assert (cohorts.bits(state), [u.adapter.sha256() for u in updates], strategy.model_dump()) == before
    assert cohorts.bits(strategy.aggregate(state, updates)) == cohorts.bits(first)
    assert cohorts.bits(run(strategy)) == cohorts.bits(run(type(strategy)()))
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    run(strategy)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_linear_strategy_holds_no_more_for_more_clients(strategy: AggregationStrategy) -> None:
    state = strategy.init(SPEC)
    wide = [replace(client, rank=6) for client in owners(strategy, 8)]
    updates = [train(strategy, state, client) for client in wide]
    few, many = held_bytes(strategy, state, updates[:2]), held_bytes(strategy, state, updates)
    assert (few == many) == strategy.capabilities.linear_uplink
    if strategy.capabilities.linear_uplink:
        assert many <= 2 * updates[0].adapter.nbytes


def test_an_exact_strategy_is_exact(strategy: AggregationStrategy) -> None:
    assert strategy.is_exact() == strategy.capabilities.exact
    state = run(strategy, 1)
    updates = replies(strategy, state, 5)
    after = strategy.aggregate(state, updates)
    assert math.isfinite(cohorts.error(after, updates) if after.merged is not None else 0.0)
    if strategy.is_exact():
        assert cohorts.error(after, updates) < 2e-6


def test_an_exact_strategy_stays_exact(strategy: AggregationStrategy) -> None:
    """Whatever the round: factors that take turns, cores after their frames were found."""
    for merged in range(2, 5):
        state = run(strategy, merged)
        updates = replies(strategy, state, 5, seed=merged)
        after = strategy.aggregate(state, updates)
        if strategy.is_exact():
            assert cohorts.error(after, updates) < 2e-6


def test_mixed_ranks_are_refused_by_strategies_that_cannot_serve_them(strategy: AggregationStrategy) -> None:
    assert strategy.refusals({"ada": 4, "bo": 4}) == []
    refused = strategy.refusals({"ada": 4, "bo": 8, "cy": 4})
    if strategy.capabilities.mixed_ranks:
        assert refused == []
    else:
        (reason,) = refused
        assert f"{strategy.plugin_name} needs equal ranks: bo (8) differ from rank 4" in reason
        assert "flora" in reason


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf])
def test_a_weight_must_be_a_positive_number(strategy: AggregationStrategy, weight: float) -> None:
    state = strategy.init(SPEC)
    one, *others = replies(strategy, state)
    with pytest.raises(RejectedUpdate, match=f"client ada weighs {weight}; expected a positive, finite weight"):
        strategy.aggregate(state, [replace(one, num_examples=weight), *others])


def test_a_round_without_updates_is_refused(strategy: AggregationStrategy) -> None:
    state = strategy.init(SPEC)
    with pytest.raises(ConfigurationError, match="a round without any update cannot be merged"):
        strategy.aggregate(state, [])
    with pytest.raises(ConfigurationError, match="a round without any update cannot be merged"):
        strategy.finish(state, strategy.begin(state))


def test_an_update_of_another_base_is_refused(strategy: AggregationStrategy) -> None:
    state = strategy.init(SPEC)
    one, *others = replies(strategy, state)
    with pytest.raises(RejectedUpdate, match="client ada trained on base version 7"):
        strategy.aggregate(state, [replace(one, base_version=7), *others])


def test_a_refused_reply_leaves_the_accumulator_alone(strategy: AggregationStrategy) -> None:
    """A strategy may refuse a reply of its own accord; the round then goes on as if it had not come."""
    state = strategy.init(SPEC)
    updates = replies(strategy, state)
    strange = Adapter.pack({"out": LowRank(torch.ones(12, 40), torch.ones(40, 12))}, updates[0].adapter.extras)
    accumulated = strategy.begin(state)
    accumulated = strategy.add(accumulated, updates[0])
    try:
        strategy.add(accumulated, replace(updates[1], adapter=strange))
    except RejectedUpdate:
        for update in updates[1:]:
            accumulated = strategy.add(accumulated, update)
        after = strategy.finish(state, accumulated)
        assert cohorts.bits(after) == cohorts.bits(strategy.aggregate(state, updates))
    else:
        assert strategy.capabilities.mixed_ranks
