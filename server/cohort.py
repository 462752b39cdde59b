"""Who takes part and when: seeded choices among the clients that are online, and which rounds are evaluated."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from common.experiment import ClientSettings, Experiment
from common.seeds import chance, derive_seed

DEFAULTS = ClientSettings()
"""Settings of a node that the experiment does not list."""


def choose(names: Iterable[str], count: int, seed: int, *purpose: str | int) -> list[str]:
    """Choose ``count`` names at random, by the order of their hashes; sorted by name.

    A client that joins or leaves changes the choice among the others as little as possible.
    """
    ranked = sorted(names, key=lambda name: (derive_seed(seed, *purpose, name), name))
    return sorted(ranked[:count])


def planned_cohort(experiment: Experiment, training: int) -> int:
    """Return how many of the clients that train do so in one round, when all of them are there."""
    federation = experiment.federation
    return min(federation.cohort_size or max(1, round(federation.cohort_fraction * training)), training)


def training_cohort(
    experiment: Experiment, clients: Mapping[str, ClientSettings], number: int, online: Iterable[str]
) -> list[str]:
    """Choose the clients of a training round.

    Parameters
    ----------
    experiment : Experiment
        Cohort size, seed and simulated absence.
    clients : mapping of str to ClientSettings
        Settings of the clients the experiment knows; other nodes have the defaults.
    number : int
        Round, from 1.
    online : iterable of str
        Names of the nodes that answer.
    """
    federation = experiment.federation
    here = [
        name for name in sorted(online) if clients.get(name, DEFAULTS).trains and not _is_away(experiment, number, name)
    ]
    count = federation.cohort_size or max(1, round(federation.cohort_fraction * len(here)))
    if experiment.privacy.protects_clients:  # what the sum is divided by must not depend on who is there
        count = planned_cohort(experiment, sum(settings.trains for settings in clients.values()))
    return choose(here, count, experiment.seed, "cohort", number)


def absent(
    experiment: Experiment, clients: Mapping[str, ClientSettings], number: int, online: Container[str]
) -> dict[str, str]:
    """Tell of each client that should train, but is not there in a round, why."""
    found = {}
    for name, settings in clients.items():
        if settings.trains and name not in online:
            found[name] = "its node is not connected"
        elif settings.trains and _is_away(experiment, number, name):
            found[name] = "offline in this round (simulation.offline)"
    return found


def _is_away(experiment: Experiment, number: int, name: str) -> bool:
    return chance(experiment.simulation.offline, experiment.seed, "offline", number, name)


def evaluation_cohort(
    experiment: Experiment, clients: Mapping[str, ClientSettings], online: Iterable[str]
) -> list[str]:
    """Choose the clients that evaluate: the same ones in every round."""
    if "clients" not in experiment.evaluation.on:
        return []
    able = [name for name in online if clients.get(name, DEFAULTS).evaluates]
    count = max(1, round(experiment.evaluation.fraction * len(able)))
    return choose(able, count, experiment.seed, "evaluation")


def is_evaluated(experiment: Experiment, number: int) -> bool:
    """Tell whether a round is evaluated: round 0, the last one, and every so many between."""
    return number in (0, experiment.federation.rounds) or number % experiment.evaluation.every == 0
