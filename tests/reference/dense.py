"""Slow, obvious arithmetic that the quick code is compared with: numpy, float64, loops, dense matrices.

Shares no code with the platform, so that a mistake cannot hide in both places.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def product(b: Matrix, a: Matrix) -> Matrix:
    """Sum the outer products of the rank slots, one after the other."""
    total = np.zeros((b.shape[0], a.shape[1]))
    for slot in range(a.shape[0]):
        total = total + np.outer(b[:, slot], a[slot])
    return total


def average(parts: Sequence[tuple[Matrix, Matrix]], weights: Sequence[float], whole: float) -> Matrix:
    """Return ``Σ nᵢ bᵢ aᵢ / n``; ``whole`` is n, which also counts clients without the layer."""
    total = np.zeros((parts[0][0].shape[0], parts[0][1].shape[1]))
    for (b, a), weight in zip(parts, weights, strict=True):
        total = total + weight / whole * product(b, a)
    return total


def distance(x: Matrix, y: Matrix) -> float:
    """Return ``‖x − y‖``, relative to ``‖y‖`` where that is not zero."""
    whole = math.sqrt(float(np.sum(y * y)))
    apart = math.sqrt(float(np.sum((x - y) ** 2)))
    return apart / whole if whole else apart


def tail(matrix: Matrix, rank: int) -> float:
    """Return the squared norm that the best approximation of a rank leaves out (Eckart and Young)."""
    values = np.linalg.svd(matrix, compute_uv=False)
    return float(sum(value**2 for value in values[rank:]))


def energy_rank(matrix: Matrix, energy: float) -> int:
    """Count singular values until their squares reach a share of the squared norm."""
    squares = [float(value) ** 2 for value in np.linalg.svd(matrix, compute_uv=False)]
    held = 0.0
    for count, square in enumerate(squares, 1):
        held += square
        if held >= energy * sum(squares) > 0:
            return count
    return 0


@dataclass(frozen=True)
class Unit:
    """A balanced rank slot: owner's share of the round, weight in the centroid, both halves."""

    share: float
    weight: float
    a: Matrix
    b: Matrix

    @property
    def feature(self) -> Matrix:
        return np.concatenate([self.a, self.b])


def units(clients: Sequence[tuple[float, Matrix, Matrix]]) -> list[Unit]:
    """Balance every slot of every client (share, b, a) by itself."""
    found = []
    for share, b, a in clients:
        for slot in range(a.shape[0]):
            row, column = a[slot], b[:, slot]
            gain = math.sqrt(float(np.linalg.norm(column)) / float(np.linalg.norm(row)))
            found.append(Unit(share, share, row * gain, column / gain))
    return found


def cluster_cost(members: Sequence[Unit]) -> tuple[float, Matrix]:
    """Return the least weighted scatter of a cluster over all signs, and the centroid that has it."""
    best = math.inf
    centre: Matrix = np.zeros(0)
    for signs in itertools.product([1.0, -1.0], repeat=len(members) - 1):
        pairs = [(unit.weight, sign * unit.feature) for unit, sign in zip(members, (1.0, *signs), strict=True)]
        mean = np.sum([weight * feature for weight, feature in pairs], axis=0) / sum(w for w, _ in pairs)
        cost = sum(weight * float(np.sum((feature - mean) ** 2)) for weight, feature in pairs)
        if cost < best:
            best, centre = cost, mean
    return best, centre


def best_partition(pool: Sequence[Unit], count: int) -> tuple[float, list[list[int]]]:
    """Try every partition of the pool into ``count`` clusters, with every choice of signs."""
    best, found = math.inf, []
    for labels in itertools.product(range(count), repeat=len(pool)):
        groups = [[i for i, label in enumerate(labels) if label == j] for j in range(count)]
        if any(not group for group in groups) or [group[0] for group in groups] != sorted(group[0] for group in groups):
            continue
        cost = sum(cluster_cost([pool[i] for i in group])[0] for group in groups)
        if cost < best:
            best, found = cost, groups
    return best, found


def lego_delta(pool: Sequence[Unit], groups: Sequence[Sequence[int]], inn: int, factor: str) -> Matrix:
    """Sum the centroids' outer products, each times its mass or the squared growth of its norm."""
    total = np.zeros((len(pool[0].b), inn))
    for group in groups:
        members = [pool[i] for i in group]
        _, centre = cluster_cost(members)
        scale = sum(unit.share for unit in members)
        if factor != "mass":
            order = np.inf if factor == "inf" else 2
            mean = sum(unit.weight * float(np.linalg.norm(unit.feature, order)) for unit in members)
            mean /= sum(unit.weight for unit in members)
            scale = (mean / float(np.linalg.norm(centre, order))) ** 2
        total = total + scale * np.outer(centre[inn:], centre[:inn])
    return total


def cosine(xs: Mapping[str, Matrix], ys: Mapping[str, Matrix]) -> float:
    """Return the cosine of two whole updates, layer after layer."""
    dot = sum(float(np.sum(xs[layer] * ys[layer])) for layer in xs)
    x = math.sqrt(sum(float(np.sum(value**2)) for value in xs.values()))
    y = math.sqrt(sum(float(np.sum(value**2)) for value in ys.values()))
    return dot / (x * y)


def nearest(matrix: Matrix, rank: int) -> Matrix:
    """Return the best approximation of a rank: the leading singular triples, one after the other."""
    u, values, vh = np.linalg.svd(matrix, full_matrices=False)
    total = np.zeros_like(matrix)
    for slot in range(min(rank, len(values))):
        total = total + values[slot] * np.outer(u[:, slot], vh[slot])
    return total


def padded_mean(
    parts: Sequence[tuple[Matrix, Matrix]], weights: Sequence[float], per_slot: bool
) -> tuple[Matrix, Matrix]:
    """Average b and a slot by slot, a client without the slot counting as zero, or not at all."""
    rank = max(a.shape[0] for _, a in parts)
    b_mean, a_mean = np.zeros((parts[0][0].shape[0], rank)), np.zeros((rank, parts[0][1].shape[1]))
    for slot in range(rank):
        held = [(b[:, slot], a[slot], weight) for (b, a), weight in zip(parts, weights, strict=True) if slot < len(a)]
        whole = sum(weight for *_, weight in held) if per_slot else sum(weights)
        for column, row, weight in held:
            b_mean[:, slot] += weight / whole * column
            a_mean[slot] += weight / whole * row
    return b_mean, a_mean


def ridge(target: Matrix, a: Matrix, penalty: float) -> Matrix:
    """Return x with the least ``‖target − x a‖² + penalty ‖x‖²``, as least squares over one longer system."""
    system = np.concatenate([a.T, math.sqrt(penalty) * np.eye(len(a))])
    wanted = np.concatenate([target.T, np.zeros((len(a), len(target)))])
    found: Matrix = np.linalg.lstsq(system, wanted, rcond=None)[0].T
    return found
