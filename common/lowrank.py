"""One layer's weight update, as two thin factors or as a dense matrix.

A client's update of a layer is ``ΔW = b @ a``: ``a`` is PEFT's ``lora_A`` and ``b`` its ``lora_B`` times the
whole scaling, so that a factor ``a`` shared by all clients keeps its bits. Everything here works on the
factors; the ``out × in`` matrix is only built when somebody asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import ConfigurationError


class Svd(NamedTuple):
    """``u @ diag(s) @ vh``, singular values falling: u (out, r), s (r,), vh (r, in), all float64."""

    u: Tensor
    s: Tensor
    vh: Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update ``b @ a`` of one layer.

    Parameters
    ----------
    b : Tensor, shape (out, rank)
        Output factor, every scale folded in.
    a : Tensor, shape (rank, in)
        Input factor.

    Raises
    ------
    ConfigurationError
        If the two factors do not share their rank.
    """

    b: Tensor
    a: Tensor

    def __post_init__(self) -> None:
        if self.b.dim() != 2 or self.a.dim() != 2 or self.b.shape[1] != self.a.shape[0]:
            raise ConfigurationError(
                f"factors of shape {tuple(self.b.shape)} and {tuple(self.a.shape)} do not form b (out, r) @ a (r, in)"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the layer."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """Number of rank slots; the matrix' own rank may be lower."""
        return self.a.shape[0]

    def dense(self) -> Tensor:
        """Build the matrix, shape (out, in)."""
        return self.b @ self.a

    def scaled(self, factor: float) -> LowRank:
        """Multiply the update by ``factor``, in ``b``."""
        return LowRank(self.b * factor, self.a)

    def norm(self) -> float:
        """Return the Frobenius norm of ``b @ a``."""
        return math.sqrt(max(inner(self, self), 0.0))

    def svd(self) -> Svd:
        """Decompose ``b @ a`` through QR of the thin factors, in float64.

        O((out + in) r² + r³) instead of a dense SVD's O(out · in · min(out, in)).
        """
        q, r = torch.linalg.qr(self.b.double())
        p, t = torch.linalg.qr(self.a.double().T)
        u, s, vh = torch.linalg.svd(r @ t.T, full_matrices=False)
        return Svd(q @ u, s, vh @ p.T)

    def truncate(self, rank: int | None = None, energy: float | None = None) -> tuple[LowRank, float]:
        """Return the nearest update of bounded rank, refactored into singular vectors, and what it loses.

        Singular values that are only rounding noise are always dropped (see `kept_rank`), so the sum survives
        and the owner's own factors do not.

        Parameters
        ----------
        rank : int, optional
            Keep at most so many singular values.
        energy : float in (0, 1], optional
            Keep the fewest values that hold this share of the squared norm.

        Returns
        -------
        LowRank, float
            Balanced factors ``u √s`` and ``√s vh``, float32 at least, the largest entry of each column of ``u``
            positive, whatever the signs in the factors given; the share of ``‖ΔW‖²`` that the bounds leave out.

        Notes
        -----
        With ``b = q r``, ``aᵀ = p t`` and ``r tᵀ = x s yᵀ``, the factors are ``q x √s = b (tᵀ y / √s)`` and
        ``√s yᵀ pᵀ = (xᵀ r / √s) a``: without `svd`'s ``q`` and ``p``, quicker and no less exact.
        """
        b, a = self.b.double(), self.a.double()
        r, t = torch.linalg.qr(b, mode="r").R, torch.linalg.qr(a.T, mode="r").R
        x, s, yh = torch.linalg.svd(r @ t.T, full_matrices=False)
        dtype = torch.promote_types(self.a.dtype, torch.float32)
        noise = resolution(dtype, self.shape)
        keep = kept_rank(s, rank, energy, noise)
        root = s[:keep].sqrt()
        outer = b @ (t.T @ (yh[:keep].T / root))
        sign = outer.gather(0, outer.abs().argmax(0, keepdim=True)).sign()
        kept = LowRank((outer * sign).to(dtype), ((x[:, :keep] / root * sign).T @ r @ a).to(dtype))
        left_out, total = s[keep : kept_rank(s, None, None, noise)].square().sum(), s.square().sum()
        return kept, float(left_out / total) if total else 0.0


@dataclass(frozen=True, eq=False)
class Dense:
    """The update of a layer whose rank no longer pays: ``w``, shape (out, in)."""

    w: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the layer."""
        return self.w.shape[0], self.w.shape[1]

    def dense(self) -> Tensor:
        """Return the matrix itself, shape (out, in)."""
        return self.w

    def scaled(self, factor: float) -> Dense:
        """Multiply the update by ``factor``."""
        return Dense(self.w * factor)

    def norm(self) -> float:
        """Return the Frobenius norm."""
        return float(torch.linalg.vector_norm(self.w.double()))

    def low_rank(self) -> LowRank:
        """Factor the matrix into its singular vectors, dropping nothing but rounding."""
        return self.truncate()[0]

    def truncate(self, rank: int | None = None, energy: float | None = None) -> tuple[LowRank, float]:
        """Return the nearest factors of bounded rank and the share of ``‖ΔW‖²`` they lose, as `LowRank.truncate`."""
        u, s, vh = torch.linalg.svd(self.w.double(), full_matrices=False)
        dtype = torch.promote_types(self.w.dtype, torch.float32)
        noise = resolution(dtype, self.shape)
        keep = kept_rank(s, rank, energy, noise)
        root = s[:keep].sqrt()
        left_out, total = s[keep : kept_rank(s, None, None, noise)].square().sum(), s.square().sum()
        kept = LowRank((u[:, :keep] * root).to(dtype), (root[:, None] * vh[:keep]).to(dtype))
        return kept, float(left_out / total) if total else 0.0


Update = LowRank | Dense


def resolution(dtype: torch.dtype, shape: tuple[int, int]) -> float:
    """Tell which share of the largest singular value is rounding: of ``dtype``, or of the float64 SVD."""
    return max(torch.finfo(dtype).eps, max(shape) * torch.finfo(torch.float64).eps)


def kept_rank(s: Tensor, rank: int | None, energy: float | None, noise: float) -> int:
    """Count the singular values ``s`` (falling) worth keeping under a rank and an energy bound.

    Values up to ``noise`` times the largest are never kept.
    """
    if not len(s) or s[0] == 0:
        return 0
    keep = int((s > s[0] * noise).sum())
    if energy is not None:
        share = s.square().cumsum(0) / s.square().sum()
        keep = min(keep, int((share < energy).sum()) + 1)
    return keep if rank is None else min(keep, rank)


def stack(parts: Sequence[LowRank], weights: Sequence[float] | None = None) -> LowRank:
    """Sum updates exactly by putting their factors side by side (FLoRA, arXiv 2409.05976).

    The rank is the sum of the parts' ranks. Weights go into ``b``, once; half precision is widened to float32
    first.
    """
    b, a = torch.cat([part.b for part in parts], dim=1), torch.cat([part.a for part in parts])
    if weights is None:
        return LowRank(b, a)
    wide = torch.promote_types(b.dtype, torch.float32)
    slots = torch.repeat_interleave(torch.tensor(weights, dtype=wide), torch.tensor([part.rank for part in parts]))
    return LowRank(b.to(wide).mul_(slots), a.to(wide))  # cat gave memory of its own


def add(x: Update, y: Update) -> Update:
    """Add two updates of one layer: factors stay factors, anything with a dense part becomes dense."""
    if isinstance(x, LowRank) and isinstance(y, LowRank):
        return stack([x, y])
    return Dense(x.dense() + y.dense())


def inner(x: Update, y: Update) -> float:
    """Frobenius inner product of two updates, in float64, without the dense matrix of a low-rank one.

    ``⟨b₁a₁, b₂a₂⟩ = Σ (b₁ᵀb₂) ∘ (a₁a₂ᵀ)``; differences computed through it are exact to about 1e-8 relative.
    """
    if isinstance(x, Dense) and isinstance(y, Dense):
        return float((x.w.double() * y.w.double()).sum())
    if isinstance(x, LowRank) and isinstance(y, LowRank):
        return float(((x.b.double().T @ y.b.double()) * (x.a.double() @ y.a.double().T)).sum())
    thin, wide = (x, y) if isinstance(x, LowRank) else (y, x)
    assert isinstance(thin, LowRank)
    return float(((thin.b.double().T @ wide.dense().double()) * thin.a.double()).sum())
