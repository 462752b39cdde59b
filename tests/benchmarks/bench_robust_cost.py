"""What a round costs beside the merge: robust rules, server optimizers and the certificate, one layer on one thread.

The argument is the layer's size.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from replies import EQUAL, LAST, replies
from reporting import peak_above, report, seconds

from common.adapter import Adapter
from common.federation import ClientInfo, ClientUpdate, ModelSpec, ServerState
from common.start import starting_adapter
from strategies import AggregationStrategy, aggregation_strategy
from strategies.certificate import Certificate, certificate
from strategies.optimizers import OPTIMIZERS, ServerOptimizer
from strategies.robust import ROBUST
from strategies.updates import parts_by_layer

SIZE = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
SPEC = ModelSpec({"layer": (SIZE, SIZE)}, seed=0)
LAYERS = 64
REPEATS = 9
STRATEGIES = ("fedavg", "flora")
"""One on whose numbers rules and optimizers act, and one on whose products they do."""


def last_round(
    strategy: AggregationStrategy, optimizer: ServerOptimizer
) -> tuple[ServerState, ServerState, list[ClientUpdate]]:
    """Play the rounds; return the last one's state before, the state its merge makes, and its replies."""
    state = strategy.init(SPEC)
    while True:
        given = replies(strategy, state, EQUAL)
        after = strategy.aggregate(state, given)
        if after.round == LAST:
            return state, after, given
        state = optimizer.step(state, after, strategy)


def starts(strategy: AggregationStrategy, state: ServerState, given: Sequence[ClientUpdate]) -> dict[str, Adapter]:
    """Return what each client's training began with."""
    clients = [ClientInfo(update.client, rank) for update, rank in zip(given, EQUAL, strict=True)]
    return {client.name: starting_adapter(strategy.dispatch(state, client), SPEC) for client in clients}


def certify(merged: Adapter, given: Sequence[ClientUpdate]) -> Certificate:
    """Measure a merge as the server does."""
    weights = {update.client: update.num_examples for update in given}
    return certificate(merged, parts_by_layer(given).items(), weights)


def works() -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Yield what is measured: what it is, the strategy it goes with, and the work itself."""
    for name in STRATEGIES:
        strategy = aggregation_strategy(name)
        state, after, given = last_round(strategy, OPTIMIZERS.create("none"))
        begun = starts(strategy, state, given)
        for rule in (ROBUST.create(each) for each in ROBUST.names()):
            if not rule.passes_all and (strategy.capabilities.linear_uplink or not rule.needs_linear):
                yield f"robust rule {rule.plugin_name}", name, partial(rule.judge, given, begun)
        for optimizer in (OPTIMIZERS.create(each) for each in OPTIMIZERS.names() if each != "none"):
            held, merged, _ = last_round(strategy, optimizer)
            yield f"server optimizer {optimizer.plugin_name}", name, partial(optimizer.step, held, merged, strategy)
        assert after.merged is not None
        yield "certificate", name, partial(certify, after.merged, given)


def main() -> None:
    """Measure and report."""
    torch.set_num_threads(1)
    rows = []
    for what, strategy, work in works():
        taken = seconds(work, REPEATS, clock=time.process_time)
        _, peak = peak_above(work)
        rows.append([what, strategy, f"{taken * 1000:.1f} ms", f"{taken * LAYERS:.2f} s", f"{peak / 1e6:.1f} MB"])
    report(
        "robust_cost",
        "Robust rules, server optimizers and the certificate",
        f"One layer of {SIZE} × {SIZE}, {len(EQUAL)} clients of rank {EQUAL[0]}, the round after two others. Median "
        f"processor time on one thread; a layer costs what it costs whatever the others are, so {LAYERS} layers are "
        f"that many times one. Memory is the peak above the replies; the layer's matrix alone would be "
        f"{SIZE**2 * 4 / 1e6:.0f} MB in fp32. An optimizer on products (flora) remembers a sum over all rounds, whose "
        "rank, and cost, grows with them until it is kept as a matrix.",
        ["work", "strategy", "one layer", f"{LAYERS} layers", "memory of one layer"],
        rows,
    )


if __name__ == "__main__":
    main()
