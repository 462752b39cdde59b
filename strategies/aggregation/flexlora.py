"""FlexLoRA: average the products, decompose the average, and give every client the best of its own rank.

``D = Σ wᵢ bᵢ aᵢ = u s vh``, ``wᵢ = nᵢ / Σ n``; a client of rank ``r`` starts the next round from ``u_r s_r vh_r``, the
nearest matrix of that rank, which misses ``√(Σ_{j>r} s_j²)``. The base model stays as it is: ``D`` carries all that was
learned, and what a cut leaves out of it is lost to the clients who get it.

Bai, Chen, Qian, Yao, Li: Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources, NeurIPS 2024, arXiv 2402.11505. Implemented is its server step. Departures: ``D`` is never built, the stacked
factors are decomposed by QR and a small SVD; singular values are split evenly between both factors unless
``split = "paper"``; a client of higher rank than the server's is completed with fresh rows of ``a``, the same for all
clients of a round, and ``b`` = 0; a layer whose average is zero starts afresh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from common.adapter import Adapter
from common.federation import ClientInfo, ClientUpdate, Dispatch, ServerState
from common.lowrank import LowRank
from common.seeds import derive_seed
from strategies.aggregation import Capabilities
from strategies.gathering import Gathering
from strategies.mean import mean_extras
from strategies.products import client_ranks, exact_average, nearest, without_empty
from strategies.updates import shares


class FlexLoRA(Gathering):
    """Best approximation of the exact average at every client's own rank."""

    capabilities: ClassVar[Capabilities] = Capabilities(mixed_ranks=True, linear_uplink=False)

    server_rank: int | None = Field(
        None, ge=1, description="Rank the server keeps per layer; none takes the largest client rank of the round."
    )
    split: Literal["balanced", "paper"] = Field(
        "balanced",
        description="Singular values: their roots in both factors, or all in b over rows of a of length 1.",
    )

    def expected_ranks(self, rank: int, cohort: Sequence[int], merges: int) -> tuple[int, int]:
        """Expect the server's slots in the start adapter, at most one per slot of a client."""
        slots = min(self.server_rank or max(cohort), sum(cohort))
        return (min(rank, slots) if merges else 0), 0

    def dispatch(self, state: ServerState, client: ClientInfo) -> Dispatch:
        """Send the leading singular vectors the client can hold, and the seed of the rows it lacks."""
        seed = derive_seed(state.spec.seed, "flexlora", state.round)
        return Dispatch(state.start.narrowed(client.rank), client.rank, seed)

    def finish(self, state: ServerState, accumulated: list[ClientUpdate]) -> ServerState:
        """Decompose the average of the products and keep its leading part."""
        average = exact_average(accumulated)
        layers, discarded = nearest(average, self.server_rank or max(client_ranks(accumulated)))
        merged = Adapter.pack(layers, method=state.spec.method)
        if self.split == "paper":
            layers = {layer: unit_rows(part) for layer, part in layers.items()}
        heads = mean_extras(accumulated, shares(accumulated))
        return replace(
            state,
            start=Adapter.pack(without_empty(layers), heads, state.spec.method),
            round=state.round + 1,
            merged=merged,
            metrics={"discarded_energy": discarded},
        )


def unit_rows(part: LowRank) -> LowRank:
    """Move the length of every row of ``a``, none of which is zero, into ``b``."""
    length = part.a.norm(dim=1)
    return LowRank(part.b * length, part.a / length[:, None])
