"""FLoRA: stack the factors of all clients, which sums their updates exactly for any mix of ranks.

``ΔW = Σ wᵢ bᵢ aᵢ = [w₁b₁ … w_K b_K] [a₁; …; a_K]``, ``wᵢ = nᵢ / Σ n``. The sum grows the global adapter, and
every client starts the next round with a fresh ``a`` and ``b`` = 0.

Wang, Shen, He, Sun, Wang, Lyu, Li: FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous
Low-Rank Adaptations, NeurIPS 2024, arXiv 2409.05976. Implemented is the stacking of its server step.
Departures: scale and weight go into ``b``, once (the paper folds the weight into ``a``); the stack is
refactored by QR and a small SVD, so that no owner's factors reach another; updates are summed in a global
adapter instead of being added to base weights. A layer that a client does not train contributes nothing
there, and the other weights are not renormalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from common.adapter import Adapter
from common.federation import ClientInfo, ClientUpdate, Dispatch, ServerState
from common.lowrank import Update
from common.seeds import derive_seed
from strategies.aggregation import Capabilities
from strategies.gathering import Gathering
from strategies.global_adapter import change, compact, grow
from strategies.mean import mean_extras
from strategies.products import exact_average
from strategies.updates import shares


class FLoRA(Gathering):
    """Exact merging of any mix of ranks into a global adapter."""

    capabilities: ClassVar[Capabilities] = Capabilities(mixed_ranks=True, linear_uplink=False, exact=True)

    global_rank: int | None = Field(
        None, ge=1, description="Largest rank of the global adapter per layer; none keeps the exact sum."
    )
    global_energy: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of each layer's squared norm to keep per round; none keeps all of it.",
    )

    def is_exact(self) -> bool:
        """Tell whether nothing is discarded: no cap is set."""
        return self.global_rank is None and self.global_energy is None

    def expected_ranks(self, rank: int, cohort: Sequence[int], merges: int) -> tuple[int, int]:
        """Expect no start adapter, and a global one that grows by all clients' ranks, up to its cap."""
        total = merges * sum(cohort)
        return 0, total if self.global_rank is None else min(total, self.global_rank)

    def dispatch(self, state: ServerState, client: ClientInfo) -> Dispatch:
        """Send heads and the seed of a fresh ``a``, another one per round and client."""
        return Dispatch(state.start, client.rank, derive_seed(state.spec.seed, "flora", state.round, client.name))

    def finish(self, state: ServerState, accumulated: list[ClientUpdate]) -> ServerState:
        """Sum the replies, grow the global adapter by the sum, average the heads."""
        layers: dict[str, Update] = {}
        for name, average in exact_average(accumulated).items():
            layers[name] = compact(average) if self.is_exact() else average
        merged = Adapter.pack(layers, method=state.spec.method)
        total, discarded = grow(state.global_adapter, merged, self.global_rank, self.global_energy)
        return replace(
            state,
            start=Adapter.pack({}, mean_extras(accumulated, shares(accumulated)), state.spec.method),
            global_adapter=total,
            round=state.round + 1,
            base_version=state.base_version + 1,
            merged=merged if self.is_exact() else change(total, state.global_adapter),
            metrics={} if self.is_exact() else {"discarded_energy": discarded},
        )
