"""A row's weight gradient as a sum of outer products, and what can be had from it without forming it.

For a layer ``y_t = W x_t`` a row's gradient is ``Σ_t g_t x_tᵀ`` over its positions t. Its squared norm is
``Σ_{t,s} (g_t·g_s)(x_t·x_s)`` (Goodfellow, Efficient Per-Example Gradient Computations, arXiv 1510.01799; for
sequences Li, Tramèr, Liang, Hashimoto, ICLR 2022, arXiv 2110.05679), and a weighted sum over rows is one matrix product
of what is kept (Bu, Wang, Zha, Karypis, ICML 2023, arXiv 2210.00038). An embedding is the same with one-hot vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Outer:
    """``Σ_t left_t ⊗ right_t`` for every row of a batch.

    Parameters
    ----------
    left, right : Tensor, shape (rows, positions, size), or integer of shape (rows, positions)
        Vectors; integers stand for one-hot vectors. At most one side is integer.
    shape : (int, int)
        Sizes of both sides: the gradient's shape.
    """

    left: Tensor
    right: Tensor
    shape: tuple[int, int]

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """Both sides."""
        return self.left, self.right

    def numbers(self) -> int:
        """Count what is kept per row."""
        return (self.left.numel() + self.right.numel()) // len(self.left)

    def silenced(self, bad: Tensor) -> Outer:
        """Return the same with zeros in the rows marked."""
        marked = bad.to(self.left.device)[:, None, None]
        left, right = (side if _is_one_hot(side) else side.masked_fill(marked, 0) for side in self.sides)
        return Outer(left, right, self.shape)

    def dense(self) -> Tensor:
        """Form every row's gradient, shape (rows, *shape), in fp32; the narrower side is put first for speed."""
        if _is_one_hot(self.left):
            return _scattered(self.left, self.right, self.shape[0])
        if _is_one_hot(self.right):
            return _scattered(self.right, self.left, self.shape[1]).transpose(1, 2)
        left, right = self.left.float(), self.right.float()
        if self.shape[1] < self.shape[0]:
            return torch.bmm(right.transpose(1, 2), left).transpose(1, 2)
        return torch.bmm(left.transpose(1, 2), right)

    def weighted(self, factors: Tensor) -> Tensor:
        """Return ``Σ_i factors_i · gradient_i``, of the gradient's shape, in fp32."""
        if _is_one_hot(self.left):
            return _gathered(self.left, self.right, factors, self.shape[0])
        if _is_one_hot(self.right):
            return _gathered(self.right, self.left, factors, self.shape[1]).t()
        left, right = self.left.float(), self.right.float()
        if self.shape[1] < self.shape[0]:
            right = right * factors[:, None, None]
            return (right.flatten(0, 1).t() @ left.flatten(0, 1)).t()
        left = left * factors[:, None, None]
        return left.flatten(0, 1).t() @ right.flatten(0, 1)


class Grams:
    """Inner products of positions; those of a tensor with itself are kept, since several layers have the same input."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Tensor] = {}

    def of(self, one: Tensor, other: Tensor) -> Tensor:
        """Return those of all positions of one side with all of another's, shape (rows, positions, positions)."""
        if one is not other or _is_one_hot(one):
            return _gram(one, other)
        key = (one.data_ptr(), one.shape, one.stride())
        if key not in self._known:
            self._known[key] = _gram(one, one)
        return self._known[key]


def squared_norms(pairs: Sequence[Outer], grams: Grams) -> Tensor:
    """Return every row's squared norm of the sum of ``pairs``, shape (rows,); none of them is formed.

    ``grams`` serves all parameters of one pass, whose tensors stay where they are meanwhile.
    """
    total = torch.zeros((), device=pairs[0].left.device)
    for one, other in combinations_with_replacement(pairs, 2):
        product = (grams.of(one.left, other.left) * grams.of(one.right, other.right)).sum(dim=(1, 2))
        total = total + (product if one is other else 2 * product)
    return total.clamp(min=0)


def _gram(one: Tensor, other: Tensor) -> Tensor:
    if _is_one_hot(one):
        if _is_one_hot(other):
            return (one.unsqueeze(2) == other.unsqueeze(1)).float()
        return _gram(other, one).transpose(1, 2)
    if _is_one_hot(other):
        return one.float().gather(2, other.unsqueeze(1).expand(-1, one.shape[1], -1))
    return torch.bmm(one.float(), other.float().transpose(1, 2))


def _scattered(places: Tensor, vectors: Tensor, size: int) -> Tensor:
    rows, _, width = vectors.shape
    found = torch.zeros(rows, size, width, device=vectors.device)
    return found.scatter_add_(1, places.unsqueeze(2).expand(-1, -1, width), vectors.float())


def _gathered(places: Tensor, vectors: Tensor, factors: Tensor, size: int) -> Tensor:
    found = torch.zeros(size, vectors.shape[2], device=vectors.device)
    return found.index_add_(0, places.flatten(), (vectors.float() * factors[:, None, None]).flatten(0, 1))


def _is_one_hot(side: Tensor) -> bool:
    return not side.is_floating_point()
