"""LoRA-LEGO: pool the rank slots of all clients, cluster them, and build an adapter from the centroids.

Each slot (row of ``a`` with column of ``b``) is a unit of meaning of its own; per layer k-means finds ``k``
groups of like units, and slot ``j`` of the result is the mean ``μ_j`` of group ``C_j``, times ``√f_j`` in
both halves:

- ``scale="mass"``: ``f_j = Σ_{u ∈ C_j} w_u``, ``w_u`` the share ``nᵢ / Σ n`` of the unit's client. As many
  clusters as units give exactly ``Σ wᵢ ΔWᵢ``.
- ``scale="paper"``: ``f_j = (mean ‖u‖ / ‖μ_j‖)² √(r / k)``, ``r`` the mean rank: the paper's parameter and
  output reweighting, meant for merging experts of different tasks; between rounds it overshoots an average.

Zhao, Shen, Zhu, Li, Su, Wang, Kuang, Wu: Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to
Extremes Through Rank-Wise Clustering, ICLR 2025, arXiv 2409.16167. Departures: the paper merges finished
adapters, rounds are ours; units are balanced and clustered up to sign, since raw k-means depends on how an
update happens to be factored; and where a cluster holds units of one client only, the layer is refactored
into its singular vectors (same sum), so that no owner's unit reaches another owner.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from common.adapter import Adapter
from common.errors import ConfigurationError
from common.federation import ClientInfo, ClientUpdate, Dispatch, ServerState
from common.lowrank import LowRank
from common.seeds import derive_seed
from strategies.aggregation import Capabilities
from strategies.gathering import Gathering
from strategies.global_adapter import grow
from strategies.kmeans import Clusters, kmeans, singletons
from strategies.mean import mean_extras
from strategies.units import Centroids, Norm, Units, centroids, pool, stretch
from strategies.updates import by_layer, shares

COUNTS = ("capped_factors", "clamped_layers", "refactored_layers", "zero_layers")
"""Metrics of a merge: capped reweightings; layers with fewer clusters than asked for, with a cluster of one
owner, without any usable unit."""


class LoraLego(Gathering):
    """Rank-wise clustering of the clients' units; lossy, any mix of ranks."""

    capabilities: ClassVar[Capabilities] = Capabilities(mixed_ranks=True, linear_uplink=False)

    clusters: int | None = Field(
        None,
        ge=1,
        description="Clusters per layer, the rank of the result; none takes the largest client rank.",
    )
    scale: Literal["mass", "paper"] = Field(
        "mass",
        description="Length of a merged slot: its members' share of the round, or the paper's reweighting.",
    )
    norm: Norm = Field("inf", description="Norm of the paper's parameter reweighting.")
    mode: Literal["adapter", "merge"] = Field(
        "adapter",
        description="Start the next round from the centroids, or merge them into the global adapter.",
    )
    unit_weight: Literal["client", "rank"] = Field(
        "client",
        description="Weight of a unit in its centroid: its client's share, or that divided by its rank.",
    )
    canonical: Literal["none", "svd"] = Field(
        "none", description="Cluster the clients' slots as they are, or their singular vectors."
    )
    strict: bool = Field(False, description="Refuse more clusters than units instead of using fewer.")
    n_init: int = Field(10, ge=1, le=1000, description="Starts of k-means; the best one counts.")
    max_iter: int = Field(100, ge=1, le=10000, description="Steps of k-means at most.")
    max_factor: float = Field(10.0, ge=1, description="Cap on the paper's parameter reweighting.")
    seed_per: Literal["round", "client"] = Field(
        "round",
        description="Whether all clients of a round draw the same missing rows of a, or each its own.",
    )

    def refusals(self, ranks: Mapping[str, int]) -> list[str]:
        """Refuse, if strict, more clusters than all clients together have units."""
        units = sum(ranks.values())
        if not self.strict or self.clusters is None or self.clusters <= units:
            return []
        return [f"strategy lora_lego wants {self.clusters} clusters of {units} units; lower clusters or unset strict"]

    def expected_ranks(self, rank: int, cohort: Sequence[int], merges: int) -> tuple[int, int]:
        """Expect as many slots as clusters, in the start or, per merge, in the global adapter."""
        slots = min(self.clusters or max(cohort), sum(cohort))
        return (0, merges * slots) if self.mode == "merge" else (min(rank, slots) if merges else 0, 0)

    def dispatch(self, state: ServerState, client: ClientInfo) -> Dispatch:
        """Send the heaviest slots the client can hold, and the seed of the rows it lacks."""
        purpose = (state.round,) if self.seed_per == "round" else (state.round, client.name)
        seed = derive_seed(state.spec.seed, "lora_lego", "a", *purpose)
        return Dispatch(state.start.narrowed(client.rank), client.rank, seed)

    def finish(self, state: ServerState, accumulated: list[ClientUpdate]) -> ServerState:
        """Cluster each layer's units; the centroids become the next start or grow the global adapter."""
        weights = shares(accumulated)
        counts = Counter(dict.fromkeys(COUNTS, 0))
        layers: dict[str, LowRank] = {}
        for name, parts in by_layer(accumulated).items():
            seed = derive_seed(state.spec.seed, "lora_lego", "kmeans", state.round, name)
            held = [weights[client] for client in parts]
            layers[name] = self._merge_layer(name, list(parts.values()), held, seed, counts)
        method = state.spec.method
        heads, merged = mean_extras(accumulated, weights), Adapter.pack(layers, method=method)
        after = replace(
            state,
            start=Adapter.pack({}, heads, method),
            round=state.round + 1,
            merged=merged,
            metrics={name: float(count) for name, count in counts.items()},
        )
        if self.mode == "adapter":
            used = {name: layer for name, layer in layers.items() if layer.rank}
            return replace(after, start=Adapter.pack({**state.start.layers, **used}, heads, method))
        total, _ = grow(state.global_adapter, merged)
        return replace(after, global_adapter=total, base_version=state.base_version + 1)

    def _merge_layer(
        self, name: str, parts: list[LowRank], weights: list[float], seed: int, counts: Counter[str]
    ) -> LowRank:
        """Merge one layer of all clients that have it; a layer of zeros stays one, of rank 0."""
        dtype = torch.promote_types(parts[0].a.dtype, torch.float32)
        if self.canonical == "svd":
            parts = [part.truncate()[0] for part in parts]
        units = pool(parts, weights, per_rank=self.unit_weight == "rank")
        if not len(units):
            counts["zero_layers"] += 1
            out, inn = parts[0].shape
            return LowRank(torch.zeros(out, 0, dtype=dtype), torch.zeros(0, inn, dtype=dtype))
        wanted = self._wanted(name, len(units), max(part.rank for part in parts), counts)
        clusters = (
            kmeans(units.gram(), units.weight, wanted, seed, self.n_init, self.max_iter)
            if wanted < len(units)
            else singletons(len(units))
        )
        means = centroids(units, clusters)
        update = means.update(self._factors(units, clusters, means, counts), dtype)
        if not means.sole_owner:
            return update
        counts["refactored_layers"] += 1
        return update.truncate()[0]

    def _wanted(self, name: str, units: int, largest_rank: int, counts: Counter[str]) -> int:
        """Return the number of clusters, at most one per unit."""
        if self.clusters is None:
            return min(largest_rank, units)
        if self.clusters > units:
            if self.strict:
                raise ConfigurationError(
                    f"layer {name}: {self.clusters} clusters of {units} units; lower clusters or unset strict"
                )
            counts["clamped_layers"] += 1
        return min(self.clusters, units)

    def _factors(self, units: Units, clusters: Clusters, means: Centroids, counts: Counter[str]) -> Tensor:
        """Return what each centroid's rank-1 product is multiplied by."""
        if self.scale == "mass":
            return means.mass
        factor, capped = stretch(units, clusters, means, self.norm, self.max_factor)
        counts["capped_factors"] += capped
        return factor.square() * math.sqrt(units.mean_rank / clusters.count)
