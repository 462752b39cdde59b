"""What a run will do, worked out before it starts: clients, ranks and bytes, or why it cannot work."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from common.errors import ConfigurationError, LoRAFleetError
from common.experiment import Experiment
from common.federation import ModelSpec
from common.tasks import clients_key
from common.workspace import choose_device, method_of, model_spec, task_of
from server.initial import initial_state
from strategies import AggregationStrategy, aggregation_strategy

BYTES = {"fp32": 4, "fp16": 2}


@dataclass(frozen=True)
class PlannedClient:
    """One client of the plan: bytes of adapters per training round, headers aside."""

    name: str
    rank: int
    trains: bool
    evaluates: bool
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Parameters
    ----------
    clients : tuple of PlannedClient
        Sorted by name; bytes down are those of the last round, when the global adapter is largest.
    layers : int
        Adapted layers.
    rounds, cohort_size : int
        Rounds, and clients trained in each.
    bytes_up, bytes_down : int
        Of the whole run, expected: training and evaluation messages, headers aside.
    largest_download : int
        Bytes one client may have to fetch at once.
    notices : tuple of str
        What the user should know: clamped ranks, substituted packages.
    """

    clients: tuple[PlannedClient, ...]
    layers: int
    rounds: int
    cohort_size: int
    bytes_up: int
    bytes_down: int
    largest_download: int
    notices: tuple[str, ...]


def make_plan(experiment: Experiment) -> Plan:
    """Check an experiment as a whole and plan it.

    Raises
    ------
    ConfigurationError, DataError
        With everything that stands in the way.
    """
    problems: list[str] = []
    strategy = _attempt(problems, lambda: aggregation_strategy(experiment.strategy.name, **experiment.strategy.options))
    task = _attempt(problems, lambda: task_of(experiment))
    method = _attempt(problems, lambda: method_of(experiment))
    _attempt(problems, lambda: choose_device(experiment.training.device))
    if problems or strategy is None or task is None or method is None:
        raise ConfigurationError(problems)
    clients = experiment.simulated_clients()
    ranks = {name: client.rank if isinstance(client.rank, int) else method.rank for name, client in clients.items()}
    training = {name: rank for name, rank in ranks.items() if clients[name].trains}
    if refusals := strategy.refusals(training):
        raise ConfigurationError(refusals)
    spec = model_spec(experiment)
    initial_state(experiment, strategy, spec)
    notices = task.check_data(clients_key(clients), experiment.seed)
    return _planned(experiment, strategy, spec, ranks, [*notices, *_clamped(spec, ranks)])


def _attempt(problems: list[str], build):  # type: ignore[no-untyped-def]
    try:
        return build()
    except ConfigurationError as error:
        problems += error.problems
    except LoRAFleetError as error:
        problems.append(str(error))
    return None


def _clamped(spec: ModelSpec, ranks: dict[str, int]) -> list[str]:
    found = []
    for rank in sorted(set(ranks.values())):
        layers = [layer for layer in spec.layers if spec.layer_rank(layer, rank) < rank]
        if layers:
            names = ", ".join(name for name, value in ranks.items() if value == rank)
            limit = spec.layer_rank(layers[0], rank)
            found.append(f"rank {rank} ({names}) is above the size of {len(layers)} layers and is clamped to {limit}")
    return found


def _planned(
    experiment: Experiment,
    strategy: AggregationStrategy,
    spec: ModelSpec,
    ranks: dict[str, int],
    notices: list[str],
) -> Plan:
    settings, number_size = experiment.federation, BYTES[experiment.federation.wire]
    known = experiment.simulated_clients()
    names = [name for name in ranks if known[name].trains]
    evaluating = [name for name in ranks if known[name].evaluates]
    cohort = min(settings.cohort_size or max(1, round(settings.cohort_fraction * len(names))), len(names))
    cohort_ranks = sorted((ranks[name] for name in names), reverse=True)[:cohort]
    heads = sum(head.numel() for head in spec.heads.values()) * number_size
    # ``a`` stays away where it is frozen and shared
    frozen = strategy.capabilities.shared_frozen_factor

    def download(rank: int, merges: int) -> int:
        start, merged = strategy.expected_ranks(rank, cohort_ranks, merges)
        return heads + number_size * (_numbers(spec, start, frozen) + _numbers_merged(spec, merged))

    clients = tuple(
        PlannedClient(
            name,
            rank,
            known[name].trains,
            known[name].evaluates,
            heads + number_size * _numbers(spec, rank, frozen),
            download(rank, settings.rounds - 1),
        )
        for name, rank in sorted(ranks.items())
    )
    share = cohort / len(names)
    trained = sum(download(ranks[name], done) for name in names for done in range(settings.rounds)) * share
    on_clients = "clients" in experiment.evaluation.on
    rounds = [
        n for n in range(settings.rounds + 1) if n in (0, settings.rounds) or n % experiment.evaluation.every == 0
    ]
    widest = max(cohort_ranks)
    judged = sum(download(widest, done) for done in rounds) * len(evaluating) * experiment.evaluation.fraction
    return Plan(
        clients,
        len(spec.layers),
        settings.rounds,
        cohort,
        round(sum(client.bytes_up for client in clients if client.trains) * share * settings.rounds),
        round(trained + (judged if on_clients else 0)),
        max(download(widest, done) for done in range(settings.rounds + 1)),
        tuple(notices),
    )


def _numbers(spec: ModelSpec, rank: int, frozen: bool) -> int:
    total = 0
    for layer, (out, inn) in spec.layers.items():
        total += spec.layer_rank(layer, rank) * (out if frozen else out + inn)
    return total


def _numbers_merged(spec: ModelSpec, rank: int) -> int:
    return sum(min(rank * (out + inn), out * inn) for out, inn in spec.layers.values())


def rank_summary(plan: Plan) -> str:
    """Say which ranks train: ``2 × 8, 4, 16``."""
    counted = Counter(client.rank for client in plan.clients if client.trains)
    return ", ".join(f"{count} × {rank}" if count > 1 else str(rank) for rank, count in sorted(counted.items()))
