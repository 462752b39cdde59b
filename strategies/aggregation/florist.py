"""FLoRIST: FLoRA's exact sum, cut on the server to the fewest singular values that hold a share of its energy.

``D = Σ wᵢ bᵢ aᵢ = u s vh``, ``wᵢ = nᵢ / Σ n``; per layer ``p = min {p : Σ_{j≤p} s_j² ≥ τ Σ s_j²}``, and
``u_p s_p vh_p`` grows the global adapter. Every client starts the next round with a fresh ``a`` and ``b`` = 0, so the
cut limits no client's rank. ``τ`` = 1 is FLoRA.

Ramesh, Dass: FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of Large Language
Models, MLSys 2026, arXiv 2506.09199. ``τ`` is tunable there; our default loses a hundredth of the squared norm.
Departures: one decomposition by QR and a small SVD instead of one SVD per stacked factor; updates are summed in a
global adapter instead of being added to base weights. Ours is ``error_feedback``: the server keeps what was cut off, in
no more slots than the round's clients have together, and adds it to the next round's sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from common.adapter import Adapter
from common.federation import ClientInfo, ClientUpdate, Dispatch, ServerState
from common.lowrank import LowRank, kept_rank, stack
from common.seeds import derive_seed
from strategies.aggregation import Capabilities
from strategies.gathering import Gathering
from strategies.global_adapter import grow
from strategies.mean import mean_extras
from strategies.products import exact_average
from strategies.updates import shares


class FLoRIST(Gathering):
    """Merging of any mix of ranks into a global adapter that grows by the energy it is worth."""

    capabilities: ClassVar[Capabilities] = Capabilities(mixed_ranks=True, linear_uplink=False)

    energy: float = Field(
        0.99, gt=0, le=1, description="Share τ of each layer's squared norm to keep per round; 1 keeps all of it."
    )
    error_feedback: bool = Field(
        False, description="Whether the server adds what a round's cut left out to the next round's sum."
    )

    def is_exact(self) -> bool:
        """Tell whether nothing is cut."""
        return self.energy == 1

    def expected_ranks(self, rank: int, cohort: Sequence[int], merges: int) -> tuple[int, int]:
        """Expect no start adapter, and a global one that grows by all clients' ranks at most."""
        return 0, merges * sum(cohort)

    def dispatch(self, state: ServerState, client: ClientInfo) -> Dispatch:
        """Send heads and the seed of a fresh ``a``, another one per round and client."""
        return Dispatch(state.start, client.rank, derive_seed(state.spec.seed, "florist", state.round, client.name))

    def finish(self, state: ServerState, accumulated: list[ClientUpdate]) -> ServerState:
        """Sum the replies, cut the sum, grow the global adapter by it, average the heads."""
        layers: dict[str, LowRank] = {}
        extras = dict(state.extras)
        left_out = whole = 0.0
        for layer, average in exact_average(accumulated).items():
            parts = [average, *lost_before(state.extras, layer)] if self.error_feedback else [average]
            layers[layer], lost, energies = self._split(stack(parts), average.rank)
            whole += float(energies.sum())
            left_out += float(energies[layers[layer].rank :].sum())
            if self.error_feedback:
                extras |= {f"{LOST_B}{layer}": lost.b.contiguous(), f"{LOST_A}{layer}": lost.a.contiguous()}
        merged = Adapter.pack(layers, method=state.spec.method)
        total, _ = grow(state.global_adapter, merged)
        heads = mean_extras(accumulated, shares(accumulated))
        return replace(
            state,
            start=Adapter.pack({}, heads, state.spec.method),
            global_adapter=total,
            round=state.round + 1,
            base_version=state.base_version + 1,
            extras=extras,
            merged=merged,
            metrics={} if self.is_exact() else {"discarded_energy": left_out / whole if whole else 0.0},
        )

    def _split(self, update: LowRank, slots: int) -> tuple[LowRank, LowRank, Tensor]:
        """Return what is kept, what is left out, both of at most so many slots, and all squared singular values."""
        singular, _ = update.truncate()
        values = singular.b.double().square().sum(0)  # balanced: each column of b is as long as its value's root
        keep = kept_rank(values, slots, None if self.energy == 1 else self.energy, 0.0)
        rest = slice(keep, keep + slots)
        return (
            LowRank(singular.b[:, :keep], singular.a[:keep]),
            LowRank(singular.b[:, rest], singular.a[rest]),
            values.square(),
        )


LOST_B, LOST_A = "florist.lost_b/", "florist.lost_a/"


def lost_before(extras: Mapping[str, Tensor], layer: str) -> list[LowRank]:
    """Return what the rounds before left out of a layer, if it is remembered."""
    name = f"{LOST_B}{layer}"
    return [LowRank(extras[name], extras[f"{LOST_A}{layer}"])] if name in extras else []
