"""What every robust rule must do with every aggregation strategy it fits; runs over whatever it finds of both."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from common.adapter import Adapter
from common.errors import ConfigurationError
from common.federation import ClientInfo, ClientUpdate, ServerState
from common.lowrank import LowRank
from common.start import starting_adapter
from common.travel import complete, take
from strategies import AGGREGATION, AggregationStrategy, aggregation_strategy
from strategies.merging import merge_gathered, robust_refusals
from strategies.optimizers import OPTIMIZERS
from strategies.robust import ROBUST, RobustRule
from tests.reference import cohorts

SPEC = cohorts.model_spec()
CLIENTS, LIARS = len(cohorts.NAMES), ("cy", "hal")


def fits(rule: RobustRule, strategy: AggregationStrategy) -> bool:
    return not robust_refusals(rule, strategy, dict.fromkeys("abcdefgh", 3), CLIENTS)


PAIRS = [
    pytest.param(rule, strategy, id=f"{rule}-{strategy}")
    for rule in ROBUST.names()
    for strategy in AGGREGATION.names()
    if fits(ROBUST.create(rule), aggregation_strategy(strategy))
]
WITH_PRODUCTS = [
    pair
    for pair in PAIRS
    if pair.values[0] != "none" and not AGGREGATION.plugin(str(pair.values[1])).capabilities.client_memory
]


@pytest.fixture(params=ROBUST.names())
def rule(request: pytest.FixtureRequest) -> RobustRule:
    return ROBUST.create(request.param)


def round_of(
    strategy: AggregationStrategy, state: ServerState, equal: bool, seed: int, scale: float = 1.0
) -> tuple[list[ClientUpdate], dict[str, Adapter]]:
    """Return what eight clients give and began with; two of them multiply what they learned."""
    ranks = [3] * CLIENTS if equal or not strategy.capabilities.mixed_ranks else [2, 5, 3, 4, 6, 1, 2, 2]
    updates, starts = [], {}
    for place, (name, rank) in enumerate(zip(cohorts.NAMES, ranks, strict=True)):
        dispatch = strategy.dispatch(state, ClientInfo(name, rank))
        start = starting_adapter(dispatch, SPEC)
        numbers = take(start, dispatch.sends, dispatch)
        generator = torch.Generator().manual_seed(seed * CLIENTS + place)
        learned = 0.1 + 0.02 * torch.randn(len(numbers), generator=generator)
        sent = numbers + learned * (scale if name in LIARS else 1.0)
        before = start if dispatch.sends in ("a", "b") else None
        adapter = complete(sent, start.layout, dispatch.sends, dispatch, before)
        updates.append(ClientUpdate(name, adapter, 10.0 + place, state.base_version))
        starts[name] = start
    return updates, starts


def run(
    rule: RobustRule, strategy: AggregationStrategy, rounds: int = 3, scale: float = 1.0, turn: int = 0
) -> ServerState:
    state, optimizer = strategy.init(SPEC), OPTIMIZERS.create("none")
    for number in range(rounds):
        updates, starts = round_of(strategy, state, rule.needs_linear, number, scale)
        state, judgement = merge_gathered(
            strategy, rule, optimizer, state, updates[turn:] + updates[:turn], starts, 0.5
        )
        assert set(judgement.trust) <= set(starts)
        assert all(0 <= share <= 1 for share in judgement.trust.values())
    return state


def test_it_says_what_it_is(rule: RobustRule) -> None:
    for option, field in type(rule).model_fields.items():
        assert field.description, f"{option} has no description"
        assert not field.is_required(), f"{option} has no default"
    text = sys.modules[type(rule).__module__].__doc__ or ""
    assert rule.plugin_name == "none" or re.search(r"arXiv\s\d{4}\.\d{5}", text), "the module cites no paper"
    assert type(rule).__doc__
    assert rule.least_updates >= 1
    assert rule.passes_all == (rule.plugin_name == "none")
    with pytest.raises(ConfigurationError, match="unknown key 'no_such_option'"):
        ROBUST.create(rule.plugin_name, {"no_such_option": 1})


@pytest.mark.parametrize(("rule_name", "name"), PAIRS)
def test_rounds_run_and_the_order_of_replies_is_irrelevant(rule_name: str, name: str) -> None:
    rule, strategy = ROBUST.create(rule_name), aggregation_strategy(name)
    state = run(rule, strategy)
    assert state.round == 3
    assert bool(state.start.flat.isfinite().all())
    assert bool(state.global_adapter.flat.isfinite().all())
    assert bits(run(rule, strategy, turn=3)) == bits(state)


def bits(state: ServerState) -> tuple[str, str]:
    return state.start.sha256(), state.global_adapter.sha256()


@pytest.mark.parametrize(("rule_name", "name"), WITH_PRODUCTS)
def test_liars_move_the_model_less_than_without_a_rule(rule_name: str, name: str) -> None:
    """What the liars change of the merge, against the change they make where nobody looks."""
    strategy = aggregation_strategy(name)
    rule = ROBUST.create(rule_name)
    moved = {}
    for each in (rule, ROBUST.create("none")):
        honest, lied = (_merged(each, strategy, rule.needs_linear, scale) for scale in (1.0, -10.0))
        moved[each.plugin_name] = sum((lied[layer] - honest[layer]).norm() ** 2 for layer in honest)
    assert moved[rule_name] < moved["none"] / 10


def _merged(rule: RobustRule, strategy: AggregationStrategy, equal: bool, scale: float) -> dict[str, torch.Tensor]:
    """Return the products that one round from the same state makes."""
    state = strategy.init(SPEC)
    updates, starts = round_of(strategy, state, equal, 0, scale)
    state, _ = merge_gathered(strategy, rule, OPTIMIZERS.create("none"), state, updates, starts)
    assert state.merged is not None
    return {layer: part.dense() for layer, part in state.merged.layers.items()}


@pytest.mark.parametrize(("rule_name", "name"), PAIRS)
def test_a_round_of_one_client_is_that_client(rule_name: str, name: str) -> None:
    strategy, rule = aggregation_strategy(name), ROBUST.create(rule_name)
    state = strategy.init(SPEC)
    updates, starts = round_of(strategy, state, rule.needs_linear, 0)
    alone = strategy.aggregate(state, updates[:1])
    judged, _ = merge_gathered(strategy, rule, OPTIMIZERS.create("none"), state, updates[:1], starts)
    torch.testing.assert_close(judged.start.flat, alone.start.flat, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(judged.global_adapter.flat, alone.global_adapter.flat, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["ffa_lora", "rolora", "fed_sb"])
@pytest.mark.parametrize("rule_name", [each for each in ROBUST.names() if each != "none"])
def test_what_does_not_learn_keeps_its_bits(rule_name: str, name: str) -> None:
    """In every round: a over frozen a, either factor in turn, frames."""
    strategy, rule = aggregation_strategy(name), ROBUST.create(rule_name)
    state = strategy.init(SPEC)
    for number in range(4):
        dispatch = strategy.dispatch(state, ClientInfo("ada", 3))
        start = starting_adapter(dispatch, SPEC)
        updates, starts = round_of(strategy, state, True, number, scale=-10.0)
        state, _ = merge_gathered(strategy, rule, OPTIMIZERS.create("none"), state, updates, starts)
        if name == "fed_sb" and number == 1:
            continue  # frames are new
        for layer, part in state.start.layers.items():
            known = start.layers[layer]
            assert isinstance(part, LowRank)
            assert isinstance(known, LowRank)
            if dispatch.trains != "a":
                assert torch.equal(part.a, known.a)
            else:
                assert torch.equal(part.b, known.b)
