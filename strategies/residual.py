"""What the mean of the factors misses of the mean of the products: the weighted covariance of the factors.

``Σ wᵢ bᵢ aᵢ − b̄ ā = Σ wᵢ (bᵢ − b̄)(aᵢ − ā)``. As ``Σ wᵢ (bᵢ − b̄)`` is zero, any matrix may stand for ``ā``; with the
last client's ``a_N`` its own term vanishes, which leaves ``(N − 1) r`` slots, and exact zeros where the ``aᵢ`` agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from common.adapter import Adapter
from common.federation import ClientInfo, ClientUpdate, Dispatch, ServerState
from common.lowrank import LowRank
from common.seeds import derive_seed
from strategies.aggregation import AggregationStrategy
from strategies.mean import WeightedSum
from strategies.updates import by_layer, low_rank_layers, shares


@dataclass
class MeanAndReplies:
    """Running mean of the factors, and the replies it is made of.

    Parameters
    ----------
    total : WeightedSum
        Sum of the factors and heads.
    updates : list of ClientUpdate
        What was added.
    """

    total: WeightedSum = field(default_factory=WeightedSum)
    updates: list[ClientUpdate] = field(default_factory=list)

    def add(self, update: ClientUpdate) -> MeanAndReplies:
        """Add one reply.

        Raises
        ------
        RejectedUpdate
            If its layers, ranks or heads are not those of the replies before it; nothing is changed then.
        """
        low_rank_layers(update)
        self.total.add(update)
        self.updates.append(update)
        return self


class MeanWithReplies(AggregationStrategy):
    """Base of the strategies that start from the mean of the factors and do something about what it misses."""

    def dispatch(self, state: ServerState, client: ClientInfo) -> Dispatch:
        """Send the current factors; before round 1 the seed of the ``a`` all clients start from."""
        return Dispatch(state.start, client.rank, derive_seed(state.spec.seed, self.plugin_name))

    def begin(self, state: ServerState) -> MeanAndReplies:
        """Open an empty sum."""
        return MeanAndReplies()

    def add(self, accumulated: MeanAndReplies, update: ClientUpdate) -> MeanAndReplies:
        """Add one reply's factors, times its weight, and keep it for what the mean misses."""
        return accumulated.add(update)


def residuals(updates: Sequence[ClientUpdate], mean: Adapter) -> dict[str, LowRank]:
    """Return the exact average minus the mean's product, layer by layer, without a matrix.

    Parameters
    ----------
    updates : sequence of ClientUpdate
        Of equal layout; weighed by their examples.
    mean : Adapter
        Their mean, factor by factor.
    """
    weights = shares(updates)
    centres = low_rank_layers(ClientUpdate("the mean", mean, 1.0))
    return {
        layer: covariance(list(parts.values()), [weights[client] for client in parts], centres[layer])
        for layer, parts in by_layer(updates).items()
    }


def covariance(parts: Sequence[LowRank], weights: Sequence[float], mean: LowRank) -> LowRank:
    """Return ``Σ wᵢ (bᵢ − b̄)(aᵢ − a_N)`` of one layer, rank ``(N − 1) r``.

    Parameters
    ----------
    parts : sequence of LowRank
        The clients' updates, of one rank.
    weights : sequence of float
        Their shares, which add up to 1.
    mean : LowRank
        ``Σ wᵢ bᵢ`` and ``Σ wᵢ aᵢ``.
    """
    *others, last = parts
    wide = mean.a.dtype
    b = [(part.b.to(wide) - mean.b) * weight for part, weight in zip(others, weights, strict=False)]
    a = [part.a.to(wide) - last.a.to(wide) for part in others]
    return LowRank(torch.cat([mean.b[:, :0], *b], dim=1), torch.cat([mean.a[:0], *a]))
