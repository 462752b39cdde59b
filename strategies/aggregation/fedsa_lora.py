"""FedSA-LoRA: share ``a``, keep ``b``: everybody learns a general input factor and an output factor of its own.

Client ``i`` uses ``bᵢ ā`` with ``ā = Σ wᵢ aᵢ``, ``wᵢ = nᵢ / Σ n``; ``bᵢ`` and the heads never leave it.

Guo, Zeng, Wang, Fan, Wang, Qu: Selective Aggregation for Low-Rank Adaptation in Federated Learning, ICLR 2025,
arXiv 2410.01463. Implemented is its server step. There is no one model: the loss of a round is the mean of what each
client's own model reaches, and an export needs a client's ``b``. A client that misses rounds meets a newer ``ā`` with
its old ``bᵢ``; one that is new, or lost its memory, starts with ``bᵢ = 0``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from common.adapter import Adapter
from common.errors import RejectedUpdate
from common.federation import ClientInfo, ClientUpdate, Dispatch, ModelSpec, ServerState
from common.seeds import derive_seed
from strategies.aggregation import AggregationStrategy, Capabilities, Travel
from strategies.mean import WeightedSum


class FedSALoRA(AggregationStrategy):
    """Mean of ``a`` alone; every client keeps a ``b`` of its own. Needs equal ranks."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        mixed_ranks=False, linear_uplink=True, client_memory=True, same_coordinates=True
    )

    def init(self, spec: ModelSpec) -> ServerState:
        """Begin without heads: those are the clients' own."""
        return ServerState(spec, Adapter.empty(spec.method), Adapter.empty(spec.method))

    def travels(self, number: int) -> Travel:
        """Send ``a`` both ways."""
        return Travel("inner", "inner")

    def dispatch(self, state: ServerState, client: ClientInfo) -> Dispatch:
        """Send the mean ``a``; before round 1 the seed of the ``a`` all clients start from."""
        return Dispatch(state.start, client.rank, derive_seed(state.spec.seed, "fedsa_lora"), keeps_b=True)

    def begin(self, state: ServerState) -> WeightedSum:
        """Open an empty sum."""
        return WeightedSum()

    def add(self, accumulated: WeightedSum, update: ClientUpdate) -> WeightedSum:
        """Add one reply's ``a``, times its weight.

        Raises
        ------
        RejectedUpdate
            If the reply brings a ``b`` or a head.
        """
        if update.adapter.flat[: update.adapter.layout.head_numel].any():
            raise RejectedUpdate(f"client {update.client} sent b or a head; under fedsa_lora they stay with the client")
        return accumulated.add(update)

    def finish(self, state: ServerState, accumulated: WeightedSum) -> ServerState:
        """Replace the shared ``a`` by the mean."""
        mean = accumulated.mean()
        return replace(state, start=Adapter.pack(mean.layers, method=mean.method), round=state.round + 1)
