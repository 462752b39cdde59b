"""What of an adapter travels, and how the other side makes it whole again.

Both sides know the dispatch, so a factor that nobody trained stays away: it is drawn from its seed, taken from the
start of the training or from frames that were sent once. Numbers travel in the order of the adapter's buffer; a core or
the sparse entries of a matrix take the place of its ``b``.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import torch
from torch import Tensor

from common.adapter import Adapter, Layout, tensor_bytes
from common.errors import ClientError
from common.federation import Dispatch, Part
from common.lowrank import Dense, LowRank, Update
from common.seeds import derive_seed
from common.start import frozen_factors


def entries(numel: int, density: float) -> int:
    """Count the entries of a matrix that learn, at least one."""
    return max(1, round(numel * density))


@lru_cache(maxsize=256)
def places(seed: int, layer: str, numel: int, density: float) -> Tensor:
    """Draw which entries of a matrix learn, rising, shape (entries,): the same for whoever knows the seed."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "mask", layer))
    return torch.randperm(numel, generator=generator)[: entries(numel, density)].sort().values


def part_numel(layout: Layout, part: Part, density: float | None = None) -> int:
    """Count the numbers of a part of an adapter with this layout."""
    if part == "ab":
        return layout.numel
    if part == "b":
        return layout.head_numel
    if part == "a":
        return layout.numel - layout.outer_numel
    if part == "inner":
        return layout.numel - layout.head_numel
    heads = layout.head_numel - layout.outer_numel
    if part == "core":
        return heads + sum(rank * rank for *_, rank in layout.layers)
    return heads + sum(entries(out * inn, density or 1.0) for _, out, inn, _ in layout.layers)


def take(adapter: Adapter, part: Part, dispatch: Dispatch | None = None) -> Tensor:
    """Return the numbers of a part, flat.

    Parameters
    ----------
    adapter : Adapter
        Whole.
    part : Part
        What is to travel.
    dispatch : Dispatch, optional
        For ``core`` and ``sparse``: knows the frames, or the mask.
    """
    flat, layout = adapter.flat, adapter.layout
    if part == "ab":
        return flat
    if part == "b":
        return flat[: layout.head_numel]
    if part == "a":
        return flat[layout.outer_numel :]
    if part == "inner":
        return flat[layout.head_numel :]
    assert dispatch is not None
    inside = [_inside(name, update, part, dispatch).reshape(-1) for name, update in adapter.layers.items()]
    return torch.cat([*inside, flat[layout.outer_numel : layout.head_numel]])


def core_of(update: LowRank, frame: LowRank) -> Tensor:
    """Return the core of an update whose ``b`` lies in the frame, shape (rank, rank) of the update."""
    return frame.b[:, : update.rank].to(update.b.dtype).T @ update.b


def around(core: Tensor, frame: LowRank) -> LowRank:
    """Put the first columns and rows of a frame around a core, shape (rank, rank)."""
    rank = len(core)
    return LowRank(frame.b[:, :rank].to(core.dtype) @ core, frame.a[:rank].to(core.dtype))


def _inside(name: str, update: Update, part: Part, dispatch: Dispatch) -> Tensor:
    """Return one layer's core, shape (rank, rank), or its sparse entries."""
    if part == "core":
        assert isinstance(update, LowRank)
        return core_of(update, _frame(dispatch, name, update.rank))
    assert isinstance(update, Dense)
    assert dispatch.density is not None
    return update.w.reshape(-1)[places(dispatch.seed, name, update.w.numel(), dispatch.density)]


def complete(
    numbers: Tensor, layout: Layout, part: Part, dispatch: Dispatch | None = None, start: Adapter | None = None
) -> Adapter:
    """Make an adapter whole again from the part of it that travelled.

    Parameters
    ----------
    numbers : Tensor, shape (part_numel(layout, part),)
        What arrived.
    layout : Layout
        Of the whole adapter.
    part : Part
        What it is.
    dispatch : Dispatch, optional
        What both sides know; not needed for ``ab``.
    start : Adapter, optional
        What the training began with, of the same layout: what did not travel is as it was there. Where there is none,
        what a client keeps to itself counts as zero.

    Raises
    ------
    ClientError
        If nothing tells what is missing.
    """
    if part == "ab":
        return Adapter(numbers, layout)
    if part == "b" and dispatch is not None and dispatch.frozen_a is not None:
        return Adapter(torch.cat([numbers, frozen_factors(layout, dispatch.frozen_a).to(numbers.dtype)]), layout)
    if part == "inner" and start is None:
        whole = numbers.new_zeros(layout.numel)
        whole[layout.head_numel :] = numbers
        return Adapter(whole, layout)
    if part in ("b", "a", "inner") and start is not None and start.layout == layout:
        before = {"b": 0, "a": layout.outer_numel, "inner": layout.head_numel}[part]
        after = layout.head_numel if part == "b" else layout.numel
        return Adapter(torch.cat([start.flat[:before], numbers, start.flat[after:]]), layout)
    if part == "core" and dispatch is not None and dispatch.frames is not None:
        return _from_inside(numbers, layout, part, dispatch)
    if part == "sparse" and dispatch is not None and dispatch.density is not None:
        return _from_inside(numbers, layout, part, dispatch)
    raise ClientError(f"an adapter came as {part} alone, and nothing here tells the rest")


def untrained_hash(adapter: Adapter, dispatch: Dispatch) -> str | None:
    """Hash the factor that was to stay as it was, so that server and node can compare theirs; None if both moved."""
    layout = adapter.layout
    if dispatch.sends == "b":
        return hashlib.sha256(tensor_bytes(adapter.inner_factors)).hexdigest()
    if dispatch.sends == "a":
        return hashlib.sha256(tensor_bytes(adapter.flat[: layout.outer_numel])).hexdigest()
    return None


def _from_inside(numbers: Tensor, layout: Layout, part: Part, dispatch: Dispatch) -> Adapter:
    layers: dict[str, Update] = {}
    at = 0
    for name, out, inn, rank in layout.layers:
        count = rank * rank if part == "core" else entries(out * inn, dispatch.density or 1.0)
        piece, at = numbers[at : at + count], at + count
        if part == "core":
            layers[name] = around(piece.view(rank, rank), _frame(dispatch, name, rank))
        else:
            matrix = piece.new_zeros(out * inn)
            matrix[places(dispatch.seed, name, out * inn, dispatch.density or 1.0)] = piece
            layers[name] = Dense(matrix.view(out, inn))
    heads = {}
    for head, shape in layout.extras:
        heads[head] = numbers[at : at + math.prod(shape)].view(shape)
        at += math.prod(shape)
    return Adapter.pack(layers, heads, layout.method)


def _frame(dispatch: Dispatch, layer: str, rank: int) -> LowRank:
    """Return a layer's frame, of ``rank`` at least."""
    frame = dispatch.frames.layers.get(layer) if dispatch.frames is not None else None
    if not isinstance(frame, LowRank) or frame.rank < rank:
        raise ClientError(f"there are no frames of rank {rank} for layer {layer}; they must be sent again")
    return frame
