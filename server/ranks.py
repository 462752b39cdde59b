"""The rank each client trains: from the experiment, its device, or the bytes it may send."""

from __future__ import annotations

from common.adapter import Layout
from common.errors import ConfigurationError
from common.experiment import ClientSettings, Experiment
from common.federation import ModelSpec
from server.traffic import Traffic
from strategies import AggregationStrategy

LOOKED_AT = 100
"""Rounds whose uploads must fit a budget, however many are planned: a run that is extended keeps its ranks."""


def client_rank(
    experiment: Experiment,
    strategy: AggregationStrategy,
    spec: ModelSpec,
    settings: ClientSettings,
    default: int,
    device: int | None = None,
) -> int:
    """Return a client's rank.

    Parameters
    ----------
    experiment, strategy, spec
        What is run.
    settings : ClientSettings
        Its rank, if it has one of its own, and its byte budget.
    default : int
        The adapter's rank.
    device : int, optional
        Highest rank its device can carry, as far as that is known; counts for ``rank = "auto"``.

    Raises
    ------
    ConfigurationError
        If not even rank 1 fits its bytes.
    """
    rank = min(device or default, default) if settings.rank == "auto" else settings.rank or default
    if settings.upload_bytes is None:
        return rank
    return _affordable(Traffic(experiment, strategy, spec, [rank], Layout()), rank, settings.upload_bytes)


def _affordable(traffic: Traffic, most: int, budget: int) -> int:
    """Return the largest rank whose upload fits the budget in every round."""
    parts = {traffic.strategy.travels(number).up: number for number in range(1, LOOKED_AT + 1)}

    def largest(rank: int) -> int:
        return max(traffic.upload(rank, number) for number in parts.values())

    fitting = next((rank for rank in range(most, 0, -1) if largest(rank) <= budget), 0)
    if not fitting:
        raise ConfigurationError(
            f"upload_bytes = {budget} holds not even rank 1, which needs {largest(1)}; raise it, or choose a smaller "
            "federation.wire or strategy"
        )
    return fitting
