"""One factor learns while all clients hold the other one: then the mean of what learned is the mean of the products."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from common.adapter import Adapter
from common.errors import RejectedUpdate
from common.federation import ClientUpdate, ServerState
from common.lowrank import Dense, LowRank, Update
from common.start import fresh_a
from strategies.mean import WeightedSum
from strategies.updates import low_rank_layers

Factor = Literal["b", "a"]


@dataclass
class AlternatingSum:
    """Running sum of the factor that learns in this round.

    Ranks may differ: a client of rank ``r`` holds the first ``r`` slots of the shared factor, and the rest of what it
    learns counts as zero. Slots that only absent clients hold stay, their ``b`` (or ``a``) at zero for now.

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
    _drawn: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.total.nested = self.learns == "b"

    def add(self, update: ClientUpdate) -> AlternatingSum:
        """Add one update after comparing the factor that was not to learn with the one given, bit for bit.

        Raises
        ------
        RejectedUpdate
            If that factor differs, or the update's layers do not fit; the sum is then unchanged.
        """
        parts = low_rank_layers(update)
        known = self.state.spec.layers if self.learns == "b" else self.state.start.layers
        if unknown := sorted(set(parts) - set(known)):
            raise RejectedUpdate(f"client {update.client} sent an unknown layer {unknown[0]!r}")
        if differing := [name for name, part in parts.items() if not self._holds_given(name, part)]:
            raise RejectedUpdate(
                f"client {update.client}, layer {differing[0]}: frozen factor differs from the one it was given; "
                f"only {self.learns} may be trained in this round"
            )
        self.total.add(update if self.learns == "b" else self._rows(update))
        return self

    def mean(self) -> Adapter:
        """Divide by the total weight, and put the factor that did not learn beside it."""
        if self.learns == "b":
            self.total.hold(self.state.start.layout)
            layers = self.total.layout.layers if self.total.layout else ()
            frozen = [self._given_a(name, rank, inn).reshape(-1) for name, _, inn, rank in layers]
            return self.total.mean(torch.cat(frozen) if frozen else torch.empty(0))
        mean = self.total.mean()
        whole = dict(self.state.start.layers)
        for name, learned in mean.layers.items():
            held, rows = whole[name], learned.dense()
            assert isinstance(held, LowRank)
            whole[name] = LowRank(held.b.to(rows.dtype), rows)
        return Adapter.pack(whole, mean.extras, mean.method)

    def _holds_given(self, name: str, part: LowRank) -> bool:
        """Tell whether the factor that was not to learn is the one given."""
        if self.learns == "b":
            return torch.equal(part.a, self._given_a(name, *part.a.shape).to(part.a.dtype))
        held = self.state.start.layers[name]
        assert isinstance(held, LowRank)
        given = held.b[:, : part.rank].float().to(part.b.dtype)
        return torch.equal(part.b[:, : held.rank], given) and not part.b[:, held.rank :].any()

    def _given_a(self, name: str, rank: int, in_features: int) -> Tensor:
        """Return the first rows of a layer's ``a`` as clients begin with them; those of the state are not copied."""
        held = self.state.start.layers.get(name)
        known = held.a if isinstance(held, LowRank) else torch.empty(0, in_features)
        if rank > len(known) and rank > len(self._drawn.get(name, ())):
            drawn = fresh_a(self.seed, name, rank, in_features)
            drawn[: len(known)] = known
            self._drawn[name] = drawn
        return (known if rank <= len(known) else self._drawn[name])[:rank].float()

    def _rows(self, update: ClientUpdate) -> ClientUpdate:
        """Return the rows of ``a`` at the state's rank, alone; slots beyond it have ``b`` = 0 and add nothing."""
        rows: dict[str, Update] = {}
        for name, part in low_rank_layers(update).items():
            held = self.state.start.layers[name]
            assert isinstance(held, LowRank)
            missing = held.rank - part.rank
            kept = part.a[: held.rank]
            rows[name] = Dense(torch.nn.functional.pad(kept, (0, 0, 0, missing)) if missing > 0 else kept)
        adapter = Adapter.pack(rows, update.adapter.extras, update.adapter.method)
        return ClientUpdate(update.client, adapter, update.num_examples)
