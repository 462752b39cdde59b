"""FedEx-LoRA: average both factors, and put what this misses into the global adapter, so that the merge is exact.

``ā = Σ wᵢ aᵢ``, ``b̄ = Σ wᵢ bᵢ``, ``wᵢ = nᵢ / Σ n``; the residual ``Σ wᵢ bᵢ aᵢ − b̄ ā = Σ wᵢ (bᵢ − b̄)(aᵢ − ā)``, of rank
``(N − 1) r`` at most for ``N`` clients, grows the global adapter, and clients go on from ``ā`` and ``b̄``.

Singhal, Ponkshe, Vepakomma: FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models,
ACL 2025, arXiv 2410.09432. Implemented is its server step, with the truncated residual as an option. Departures:
clients weigh by their examples, not alike; the residual stays in factors, refactored so that no owner's deviation can
be read off, and is summed in a global adapter instead of being added to base weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from common.adapter import Adapter
from common.federation import ServerState
from common.lowrank import add
from strategies.aggregation import Capabilities
from strategies.global_adapter import grow
from strategies.products import nearest
from strategies.residual import MeanAndReplies, MeanWithReplies, residuals


class FedExLoRA(MeanWithReplies):
    """Mean of the factors plus its residual: exact; needs equal ranks."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        mixed_ranks=False, linear_uplink=False, same_coordinates=True, exact=True
    )

    residual_rank: int | None = Field(
        None, ge=1, description="Largest rank of a round's residual per layer; none keeps all of it."
    )

    def is_exact(self) -> bool:
        """Tell whether the whole residual is kept."""
        return self.residual_rank is None

    def expected_ranks(self, rank: int, cohort: Sequence[int], merges: int) -> tuple[int, int]:
        """Expect the mean's rank, and a global adapter that grows by the residuals'."""
        residual = (len(cohort) - 1) * max(cohort)
        grown = residual if self.residual_rank is None else min(residual, self.residual_rank)
        return super().expected_ranks(rank, cohort, merges)[0], merges * grown

    def finish(self, state: ServerState, accumulated: MeanAndReplies) -> ServerState:
        """Replace the start adapter by the mean and grow the global adapter by the residual."""
        mean = accumulated.total.mean()
        missed, discarded = nearest(residuals(accumulated.updates, mean), self.residual_rank)
        total, _ = grow(state.global_adapter, Adapter.pack(missed, method=state.spec.method))
        layers = {layer: add(part, missed[layer]) for layer, part in mean.layers.items()}
        return replace(
            state,
            start=mean,
            global_adapter=total,
            round=state.round + 1,
            base_version=state.base_version + 1,
            merged=Adapter.pack(layers, method=state.spec.method),
            metrics={} if self.is_exact() else {"discarded_energy": discarded},
        )
