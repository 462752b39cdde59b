"""What the releases of a run have cost each client, and who may still be drawn.

Cohorts are drawn by a public seed, so drawing hides nobody and amplifies nothing: every release a client had a part in
is one Gaussian mechanism on all it contributed. Neighbouring runs differ in one client, whose updates are all zero in
one of them; who takes part when is public.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from common.experiment import Experiment
from common.privacy.accounting import Mechanism, Spending, total
from common.privacy.calibration import affordable_steps
from common.privacy.limits import least_noise, limits
from common.privacy.settings import Accountant, PrivacySettings
from server.journal import Released
from server.record import RoundRecord

NO_AMPLIFICATION = 1.0
"""Sample rate of a client: it takes part, or it does not."""

History = tuple[tuple[float, int], ...]
"""Noise multipliers, and how many releases had them."""


def planned_noise(experiment: Experiment) -> float:
    """Return the noise multiplier of a run that begins: given, or the least that its rounds need.

    Raises
    ------
    ConfigurationError
        If no noise keeps the budget; names the smallest ε within reach.
    """
    privacy, rounds = experiment.privacy, experiment.federation.rounds
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    most = min(rounds, privacy.participations or rounds)
    return least_noise(limits(privacy), NO_AMPLIFICATION, most, privacy.accountant)


@dataclass
class ClientAccount:
    """The spending of every client of a run.

    Parameters
    ----------
    experiment : Experiment
        Budget and rounds.
    known : set of str
        Names of clients that may be drawn, whether they have been or not.
    before : sequence of Released
        What was committed before this process; the noise of the first one stays that of the run.
    """

    experiment: Experiment
    known: Set[str]
    before: Iterable[Released] = ()
    _taken: dict[str, Counter[float]] = field(default_factory=dict)
    _began_with: float | None = None

    def __post_init__(self) -> None:
        for release in self.before:
            self._began_with = self._began_with or release.noise_multiplier
            self._add(release.clients, release.noise_multiplier)

    @cached_property
    def noise(self) -> float:
        """Noise multiplier of the run's releases."""
        return self._began_with or planned_noise(self.experiment)

    def charge(self, clients: Iterable[str]) -> None:
        """Charge one release to those that have a part in it."""
        self._add(clients, self.noise)

    def epsilon(self, client: str) -> float:
        """Return what a client has spent."""
        return _epsilon(self._history(client), self._privacy.delta, self._privacy.accountant)

    def rounds_left(self, client: str) -> int:
        """Return in how many further releases of the run a client may have a part."""
        history, most = self._history(client), self._privacy.participations or self.experiment.federation.rounds
        left = most - sum(count for _, count in history)
        return _affordable(history, self.noise, self._privacy, left) if left > 0 else 0

    def spent(self) -> set[str]:
        """Return the clients that must not be drawn any more: another release would exceed budget or participations."""
        return {client for client in self.known | self._taken.keys() if not self.rounds_left(client)}

    def write(self, record: RoundRecord) -> None:
        """Write what every client has spent so far into a round's record."""
        second: Accountant = "prv" if self._privacy.accountant == "rdp" else "rdp"
        record.measure("noise_multiplier", self.noise)
        for client in sorted(self._taken):
            record.measure("epsilon", self.epsilon(client), client)
            record.measure("second_epsilon", _epsilon(self._history(client), self._privacy.delta, second), client)
            record.measure("rounds_left", float(self.rounds_left(client)), client)

    @property
    def _privacy(self) -> PrivacySettings:
        return self.experiment.privacy

    def _add(self, clients: Iterable[str], noise: float) -> None:
        for client in clients:
            self._taken.setdefault(client, Counter())[noise] += 1

    def _history(self, client: str) -> History:
        return tuple(sorted(self._taken.get(client, {}).items()))


def _spending(history: History) -> Spending:
    return total(Spending.of(Mechanism(noise, NO_AMPLIFICATION), count) for noise, count in history)


@lru_cache(maxsize=4096)
def _epsilon(history: History, delta: float, accountant: Accountant) -> float:
    """Most clients of a run have one of a few histories."""
    return _spending(history).epsilon(delta, accountant)


@lru_cache(maxsize=4096)
def _affordable(history: History, noise: float, privacy: PrivacySettings, most: int) -> int:
    mechanism, spent = Mechanism(noise, NO_AMPLIFICATION), _spending(history)
    return affordable_steps(privacy.epsilon, privacy.delta, mechanism, spent, privacy.accountant, most)
