"""Who this client is: its name, experiment and folder, read from Flower's context."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from flwr.app import Context

from client.owner import read_owner
from client.privacy.places import LEDGER, home_ledger, run_ledger
from common.errors import ClientError
from common.experiment import Experiment
from common.experiment_file import carried_experiment
from common.privacy.settings import Budget
from common.tasks import Clients, clients_key


@dataclass(frozen=True)
class Node:
    """One client.

    Parameters
    ----------
    name : str
        Name in the federation.
    experiment : Experiment
        What the federation runs.
    clients : Clients
        All simulated clients, as tasks want them.
    folder : Path or None
        Where the client keeps its state between rounds; None keeps nothing.
    shared : Path or None
        Where all clients of this machine keep what is the same for all.
    ledger : Path or None
        File that limits what the client's data are used for under privacy; None can keep no such promise.
    budget : Budget or None
        The owner's own limit.
    data_set : str
        What the owner calls its data, whatever an experiment says; empty: what the experiment calls them.
    """

    name: str
    experiment: Experiment
    clients: Clients
    folder: Path | None
    shared: Path | None
    ledger: Path | None = None
    budget: Budget | None = None
    data_set: str = ""


def node_of(context: Context) -> Node:
    """Find out which client a Flower context belongs to.

    A node has its name in its own configuration; in a simulation the partition's number counts the clients in the
    order of their names.
    """
    experiment, clients = _read(str(context.run_config["experiment"]))
    place = str(context.node_config.get("owner", ""))
    owner = read_owner(Path(place)) if place else None
    name = context.node_config.get("name") or (owner.name if owner else None)
    if name is None:
        number = int(context.node_config["partition-id"])
        if number >= len(clients):
            raise ClientError(f"node {number} is none of the {len(clients)} clients of the experiment")
        name = clients[number][0]
    home = str(context.run_config.get("home", ""))
    run = str(context.run_config.get("run-id", ""))
    shared = Path(home) / "runs" / run / "clients" if home and run else None
    node = Node(str(name), experiment, clients, shared / str(name) if shared else None, shared)
    if owner is not None:  # a ledger of its own, which counts all experiments, whatever this one says
        ledger = Path(place).absolute().parent / LEDGER
        return replace(node, ledger=ledger, budget=owner.budget, data_set="the owner's data")
    settings = dict(clients).get(node.name)
    budget = settings.budget if settings else None
    if shared is None:
        return replace(node, budget=budget)
    everything = experiment.simulation.persistent_ledger
    ledger = home_ledger(Path(home), node.name) if everything else run_ledger(Path(home), run, node.name)
    return replace(node, ledger=ledger, budget=budget)


@lru_cache(maxsize=4)
def _read(text: str) -> tuple[Experiment, Clients]:
    experiment = carried_experiment(text)
    return experiment, clients_key(experiment.simulated_clients())
