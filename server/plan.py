"""What a run will do, worked out before it starts: clients, ranks and bytes, or why it cannot work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from common.adapter import Layout
from common.base_model import four_bit
from common.errors import ConfigurationError, LoRAFleetError
from common.experiment import Experiment
from common.federation import ModelSpec
from common.tasks import Task, clients_key
from common.workspace import choose_device, method_of, model_spec, task_of
from server.bounds import bound_refusals
from server.cohort import planned_cohort
from server.initial import given_adapter
from server.privacy.refusals import client_privacy_refusals
from server.private_refusals import privacy_notices, row_refusals
from server.ranks import choose_rank
from server.secure.refusals import secure_refusals
from server.traffic import WHOLE, Traffic
from strategies import AggregationStrategy, aggregation_strategy
from strategies.merging import robust_refusals
from strategies.optimizers import OPTIMIZERS
from strategies.robust import ROBUST
from strategies.sections import SECTIONS

if TYPE_CHECKING:
    from common.privacy.accounting import Spending
    from server.private_plan import PrivatePlan

NOTHING_SPENT: Mapping[str, Spending] = MappingProxyType({})


@dataclass(frozen=True)
class PlannedClient:
    """One client of the plan: optimizer steps and bytes of adapters per training round, headers aside."""

    name: str
    rank: int
    trains: bool
    evaluates: bool
    steps: int
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Parameters
    ----------
    clients : tuple of PlannedClient
        Sorted by name; bytes up are those of one round, bytes down of the last one, when downloads are largest.
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
    privacy : PrivatePlan or None
        What is promised and what it takes; None without privacy.
    """

    clients: tuple[PlannedClient, ...]
    layers: int
    rounds: int
    cohort_size: int
    bytes_up: int
    bytes_down: int
    largest_download: int
    notices: tuple[str, ...]
    privacy: PrivatePlan | None = None


def make_plan(experiment: Experiment, spent: Mapping[str, Spending] = NOTHING_SPENT) -> Plan:
    """Check an experiment as a whole and plan it.

    Parameters
    ----------
    experiment : Experiment
        What is to run.
    spent : mapping of str to Spending
        What earlier runs spent on a client's data, where that is known; counts against its owner's privacy budget.

    Raises
    ------
    ConfigurationError, DataError
        With everything that stands in the way.
    """
    problems: list[str] = []
    strategy = _attempt(problems, lambda: aggregation_strategy(experiment.strategy.name, **experiment.strategy.options))
    task = _attempt(problems, lambda: task_of(experiment))
    method = _attempt(problems, lambda: method_of(experiment))
    rule = _attempt(problems, lambda: ROBUST.create(experiment.robust.name, experiment.robust.options))
    optimizer = experiment.server_optimizer
    _attempt(problems, lambda: OPTIMIZERS.create(optimizer.name, optimizer.options))
    _attempt(problems, lambda: choose_device(experiment.training.device))
    if experiment.training.base_precision == "4bit":
        _attempt(problems, four_bit)
    if problems or strategy is None or task is None or method is None or rule is None:
        raise ConfigurationError(problems)
    clients = experiment.simulated_clients()
    spec = model_spec(experiment)
    ranks = _ranks(experiment, strategy, spec, method.rank)
    training = {name: rank for name, rank in ranks.items() if clients[name].trains}
    cohort = planned_cohort(experiment, len(training))
    share = experiment.federation.max_weight_share
    if refusals := [
        *strategy.refusals(training),
        *robust_refusals(rule, strategy, training, cohort, share),
        *secure_refusals(experiment, strategy, cohort),
        *client_privacy_refusals(experiment, strategy),
        *row_refusals(experiment, strategy, task),
        *bound_refusals(experiment, strategy, list(training.values())),
        *_evaluation_refusals(experiment, strategy, task),
    ]:
        raise ConfigurationError(refusals)
    given = given_adapter(experiment, strategy, spec)
    begun = given.layout if given is not None else Layout()
    notices = [*task.check_data(clients_key(clients), experiment.seed), *_clamped(spec, training)]
    planned = _planned(experiment, strategy, spec, begun, ranks, notices)
    if experiment.privacy.mode == "none":
        return planned
    from server.private_plan import plan_privacy  # brings Opacus, which takes a second

    private = plan_privacy(experiment, strategy, spec, task, training, cohort, spent)
    return replace(planned, privacy=private, notices=(*notices, *privacy_notices(experiment, private, task)))


def option_problems(table: Mapping[str, Any]) -> list[str]:
    """Find what is wrong with the plug-ins an experiment's tables name, whatever else is wrong with them."""
    problems: list[str] = []
    for section, family in SECTIONS.items():
        choice = table.get(section)
        if isinstance(choice, Mapping) and isinstance(name := choice.get("name"), str):
            options = choice.get("options", {})
            _attempt(problems, partial(family.create, name, options if isinstance(options, Mapping) else {}))
    return problems


def _ranks(experiment: Experiment, strategy: AggregationStrategy, spec: ModelSpec, default: int) -> dict[str, int]:
    """Return the rank of every client, as far as it is known before its node is."""
    found, problems = {}, []
    for name, settings in experiment.simulated_clients().items():
        try:
            found[name] = choose_rank(experiment, strategy, spec, settings, default).rank
        except ConfigurationError as error:
            problems.append(f"client {name}: {error}")
    if problems:
        raise ConfigurationError(problems)
    return found


def _evaluation_refusals(experiment: Experiment, strategy: AggregationStrategy, task: Task) -> list[str]:
    """Say who cannot evaluate, if they are to and cannot."""
    own, places = strategy.capabilities.client_memory, experiment.evaluation.on
    silent = experiment.privacy.mode != "none" and not task.synthetic
    instead = "[]" if own and silent else '["server"]' if silent else '["clients"]'
    found = []
    if own and "server" in places:
        found.append(
            f"the server cannot evaluate under strategy {strategy.plugin_name}: its clients keep factors of their own, "
            f"and there is no one model; set evaluation.on = {instead}"
        )
    if silent and "clients" in places:
        found.append(
            f"what clients measure on their own data must not be told under privacy; set evaluation.on = {instead}"
        )
    return found


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
    begun: Layout,
    ranks: dict[str, int],
    notices: list[str],
) -> Plan:
    settings, known = experiment.federation, experiment.simulated_clients()
    training = [name for name in ranks if known[name].trains]
    judging = {name for name in ranks if known[name].evaluates and "clients" in experiment.evaluation.on}
    cohort = planned_cohort(experiment, len(training))
    cohort_ranks = sorted((ranks[name] for name in training), reverse=True)[:cohort]
    traffic = Traffic(experiment, strategy, spec, cohort_ranks, begun)

    def down(name: str, number: int, share: float = 1.0, judged: float = 1.0) -> float:
        trained = traffic.training(name, ranks[name], number, name in judging) if number and known[name].trains else 0
        return share * trained + (judged * traffic.evaluation(name, number) if name in judging else 0)

    share, judged = cohort / len(training), experiment.evaluation.fraction
    return Plan(
        clients=tuple(
            PlannedClient(
                name,
                rank,
                known[name].trains,
                known[name].evaluates,
                experiment.training.steps if known[name].trains else 0,
                traffic.upload(rank, settings.rounds) if known[name].trains else 0,
                round(down(name, settings.rounds)),
            )
            for name, rank in sorted(ranks.items())
        ),
        layers=len(spec.layers),
        rounds=settings.rounds,
        cohort_size=cohort,
        bytes_up=round(
            share * sum(traffic.upload(ranks[name], n) for name in training for n in range(1, settings.rounds + 1))
        ),
        bytes_down=round(sum(down(name, n, share, judged) for name in ranks for n in range(settings.rounds + 1))),
        largest_download=max(
            sum(traffic.download(name, WHOLE, done)) for name in ranks for done in range(settings.rounds + 1)
        ),
        notices=tuple(notices),
    )


def rank_summary(plan: Plan) -> str:
    """Say which ranks train: ``2 × 8, 4, 16``."""
    counted = Counter(client.rank for client in plan.clients if client.trains)
    return ", ".join(f"{count} × {rank}" if count > 1 else str(rank) for rank, count in sorted(counted.items()))
