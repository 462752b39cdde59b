"""What noise costs: Rényi differential privacy of steps added up, and its conversion to (ε, δ).

A step of DP-SGD is a Poisson-subsampled Gaussian mechanism. Its Rényi divergence at each order α adds up over steps,
rounds and restarts (Mironov, Rényi Differential Privacy, CSF 2017, arXiv 1702.07476; Mironov, Talwar, Zhang, arXiv
1908.10530); ``ε = min over α`` of the conversion by Balle et al. (arXiv 1905.09982). The second accountant composes the
privacy loss numerically (Gopi, Lee, Wutschitz, NeurIPS 2021, arXiv 2106.02848). Both are Opacus's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, reduce
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.privacy.settings import Accountant

ORDERS: tuple[float, ...] = (*(1 + tenth / 10 for tenth in range(1, 100)), *range(11, 65), 128, 256, 512, 1024)
"""Rényi orders; with Opacus's own, which end at 63, no ε below 0.1 could be certified at δ = 1e-5."""

HOPELESS = 100.0
"""Above this ε the loss is not composed numerically: it says nothing any more, and would take minutes."""

SMALLEST_DELTA = 1e-10
"""Below this δ rounding in the Fourier transform outweighs the tail: at 1e-12 ε came out too small."""

ERROR = 0.01
"""Width of the numerically composed ε, which is added to it."""

MESH_POINTS = 1 << 21
"""The loss is composed on a mesh of about so many points, a second of work; long histories get a coarser one."""

Curve = NDArray[np.float64]
"""Rényi divergence at each of the orders."""


class Mechanism(NamedTuple):
    """One step: Gaussian noise of ``noise_multiplier`` times the clipping norm on rows drawn at ``sample_rate``."""

    noise_multiplier: float
    sample_rate: float


@lru_cache(maxsize=4096)
def curve(mechanism: Mechanism) -> Curve:
    """Return the Rényi divergence of one step; 10 to 100 ms the first time, then kept."""
    from opacus.accountants.analysis.rdp import compute_rdp  # brings torch along; whoever lists a ledger needs none

    found = compute_rdp(
        q=mechanism.sample_rate, noise_multiplier=mechanism.noise_multiplier, steps=1, orders=list(ORDERS)
    )
    values: Curve = np.maximum(found, 0.0)  # of very small ones rounding leaves -1e-16
    values.setflags(write=False)
    return values


@dataclass(frozen=True, eq=False)
class Spending:
    """What was spent: steps of each mechanism, and their curves added up.

    Parameters
    ----------
    steps : mapping of Mechanism to int
        Equal mechanisms are one entry.
    rdp : ndarray, shape (orders,)
        Sum of the steps' curves.
    """

    steps: Mapping[Mechanism, int] = field(default_factory=dict)
    rdp: Curve = field(default_factory=lambda: np.zeros(len(ORDERS)))

    @classmethod
    def of(cls, mechanism: Mechanism, steps: int, known: Curve | None = None) -> Spending:
        """Return what ``steps`` steps of a mechanism spend; ``known`` is its curve where that is at hand."""
        if not steps:
            return cls()
        return cls({mechanism: steps}, steps * (curve(mechanism) if known is None else known))

    def __add__(self, other: Spending) -> Spending:
        """Return both together; the order does not matter."""
        steps = dict(self.steps)
        for mechanism, count in other.steps.items():
            steps[mechanism] = steps.get(mechanism, 0) + count
        return Spending(steps, self.rdp + other.rdp)

    def epsilon(self, delta: float, accountant: Accountant = "rdp") -> float:
        """Return ε at ``delta``: an upper bound, whichever accountant finds it; infinite without noise."""
        if not self.steps:
            return 0.0
        bound = _from_rdp(self.rdp, delta)
        if accountant == "rdp" or bound > HOPELESS or delta < SMALLEST_DELTA:
            return bound
        reach = _from_rdp(self.rdp, delta / 4000) + 3  # as far as the loss is looked at
        return min(bound, _from_loss(tuple(sorted(self.steps.items())), delta, reach))


def total(spendings: Iterable[Spending]) -> Spending:
    """Add spendings up."""
    return reduce(Spending.__add__, spendings, Spending())


def bounds(rdp: Curve, delta: float) -> Curve:
    """Convert at each order, by Balle et al., theorem 21; every one of them is an upper bound on ε."""
    orders = np.asarray(ORDERS)
    found: Curve = rdp - (math.log(delta) + np.log(orders)) / (orders - 1) + np.log1p(-1 / orders)
    return found


def _from_rdp(rdp: Curve, delta: float) -> float:
    return max(0.0, float(bounds(rdp, delta).min()))


@lru_cache(maxsize=4096)
def _from_loss(history: tuple[tuple[Mechanism, int], ...], delta: float, reach: float) -> float:
    """Compose the privacy loss numerically; infinite where that fails, so that the other accountant's bound holds."""
    from opacus.accountants import PRVAccountant  # brings torch along, as above

    accountant = PRVAccountant()
    accountant.history = [(*mechanism, count) for mechanism, count in history]
    steps = sum(count for _, count in history)
    points = 2 * reach * math.sqrt(steps * math.log(12_000 / delta) / 2) / ERROR
    try:
        with np.errstate(all="ignore"):
            found = float(accountant.get_epsilon(delta, eps_error=ERROR * max(1.0, points / MESH_POINTS)))
    except (ArithmeticError, ValueError, RuntimeError, MemoryError):
        return math.inf
    return found if math.isfinite(found) else math.inf
