"""Orthonormal frames of a low-rank update, and the core between them: ``b a = B R A``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from common.lowrank import LowRank
from common.seeds import derive_seed


class Framed(NamedTuple):
    """An update as ``b @ core @ a``: b (out, rank) and a (rank, in) orthonormal, core (rank, rank)."""

    frame: LowRank
    core: Tensor


def framed(update: LowRank, seed: int, layer: str) -> Framed:
    """Take an update's singular vectors as frames, its singular values as the core.

    Where the update has fewer singular values than rank slots, random directions fill the frames up, so that the core
    can still grow.

    Parameters
    ----------
    update : LowRank
        Rank at most min(out, in).
    seed : int
        Draws the directions that are missing.
    layer : str
        Module name; each layer draws its own.
    """
    u, s, vh = update.svd()
    rank = min(update.rank, *update.shape)
    keep = int((s > s.max() * 1e-6).sum()) if len(s) else 0
    generator = torch.Generator().manual_seed(derive_seed(seed, "frames", layer))
    b = _completed(u[:, :keep], rank, generator)
    a = _completed(vh[:keep].T, rank, generator).T
    core = torch.diag(torch.cat([s[:keep], s.new_zeros(rank - keep)]))
    dtype = torch.promote_types(update.a.dtype, torch.float32)
    return Framed(LowRank(b.to(dtype), a.to(dtype).contiguous()), core.to(dtype))


def _completed(columns: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Add random orthonormal columns up to ``rank``."""
    missing = rank - columns.shape[1]
    if not missing:
        return columns
    drawn = torch.randn(columns.shape[0], missing, generator=generator, dtype=torch.float64)
    for _ in range(2):  # twice is enough to be orthogonal to rounding
        drawn = drawn - columns @ (columns.T @ drawn)
    return torch.cat([columns, torch.linalg.qr(drawn).Q], dim=1)
