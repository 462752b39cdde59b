"""SLoRA: first a few rounds of sparse training of the whole matrices, whose SVD then is LoRA's start.

Stage 1: every client trains the same few entries ``U = M ∘ (W − W₀)``, ``M`` drawn from one seed; their mean is exact.
Then ``U ≈ P Σ Qᵀ`` of the adapter's rank becomes ``b = P √Σ``, ``a = √Σ Qᵀ``, and stage 2 averages the factors as FedIT
does, over the pristine base.

Babakniya, Elkordy, Ezzeldin, Liu, Song, El-Khamy, Avestimehr: SLoRA: Federated Parameter Efficient Fine-Tuning of
Language Models, FL@FM-NeurIPS 2023, arXiv 2308.06522. Departures: one mask for the whole federation, since the union of
masks of their own would be dense; singular values are split between both factors. In stage 1 server and nodes hold a
matrix per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field

from common.adapter import Adapter
from common.federation import ClientInfo, ClientUpdate, Dispatch, ModelSpec, ServerState
from common.lowrank import Dense, LowRank, Update
from common.seeds import derive_seed
from strategies.aggregation import AggregationStrategy, Capabilities, Travel
from strategies.mean import WeightedSum
from strategies.sparse_svd import leading_part


class SLoRA(AggregationStrategy):
    """Sparse training first, LoRA from its SVD afterwards; needs equal ranks."""

    capabilities: ClassVar[Capabilities] = Capabilities(mixed_ranks=False, linear_uplink=True, same_coordinates=True)

    sparse_rounds: int = Field(2, ge=0, description="Rounds of sparse training; 0 is plain fedavg.")
    density: float = Field(0.01, gt=0, le=1, description="Share of each matrix that stage 1 trains.")
    rank: int = Field(8, ge=1, description="Rank that is kept of the sparse update, and that stage 2 starts with.")

    def init(self, spec: ModelSpec) -> ServerState:
        """Begin with matrices of zeros, or with nothing if there is no stage 1."""
        zeros: dict[str, Update] = {name: Dense(torch.zeros(shape)) for name, shape in spec.layers.items()}
        start = Adapter.pack(zeros if self.sparse_rounds else {}, spec.heads, spec.method)
        return ServerState(spec, start, Adapter.empty(spec.method))

    def travels(self, number: int) -> Travel:
        """Send the entries that learn, later the factors."""
        return Travel("sparse", "sparse") if number <= self.sparse_rounds else Travel()

    def expected_ranks(self, rank: int, cohort: Sequence[int], merges: int) -> tuple[int, int]:
        """Expect a start from the first round on; after stage 1 at most of the rank that was kept."""
        if merges < self.sparse_rounds or not self.sparse_rounds:
            return (rank if merges or self.sparse_rounds else 0), 0
        return min(rank, max(self.rank, *cohort)), 0

    def dispatch(self, state: ServerState, client: ClientInfo) -> Dispatch:
        """Send the mean, and in stage 1 the seed of the mask."""
        seed = derive_seed(state.spec.seed, "slora")
        if state.round < self.sparse_rounds:
            return Dispatch(state.start, client.rank, seed, trains="sparse", density=self.density)
        return Dispatch(state.start.narrowed(client.rank), client.rank, seed)

    def begin(self, state: ServerState) -> WeightedSum:
        """Open an empty sum."""
        return WeightedSum()

    def add(self, accumulated: WeightedSum, update: ClientUpdate) -> WeightedSum:
        """Add one reply's matrices or factors, times its weight."""
        return accumulated.add(update)

    def finish(self, state: ServerState, accumulated: WeightedSum) -> ServerState:
        """Replace the start adapter by the mean; after the last sparse round by its leading part."""
        mean = accumulated.mean()
        after = replace(state, start=mean, round=state.round + 1, merged=mean)
        if after.round != self.sparse_rounds:
            return after
        seed = derive_seed(state.spec.seed, "slora", "svd")
        layers: dict[str, LowRank] = {}
        left_out = whole = 0.0
        for name, update in mean.layers.items():
            layers[name] = leading_part(update.dense(), self.rank, derive_seed(seed, name))
            square = update.norm() ** 2
            left_out, whole = left_out + max(square - layers[name].norm() ** 2, 0.0), whole + square
        start = Adapter.pack(layers, mean.extras, mean.method)
        return replace(
            after, start=start, merged=start, metrics={"discarded_energy": left_out / whole if whole else 0.0}
        )
