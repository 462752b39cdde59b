"""Weighted k-means of points whose sign is free, computed from their Gram matrix alone.

``min Σᵢ wᵢ min_j ‖σᵢ xᵢ − μ_j‖²`` over centroids ``μ_j`` and signs ``σᵢ = ±1``: a rank-1 update ``b aᵀ`` is
the same as ``(−b)(−a)ᵀ``, so a point must not be far from its own mirror image. With ``μ_j = Σᵢ c_ij xᵢ``
every distance follows from ``G = X Xᵀ``, and an iteration costs O(n² k) whatever the points' length.

Lloyd's iteration from k-means++ seeds (Arthur and Vassilvitskii, SODA 2007), kernel form. All in float64;
ties go to the lowest index; an empty cluster takes the point farthest from its centroid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Clusters:
    """A partition of n points into ``count`` clusters.

    Parameters
    ----------
    labels : Tensor of int64, shape (n,)
        Cluster of each point.
    signs : Tensor, shape (n,)
        ±1: how each point enters its centroid.
    count : int
        Number of clusters, none of them empty.
    inertia : float
        Weighted sum of squared distances to the centroids of the last but one step.
    """

    labels: Tensor
    signs: Tensor
    count: int
    inertia: float = 0.0

    def membership(self) -> Tensor:
        """Return 1 where point i belongs to cluster j, shape (count, n), float64."""
        return torch.nn.functional.one_hot(self.labels, self.count).T.double()


def singletons(count: int) -> Clusters:
    """Give each of ``count`` points a cluster of its own."""
    return Clusters(torch.arange(count), torch.ones(count, dtype=torch.float64), count)


def kmeans(
    gram: Tensor,
    weight: Tensor,
    count: int,
    seed: int,
    n_init: int = 10,
    max_iter: int = 100,
    tol: float = 1e-10,
) -> Clusters:
    """Cluster points given by their Gram matrix; the best of ``n_init`` starts.

    Parameters
    ----------
    gram : Tensor of float64, shape (n, n)
        Inner products of the points.
    weight : Tensor of float64, shape (n,)
        Positive weights.
    count : int
        Number of clusters, from 1 to n.
    seed : int
        Decides the starts; the same seed gives the same bits.
    n_init, max_iter : int
        Starts, and steps at most per start.
    tol : float
        Stop when a step gains less than this share of ``Σ wᵢ ‖xᵢ‖²``.
    """
    generator = torch.Generator().manual_seed(seed)
    best: Clusters | None = None
    for _ in range(n_init):
        found = _lloyd(gram, weight, _plus_plus(gram, weight, count, generator), max_iter, tol)
        if best is None or found.inertia < best.inertia:
            best = found
    assert best is not None
    return best


def _plus_plus(gram: Tensor, weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw seeds far apart; returns the centroids' coefficients, shape (n, count)."""
    square = gram.diagonal()
    chosen = [_draw(weight, generator)]
    near = torch.full_like(square, math.inf)
    for _ in range(count - 1):
        last = chosen[-1]
        near = torch.minimum(near, (square + square[last] - 2 * gram[:, last].abs()).clamp_min(0))
        near[chosen] = 0
        chosen.append(_draw(weight * near, generator))
    coefficients = torch.zeros(len(square), count, dtype=torch.float64)
    coefficients[chosen, range(count)] = 1
    return coefficients


def _draw(mass: Tensor, generator: torch.Generator) -> int:
    """Draw an index with probability proportional to ``mass``; the first one if all mass is zero."""
    steps = mass.cumsum(0)
    spot = steps[-1] * torch.rand((), dtype=torch.float64, generator=generator)
    return int(torch.searchsorted(steps, spot, right=True).clamp_max(len(mass) - 1)) if steps[-1] > 0 else 0


def _lloyd(gram: Tensor, weight: Tensor, coefficients: Tensor, max_iter: int, tol: float) -> Clusters:
    """Alternate assignment and means until a step gains next to nothing."""
    count = coefficients.shape[1]
    least_gain = tol * float((weight * gram.diagonal()).sum())
    before = math.inf
    for _ in range(max_iter):
        labels, signs, distance = _assign(gram, coefficients)
        _fill_empty(labels, signs, distance, count)
        inertia = float((weight * distance).sum())
        if before - inertia <= least_gain:
            break
        before = inertia
        share = torch.zeros_like(coefficients)
        share[torch.arange(len(labels)), labels] = weight
        coefficients = signs[:, None] * share / share.sum(0)
    return Clusters(labels, signs, count, inertia)


def _assign(gram: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find each point's nearest centroid up to sign: label, sign, squared distance."""
    product = gram @ coefficients
    closeness = 2 * product.abs() - (coefficients * product).sum(0)
    best, labels = closeness.max(1).values, closeness.argmax(1)
    nearest = product.gather(1, labels[:, None])[:, 0]
    signs = torch.where(nearest < 0, -1.0, 1.0).double()
    return labels, signs, (gram.diagonal() - best).clamp_min(0)


def _fill_empty(labels: Tensor, signs: Tensor, distance: Tensor, count: int) -> None:
    """Give every empty cluster the farthest point of a cluster that keeps another one; in place."""
    sizes = torch.bincount(labels, minlength=count)
    for empty in (sizes == 0).nonzero()[:, 0].tolist():
        point = int(torch.where(sizes[labels] > 1, distance, -1.0).argmax())
        sizes[labels[point]] -= 1
        sizes[empty] += 1
        labels[point], signs[point], distance[point] = empty, 1.0, 0.0
