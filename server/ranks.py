"""The rank each client trains: from the experiment, its device, or the bytes it may send."""

from __future__ import annotations

from typing import NamedTuple

from common.adapter import Layout
from common.errors import ConfigurationError
from common.experiment import ClientSettings, Experiment
from common.federation import ModelSpec
from common.messages import Presence
from server.traffic import Traffic
from strategies import AggregationStrategy

LOOKED_AT = 100
"""Rounds whose uploads must fit a budget, however many are planned: a run that is extended keeps its ranks."""


class RankChoice(NamedTuple):
    """A rank, and why it is that one, in words."""

    rank: int
    reason: str


def choose_rank(
    experiment: Experiment,
    strategy: AggregationStrategy,
    spec: ModelSpec,
    settings: ClientSettings,
    default: int,
    node: Presence | None = None,
) -> RankChoice:
    """Choose a client's rank.

    Parameters
    ----------
    experiment, strategy, spec
        What is run.
    settings : ClientSettings
        Its rank, if it has one of its own, and its byte budget.
    default : int
        The adapter's rank.
    node : Presence, optional
        What its node tells of the device, as far as that is known; counts for ``rank = "auto"``.

    Raises
    ------
    ConfigurationError
        If not even rank 1 fits its bytes.
    """
    rank, reason = _wanted(settings, default, node)
    if (budget := settings.upload_bytes) is not None:
        fitting = _affordable(Traffic(experiment, strategy, spec, [rank], Layout()), rank, budget)
        if fitting < rank:
            reason = f"largest whose upload fits {budget:,} bytes"
        rank = fitting
    return RankChoice(rank, reason)


def explained(choice: RankChoice, spec: ModelSpec) -> str:
    """Say why a client has its rank, and where layers are too small for it."""
    limits = [limit for layer in spec.layers if (limit := spec.layer_rank(layer, choice.rank)) < choice.rank]
    if not limits:
        return choice.reason
    least, most = min(limits), max(limits)
    span = f"{least}" if least == most else f"{least} to {most}"
    return f"{choice.reason}; clamped to {span} in {len(limits)} of {len(spec.layers)} layers"


def _wanted(settings: ClientSettings, default: int, node: Presence | None) -> RankChoice:
    """Choose without regard to bytes."""
    if settings.rank != "auto":
        return RankChoice(settings.rank, "set in the experiment") if settings.rank else _default(default)
    if node is None or not node.max_rank:
        return _default(default, ", as its device did not say what fits")
    free = f" ({node.memory_bytes / 1e9:.1f} GB free)"
    if node.max_rank < default:
        return RankChoice(node.max_rank, f"largest that fits the device{free}")
    return _default(default, f", which fits the device{free}")


def _default(rank: int, more: str = "") -> RankChoice:
    return RankChoice(rank, f"the adapter's rank{more}")


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
