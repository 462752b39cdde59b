"""Clients by what they have in common: an order that puts those who agree next to each other, and who disagrees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """Two clients, by their place, and the cosine of their updates."""

    one: int
    other: int
    cosine: float


def order(cosine: Numbers) -> list[int]:
    """Return an order of clients in which those that agree are neighbours.

    The order of the Fiedler vector: of all unit vectors with mean 0 the one in which clients lie the nearer, the more
    they agree (Fiedler, "Algebraic connectivity of graphs", 1973). Its sign is chosen so that the first client comes
    in the first half.

    Parameters
    ----------
    cosine : ndarray, shape (K, K)
        Of clients to each other; NaN counts as 0.
    """
    count = len(cosine)
    if count < 3:
        return list(range(count))
    nearness = (1 + np.nan_to_num(cosine, nan=0.0)) / 2
    nearness = (nearness + nearness.T) / 2
    laplacian = np.diag(nearness.sum(axis=1)) - nearness
    vector = np.linalg.eigh(laplacian)[1][:, 1].round(9)
    return [int(place) for place in np.argsort(vector if vector[0] <= 0 else -vector, kind="stable")]


def extremes(cosine: Numbers) -> tuple[Pair, Pair] | None:
    """Return the two clients that disagree most and the two that agree most; None with fewer than two known."""
    rows, columns = np.triu_indices(len(cosine), 1)
    values = cosine[rows, columns]
    known = np.flatnonzero(np.isfinite(values))
    if not known.size:
        return None
    found = [known[values[known].argmin()], known[values[known].argmax()]]
    least, most = (Pair(int(rows[place]), int(columns[place]), float(values[place])) for place in found)
    return least, most


def mean_of_pairs(cosine: Numbers) -> float:
    """Return the mean cosine over all pairs of clients; NaN without any."""
    values = cosine[np.triu_indices(len(cosine), 1)]
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else float("nan")
