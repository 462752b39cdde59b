"""FedIT: the weighted mean of each factor by itself.

``ā = Σ wᵢ aᵢ``, ``b̄ = Σ wᵢ bᵢ``, update ``b̄ ā``; simple and stateless, but not the mean of the products:
the error is the weighted covariance ``Σ wᵢ (bᵢ − b̄)(aᵢ − ā)``, zero only when all ``a`` (or all ``b``)
agree.

Zhang, Vahidian, Kuo, Li, Zhang, Yu, Wang, Chen: Towards Building the Federated GPT: Federated Instruction
Tuning, ICASSP 2024, arXiv 2305.05644. Departure: the scale is folded into ``b`` before the mean, which equals
the paper's for the equal scales it assumes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from common.federation import ClientInfo, ClientUpdate, Dispatch, ServerState
from common.seeds import derive_seed
from strategies.aggregation import AggregationStrategy, Capabilities
from strategies.mean import WeightedSum


class FedAvg(AggregationStrategy):
    """FedIT / FedAvg of LoRA factors; needs equal ranks."""

    capabilities: ClassVar[Capabilities] = Capabilities(mixed_ranks=False, linear_uplink=True, same_coordinates=True)

    def dispatch(self, state: ServerState, client: ClientInfo) -> Dispatch:
        """Send the current mean; before round 1 the seed of the ``a`` all clients start from."""
        return Dispatch(state.start, client.rank, derive_seed(state.spec.seed, "fedavg"))

    def begin(self, state: ServerState) -> WeightedSum:
        """Open an empty sum."""
        return WeightedSum()

    def add(self, accumulated: WeightedSum, update: ClientUpdate) -> WeightedSum:
        """Add one reply's factors, times its weight."""
        return accumulated.add(update)

    def finish(self, state: ServerState, accumulated: WeightedSum) -> ServerState:
        """Replace the start adapter by the mean."""
        mean = accumulated.mean()
        return replace(state, start=mean, round=state.round + 1, merged=mean)
