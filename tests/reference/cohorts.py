"""Random cohorts of clients for tests: seeded, in float64 unless asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from common.adapter import Adapter, tensor_bytes
from common.federation import ClientUpdate, ModelSpec, ServerState
from common.lowrank import LowRank
from tests.reference import dense

SHAPES = {"down": (6, 20), "out": (12, 12), "up": (18, 9)}
HEADS = {"score.bias": (3,), "score.weight": (3, 5)}
NAMES = ("ada", "bo", "cy", "di", "ed", "flo", "gus", "hal")


def model_spec(shapes: Mapping[str, tuple[int, int]] = SHAPES, heads: bool = True, seed: int = 7) -> ModelSpec:
    """Build a model of a few layers, with a head of zeros."""
    named = {name: torch.zeros(shape) for name, shape in HEADS.items()} if heads else {}
    return ModelSpec(dict(shapes), seed, named)


def low_rank(out: int, inn: int, rank: int, generator: torch.Generator, dtype: torch.dtype) -> LowRank:
    """Draw Gaussian factors."""
    b = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    a = torch.randn(rank, inn, generator=generator, dtype=torch.float64)
    return LowRank(b.to(dtype), a.to(dtype))


def cohort(
    spec: ModelSpec,
    ranks: Sequence[int],
    seed: int = 0,
    weights: Sequence[float] = (10, 30, 60, 5, 17, 1, 2, 3),
    dtype: torch.dtype = torch.float64,
    base_version: int = 0,
    shared_a: bool = False,
) -> list[ClientUpdate]:
    """Draw one update per rank; ``shared_a`` gives all clients the first client's input factors."""
    generator = torch.Generator().manual_seed(seed)
    updates: list[ClientUpdate] = []
    first: dict[str, LowRank] = {}
    for name, rank, weight in zip(NAMES, ranks, weights, strict=False):
        layers = {layer: low_rank(*shape, rank, generator, dtype) for layer, shape in sorted(spec.layers.items())}
        if shared_a:
            first = first or layers
            layers = {layer: LowRank(part.b, first[layer].a) for layer, part in layers.items()}
        heads = {
            head: torch.randn(value.shape, generator=generator, dtype=torch.float64).to(dtype)
            for head, value in spec.heads.items()
        }
        updates.append(ClientUpdate(name, Adapter.pack(layers, heads, spec.method), weight, base_version))
    return updates


def with_factors(update: ClientUpdate, layers: Mapping[str, LowRank]) -> ClientUpdate:
    """Replace an update's layers, keep all else."""
    adapter = Adapter.pack(layers, update.adapter.extras, update.adapter.method)
    return ClientUpdate(update.client, adapter, update.num_examples, update.base_version, update.metrics)


def factors(adapter: Adapter, layer: str) -> tuple[dense.Matrix, dense.Matrix]:
    """Return b and a of a layer as float64 numpy; of a matrix, itself and the identity."""
    part = adapter.layers[layer]
    if not isinstance(part, LowRank):
        return part.w.double().numpy(), np.eye(part.shape[1])
    return part.b.double().numpy(), part.a.double().numpy()


def exact(updates: Sequence[ClientUpdate], layer: str) -> dense.Matrix:
    """Return ``Σ wᵢ ΔWᵢ`` of a layer by the slow reference."""
    held = [update for update in updates if layer in update.adapter.layers]
    whole = sum(update.num_examples for update in updates)
    parts = [factors(update.adapter, layer) for update in held]
    return dense.average(parts, [update.num_examples for update in held], whole)


def matrix(adapter: Adapter | None, layer: str) -> dense.Matrix:
    """Return a layer's matrix as float64 numpy."""
    assert adapter is not None
    return dense.product(*factors(adapter, layer))


def error(state: ServerState, updates: Sequence[ClientUpdate]) -> float:
    """Return the largest distance of a merged layer from the exact average."""
    layers = {layer for update in updates for layer in update.adapter.layers}
    return max(dense.distance(matrix(state.merged, layer), exact(updates, layer)) for layer in layers)


def bits(state: ServerState) -> tuple[str, str, str, str, tuple[tuple[str, float], ...]]:
    """Fingerprint everything a merge changes."""
    merged = state.merged.sha256() if state.merged else ""
    remembered = repr(sorted((name, hash_of(value)) for name, value in state.extras.items()))
    metrics = tuple(sorted(state.metrics.items()))
    return state.start.sha256(), state.global_adapter.sha256(), merged, remembered, metrics


def hash_of(tensor: Tensor) -> str:
    """Hash a tensor's shape, dtype and bytes."""
    return hashlib.sha256(f"{tensor.shape}{tensor.dtype}".encode() + tensor_bytes(tensor.reshape(-1))).hexdigest()


def scaled_slots(part: LowRank, gain: Tensor) -> LowRank:
    """Rewrite the factors slot by slot, ``(c a, b / c)``, leaving the update as it is."""
    return LowRank(part.b / gain, part.a * gain[:, None])


def numpy(tensor: Tensor) -> dense.Matrix:
    """Return a tensor as float64 numpy."""
    return np.asarray(tensor.double())
