"""Fed-SB: two frozen orthonormal frames per layer; only a small square core between them learns and travels.

``ΔW = B R A``, ``R̄ = Σ wᵢ Rᵢ``, ``wᵢ = nᵢ / Σ n``: exact, ``r²`` numbers per layer whatever the layer's size, and noise
added for privacy stays Gaussian.

Singhal, Ponkshe, Vartak, Varshney, Vepakomma: Fed-SB: A Silver Bullet for Extreme Communication Efficiency and
Performance in (Private) Federated LoRA Fine-Tuning, 2025, arXiv 2502.15436. Implemented is the mean of cores.
Departures: the paper takes the frames from the gradient of the first full step; here two rounds find them, one that
trains ``b`` over a shared random ``a`` and one that trains ``a`` over the ``b`` that came of it. Both are linear, so
the whole run fits secure aggregation. Their product's singular vectors become the frames, its singular values the first
core. Ranks may differ: a client of rank ``r`` trains the leading ``r × r`` block.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from common.adapter import Adapter
from common.errors import ConfigurationError, RejectedUpdate
from common.federation import ClientInfo, ClientUpdate, Dispatch, ServerState
from common.lowrank import Dense, LowRank, Update
from common.seeds import derive_seed
from common.travel import around, core_of
from strategies.aggregation import AggregationStrategy, Capabilities, Travel
from strategies.alternating import AlternatingSum
from strategies.frames import framed
from strategies.mean import WeightedSum
from strategies.updates import low_rank_layers

SEARCH_ROUNDS = 2
"""Rounds that find the frames."""

B, A = "fed_sb.b/", "fed_sb.a/"
"""Names of the frames in a state's extras, before the layer's."""

SLACK = 1e-3
"""Share of a client's ``b`` that may lie outside its frame: what half precision rounds off."""


@dataclass
class CoreSum:
    """Running sum of cores, each padded to the frames' rank.

    Parameters
    ----------
    frames : Adapter
        What all clients train between.
    """

    frames: Adapter
    total: WeightedSum = field(default_factory=WeightedSum)

    def add(self, update: ClientUpdate) -> CoreSum:
        """Add one update's core and heads, times its weight.

        Raises
        ------
        RejectedUpdate
            If the update does not lie between the frames; the sum is then unchanged.
        """
        cores: dict[str, Update] = {}
        for name, part in low_rank_layers(update).items():
            frame = self.frames.layers.get(name)
            where = f"client {update.client}, layer {name}"
            if not isinstance(frame, LowRank) or part.rank > frame.rank or part.shape != frame.shape:
                raise RejectedUpdate(f"{where}: shape {part.shape} of rank {part.rank} fits no frame of this run")
            core = core_of(part, frame)
            apart = part.b - frame.b[:, : part.rank].to(part.b) @ core
            same = torch.equal(part.a, frame.a[: part.rank].to(part.a))
            if not same or float(apart.norm()) > SLACK * float(part.b.norm()):
                raise RejectedUpdate(f"{where}: frozen factor differs from its frame; only the core may be trained")
            cores[name] = Dense(torch.nn.functional.pad(core, (0, frame.rank - part.rank) * 2))
        packed = Adapter.pack(cores, update.adapter.extras, update.adapter.method)
        self.total.add(ClientUpdate(update.client, packed, update.num_examples))
        return self

    def mean(self) -> Adapter:
        """Divide by the total weight, and put the frames around the cores."""
        mean = self.total.mean()
        layers: dict[str, Update] = {}
        for name, core in mean.layers.items():
            frame = self.frames.layers[name]
            assert isinstance(frame, LowRank)
            layers[name] = around(core.dense(), frame)
        return Adapter.pack(layers, mean.extras, mean.method)


class FedSB(AggregationStrategy):
    """Exact mean of square cores between frozen frames; the smallest uploads of all."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        mixed_ranks=True, linear_uplink=True, same_coordinates=True, exact=True
    )

    def travels(self, number: int) -> Travel:
        """Send factors while the frames are sought, cores afterwards."""
        return Travel("core", "core") if number > SEARCH_ROUNDS else Travel("ab", "b" if number == 1 else "a")

    def dispatch(self, state: ServerState, client: ClientInfo) -> Dispatch:
        """Send what a client of this rank trains: a factor, or the leading block of the core."""
        seed = self._seed(state)
        if state.round < SEARCH_ROUNDS:
            start = state.start.narrowed(client.rank)
            return Dispatch(start, client.rank, seed, trains="a" if state.round else "b")
        frames = frames_of(state)
        return Dispatch(_leading(state.start, frames, client.rank), client.rank, seed, trains="core", frames=frames)

    def begin(self, state: ServerState) -> AlternatingSum | CoreSum:
        """Open an empty sum of the factor or of the cores."""
        if state.round < SEARCH_ROUNDS:
            return AlternatingSum(state, self._seed(state), "a" if state.round else "b")
        return CoreSum(frames_of(state))

    def add(self, accumulated: AlternatingSum | CoreSum, update: ClientUpdate) -> AlternatingSum | CoreSum:
        """Add what learned, times its weight."""
        return accumulated.add(update)

    def finish(self, state: ServerState, accumulated: AlternatingSum | CoreSum) -> ServerState:
        """Replace what learned by its mean; after the second round fix the frames."""
        if state.round == SEARCH_ROUNDS - 1:
            layers, heads, frames = framed_layers(accumulated.mean(), self._seed(state))
            start, extras = Adapter.pack(layers, heads, state.spec.method), {**state.extras, **frames}
        else:
            start, extras = accumulated.mean(), dict(state.extras)
        return replace(state, start=start, round=state.round + 1, merged=start, extras=extras)

    def _seed(self, state: ServerState) -> int:
        return derive_seed(state.spec.seed, "fed_sb")


def framed_layers(mean: Adapter, seed: int) -> tuple[dict[str, Update], dict[str, Tensor], dict[str, Tensor]]:
    """Return a mean's layers between frames, its heads, and the frames by their names in a state; none is a view."""
    layers: dict[str, Update] = {}
    frames: dict[str, Tensor] = {}
    for name, part in low_rank_layers(ClientUpdate("the mean", mean, 1.0)).items():
        frame, core = framed(part, seed, name)
        layers[name] = around(core, frame)
        frames |= {B + name: frame.b, A + name: frame.a}
    return layers, {name: value.clone() for name, value in mean.extras.items()}, frames


@lru_cache(maxsize=2)
def frames_of(state: ServerState) -> Adapter:
    """Return the frames a state holds.

    Raises
    ------
    ConfigurationError
        If it holds none.
    """
    names = [name.removeprefix(B) for name in state.extras if name.startswith(B)]
    if not names:
        raise ConfigurationError("this state holds no frames for fed_sb; begin a new run")
    return Adapter.pack(
        {name: LowRank(state.extras[B + name], state.extras[A + name]) for name in names}, method=state.spec.method
    )


def _leading(start: Adapter, frames: Adapter, rank: int) -> Adapter:
    """Return the part of a start that a client of this rank can hold: the leading block of each core."""
    layers: dict[str, Update] = {}
    for name, part in start.layers.items():
        frame = frames.layers[name]
        assert isinstance(part, LowRank)
        assert isinstance(frame, LowRank)
        held = min(rank, frame.rank)
        layers[name] = around(core_of(part, frame)[:held, :held], frame)
    return Adapter.pack(layers, start.extras, start.method)
