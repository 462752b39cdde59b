"""Robust rules: what is done with a round's updates before the strategy merges them, so that liars cannot steer it.

Each module of this package is one rule, named after its file. A rule comes before the strategy: it leaves updates out,
weighs them anew, shortens them, or puts one update in the place of all.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from common.adapter import Adapter
from common.federation import ClientUpdate
from common.plugins import Family, Plugin


@dataclass(frozen=True, eq=False)
class Judgement:
    """What a rule makes of a round's updates.

    Parameters
    ----------
    updates : sequence of ClientUpdate
        What the strategy merges instead, sorted by client.
    trust : mapping of str to float
        What is left of each client's weight, by name: 1 as it was, 0 left out.
    """

    updates: Sequence[ClientUpdate]
    trust: Mapping[str, float] = field(default_factory=dict)


class RobustRule(Plugin):
    """Base of the robust rules."""

    needs_linear: ClassVar[bool] = False
    """Works on the parameters themselves: only where these may be averaged (``linear_uplink``), at equal ranks."""

    by_weights: ClassVar[bool] = False
    """All it does is to change weights: only for strategies that weigh clients by them."""

    passes_all: ClassVar[bool] = False
    """Changes nothing, so that updates need not be gathered first."""

    @property
    def least_updates(self) -> int:
        """Fewest updates it can judge; a round with fewer has failed."""
        return 1

    @abstractmethod
    def judge(self, updates: Sequence[ClientUpdate], starts: Mapping[str, Adapter]) -> Judgement:
        """Judge the updates of a round.

        Parameters
        ----------
        updates : sequence of ClientUpdate
            Sorted by client, at least one, all screened.
        starts : mapping of str to Adapter
            What each client's training began with, whole, by name: an update's change is ``b a`` minus its start's.

        Raises
        ------
        ConfigurationError
            If there are fewer than ``least_updates``.
        """


ROBUST: Family[RobustRule] = Family("strategies.robust", RobustRule, "robust rule")  # type: ignore[type-abstract]
