"""RoLoRA over several rounds: whose turn it is, what is kept of absent clients, and what a latecomer finds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.adapter import Adapter
from common.errors import ConfigurationError, RejectedUpdate
from common.federation import ClientInfo, ClientUpdate, Dispatch, ServerState
from common.lowrank import LowRank
from common.start import fresh_a, starting_adapter
from common.store import RunStore
from common.travel import complete, take
from strategies import AggregationStrategy, aggregation_strategy
from tests.reference import cohorts
from tests.tiny import drive, synthetic

SPEC = cohorts.model_spec()
STRATEGY = aggregation_strategy("rolora")


def begun(strategy: AggregationStrategy, state: ServerState, client: ClientInfo) -> tuple[Dispatch, Adapter]:
    dispatch = strategy.dispatch(state, client)
    return dispatch, starting_adapter(dispatch, SPEC)


def trained(state: ServerState, name: str, rank: int, strategy: AggregationStrategy = STRATEGY) -> ClientUpdate:
    """Move the factor that learns, as a client would."""
    dispatch, start = begun(strategy, state, ClientInfo(name, rank))
    numbers = take(start, dispatch.sends)
    noise = torch.randn(numbers.shape, generator=torch.Generator().manual_seed(state.round + sum(map(ord, name))))
    adapter = complete(numbers + 0.3 * noise, start.layout, dispatch.sends, dispatch, start)
    return ClientUpdate(name, adapter, 1.0 + rank)


def run(*cohorts_ranks: dict[str, int]) -> ServerState:
    state = STRATEGY.init(SPEC)
    for ranks in cohorts_ranks:
        state = STRATEGY.aggregate(state, [trained(state, name, rank) for name, rank in ranks.items()])
    return state


def factors(adapter: Adapter, layer: str = "out") -> LowRank:
    part = adapter.layers[layer]
    assert isinstance(part, LowRank)
    return part


ALL = {"ada": 2, "bo": 5, "cy": 3}
NARROW = {"ada": 2, "cy": 3}


@pytest.mark.parametrize(("period", "turns"), [(1, "babababa"), (2, "bbaabbaa"), (3, "bbbaaabb")])
def test_factors_take_turns(period: int, turns: str) -> None:
    strategy = aggregation_strategy("rolora", period=period)
    state, seen = strategy.init(SPEC), ""
    for number in range(1, 9):
        dispatch = strategy.dispatch(state, ClientInfo("ada", 2))
        assert (dispatch.receives, dispatch.sends) == strategy.travels(number) == ("ab", dispatch.trains)
        seen += dispatch.trains
        state = strategy.aggregate(state, [trained(state, "ada", 2, strategy)])
    assert seen == turns


def test_turns_follow_merged_rounds() -> None:
    """A round that failed is no turn: the server's count of merges decides, not the round's number."""
    state = run(ALL)
    assert STRATEGY.dispatch(replace(state, round=1), ClientInfo("ada", 2)).trains == "a"
    assert STRATEGY.dispatch(replace(state, round=2), ClientInfo("ada", 2)).trains == "b"


def test_the_factor_that_rests_keeps_its_bits() -> None:
    one = run(ALL)
    two = STRATEGY.aggregate(one, [trained(one, name, rank) for name, rank in ALL.items()])
    three = STRATEGY.aggregate(two, [trained(two, name, rank) for name, rank in ALL.items()])
    for layer in SPEC.layers:
        assert torch.equal(factors(one.start, layer).b, factors(two.start, layer).b)
        assert torch.equal(factors(two.start, layer).a, factors(three.start, layer).a)
        assert not torch.equal(factors(one.start, layer).a, factors(two.start, layer).a)
        assert not torch.equal(factors(two.start, layer).b, factors(three.start, layer).b)


@pytest.mark.parametrize("rounds", range(1, 5))
def test_every_round_is_exact_for_mixed_ranks(rounds: int) -> None:
    state = run(*[ALL] * (rounds - 1))
    updates = [trained(state, name, rank) for name, rank in ALL.items()]
    assert cohorts.error(STRATEGY.aggregate(state, updates), updates) < 1e-6


def test_what_absent_clients_learned_of_a_is_not_lost() -> None:
    """Only narrow clients train b in the third round; the rows of a that only bo holds stay for him."""
    before = run(ALL, ALL)
    state = run(ALL, ALL, NARROW)
    assert torch.equal(factors(state.start).a, factors(before.start).a)
    assert not factors(state.start).b[:, 3:].any()
    _, start = begun(STRATEGY, state, ClientInfo("bo", 5))
    assert torch.equal(factors(start).a, factors(before.start).a)
    updates = [trained(state, name, rank) for name, rank in ALL.items()]
    assert cohorts.error(STRATEGY.aggregate(state, updates), updates) < 1e-6


@pytest.mark.parametrize("joins", [1, 2, 3])
def test_a_wider_latecomer_begins_with_fresh_rows(joins: int) -> None:
    """While a learns his own rows have b = 0 and add nothing; they widen the start once b's turn has come."""
    state = run(*[NARROW] * joins)
    dispatch, start = begun(STRATEGY, state, ClientInfo("bo", 5))
    assert torch.equal(factors(start).a[3:], fresh_a(dispatch.seed, "out", 5, 12)[3:])
    assert not factors(start).b[:, 3:].any()
    updates = [trained(state, name, rank) for name, rank in ALL.items()]
    after = STRATEGY.aggregate(state, updates)
    assert cohorts.error(after, updates) < 1e-6
    assert factors(after.start).rank == (5 if dispatch.trains == "b" else 3)


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_factor_that_was_to_rest_and_moved_is_refused(rounds: int) -> None:
    state = run(*[ALL] * rounds)
    good, bad = trained(state, "ada", 2), trained(state, "bo", 5)
    part = factors(bad.adapter)
    moved = LowRank(part.b, part.a + 1e-6) if rounds == 0 else LowRank(part.b + 1e-6, part.a)
    accumulated = STRATEGY.add(STRATEGY.begin(state), good)
    with pytest.raises(RejectedUpdate, match="client bo, layer out: frozen factor differs"):
        STRATEGY.add(accumulated, cohorts.with_factors(bad, {**bad.adapter.layers, "out": moved}))  # type: ignore[dict-item]
    alone = STRATEGY.finish(state, accumulated)
    assert cohorts.bits(alone) == cohorts.bits(STRATEGY.aggregate(state, [good]))


def test_a_period_is_at_least_one_round() -> None:
    with pytest.raises(ConfigurationError, match="period"):
        aggregation_strategy("rolora", period=0)


@pytest.mark.parametrize("wire", ["fp32", "bf16"])
def test_no_reply_is_refused_whatever_the_scale_and_format(tmp_path: Path, wire: str) -> None:
    """A scale that is no power of two must not cost the resting factor its bits."""
    scale = ("adapter.options.alpha=7", "adapter.options.rslora=true")
    experiment = synthetic("strategy.name=rolora", *scale, f"federation.wire_down={wire}", f"federation.wire={wire}")
    run = drive(experiment, tmp_path)
    with RunStore.open(tmp_path, read_only=True) as store:
        assert {row.status for row in store.client_rounds(run.run.id)} == {"accepted"}
    assert run.metrics["held_out_loss"][-1] < run.metrics["held_out_loss"][0]
