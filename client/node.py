"""Who this client is: its name, experiment and folder, read from Flower's context."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from flwr.app import Context

from common.errors import ClientError
from common.experiment import Experiment
from common.experiment_file import carried_experiment
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
    """

    name: str
    experiment: Experiment
    clients: Clients
    folder: Path | None
    shared: Path | None


def node_of(context: Context) -> Node:
    """Find out which client a Flower context belongs to.

    A node has its name in its own configuration; in a simulation the partition's number counts the clients in the
    order of their names.
    """
    experiment, clients = _read(str(context.run_config["experiment"]))
    name = context.node_config.get("name")
    if name is None:
        number = int(context.node_config["partition-id"])
        if number >= len(clients):
            raise ClientError(f"node {number} is none of the {len(clients)} clients of the experiment")
        name = clients[number][0]
    home = str(context.run_config.get("home", ""))
    run = str(context.run_config.get("run-id", ""))
    shared = Path(home) / "runs" / run / "clients" if home and run else None
    return Node(str(name), experiment, clients, shared / str(name) if shared else None, shared)


@lru_cache(maxsize=4)
def _read(text: str) -> tuple[Experiment, Clients]:
    experiment = carried_experiment(text)
    return experiment, clients_key(experiment.simulated_clients())
