"""The limits one client's training is under, and what keeps within all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from common.privacy.accounting import Mechanism, Spending
from common.privacy.calibration import NOTHING, affordable_steps, noise_multiplier
from common.privacy.settings import Accountant, Budget, PrivacySettings


class Limit(NamedTuple):
    """A budget, and what counts against it already."""

    epsilon: float
    delta: float
    spent: Spending = NOTHING


def limits(privacy: PrivacySettings, budget: Budget | None = None, spent: Spending = NOTHING) -> tuple[Limit, ...]:
    """Return the experiment's limit, for the run alone, and the owner's, for everything spent on the data.

    Parameters
    ----------
    privacy : PrivacySettings
        What the experiment asks for.
    budget : Budget, optional
        What the owner allows.
    spent : Spending
        Of earlier runs on the same data; the experiment's own budget is not touched by it.
    """
    asked = Limit(privacy.epsilon, privacy.delta)
    return (asked,) if budget is None else (asked, Limit(budget.epsilon, budget.delta, spent))


def least_noise(under: Sequence[Limit], sample_rate: float, steps: int, accountant: Accountant = "rdp") -> float:
    """Return the least noise with which so many further steps keep within every limit.

    Raises
    ------
    ConfigurationError
        If no noise suffices; names the smallest ε that can be reached.
    """
    return max(
        noise_multiplier(limit.epsilon, limit.delta, sample_rate, steps, limit.spent, accountant) for limit in under
    )


def steps_within(
    under: Sequence[Limit], mechanism: Mechanism, most: int, accountant: Accountant = "rdp", more: Spending = NOTHING
) -> int:
    """Return how many further steps, at most ``most``, every limit allows after ``more`` was spent, too."""
    return min(
        affordable_steps(limit.epsilon, limit.delta, mechanism, limit.spent + more, accountant, most) for limit in under
    )
