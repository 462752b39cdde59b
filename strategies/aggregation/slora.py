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
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pydantic import Field

from common.adapter import Adapter
from common.errors import RejectedUpdate
from common.federation import ClientInfo, ClientUpdate, Dispatch, ModelSpec, ServerState
from common.lowrank import Dense, LowRank, Update
from common.seeds import derive_seed
from strategies.aggregation import AggregationStrategy, Capabilities, Travel
from strategies.mean import WeightedSum
from strategies.sparse_svd import leading_part


@dataclass
class StageSum(WeightedSum):
    """Running sum of what one stage trains.

    Parameters
    ----------
    dense : bool
        Matrices, in stage 1; factors otherwise.
    """

    dense: bool = False

    def add(self, update: ClientUpdate) -> StageSum:
        """Add one update.

        Raises
        ------
        RejectedUpdate
            If it is of the other stage, or its layout does not fit; the sum is then unchanged.
        """
        for name, part in update.adapter.layers.items():
            if isinstance(part, Dense) != self.dense:
                found, expected = ("factors", "a matrix") if self.dense else ("a matrix", "factors")
                raise RejectedUpdate(f"client {update.client}, layer {name}: {found}; this stage trains {expected}")
        super().add(update)
        return self


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
        """Expect a start from the first round on in stage 1, then once one of the rank that was kept."""
        if merges < self.sparse_rounds:
            return rank, 0
        if merges == self.sparse_rounds:
            return (min(rank, self.rank) if merges else 0), 0
        return min(rank, max(cohort)), 0

    def dispatch(self, state: ServerState, client: ClientInfo) -> Dispatch:
        """Send the mean, and in stage 1 the seed of the mask."""
        if state.round < self.sparse_rounds:
            seed = derive_seed(state.spec.seed, "slora")
            return Dispatch(state.start, client.rank, seed, trains="sparse", density=self.density)
        return Dispatch(state.start.narrowed(client.rank), client.rank, derive_seed(state.spec.seed, "fedavg"))

    def begin(self, state: ServerState) -> StageSum:
        """Open an empty sum of matrices or of factors."""
        return StageSum(dense=state.round < self.sparse_rounds)

    def add(self, accumulated: StageSum, update: ClientUpdate) -> StageSum:
        """Add one reply's matrices or factors, times its weight."""
        return accumulated.add(update)

    def finish(self, state: ServerState, accumulated: StageSum) -> ServerState:
        """Replace the start adapter by the mean; after the last sparse round by its leading part."""
        mean = accumulated.mean()
        after = replace(state, start=mean, round=state.round + 1, merged=mean, metrics={})
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
