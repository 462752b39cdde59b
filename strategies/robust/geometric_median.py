"""Geometric median: weigh the updates so that their mean has the least sum of distances to all of them.

``min_z Σ ‖z − xᵢ‖`` by Weiszfeld's steps ``z = Σ βᵢ xᵢ``, ``βᵢ ∝ 1 / max(ν, ‖z − xᵢ‖)``. Only the weights ``β`` are
sought, from the distances between the clients' products; any strategy can merge the updates with them. Less than half
of the clients cannot move it far, however far away they are. Who ends with less than a hundredth of an equal share, as
beyond some hundred times the others' distance, is left out altogether: a small weight bounds a client's part of a sum,
not its part in a strategy that also clusters or decomposes what it is given.

Pillutla, Kakade, Harchaoui: Robust Aggregation for Federated Learning, IEEE Transactions on Signal Processing 70, 2022,
arXiv 1912.13445: its smoothed Weiszfeld algorithm. Departures: every client counts once, as weights are claims; the
steps begin in the smallest ball around an update that holds most of them instead of the mean, and ``ν`` is a share of
its radius, so that neither depends on how far away a liar is; who is more than ``1 / SMOOTHING`` radii from the ball's
centre has no part in the steps, where its distance would cancel the digits of all others; distances are those of the
products, as in `krum`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from common.adapter import Adapter
from common.federation import ClientUpdate
from strategies.gram import gram_of_changes, squared_distances
from strategies.robust import Judgement, RobustRule

SMOOTHING = 1e-6
"""Smallest distance that counts, as a share of the radius of the ball that holds most updates; its inverse: largest."""

LEAST = 0.01
"""Share of an equal share below which an update is left out."""


class GeometricMedian(RobustRule):
    """All updates, weighed by how near they are to the geometric median."""

    by_weights: ClassVar[bool] = True

    iterations: int = Field(100, ge=1, le=10_000, description="Weiszfeld steps at most.")
    tolerance: float = Field(1e-6, gt=0, lt=1, description="Stop when no weight moves more than this share of the sum.")

    def judge(self, updates: Sequence[ClientUpdate], starts: Mapping[str, Adapter]) -> Judgement:
        """Give every update its weight in the median, if any is worth it; the sum of weights stays."""
        squares = squared_distances(gram_of_changes(updates, starts))
        found = median_weights(squares, self.iterations, self.tolerance)
        weights = _normal(torch.where(found * len(found) < LEAST, 0.0, found)).tolist()
        total = math.fsum(update.num_examples for update in updates)
        return Judgement(
            [
                replace(update, num_examples=total * weight)
                for update, weight in zip(updates, weights, strict=True)
                if weight > 0
            ],
            {update.client: weight / max(weights) for update, weight in zip(updates, weights, strict=True)},
        )


def median_weights(squares: Tensor, iterations: int, tolerance: float) -> Tensor:
    """Return the weights of the geometric median, sum 1.

    Parameters
    ----------
    squares : Tensor, shape (K, K)
        Squared distances between the points, float64.
    iterations : int
        Steps at most.
    tolerance : float
        Stop when no weight moves more than this.
    """
    distances = squares.sqrt()
    radii = distances.sort(dim=1).values[:, len(distances) // 2]
    centre = int(radii.argmin())
    near = float(radii[centre])
    weights = _normal((distances[centre] <= near).double())
    counts = (distances[centre] <= near / SMOOTHING).double()
    if near == 0:  # most of the points are one and the same, and that is the median
        return weights
    for _ in range(iterations):
        # ‖xᵢ − Σ βⱼ xⱼ‖² = Σⱼ βⱼ dᵢⱼ² − ½ Σⱼₖ βⱼ βₖ dⱼₖ²
        spread = squares @ weights
        apart = (spread - weights @ spread / 2).clamp_min(0).sqrt()
        before, weights = weights, _normal(counts / apart.clamp_min(SMOOTHING * near))
        if float((weights - before).abs().max()) <= tolerance:
            break
    return weights


def _normal(weights: Tensor) -> Tensor:
    normal: Tensor = weights / weights.sum()
    return normal
