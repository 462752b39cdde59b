"""What a run may still spend: its own budget, for the run alone, and the owner's, for everything on the same data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.privacy.accounting import Curve, Mechanism, Spending
from common.privacy.calibration import affordable_steps, noise_multiplier
from common.privacy.limits import Limit
from common.privacy.settings import OTHER, Accountant

FEW = 8
"""Mechanisms whose privacy loss is composed numerically; of more that takes minutes, and Rényi orders decide."""

SECOND_STEPS = 20_000
"""A longer run's second number would take more than a second."""


@dataclass(frozen=True)
class Balance:
    """A run with one mechanism against its limits.

    Parameters
    ----------
    under : tuple of Limit
        The experiment's, at the experiment's δ, comes first; each knows what others have spent of it.
    mechanism : Mechanism
        Of every step of the run.
    curve : ndarray
        Its Rényi curve.
    steps : int
        Spent by the run.
    accountant : {"rdp", "prv"}
        Decides.
    """

    under: tuple[Limit, ...]
    mechanism: Mechanism
    curve: Curve
    steps: int
    accountant: Accountant

    def epsilon(self, limit: Limit, more: int = 0, accountant: Accountant | None = None) -> float:
        """Return what counts against a limit after ``more`` further steps."""
        spent = limit.spent + Spending.of(self.mechanism, self.steps + more, self.curve)
        return spent.epsilon(limit.delta, accountant or deciding(limit, self.accountant))

    def exceeded(self, more: int) -> Limit | None:
        """Return the first limit that ``more`` further steps would exceed."""
        return next((limit for limit in self.under if not self._fits(limit, more)), None)

    def steps_left(self, limit: Limit, most: int) -> int:
        """Return how many further steps, at most ``most``, a limit allows."""
        # from the run's beginning: the same sums in every round, which are remembered
        decides = deciding(limit, self.accountant)
        asked = (limit.epsilon, limit.delta, self.mechanism, limit.spent, decides, self.steps + most)
        return max(0, affordable_steps(*asked) - self.steps)

    def rounds_left(self, steps: int, most: int) -> int:
        """Return how many further rounds of so many steps every limit allows, ``most`` at most."""
        if self.exceeded(most * steps) is None:
            return most
        return min(self.steps_left(limit, most * steps) // steps for limit in self.under)

    def second_epsilon(self) -> float | None:
        """Return the run's ε by the other accountant, where that is quick."""
        other = OTHER[self.accountant]
        if other == "prv" and self.steps > SECOND_STEPS:
            return None
        found = self.epsilon(self.under[0], accountant=other)
        return found if math.isfinite(found) else None

    def _fits(self, limit: Limit, more: int) -> bool:
        """Tell whether a limit holds; either bound is valid, so where the quick one does, the other is not asked."""
        if self.epsilon(limit, more, "rdp") <= limit.epsilon:
            return True
        decides = deciding(limit, self.accountant)
        return decides == "prv" and self.epsilon(limit, more, decides) <= limit.epsilon


def deciding(limit: Limit, accountant: Accountant) -> Accountant:
    """Return the accountant that decides on a limit."""
    return "rdp" if len(limit.spent.steps) >= FEW else accountant


def noise_within(under: tuple[Limit, ...], sample_rate: float, steps: int, accountant: Accountant) -> float:
    """Return the least noise with which so many steps keep within every limit.

    Raises
    ------
    ConfigurationError
        If no noise suffices.
    """
    return max(
        noise_multiplier(limit.epsilon, limit.delta, sample_rate, steps, limit.spent, deciding(limit, accountant))
        for limit in under
    )
