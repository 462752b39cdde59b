"""A round's merge from the replies gathered: weights capped, updates judged, merged, and the optimizer's step taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from common.adapter import Adapter
from common.federation import ClientInfo, ClientUpdate, ServerState
from common.lowrank import Dense, LowRank, Update
from common.travel import around, core_of
from strategies.aggregation import AGGREGATION, AggregationStrategy
from strategies.optimizers import ServerOptimizer
from strategies.robust import ROBUST, Judgement, RobustRule
from strategies.weights import capped_weights


def merge_gathered(
    strategy: AggregationStrategy,
    rule: RobustRule,
    optimizer: ServerOptimizer,
    state: ServerState,
    updates: Sequence[ClientUpdate],
    starts: Mapping[str, Adapter],
    max_weight_share: float | None = None,
) -> tuple[ServerState, Judgement]:
    """Merge a round's updates.

    Parameters
    ----------
    strategy, rule, optimizer : AggregationStrategy, RobustRule, ServerOptimizer
        How.
    state : ServerState
        What the clients trained on.
    updates : sequence of ClientUpdate
        At least one, all screened, in any order.
    starts : mapping of str to Adapter
        What each client's training began with, whole, by name.
    max_weight_share : float in (0, 1], optional
        Cap on a client's share of the round's weight, before the rule.

    Returns
    -------
    ServerState, Judgement
        The next state; what was merged, and what is left of each client's weight.

    Raises
    ------
    ConfigurationError
        If there are too few updates.
    RejectedUpdate
        If an update cannot be merged; names the client.
    """
    ordered = sorted(updates, key=lambda update: update.client)
    if max_weight_share is not None:
        weights = capped_weights({update.client: update.num_examples for update in ordered}, max_weight_share)
        ordered = [replace(update, num_examples=weights[update.client]) for update in ordered]
    judgement = _judged(rule, strategy, state, ordered, starts)
    after = strategy.aggregate(state, judgement.updates)
    return optimizer.step(state, after, strategy), judgement


def robust_refusals(
    rule: RobustRule,
    strategy: AggregationStrategy,
    ranks: Mapping[str, int],
    cohort: int,
    max_weight_share: float | None = None,
) -> list[str]:
    """List, in sentences, why a rule or a cap cannot serve a strategy and its clients; empty if they can.

    Parameters
    ----------
    rule, strategy : RobustRule, AggregationStrategy
        What is to go together.
    ranks : mapping of str to int
        Of the clients that train.
    cohort : int
        Clients trained in a round.
    max_weight_share : float, optional
        Cap on a client's share of the round's weight.
    """
    found = []
    name = rule.plugin_name
    if rule.needs_linear and not strategy.capabilities.linear_uplink:
        linear = [each for each in AGGREGATION.names() if AGGREGATION.plugin(each).capabilities.linear_uplink]
        found.append(
            f"robust rule {name} works on the numbers themselves, which strategy {strategy.plugin_name} does not "
            f"average; use a strategy that does: {', '.join(linear)}; or a rule for any strategy: {_rules_for_any()}"
        )
    elif rule.needs_linear and len(set(ranks.values())) > 1:
        listed = ", ".join(str(rank) for rank in sorted(set(ranks.values())))
        found.append(
            f"robust rule {name} needs equal ranks, the clients have {listed}; give them one rank or use a rule for "
            f"mixed ranks: {_rules_for_any()}"
        )
    elif strategy.capabilities.client_memory and not rule.needs_linear and not rule.passes_all:
        on_numbers = [each for each in ROBUST.names() if ROBUST.plugin(each).needs_linear]
        found.append(
            f"robust rule {name} compares products b a, which the server of strategy {strategy.plugin_name} never sees "
            f"whole; use a rule on the numbers themselves: {', '.join(on_numbers)}"
        )
    if not strategy.weighs_examples():
        blind = [f"robust rule {name}"] if rule.by_weights else []
        blind += ["federation.max_weight_share"] if max_weight_share is not None else []
        found += [
            f"{each} changes weights, but strategy {strategy.plugin_name} with these options does not weigh clients by "
            "them; choose other options or another rule"
            for each in blind
        ]
    if cohort < rule.least_updates:
        found.append(
            f"robust rule {name} needs {rule.least_updates} updates a round, {cohort} clients train; "
            "lower robust.options.attackers or train more clients"
        )
    return found


def _judged(
    rule: RobustRule,
    strategy: AggregationStrategy,
    state: ServerState,
    updates: Sequence[ClientUpdate],
    starts: Mapping[str, Adapter],
) -> Judgement:
    """Let the rule judge the updates; where only cores learn, a rule on numbers judges those.

    The median of the numbers of ``b = B R`` lies no longer in the frame ``B``.
    """
    frames = strategy.dispatch(state, ClientInfo("cohort", 1)).frames
    if frames is None or not rule.needs_linear:
        return rule.judge(updates, starts)
    cores = [replace(update, adapter=_cores(update.adapter, frames)) for update in updates]
    judgement = rule.judge(cores, {client: _cores(start, frames) for client, start in starts.items()})
    whole = [replace(update, adapter=_framed(update.adapter, frames)) for update in judgement.updates]
    return replace(judgement, updates=whole)


def _cores(adapter: Adapter, frames: Adapter) -> Adapter:
    layers: dict[str, Update] = {}
    for name, part in adapter.layers.items():
        frame = frames.layers[name]
        assert isinstance(part, LowRank)
        assert isinstance(frame, LowRank)
        layers[name] = Dense(core_of(part, frame))
    return Adapter.pack(layers, adapter.extras, adapter.method)


def _framed(cores: Adapter, frames: Adapter) -> Adapter:
    layers: dict[str, Update] = {}
    for name, core in cores.layers.items():
        frame = frames.layers[name]
        assert isinstance(frame, LowRank)
        layers[name] = around(core.dense(), frame)
    return Adapter.pack(layers, cores.extras, cores.method)


def _rules_for_any() -> str:
    names = [name for name in ROBUST.names() if name != "none" and not ROBUST.plugin(name).needs_linear]
    return ", ".join(names)
