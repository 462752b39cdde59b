"""What clients of a simulation have spent of their privacy before, where their ledgers count all experiments."""

from __future__ import annotations

from pathlib import Path

from client.privacy.fingerprint import fingerprint_of
from client.privacy.ledger import read_ledger
from client.privacy.places import home_ledger
from client.privacy.run_plan import label_of
from common.errors import UserError
from common.experiment import Experiment
from common.privacy.accounting import Spending
from common.tasks import clients_key
from common.workspace import task_of


def spent_before(experiment: Experiment, home: Path) -> dict[str, Spending]:
    """Read what has been spent on every client's data, by client; nothing where ledgers count one run only.

    Raises
    ------
    LedgerError
        If a ledger is damaged.
    """
    found: dict[str, Spending] = {}
    if not (experiment.privacy.protects_rows and experiment.simulation.persistent_ledger):
        return found
    clients = experiment.simulated_clients()
    for name, settings in clients.items():
        if not settings.trains:
            continue
        try:
            rows = task_of(experiment).client_data(name, clients_key(clients), experiment.seed).train
        except UserError:
            continue  # the plan tells what is wrong with the data, with everything else that is
        found[name] = read_ledger(home_ledger(home, name)).spent_on(label_of(experiment, name), fingerprint_of(rows))
    return found
