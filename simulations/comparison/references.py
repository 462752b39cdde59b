"""The runs a federation is compared with: all data in one place, and each owner alone.

Both are ordinary runs with a single training client, so they need no code of their own: merging one reply gives
that reply back. They send nothing that a real owner would send, so no bytes are counted, and none of them fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.errors import UserError
from common.experiment import ClientSettings, Experiment
from common.experiment_file import load_experiment
from common.tasks import clients_key
from common.workspace import method_of, task_of
from server.cohort import evaluation_cohort, training_cohort
from simulations.comparison.cells import SEED, Cell

CENTRALISED, LOCAL = "centralised", "local"

_NAME_LENGTH = 64


def reference_cells(source: str, overrides: Sequence[str], seed: int) -> list[Cell]:
    """Build the references of one experiment under one seed: a run on pooled data, then one run per owner."""
    try:
        experiment = federation(source, overrides, seed)
        pooled = Cell(CENTRALISED, seed, experiment=centralised(experiment), reference=True)
    except UserError as error:
        return [Cell(row, seed, problem=str(error), reference=True) for row in (CENTRALISED, LOCAL)]
    alone = [
        Cell(LOCAL, seed, experiment=local(experiment, owner), reference=True, owner=owner)
        for owner in trained(experiment)
    ]
    return [pooled, *alone]


def federation(source: str, overrides: Sequence[str], seed: int) -> Experiment:
    """Build the experiment the references belong to, without simulated faults: a lone client cannot be spared."""
    experiment = load_experiment(source, [*overrides, f"{SEED}={seed}"])
    simulation = experiment.simulation.model_copy(update={"dropout": 0.0, "offline": 0.0, "stragglers": 0.0})
    return experiment.model_copy(update={"simulation": simulation})


def centralised(experiment: Experiment) -> Experiment:
    """Let one client of the largest rank train on the data of all, as many steps as they do together."""
    clients = experiment.simulated_clients()
    names = trained(experiment)
    rank = max(_rank(experiment, clients[name]) for name in names)
    pooled = CENTRALISED
    while pooled in clients:
        pooled += "_"
    others = {name: settings.model_dump() | {"trains": False} for name, settings in clients.items()}
    cohort = len(training_cohort(experiment, clients, 1, names))
    return _reference(
        experiment,
        CENTRALISED,
        {**others, pooled: {"pool": names, "rank": rank, "evaluates": False}},
        experiment.training.steps * cohort,
    )


def local(experiment: Experiment, owner: str) -> Experiment:
    """Let one owner train alone and judge its model by its own held-out part, if it does in the federation."""
    judged = judging(experiment)
    clients = {
        name: settings.model_dump() | {"trains": name == owner, "evaluates": name == owner and name in judged}
        for name, settings in experiment.simulated_clients().items()
    }
    return _reference(experiment, f"{LOCAL}-{owner}", clients, experiment.training.steps)


def held_out_examples(experiment: Experiment) -> dict[str, int]:
    """Count the held-out examples of each owner, by which the federation weighs their losses."""
    task, clients = task_of(experiment), clients_key(experiment.simulated_clients())
    return {name: len(task.client_data(name, clients, experiment.seed).held_out) for name, _ in clients}


def trained(experiment: Experiment) -> list[str]:
    """List the clients that train."""
    return [name for name, settings in experiment.simulated_clients().items() if settings.trains]


def judging(experiment: Experiment) -> list[str]:
    """List the clients that evaluate, in every round the same ones."""
    clients = experiment.simulated_clients()
    return evaluation_cohort(experiment, clients, list(clients))


def _rank(experiment: Experiment, settings: ClientSettings) -> int:
    return settings.rank if isinstance(settings.rank, int) else method_of(experiment).rank


def _reference(experiment: Experiment, name: str, clients: dict[str, Any], steps: int) -> Experiment:
    table = experiment.model_dump()
    table["name"] = f"{experiment.name}-{name}"[:_NAME_LENGTH]
    table["strategy"] = {"name": "fedavg"}
    table["clients"] = clients
    table["training"] |= {"steps": steps}
    # Limits on what an owner may send would refuse a long training on everything.
    table["federation"] |= {"cohort_fraction": 1.0, "cohort_size": None, "max_update_norm": None, "wire": "fp32"}
    table["evaluation"] |= {"certificate": False}
    table["simulation"] |= {"clients": 0, "ranks": ()}
    return Experiment.parse(table)
