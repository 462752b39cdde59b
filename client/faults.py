"""Clients that fail or lie on purpose: ``dropout``, ``stragglers`` and ``attackers`` of ``[simulation]``, seeded."""

from __future__ import annotations

import time

from client.node import Node
from common.adapter import Adapter
from common.errors import ClientError
from common.seeds import chance, derive_seed


def drop_out(node: Node, number: int) -> None:
    """Fail in round ``number`` if the experiment's seed says so.

    Raises
    ------
    ClientError
        If this client drops out of this round.
    """
    if chance(node.experiment.simulation.dropout, node.experiment.seed, "dropout", number, node.name):
        raise ClientError("dropped out (simulation.dropout)")


def dawdle(node: Node, number: int) -> None:
    """Take longer in round ``number`` if the experiment's seed says so."""
    simulation = node.experiment.simulation
    if chance(simulation.stragglers, node.experiment.seed, "straggler", number, node.name):
        time.sleep(simulation.straggler_delay_s)


def is_attacker(node: Node) -> bool:
    """Tell whether this client is one of ``simulation.attackers``: the same ones in every round."""
    experiment = node.experiment
    training = [name for name, client in experiment.simulated_clients().items() if client.trains]
    drawn = sorted(training, key=lambda name: (derive_seed(experiment.seed, "attacker", name), name))
    return node.name in drawn[: experiment.simulation.attackers]


def lied(start: Adapter, trained: Adapter, scale: float) -> Adapter:
    """Return what a liar sends: ``start + scale (trained − start)``; what did not learn keeps its bits."""
    return trained.with_flat(start.flat + scale * (trained.flat - start.flat))
