"""What a run's privacy will cost and how much noise it takes, worked out before it starts, or why it cannot be.

Rows are counted where the plan is made: in a simulation every client's data are at hand. Nothing of that is told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import ConfigurationError
from common.experiment import ClientSettings, Experiment
from common.federation import ModelSpec, Part
from common.privacy.accounting import Mechanism, Spending
from common.privacy.calibration import NOTHING
from common.privacy.limits import least_noise, limits, steps_within
from common.privacy.settings import OTHER, Accountant, Budget
from common.tasks import Task, clients_key
from common.travel import part_numel
from common.wording import named
from common.workspace import protected_unit
from server.traffic import adapter_layout, sent_parts
from strategies import AggregationStrategy

FOREVER = 10_000
"""More rounds than this are not counted."""


@dataclass(frozen=True)
class PrivateClient:
    """What one client's privacy takes.

    Parameters
    ----------
    name : str
        Of the client.
    rows : int or None
        It trains on; None where clients are protected as a whole, and rows do not matter.
    sample_rate : float
        Chance of each row to be in a step; 1 where clients are protected.
    expected_rows : float
        Of a step; where clients are protected, the clients of a round.
    noise_multiplier : float
        Noise as a multiple of the clipping norm.
    epsilons : tuple of float
        Spent after each round it takes part in, by the accountant that decides.
    second_epsilon : float
        Spent in the end by the other accountant.
    trained_numbers : int
        Numbers that learn and are noised in a step.
    signal_to_noise : float
        Norm of a step's gradients over the norm of its noise, at most.
    budget_epsilon, budget_delta : float or None
        The owner's own limit for the data, which noise and rounds heed, too.
    """

    name: str
    rows: int | None
    sample_rate: float
    expected_rows: float
    noise_multiplier: float
    epsilons: tuple[float, ...]
    second_epsilon: float
    trained_numbers: int
    signal_to_noise: float
    budget_epsilon: float | None
    budget_delta: float | None


@dataclass(frozen=True)
class PrivatePlan:
    """What is promised, to whom, and what it takes.

    Parameters
    ----------
    mode : str
        ``sample`` or ``client``.
    unit : str
        What is protected, in words.
    epsilon, delta : float
        The experiment's budget.
    accountant, second_accountant : str
        The one that decides, and the other.
    clipping_norm : float
        Of a row's gradient, or of a client's update.
    noise_multiplier : float
        The largest of the clients'.
    steps : int
        Noised steps of a round; 1 where clients are protected.
    rounds : int
        A client takes part in at most: those planned, or those the budget lasts for.
    lasts : int or None
        Rounds for which every budget lasts where the noise is given; None where it is worked out for the plan.
    private : bool
        False where noise comes from ``privacy.test_seed``.
    clients : tuple of PrivateClient
        Those that train, by name.
    refusing : mapping of str to str
        Clients whose owners' budgets were spent by earlier runs, and what each of them will say.
    """

    mode: str
    unit: str
    epsilon: float
    delta: float
    accountant: Accountant
    second_accountant: Accountant
    clipping_norm: float
    noise_multiplier: float
    steps: int
    rounds: int
    lasts: int | None
    private: bool
    clients: tuple[PrivateClient, ...]
    refusing: Mapping[str, str]


def plan_privacy(
    experiment: Experiment,
    strategy: AggregationStrategy,
    spec: ModelSpec,
    task: Task,
    ranks: Mapping[str, int],
    cohort: int,
    spent: Mapping[str, Spending],
) -> PrivatePlan:
    """Work out noise and spending of a run under privacy.

    Parameters
    ----------
    experiment, strategy, spec, task
        Of the run.
    ranks : mapping of str to int
        Of the clients that train.
    cohort : int
        Clients trained in each round.
    spent : mapping of str to Spending
        What earlier runs spent on a client's data; counts against its owner's budget.

    Raises
    ------
    ConfigurationError
        With every client whose budget does not allow the rounds.
    """
    privacy = experiment.privacy
    steps = experiment.training.steps if privacy.protects_rows else 1
    promises, refusing = _promises(experiment, list(ranks), steps, spent)
    numbers = {rank: trained_numbers(strategy, spec, rank, experiment) for rank in set(ranks.values())}
    known = clients_key(experiment.simulated_clients())
    made = []
    for name, rank in sorted((name, rank) for name, rank in ranks.items() if name in promises):
        rows = len(task.client_data(name, known, experiment.seed).train) if privacy.protects_rows else None
        noised = numbers[rank] if privacy.protects_rows else max(numbers.values())
        made.append(_client(name, promises[name], rows, cohort, noised))
    return PrivatePlan(
        mode=privacy.mode,
        unit=protected_unit(experiment),
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        accountant=privacy.accountant,
        second_accountant=OTHER[privacy.accountant],
        clipping_norm=privacy.clipping_norm,
        noise_multiplier=max(client.noise_multiplier for client in made),
        steps=steps,
        rounds=max(len(client.epsilons) for client in made),
        lasts=None if privacy.noise_multiplier is None else min(promise.lasts for promise in promises.values()),
        private=privacy.test_seed is None,
        clients=tuple(made),
        refusing=refusing,
    )


def trained_numbers(strategy: AggregationStrategy, spec: ModelSpec, rank: int, experiment: Experiment) -> int:
    """Count the numbers that are noised at this rank, in the round that has most of them.

    Where rows are protected these are all that learn, elsewhere those that travel.
    """
    layout, rows = adapter_layout(spec, rank), experiment.privacy.protects_rows
    sent = sent_parts(strategy, experiment.federation.rounds)
    noised: set[Part] = {"ab" if part == "inner" and rows else part for part in sent}
    return max(part_numel(layout, part, getattr(strategy, "density", None)) for part in noised)


@dataclass(frozen=True)
class _Promise:
    """Noise that keeps a client's limits, and what it spends; ``lasts``: rounds the limits allow."""

    mechanism: Mechanism
    epsilons: tuple[float, ...]
    second: float
    lasts: int
    budget: Budget | None


def _promises(
    experiment: Experiment, names: list[str], steps: int, spent: Mapping[str, Spending]
) -> tuple[dict[str, _Promise], dict[str, str]]:
    """Calibrate every client's noise, or say why it will refuse; clients under like conditions are worked out once."""
    settings = experiment.simulated_clients()
    alike: dict[tuple[float | None, Budget | None, str], _Promise] = {}
    found: dict[str, _Promise] = {}
    refusing: dict[str, str] = {}
    problems: dict[str, list[str]] = {}
    for name in sorted(names):
        mine = settings[name] if experiment.privacy.protects_rows else ClientSettings()
        key = (mine.sample_rate, mine.budget, name if name in spent else "")
        try:
            if key not in alike:
                alike[key] = _promise(experiment, mine, steps, spent.get(name, NOTHING))
            found[name] = alike[key]
        except ConfigurationError as error:
            problems.setdefault(str(error), []).append(name)
            if name in spent and experiment.privacy.on_exhausted == "skip":
                refusing[name] = str(error)
    if refusing and found:  # what was spent before is no mistake of this experiment: it goes on without them
        problems = {
            text: rest for text, who in problems.items() if (rest := [one for one in who if one not in refusing])
        }
    if problems:
        whole = experiment.privacy.protects_clients
        raise ConfigurationError(text if whole else f"client {named(who)}: {text}" for text, who in problems.items())
    return found, refusing


def _promise(experiment: Experiment, client: ClientSettings, steps: int, spent: Spending) -> _Promise:
    privacy, planned = experiment.privacy, experiment.federation.rounds
    rounds = min(planned, privacy.participations or planned)
    under, decides = limits(privacy, client.budget, spent), privacy.accountant
    rate = (client.sample_rate or privacy.sample_rate) if privacy.protects_rows else 1.0
    noise = privacy.noise_multiplier or least_noise(under, rate, rounds * steps, decides)
    mechanism = Mechanism(noise, rate)
    lasts = steps_within(under, mechanism, FOREVER * steps, decides) // steps if privacy.noise_multiplier else rounds
    if not lasts:
        once = Spending.of(mechanism, steps).epsilon(privacy.delta, decides)
        raise ConfigurationError(
            f"privacy.noise_multiplier = {noise:g} spends ε = {once:.4g} in one round, more than is allowed; raise it, "
            "or leave it out to have the noise worked out"
        )
    spending = [Spending.of(mechanism, steps * number) for number in range(1, min(rounds, lasts) + 1)]
    epsilons = tuple(spending_of.epsilon(privacy.delta, decides) for spending_of in spending)
    second = spending[-1].epsilon(privacy.delta, OTHER[decides])
    return _Promise(mechanism, epsilons, second, lasts, client.budget)


def _client(name: str, promise: _Promise, rows: int | None, cohort: int, numbers: int) -> PrivateClient:
    noise, rate = promise.mechanism
    expected = float(cohort) if rows is None else rate * rows
    return PrivateClient(
        name=name,
        rows=rows,
        sample_rate=rate,
        expected_rows=expected,
        noise_multiplier=noise,
        epsilons=promise.epsilons,
        second_epsilon=promise.second,
        trained_numbers=numbers,
        signal_to_noise=expected / (noise * math.sqrt(numbers)),
        budget_epsilon=promise.budget.epsilon if promise.budget else None,
        budget_delta=promise.budget.delta if promise.budget else None,
    )
