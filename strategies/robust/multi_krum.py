"""Multi-Krum: merge the ``m`` updates with the best scores of `krum`, with their weights.

Blanchard, El Mhamdi, Guerraoui, Stainer: Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent,
NeurIPS 2017, arXiv 1703.02757. Departure: distances are those of the products, as in `krum`; the mean is the strategy's
own merge, weighted, so ``federation.max_weight_share`` should bound what a client may claim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field

from common.adapter import Adapter
from common.federation import ClientUpdate
from strategies.robust import Judgement, RobustRule
from strategies.robust.krum import enough_updates, keep, krum_order, liars


class MultiKrum(RobustRule):
    """The updates closest to their neighbours."""

    attackers: int | None = Field(
        None, ge=0, description="Liars a round must stand; none: all that K replies allow, (K − 3) / 2."
    )
    kept: int | None = Field(None, ge=1, description="Updates to merge; at most, and if none, K less the liars.")

    @property
    def least_updates(self) -> int:
        """Two honest neighbours more than twice the liars."""
        return enough_updates(self.attackers)

    def judge(self, updates: Sequence[ClientUpdate], starts: Mapping[str, Adapter]) -> Judgement:
        """Keep the updates with the lowest scores."""
        attackers = liars(len(updates), self.attackers)
        most = len(updates) - attackers
        return keep(updates, krum_order(updates, starts, attackers)[: min(self.kept or most, most)])
