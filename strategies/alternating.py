"""One factor learns while all clients hold the other one: then the mean of what learned is the mean of the products."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from common.adapter import Adapter, Layout
from common.errors import RejectedUpdate
from common.federation import ClientUpdate, Dispatch, ServerState
from common.lowrank import LowRank, Update
from common.start import starting_adapter
from strategies.mean import WeightedSum
from strategies.updates import low_rank_layers

Factor = Literal["b", "a"]


@dataclass
class AlternatingSum:
    """Running sum of the factor that learns in this round.

    Ranks may differ: a client of rank ``r`` holds the first ``r`` slots of the shared factor, and the rest of what it
    learns counts as zero.

    Parameters
    ----------
    state : ServerState
        What the clients were given.
    seed : int
        Draws the rows of ``a`` that the state lacks.
    learns : {"b", "a"}
        The factor that learns.
    """

    state: ServerState
    seed: int
    learns: Factor
    total: WeightedSum = field(default_factory=WeightedSum)
    _given: dict[Layout, Adapter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.total.nested = self.learns == "b"

    def add(self, update: ClientUpdate) -> AlternatingSum:
        """Add one update after comparing the factor that was not to learn with the one given, bit for bit.

        Raises
        ------
        RejectedUpdate
            If that factor differs, or the update's layers do not fit; the sum is then unchanged.
        """
        given = self._start(update)
        for name, part in low_rank_layers(update).items():
            known = given.layers[name]
            assert isinstance(known, LowRank)
            frozen, expected = (part.a, known.a) if self.learns == "b" else (part.b, known.b)
            if not torch.equal(frozen, expected.to(frozen.dtype)):
                raise RejectedUpdate(
                    f"client {update.client}, layer {name}: frozen factor differs from the one it was given; "
                    f"only {self.learns} may be trained in this round"
                )
        self.total.add(update if self.learns == "b" else self._padded(update))
        return self

    def mean(self) -> Adapter:
        """Divide by the total weight, and put the factor that did not learn beside it."""
        if self.learns == "b":
            layout = self.total.layout or Layout()
            return self.total.mean(self._whole(layout).inner_factors)
        mean = self.total.mean()
        layers: dict[str, Update] = {}
        for name, part in self.state.start.layers.items():
            learned = mean.layers[name]
            assert isinstance(part, LowRank)
            assert isinstance(learned, LowRank)
            layers[name] = LowRank(part.b.to(learned.a.dtype), learned.a)
        return Adapter.pack(layers, mean.extras, mean.method)

    def _padded(self, update: ClientUpdate) -> ClientUpdate:
        """Bring the rows of ``a`` to the state's rank; slots beyond it have ``b`` = 0 and add nothing."""
        layers: dict[str, Update] = {}
        for name, part in low_rank_layers(update).items():
            held = self.state.start.layers[name]
            assert isinstance(held, LowRank)
            rows = part.a.new_zeros(held.rank, part.a.shape[1])
            count = min(held.rank, part.rank)
            rows[:count] = part.a[:count]
            layers[name] = LowRank(part.b.new_zeros(part.b.shape[0], held.rank), rows)
        adapter = Adapter.pack(layers, update.adapter.extras, update.adapter.method)
        return ClientUpdate(update.client, adapter, update.num_examples)

    def _start(self, update: ClientUpdate) -> Adapter:
        layout = update.adapter.layout
        if layout not in self._given:
            if unknown := sorted(set(update.adapter.layers) - set(self.state.spec.layers)):
                raise RejectedUpdate(f"client {update.client} sent an unknown layer {unknown[0]!r}")
            self._given[layout] = self._whole(layout)
        return self._given[layout]

    def _whole(self, layout: Layout) -> Adapter:
        """Return what a client with this layout started from."""
        rank = max((rank for *_, rank in layout.layers), default=1)
        whole = starting_adapter(Dispatch(self.state.start, max(rank, 1), self.seed), self.state.spec)
        layers = {name: whole.layers[name] for name, *_ in layout.layers}
        return Adapter.pack(layers, whole.extras, whole.method)
