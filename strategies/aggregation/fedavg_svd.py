"""FedAvg in product space: all clients continue from one best approximation of the exact average.

``D = Σ wᵢ bᵢ aᵢ``, ``wᵢ = nᵢ / Σ n``, cut to its ``k`` largest singular values. It is the plain mean without the plain
mean's error: what is lost is the smallest possible at rank ``k``. Unlike FlexLoRA, which gives wide clients more, all
of them train on from the very model that was evaluated; ``k`` is therefore the smallest rank of the round, unless set.

The baseline that FlexLoRA generalises (Bai, Chen, Qian, Yao, Li, NeurIPS 2024, arXiv 2402.11505); the best
approximation is Eckart and Young's, Psychometrika 1936. Departures: the average is never built, its stacked factors are
decomposed by QR and a small SVD, singular values split evenly between both; slots beyond ``k`` start afresh every round
with ``b`` = 0, with the same rows of ``a`` for all clients; a layer whose average is zero starts afresh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from common.adapter import Adapter
from common.federation import ClientInfo, ClientUpdate, Dispatch, ServerState
from common.seeds import derive_seed
from strategies.aggregation import Capabilities
from strategies.gathering import Gathering
from strategies.mean import mean_extras
from strategies.products import client_ranks, exact_average, nearest, without_empty
from strategies.updates import shares


class FedAvgSVD(Gathering):
    """One best rank-k approximation of the exact average for all clients."""

    capabilities: ClassVar[Capabilities] = Capabilities(mixed_ranks=True, linear_uplink=False)

    rank: int | None = Field(
        None, ge=1, description="Rank k of what all clients start from; none takes the smallest of the round."
    )

    def refusals(self, ranks: Mapping[str, int]) -> list[str]:
        """Refuse a rank that not every client can hold."""
        wide = self.rank or 0
        narrow = [f"{name} ({rank})" for name, rank in sorted(ranks.items()) if rank < wide]
        if not narrow:
            return []
        return [
            f"strategy fedavg_svd starts all clients from rank {wide}, more than {', '.join(narrow)} can hold; "
            f"lower rank to {min(ranks.values())} or use flexlora"
        ]

    def expected_ranks(self, rank: int, cohort: Sequence[int], merges: int) -> tuple[int, int]:
        """Expect the same slots for everybody."""
        slots = min(self.rank or min(cohort), sum(cohort))
        return (min(rank, slots) if merges else 0), 0

    def dispatch(self, state: ServerState, client: ClientInfo) -> Dispatch:
        """Send the approximation, and the seed of the rows a wider client lacks."""
        seed = derive_seed(state.spec.seed, "fedavg_svd", state.round)
        return Dispatch(state.start.narrowed(client.rank), client.rank, seed)

    def finish(self, state: ServerState, accumulated: list[ClientUpdate]) -> ServerState:
        """Cut the average of the products to the common rank."""
        average = exact_average(accumulated)
        layers, discarded = nearest(average, self.rank or min(client_ranks(accumulated)))
        heads = mean_extras(accumulated, shares(accumulated))
        return replace(
            state,
            start=Adapter.pack(without_empty(layers), heads, state.spec.method),
            round=state.round + 1,
            merged=Adapter.pack(layers, method=state.spec.method),
            metrics={"discarded_energy": discarded},
        )
