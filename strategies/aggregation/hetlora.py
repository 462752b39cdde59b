"""HetLoRA: pad every client's factors to the largest rank, average them by magnitude, and hand out the first slots.

``pᵢ = ‖bᵢ aᵢ‖ / Σ ‖bⱼ aⱼ‖`` per layer, Frobenius norms; ``a = Σ pᵢ pad(aᵢ)``, ``b = Σ pᵢ pad(bᵢ)``. A client of rank
``r`` starts the next round from the first ``r`` slots. As every mean of factors this is no mean of products, and slots
that few clients have are shrunk by the weight of all the others, unless ``renormalise = "slot"`` divides it out.

Clients may shrink: in training ``λ ‖b[:, k:]‖ ‖a[k:]‖`` is added to the loss for the slots beyond
``k = min(r − 1, ⌊γ r⌋)``; a client whose tail, ``Σ ‖b[:, k:]‖ ‖a[k:]‖`` over the layers, is smaller after a round than
before it has rank ``k`` from then on.

Cho, Liu, Xu, Fahrezi, Joshi: Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, EMNLP 2024,
arXiv 2401.06432; slot-wise weights: Chen, Tavallaie, Nazemi, Zomaya: RBLA: Rank-Based-LoRA-Aggregation for Fine-tuning
Heterogeneous Models in FLaaS, arXiv 2408.08699. Departures: the scale is wholly in ``b``, so with unequal scales the
factors mix otherwise than with its root in both; if all updates are zero, all count alike; slots that no update of the
round carries start afresh, with ``b`` = 0, since zeros in both factors would never learn; at least one
slot is given up at a time, where the paper's ⌈γ r⌉ would leave small ranks as they are.

Two warnings: examples count only in heads and with ``weights = "examples"``, so that a client gains weight by sending a
larger update; and slots of the widest client alone leave the server as they are, but for their weight. ``flexlora`` has
neither trait.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from common.adapter import Adapter
from common.federation import ClientInfo, ClientUpdate, Dispatch, ServerState
from common.lowrank import LowRank
from common.seeds import derive_seed
from common.start import starting_adapter
from strategies.aggregation import Capabilities
from strategies.gathering import Gathering
from strategies.mean import mean_extras
from strategies.products import client_ranks
from strategies.updates import by_layer, shares


class HetLoRA(Gathering):
    """Zero-padded mean of factors of any mix of ranks, weighed by magnitude."""

    capabilities: ClassVar[Capabilities] = Capabilities(mixed_ranks=True, linear_uplink=False, same_coordinates=True)

    weights: Literal["norm", "examples"] = Field(
        "norm", description="A client's weight in a layer: its update's norm, or its examples (plain zero padding)."
    )
    renormalise: Literal["none", "slot"] = Field(
        "none", description="Whether a slot's mean is over all clients, or over those that have it."
    )
    prune: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share γ of its slots that a client keeps when it shrinks; none: no client shrinks.",
    )
    prune_strength: float = Field(0.001, ge=0, description="Strength λ of the penalty on the slots beyond that share.")

    def weighs_examples(self) -> bool:
        """Tell whether clients count by their examples, not by the size of what they send."""
        return self.weights == "examples"

    def dispatch(self, state: ServerState, client: ClientInfo) -> Dispatch:
        """Send the first slots the client can hold, and the seed of those it lacks, the same for all clients."""
        rank = remembered_rank(state, client)
        tail = None
        if self.prune is not None and kept_slots(rank, self.prune):
            tail = (self.prune, self.prune_strength)
        return Dispatch(state.start.narrowed(rank), rank, first_rows(state), tail=tail)

    def finish(self, state: ServerState, accumulated: list[ClientUpdate]) -> ServerState:
        """Average the padded factors; remember whose rank shrinks."""
        examples = shares(accumulated)
        layers: dict[str, LowRank] = {}
        for layer, parts in by_layer(accumulated).items():
            held = list(parts.values())
            weights = norm_shares(held) if self.weights == "norm" else [examples[client] for client in parts]
            layers[layer] = padded_mean(held, weights, per_slot=self.renormalise == "slot")
        start = Adapter.pack(layers, mean_extras(accumulated, examples), state.spec.method)
        shrunk = self._shrunk(state, accumulated)
        return replace(
            state,
            start=start,
            round=state.round + 1,
            merged=start,
            extras={**state.extras, **{f"{RANK}{client}": torch.tensor(rank) for client, rank in shrunk.items()}},
            metrics={} if self.prune is None else {"pruned_clients": float(len(shrunk))},
        )

    def _shrunk(self, state: ServerState, updates: Sequence[ClientUpdate]) -> dict[str, int]:
        """Return the new rank of every client whose tail became smaller while it trained."""
        found: dict[str, int] = {}
        if self.prune is None:
            return found
        for update, rank in zip(updates, client_ranks(updates), strict=True):
            kept = kept_slots(rank, self.prune)
            start = starting_adapter(Dispatch(state.start, rank, first_rows(state)), state.spec)
            if kept and tail_norm(update.adapter, kept) < tail_norm(start, kept):
                found[update.client] = kept
        return found


RANK = "hetlora.rank/"


def remembered_rank(state: ServerState, client: ClientInfo) -> int:
    """Return the client's rank, or what it has shrunk to."""
    shrunk = state.extras.get(f"{RANK}{client.name}")
    return client.rank if shrunk is None else min(client.rank, int(shrunk))


def first_rows(state: ServerState) -> int:
    """Derive the seed of the rows of ``a`` that the mean lacks."""
    return derive_seed(state.spec.seed, "hetlora", state.round)


def kept_slots(rank: int, share: float) -> int:
    """Count the slots that are not penalised; 0 where a client cannot shrink."""
    return min(rank - 1, math.floor(share * rank))


def tail_norm(adapter: Adapter, kept: int) -> float:
    """Return ``Σ ‖b[:, k:]‖ ‖a[k:]‖`` over an adapter's layers."""
    return math.fsum(
        float(part.b[:, kept:].double().norm() * part.a[kept:].double().norm())
        for part in adapter.layers.values()
        if isinstance(part, LowRank)
    )


def norm_shares(parts: Sequence[LowRank]) -> list[float]:
    """Return ``‖bᵢ aᵢ‖ / Σ ‖bⱼ aⱼ‖`` without building a product; equal shares if all are zero."""
    norms = [part.norm() for part in parts]
    total = math.fsum(norms)
    return [norm / total if total else 1 / len(parts) for norm in norms]


def padded_mean(parts: Sequence[LowRank], weights: Sequence[float], per_slot: bool) -> LowRank:
    """Average factors of any ranks slot by slot, at the largest rank that has any weight.

    Parameters
    ----------
    parts : sequence of LowRank
        One layer of the clients.
    weights : sequence of float
        Not negative.
    per_slot : bool
        Divide each slot by the weight of the clients that have it.
    """
    carried = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight]
    rank = max((part.rank for part, _ in carried), default=0)
    dtype = torch.promote_types(parts[0].a.dtype, torch.float32)
    out, inn = parts[0].shape
    b, a = torch.zeros(out, rank, dtype=dtype), torch.zeros(rank, inn, dtype=dtype)
    mass = torch.zeros(rank, dtype=dtype)
    for part, weight in carried:
        b[:, : part.rank].add_(part.b, alpha=weight)
        a[: part.rank].add_(part.a, alpha=weight)
        mass[: part.rank] += weight
    return LowRank(b / mass, a / mass[:, None]) if per_slot else LowRank(b, a)
