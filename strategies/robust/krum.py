"""Krum: merge the one update whose nearest neighbours are nearest.

The score of update ``i`` is ``Σ ‖xᵢ − xⱼ‖²`` over its ``K − f − 2`` nearest of ``K`` updates, ``f`` of which may lie;
the lowest score wins.

Blanchard, El Mhamdi, Guerraoui, Stainer: Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent,
NeurIPS 2017, arXiv 1703.02757. Departure: distances are those of the products ``b a`` less the round's start, over all
layers and heads, since factors can be rewritten without changing their product. So a liar that only rewrites its
factors goes unseen, which matters where the strategy averages factors (fedavg): take `median` there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field

from common.adapter import Adapter
from common.errors import ConfigurationError
from common.federation import ClientUpdate
from strategies.gram import gram_of_changes, squared_distances
from strategies.robust import Judgement, RobustRule


class Krum(RobustRule):
    """The update closest to its neighbours, alone."""

    attackers: int | None = Field(
        None, ge=0, description="Liars a round must stand; none: all that K replies allow, (K − 3) / 2."
    )

    @property
    def least_updates(self) -> int:
        """Two honest neighbours more than twice the liars."""
        return enough_updates(self.attackers)

    def judge(self, updates: Sequence[ClientUpdate], starts: Mapping[str, Adapter]) -> Judgement:
        """Keep the update with the lowest score."""
        return keep(updates, krum_order(updates, starts, liars(len(updates), self.attackers))[:1])


def enough_updates(attackers: int | None) -> int:
    """Return how many updates scores need: ``2 f + 3``."""
    return 1 if attackers is None else 2 * attackers + 3


def liars(count: int, attackers: int | None) -> int:
    """Return how many of ``count`` updates may lie.

    Raises
    ------
    ConfigurationError
        If there are too few updates for those asked for.
    """
    if count < (needed := enough_updates(attackers)):
        raise ConfigurationError(
            f"with attackers = {attackers} a round needs {needed} updates, it has {count}; "
            "lower robust.options.attackers or train more clients"
        )
    return max(0, (count - 3) // 2) if attackers is None else attackers


def krum_order(updates: Sequence[ClientUpdate], starts: Mapping[str, Adapter], attackers: int) -> list[int]:
    """Return the updates' places, lowest score first; equal ones in the order given."""
    squares = squared_distances(gram_of_changes(updates, starts))
    others = squares.sort(dim=1).values[:, 1:]  # the first is its own
    scores = others[:, : max(1, len(updates) - attackers - 2)].sum(1).tolist()
    return sorted(range(len(updates)), key=lambda place: (scores[place], place))


def keep(updates: Sequence[ClientUpdate], places: Sequence[int]) -> Judgement:
    """Keep the updates at some places with their weights, in the order given."""
    kept = set(places)
    return Judgement(
        [update for place, update in enumerate(updates) if place in kept],
        {update.client: float(place in kept) for place, update in enumerate(updates)},
    )
