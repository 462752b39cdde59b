"""FFA-LoRA: freeze one random ``a`` for everybody and train only ``b``, so that the mean is exact.

``Σ wᵢ bᵢ a₀ = (Σ wᵢ bᵢ) a₀``, ``wᵢ = nᵢ / Σ n``: the update is linear in what travels, noise added for
privacy stays Gaussian, and only ``b`` is sent.

Sun, Li, Li, Ding: Improving LoRA in Privacy-preserving Federated Learning, ICLR 2024, arXiv 2403.12313.
Implemented is its server step with ``a₀`` drawn from one seed (Kaiming uniform, the paper's default).
Departure: ranks may differ. A client of rank ``r`` uses the first ``r`` rows of ``a₀``, and its ``b`` counts
as padded with zero columns, which keeps the mean exact; so a round without the widest clients ends with their
columns at zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from common.errors import RejectedUpdate
from common.federation import ClientInfo, ClientUpdate, Dispatch, ServerState
from common.seeds import derive_seed
from common.start import fresh_a
from strategies.aggregation import AggregationStrategy, Capabilities
from strategies.mean import WeightedSum
from strategies.updates import low_rank_layers


@dataclass
class FrozenSum(WeightedSum):
    """Running sum of ``b`` over clients whose ``a`` is the frozen one.

    Parameters
    ----------
    nested : bool
        Always true.
    seed : int
        Seed of the frozen ``a``.
    frozen : dict of str to Tensor
        The frozen ``a`` by layer, at the largest rank seen.
    """

    nested: bool = True
    seed: int = 0
    frozen: dict[str, Tensor] = field(default_factory=dict)

    def add(self, update: ClientUpdate) -> FrozenSum:
        """Add one update after comparing its ``a`` with the frozen one, bit for bit.

        Raises
        ------
        RejectedUpdate
            If the frozen factor differs, or the update's layers do not fit; the sum is then unchanged.
        """
        for layer, part in low_rank_layers(update).items():
            if not torch.equal(part.a, self.frozen_a(layer, *part.a.shape).to(part.a.dtype)):
                raise RejectedUpdate(
                    f"client {update.client}, layer {layer}: frozen factor differs from the shared one; "
                    "only b may be trained"
                )
        super().add(update)
        return self

    def frozen_a(self, layer: str, rank: int, in_features: int) -> Tensor:
        """Return the first ``rank`` rows of the layer's frozen ``a``."""
        if layer not in self.frozen or self.frozen[layer].shape[0] < rank:
            self.frozen[layer] = fresh_a(self.seed, layer, rank, in_features)
        return self.frozen[layer][:rank]


class FFALoRA(AggregationStrategy):
    """Exact mean over one frozen input factor; ranks may differ by nested rows."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        mixed_ranks=True, linear_uplink=True, shared_frozen_factor=True, exact=True
    )

    def dispatch(self, state: ServerState, client: ClientInfo) -> Dispatch:
        """Send the columns of the mean ``b`` the client can hold, and the seed of the frozen ``a``."""
        seed = frozen_seed(state)
        return Dispatch(state.start.narrowed(client.rank), client.rank, seed, trains="b", frozen_a=seed)

    def begin(self, state: ServerState) -> FrozenSum:
        """Open an empty sum."""
        return FrozenSum(seed=frozen_seed(state))

    def add(self, accumulated: FrozenSum, update: ClientUpdate) -> FrozenSum:
        """Add one reply's ``b`` and heads, times its weight."""
        return accumulated.add(update)

    def finish(self, state: ServerState, accumulated: FrozenSum) -> ServerState:
        """Replace the start adapter by the mean, with the frozen ``a`` put back."""
        layers = accumulated.layout.layers if accumulated.layout else ()
        inner = [accumulated.frozen_a(name, rank, inn).reshape(-1) for name, _, inn, rank in layers]
        mean = accumulated.mean(torch.cat([torch.empty(0), *inner]))
        return ServerState(
            state.spec,
            mean,
            state.global_adapter,
            state.round + 1,
            state.base_version,
            state.extras,
            merged=mean,
        )


def frozen_seed(state: ServerState) -> int:
    """Derive the seed of the run's frozen ``a``."""
    return derive_seed(state.spec.seed, "ffa_lora")
