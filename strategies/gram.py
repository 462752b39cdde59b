"""How far apart the clients of a round are: inner products of their changes, from the factors alone.

A client's change is ``b a − b₀ a₀`` over all layers, heads beside: ``Δb a + b₀ Δa`` in factors, of which terms that are
zero (a frozen factor, a start of zero) are left out. With all factors of a layer side by side, the inner products are
block sums of ``(bᵀb) ∘ (a aᵀ)``; no matrix of a low-rank layer is built, one layer of all clients is looked at a time,
and what is measured does not depend on how an update is factored. But for one thing: an update whose slots cancel to
less than rounding leaves of them, as only a liar's do, counts as long as that rounding, since no merge in float32 finds
it shorter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from common.adapter import Adapter
from common.federation import ClientUpdate
from common.lowrank import Dense, LowRank, Update, stack

NOISE = 1e-14
"""Share of two squared norms below which the squared distance between them is only rounding.

Its root is that share of what cancels in a product of float32.
"""


def gram_of_changes(updates: Sequence[ClientUpdate], starts: Mapping[str, Adapter]) -> Tensor:
    """Return the inner products of the clients' changes, shape (K, K), float64, in the order given.

    A layer that a client lacks is one it did not change.
    """
    total = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for layer in sorted({layer for update in updates for layer in update.adapter.layers}):
        changes = [
            difference(update.adapter.layers[layer], starts[update.client].layers.get(layer))
            if layer in update.adapter.layers
            else None
            for update in updates
        ]
        total += _inner_products(changes)
    for head in sorted({head for update in updates for head in update.adapter.extras}):
        rows = [_head_change(update.adapter, starts[update.client], head) for update in updates]
        flat = torch.stack(rows)
        total += flat @ flat.T
    return (total + total.T) / 2


def squared_distances(gram: Tensor) -> Tensor:
    """Return ``‖xᵢ − xⱼ‖²`` from inner products; what is only rounding is 0."""
    sums = gram.diagonal()[:, None] + gram.diagonal()
    apart = sums - 2 * gram
    return torch.where(apart > NOISE * sums, apart, 0.0)


def difference(now: Update, start: Update | None) -> Update:
    """Return ``now − start`` in float64; factors stay factors, of at most twice the rank."""
    now = _in_float64(now)
    if start is None:
        return now
    start = _in_float64(start)
    if isinstance(now, Dense) or isinstance(start, Dense):
        return Dense(now.dense() - start.dense())
    b, a, b0, a0 = now.b, now.a, start.b, start.a
    terms = [LowRank(b, a), LowRank(-b0, a0)]
    if now.rank == start.rank:
        terms = [LowRank(b - b0, a), LowRank(b0, a - a0)]
    return stack([term for term in terms if term.b.any() and term.a.any()] or terms[:1])


def _in_float64(update: Update) -> Update:
    """Before anything is multiplied: the product of two float32 numbers may be beyond float32."""
    return LowRank(update.b.double(), update.a.double()) if isinstance(update, LowRank) else Dense(update.w.double())


def _inner_products(changes: Sequence[Update | None]) -> Tensor:
    """Return one layer's inner products; None is zero."""
    held = [(place, change) for place, change in enumerate(changes) if change is not None]
    thin = [change for _, change in held if isinstance(change, LowRank)]
    if len(thin) == len(held):
        b, a = torch.cat([part.b for part in thin], dim=1), torch.cat([part.a for part in thin])
        owner = torch.repeat_interleave(torch.tensor([part.rank for part in thin]))
        block = torch.nn.functional.one_hot(owner, len(thin)).double()
        slots = (b.T @ b) * (a @ a.T)
        own = block.T @ slots @ block
        own.diagonal().clamp_(min=NOISE * (block.T @ slots.diagonal().sqrt()).square())
    else:
        flat = torch.stack([change.dense().reshape(-1) for _, change in held])
        own = flat @ flat.T
    found = own.new_zeros(len(changes), len(changes))
    at = torch.tensor([place for place, _ in held])
    found[at[:, None], at] = own
    return found


def _head_change(now: Adapter, start: Adapter, head: str) -> Tensor:
    value = now.extras[head].double().reshape(-1)
    return value - start.extras[head].double().reshape(-1) if head in start.extras else value
