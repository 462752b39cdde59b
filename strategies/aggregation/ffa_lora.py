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

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from common.adapter import Layout
from common.errors import RejectedUpdate
from common.federation import ClientInfo, ClientUpdate, Dispatch, ServerState
from common.seeds import derive_seed
from common.start import fresh_a, frozen_factors
from strategies.aggregation import AggregationStrategy, Capabilities, Travel
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
    """

    nested: bool = True
    seed: int = 0

    def add(self, update: ClientUpdate) -> FrozenSum:
        """Add one update after comparing its ``a`` with the frozen one, bit for bit.

        Raises
        ------
        RejectedUpdate
            If the frozen factor differs, or the update's layers do not fit; the sum is then unchanged.
        """
        given = update.adapter.inner_factors
        if not torch.equal(given, frozen_factors(update.adapter.layout, self.seed).to(given.dtype)):
            raise RejectedUpdate(
                f"client {update.client}, layer {self._differing(update)}: frozen factor differs from the shared one; "
                "only b may be trained"
            )
        super().add(update)
        return self

    def _differing(self, update: ClientUpdate) -> str:
        parts = low_rank_layers(update).items()
        return next(
            name for name, part in parts if not torch.equal(part.a, fresh_a(self.seed, name, *part.a.shape).to(part.a))
        )


class FFALoRA(AggregationStrategy):
    """Exact mean over one frozen input factor; ranks may differ by nested rows."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        mixed_ranks=True, linear_uplink=True, shared_frozen_factor=True, same_coordinates=True, exact=True
    )

    def travels(self, number: int) -> Travel:
        """Send ``b`` both ways."""
        return Travel("b", "b")

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
        mean = accumulated.mean(frozen_factors(accumulated.layout or Layout(), accumulated.seed))
        return replace(state, start=mean, round=state.round + 1, merged=mean)


def frozen_seed(state: ServerState) -> int:
    """Derive the seed of the run's frozen ``a``."""
    return derive_seed(state.spec.seed, "ffa_lora")
