"""Clients that fail on purpose: ``[simulation] dropout`` and ``stragglers``, drawn from the run's seed."""

from __future__ import annotations

import time

from client.node import Node
from common.errors import ClientError
from common.seeds import chance


def suffer(node: Node, number: int) -> None:
    """Fail or dawdle in round ``number`` if the experiment's seed says so.

    Raises
    ------
    ClientError
        If this client drops out of this round.
    """
    simulation, seed = node.experiment.simulation, node.experiment.seed
    if chance(simulation.dropout, seed, "dropout", number, node.name):
        raise ClientError("dropped out (simulation.dropout)")
    if chance(simulation.stragglers, seed, "straggler", number, node.name):
        time.sleep(simulation.straggler_delay_s)
