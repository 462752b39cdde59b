"""Where a client's training starts: the dispatched factors, completed to the client's rank."""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import torch
from torch import Tensor

from common.adapter import Adapter, Layout, tensor_bytes
from common.errors import ConfigurationError
from common.federation import Dispatch, ModelSpec
from common.lowrank import Dense, LowRank, Update
from common.seeds import derive_seed


def fresh_a(seed: int, layer: str, rank: int, in_features: int) -> Tensor:
    """Draw an input factor as PEFT does (Kaiming uniform, a = √5: uniform in ±1/√in), float32 on the CPU.

    Rows are drawn one after the other, so the first rows of a higher rank equal those of a lower one.

    Parameters
    ----------
    seed : int
        Shared by all layers of an adapter; each layer draws from a seed of its own.
    layer : str
        Module name.
    rank, in_features : int
        Shape of the result.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "a", layer))
    bound = 1 / math.sqrt(in_features)
    return torch.rand(rank, in_features, generator=generator).mul_(2 * bound).sub_(bound)


@lru_cache(maxsize=4)
def frozen_factors(layout: Layout, seed: int) -> Tensor:
    """Draw all frozen ``a`` of a layout, flat and in its order; the last few layouts are remembered.

    Parameters
    ----------
    layout : Layout
        Names, shapes and ranks.
    seed : int
        Of the ``a`` all clients share.
    """
    factors = torch.empty(layout.numel - layout.head_numel)
    start = 0
    for name, _, inn, rank in layout.layers:
        if rank > 0:
            factors[start : start + rank * inn] = fresh_a(seed, name, rank, inn).view(-1)
            start += rank * inn
    return factors


@lru_cache(maxsize=8)
def frozen_hash(layout: Layout, seed: int) -> str:
    """Hash the frozen ``a`` of a layout, so that server and node can compare theirs."""
    return hashlib.sha256(tensor_bytes(frozen_factors(layout, seed))).hexdigest()


def starting_adapter(dispatch: Dispatch, spec: ModelSpec) -> Adapter:
    """Complete the dispatched start to every target layer at the client's rank.

    Missing rows of ``a`` are drawn from the dispatch's seed with ``b`` = 0, so they change nothing at first;
    surplus rows are cut, which only happens when a strategy sends more than the layer or the client can hold. Where
    entries of the matrix learn, layers are dense; between frames, no rank is above theirs.

    Raises
    ------
    ConfigurationError
        If the start holds a dense layer, which no adapter can be trained from.
    """
    layers: dict[str, Update] = {}
    for layer, (out, inn) in spec.layers.items():
        given = dispatch.start.layers.get(layer)
        if dispatch.trains == "sparse":
            layers[layer] = given if isinstance(given, Dense) else Dense(torch.zeros(out, inn))
        elif isinstance(given, Dense):
            raise ConfigurationError(f"layer {layer} is to start from a dense matrix; a strategy must send factors")
        else:
            layers[layer] = _factors(dispatch, layer, spec.layer_rank(layer, dispatch.rank), (out, inn), given)
    return Adapter.pack(layers, dispatch.start.extras or spec.heads, spec.method)


def _factors(dispatch: Dispatch, layer: str, rank: int, shape: tuple[int, int], given: LowRank | None) -> LowRank:
    out, inn = shape
    frame = dispatch.frames.layers.get(layer) if dispatch.frames is not None else None
    if isinstance(frame, LowRank):
        rank = min(rank, frame.rank)
        b, a = torch.zeros(out, rank), frame.a[:rank].float().clone()
    else:
        seed = dispatch.seed if dispatch.frozen_a is None else dispatch.frozen_a
        a, b = fresh_a(seed, layer, rank, inn), torch.zeros(out, rank)
    if given is not None:
        held = min(given.rank, rank)
        b[:, :held] = given.b[:, :held]
        if dispatch.frozen_a is None:
            a[:held] = given.a[:held]
    return LowRank(b, a)
