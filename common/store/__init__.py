"""Where runs are kept: a database of what happened and a folder of files for each run.

::

    <home>/lorafleet.db          SQLite, or the PostgreSQL database of LORAFLEET_DATABASE_URL
    <home>/runs/<id>/lock        held by the process that writes the run
    <home>/runs/<id>/…           artefacts: adapters, replies, states, samples
"""

from common.store.artefacts import ArtefactFile, verify, write_artefact
from common.store.entities import (
    Artefact,
    Client,
    ClientRound,
    ClientStatus,
    Event,
    Metric,
    Round,
    RoundStatus,
    Run,
    RunStatus,
    Statistic,
)
from common.store.liveness import last_sign, shown_status
from common.store.lock import RunLock, is_locked
from common.store.run_store import RunStore

__all__ = [
    "Artefact",
    "ArtefactFile",
    "Client",
    "ClientRound",
    "ClientStatus",
    "Event",
    "Metric",
    "Round",
    "RoundStatus",
    "Run",
    "RunLock",
    "RunStatus",
    "RunStore",
    "Statistic",
    "is_locked",
    "last_sign",
    "shown_status",
    "verify",
    "write_artefact",
]
