"""RoLoRA: train ``b`` in one round and ``a`` in the next, so that each round's mean is exact and both factors learn.

``Σ wᵢ bᵢ a = (Σ wᵢ bᵢ) a`` and ``Σ wᵢ b aᵢ = b (Σ wᵢ aᵢ)``, ``wᵢ = nᵢ / Σ n``, as long as the factor that does not
learn is the same at all clients. The first round trains ``b``: at ``b = 0`` the gradient of ``a`` is zero.

Chen, Ju, Dalal, Zhu, Khisti: Robust Federated Finetuning of Foundation Models via Alternating Minimization of LoRA,
2024, arXiv 2409.02346; extended at NeurIPS 2025, arXiv 2502.01755. Implemented is the alternation with a mean on the
server. Departures: phases of ``period`` rounds; ranks may differ by nested slots. Both factors are sent to the clients,
so that one that missed a round needs nothing else; only the one that learned comes back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from common.federation import ClientInfo, ClientUpdate, Dispatch, ServerState
from common.seeds import derive_seed
from strategies.aggregation import AggregationStrategy, Capabilities, Travel
from strategies.alternating import AlternatingSum, Factor


class RoLoRA(AggregationStrategy):
    """Exact mean of one factor at a time; ranks may differ by nested slots."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        mixed_ranks=True, linear_uplink=True, same_coordinates=True, exact=True
    )

    period: int = Field(1, ge=1, description="Rounds for which one factor is trained before the other one's turn.")

    def travels(self, number: int) -> Travel:
        """Send both factors down, and up the one that learned."""
        return Travel("ab", self._learns(number - 1))

    def dispatch(self, state: ServerState, client: ClientInfo) -> Dispatch:
        """Send both factors, as wide as the client can hold, and say which one is to learn."""
        start = state.start.narrowed(client.rank)
        return Dispatch(start, client.rank, self._seed(state), trains=self._learns(state.round))

    def begin(self, state: ServerState) -> AlternatingSum:
        """Open an empty sum of the factor that learns."""
        return AlternatingSum(state, self._seed(state), self._learns(state.round))

    def add(self, accumulated: AlternatingSum, update: ClientUpdate) -> AlternatingSum:
        """Add one reply's factor and heads, times its weight."""
        return accumulated.add(update)

    def finish(self, state: ServerState, accumulated: AlternatingSum) -> ServerState:
        """Replace the factor that learned by its mean."""
        mean = accumulated.mean()
        return replace(state, start=mean, round=state.round + 1, merged=mean)

    def _learns(self, merged: int) -> Factor:
        """Tell which factor learns after so many merged rounds."""
        return "b" if merged // self.period % 2 == 0 else "a"

    def _seed(self, state: ServerState) -> int:
        return derive_seed(state.spec.seed, "rolora")
