"""Rank slots as units that may be pooled: a column of ``b`` with its row of ``a``, in a unique form.

The factors of an update are not unique: permuting slots, ``(c a, b / c)`` and ``(−a, −b)`` leave ``b @ a`` as
it is but would move a unit away from its like. So units are balanced (``‖a‖ = ‖b‖``), given a sign, ordered
by norm, and clustered up to sign. Everything here is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.lowrank import LowRank, stack
from strategies.kmeans import Clusters

Norm = Literal["inf", "l2"]


@dataclass(frozen=True, eq=False)
class Units:
    """The pooled units of one layer, longest first; all tensors float64 unless said.

    Parameters
    ----------
    a : Tensor, shape (units, in)
        Input halves.
    b : Tensor, shape (units, out)
        Output halves, of the same norm as the input halves.
    owner : Tensor of int64, shape (units,)
        Position of the client that owns each unit.
    weight : Tensor, shape (units,)
        Weight of each unit in its centroid.
    mass : Tensor, shape (units,)
        Its client's share of the round.
    mean_rank : float
        Units per client that has any.
    """

    a: Tensor
    b: Tensor
    owner: Tensor
    weight: Tensor
    mass: Tensor
    mean_rank: float

    def __len__(self) -> int:
        return len(self.owner)

    def gram(self) -> Tensor:
        """Return the inner products of the features ``[a; b]``, shape (units, units)."""
        return self.a @ self.a.T + self.b @ self.b.T


@dataclass(frozen=True, eq=False)
class Centroids:
    """The weighted mean unit of each cluster.

    Parameters
    ----------
    a : Tensor, shape (clusters, in)
        Input halves.
    b : Tensor, shape (clusters, out)
        Output halves.
    mass : Tensor, shape (clusters,)
        Sum of the members' client shares.
    sole_owner : bool
        Whether some cluster holds units of one client only.
    """

    a: Tensor
    b: Tensor
    mass: Tensor
    sole_owner: bool

    def update(self, factor: Tensor, dtype: torch.dtype) -> LowRank:
        """Multiply each rank-1 product by its ``factor`` and sum them up as factors, heaviest slot first."""
        root = factor.sqrt()[:, None]
        a, b = self.a * root, self.b * root
        order = (a.norm(dim=1) * b.norm(dim=1)).sort(descending=True, stable=True).indices
        return LowRank(b[order].T.to(dtype), a[order].to(dtype))


def pool(parts: Sequence[LowRank], shares: Sequence[float], per_rank: bool = False) -> Units:
    """Collect the units of all clients of a layer; slots that are zero are left out.

    Parameters
    ----------
    parts : sequence of LowRank
        One update per client.
    shares : sequence of float
        The clients' shares of the round.
    per_rank : bool
        Divide a client's weight among its slots instead of giving it to each.
    """
    whole = stack(parts)
    a, b = whole.a.double(), whole.b.double().T
    owner = torch.repeat_interleave(torch.tensor([part.rank for part in parts]))
    mass = torch.tensor(shares, dtype=torch.float64)[owner]
    slots = torch.tensor([part.rank for part in parts], dtype=torch.float64)[owner]
    length = a.norm(dim=1) * b.norm(dim=1)
    order = length.sort(descending=True, stable=True).indices
    least = float(length.max()) * torch.finfo(whole.a.dtype).eps if len(length) else 0.0
    used = order[length[order] > least]
    a, b, owner, mass = a[used], b[used], owner[used], mass[used]
    a, b = _balanced(a, b)
    weight = mass / slots[used] if per_rank else mass
    return Units(a, b, owner, weight, mass, len(used) / max(len(owner.unique()), 1))


def centroids(units: Units, clusters: Clusters) -> Centroids:
    """Average the units of each cluster, signs aligned."""
    member = clusters.membership()
    share = member * units.weight
    mean = share / share.sum(1, keepdim=True) * clusters.signs
    owners = (member @ torch.nn.functional.one_hot(units.owner).double() > 0).sum(1)
    return Centroids(mean @ units.a, mean @ units.b, member @ units.mass, bool((owners == 1).any()))


def stretch(units: Units, clusters: Clusters, means: Centroids, norm: Norm, largest: float) -> tuple[Tensor, int]:
    """Tell by how much each centroid must grow to have its members' mean norm again.

    Averaging shrinks: the factor is at least 1 in any norm, and infinite where the members cancel.

    Parameters
    ----------
    units, clusters, means
        The clustered units and their centroids.
    norm : {"inf", "l2"}
        Norm of the whole feature ``[a; b]``.
    largest : float, at least 1
        Cap on the factor.

    Returns
    -------
    Tensor, int
        Factors, shape (clusters,), and how many of them met the cap.
    """
    share = clusters.membership() * units.weight
    wanted = share @ _feature_norm(units.a, units.b, norm) / share.sum(1)
    factor = wanted / _feature_norm(means.a, means.b, norm)
    return factor.clamp_max(largest), int((factor > largest).sum())


def _balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Give both halves of each unit the same norm, and the largest entry of ``a`` a positive sign."""
    gain = (b.norm(dim=1, keepdim=True) / a.norm(dim=1, keepdim=True)).sqrt()
    gain = gain * torch.where(a.gather(1, a.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
    return a * gain, b / gain


def _feature_norm(a: Tensor, b: Tensor, norm: Norm) -> Tensor:
    if norm == "inf":
        return torch.maximum(a.abs().amax(1), b.abs().amax(1))
    return (a.square().sum(1) + b.square().sum(1)).sqrt()
