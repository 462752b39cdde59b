"""One step of a server optimizer, the same for every strategy.

What a round changed is taken as a gradient Δ that points downhill (Reddi et al., arXiv 2003.00295, algorithm 2), and
the state, which the strategy has moved by Δ, is moved on by ``step − Δ``. Where the numbers of the start adapter mean
the same from round to round, Δ is the change of each of them, as in the paper (`strategies.coordinate_step`); elsewhere
it is the change of the whole model, layer by layer (`strategies.product_step`), and only heads move by coordinates. A
round in which a strategy goes over to another stage, whose numbers mean something else, is taken as merged.
"""

from __future__ import annotations

from dataclasses import replace

from common.adapter import Adapter
from common.federation import Part, ServerState
from strategies.aggregation import AggregationStrategy
from strategies.coordinate_step import coordinate_step
from strategies.product_step import product_step
from strategies.server_rule import PREFIX, Rule


def server_step(before: ServerState, after: ServerState, strategy: AggregationStrategy, rule: Rule) -> ServerState:
    """Move the state by the optimizer's step instead of by what was merged; ``merged`` stays the strategy's own.

    Parameters
    ----------
    before, after : ServerState
        Before and after the strategy merged a round.
    strategy : AggregationStrategy
        Tells what the start adapter's numbers mean; a cap on its ``global_rank`` is kept.
    rule : Rule
        The optimizer.
    """
    others = {name: value for name, value in after.extras.items() if not name.startswith(PREFIX)}
    if strategy.capabilities.same_coordinates:
        learned, next_learned = (_kind(strategy, number) for number in (after.round, after.round + 1))
        begun = before.start if learned == next_learned else _heads(before.start)
        start, memory = coordinate_step(begun, after.start, before.extras, rule, by_layer=learned == "core")
        return replace(after, start=start, extras=others | memory)
    heads, memory = coordinate_step(_heads(before.start), _heads(after.start), before.extras, rule)
    total, held = product_step(before, after, rule, strategy.model_dump().get("global_rank"))
    return replace(
        after,
        start=Adapter.pack(after.start.layers, heads.extras, after.start.method) if heads.extras else after.start,
        global_adapter=total,
        base_version=after.base_version if total is after.global_adapter else before.base_version + 1,
        extras=others | memory | held,
    )


def _kind(strategy: AggregationStrategy, number: int) -> Part:
    """Tell what the start adapter's numbers are to a training round: factors, or what another stage trains."""
    up = strategy.travels(number).up
    return up if up in ("core", "sparse") else "ab"


def _heads(start: Adapter) -> Adapter:
    return Adapter.pack({}, start.extras, start.method)
