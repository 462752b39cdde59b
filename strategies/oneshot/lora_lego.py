"""LoRA-LEGO: pool the rank slots of all adapters, cluster them, and keep the centroids.

Zhao, Shen, Zhu, Li, Su, Wang, Kuang, Wu: Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes
Through Rank-Wise Clustering, ICLR 2025, arXiv 2409.16167: the merge it was written for. What it does and where it
departs from the paper, `strategies.aggregation.lora_lego` says. With ``scale = "mass"`` the result stays near the
weighted sum, and is it exactly when there are as many clusters as slots; ``"paper"`` restores lengths as the paper
does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from common.adapter import Adapter
from common.federation import ClientUpdate, ModelSpec
from common.lowrank import LowRank
from strategies.aggregation.lora_lego import LoraLego
from strategies.oneshot import OneShotMerge, bounded_rank

LAYER = "layer"


class LoraLegoMerge(OneShotMerge):
    """Rank-wise clustering of the adapters' slots."""

    rank: int | None = Field(None, ge=1, description="Clusters, the rank of the result; none: the largest rank.")
    scale: Literal["mass", "paper"] = Field(
        "mass", description="Length of a merged slot: its members' weights, or the paper's reweighting."
    )

    def merge(self, parts: Sequence[LowRank], weights: Sequence[float], seed: int) -> LowRank:
        """Cluster as a round of the strategy does, whose weights are shares; then give the sum back its size."""
        strategy = LoraLego(clusters=bounded_rank(self.rank, parts), scale=self.scale)
        updates = [
            ClientUpdate(f"{number:09}", Adapter.pack({LAYER: part}), weight)
            for number, (part, weight) in enumerate(zip(parts, weights, strict=True))
        ]
        merged = strategy.aggregate(strategy.init(ModelSpec({LAYER: parts[0].shape}, seed)), updates).merged
        assert merged is not None
        layer = merged.layers[LAYER]
        assert isinstance(layer, LowRank)
        return layer.scaled(sum(weights))
