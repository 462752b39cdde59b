"""What the store takes and gives: frozen values, no database rows.

Times are aware and in UTC. Paths are relative to the home folder, with ``/`` between the parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

RunStatus = Literal["running", "completed", "failed", "interrupted"]
RoundStatus = Literal["running", "committed", "failed"]
ClientStatus = Literal["received", "accepted", "rejected", "failed", "late", "offline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run: its whole configuration and how far it came.

    Attributes
    ----------
    id : str
        Chosen by the caller; also the name of the run's folder.
    reason : str or None
        Why the status is what it is.
    experiment : str
        The whole configuration as JSON text, kept letter for letter.
    fingerprint : str
        Of the code that made the run.
    rounds_done : int
        Rounds committed after round 0, which is before training.
    adapter_path, adapter_sha256 : str or None
        The final adapter.
    finished_at : datetime or None
        None while the run is ``running``.
    alive_at : datetime or None
        When the process that writes the run last said that it lives.
    """

    id: str
    name: str
    status: RunStatus
    reason: str | None = None
    task: str
    strategy: str
    seed: int
    experiment: str
    fingerprint: str
    rounds_planned: int
    rounds_done: int = 0
    best_round: int | None = None
    best_metric: float | None = None
    adapter_path: str | None = None
    adapter_sha256: str | None = None
    created_at: datetime
    updated_at: datetime
    finished_at: datetime | None = None
    alive_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """One round of a run.

    Attributes
    ----------
    round : int
        0 is before training.
    cohort : tuple of str
        Names of the clients asked, in the order they were drawn.
    base_version : int
        Version of the global adapter the round trained on.
    bytes_up, bytes_down : int
        Bytes from and to the clients.
    seconds : float
        Wall time of the round; ``phases`` holds the seconds of each phase.
    error : float or None
        Distance to the exact average, relative to its norm.
    exact : bool
        Whether the strategy is exact by construction.
    epsilon : float or None
        Largest privacy spending over the clients so far; None without privacy.
    committed_at : datetime or None
        None while the round is ``running``.
    state_path, state_sha256 : str or None
        The server's state after the round.
    """

    run: str
    round: int
    started_at: datetime
    status: RoundStatus = "running"
    reason: str | None = None
    cohort: tuple[str, ...] = ()
    base_version: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    phases: Mapping[str, float] = field(default_factory=dict)
    error: float | None = None
    exact: bool = False
    epsilon: float | None = None
    committed_at: datetime | None = None
    state_path: str | None = None
    state_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class ClientRound:
    """What one client did in one round.

    Attributes
    ----------
    num_examples : int
        What the client declared.
    seconds : float
        Wall time of its training.
    artefact_path, artefact_sha256 : str or None
        The kept reply.
    metadata : mapping
        What is needed besides the artefact to rebuild the reply; JSON values under string keys.
    """

    run: str
    round: int
    client: str
    status: ClientStatus
    reason: str | None = None
    rank: int | None = None
    num_examples: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    artefact_path: str | None = None
    artefact_sha256: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Metric:
    """One number of one round; NaN and infinities are numbers too.

    Attributes
    ----------
    client : str
        "" is the federation as a whole.
    layer : str
        "" is all layers.
    """

    run: str
    round: int
    name: str
    value: float
    client: str = ""
    layer: str = ""


@dataclass(frozen=True, slots=True)
class Statistic:
    """Many small numbers of one round that are looked at together, one round at a time.

    Attributes
    ----------
    kind : str
        ``timeline``: ``{"clients": {name: [[phase, start, end], …]}, "server": [[phase, start, end], …]}`` in
        seconds since the round began; phases of clients are wait, download, train, upload, evaluate and lost (asked,
        no valid answer), those of the server train, aggregate, evaluate.
        ``similarity``: ``{"clients": [name, …], "cosine": [[…], …]}``, of the clients' updates to each other.
        ``layers``: ``{"clients": [name, …], "layers": [name, …], "rank": [[…], …], "effective_rank": [[…], …]}``,
        a row per client, null where a client lacks the layer or nothing was measured.
    data : JSON value
        A note ``{"left_out": reason}`` where it would have been too large.
    """

    run: str
    round: int
    kind: str
    data: Any


@dataclass(frozen=True, slots=True)
class Client:
    """A client as the server met it.

    Attributes
    ----------
    rank : int or None
        Rank it trains with, None for one that only evaluates.
    rank_reason : str
        Why that rank, in words.
    device, memory_bytes, max_rank
        What its node told: name of the device, free memory, highest rank that fits.
    """

    run: str
    client: str
    joined_at: datetime
    rank: int | None = None
    rank_reason: str = ""
    device: str = ""
    memory_bytes: int = 0
    max_rank: int | None = None


@dataclass(frozen=True, slots=True)
class Artefact:
    """A file that belongs to a run.

    Attributes
    ----------
    round : int or None
        None where the file belongs to the run as a whole.
    kind : str
        "state", "adapter", "reply", "sample" and the like.
    """

    run: str
    round: int | None
    kind: str
    path: str
    sha256: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, told for people.

    Attributes
    ----------
    kind : str
        A short word to filter by.
    text : str
        A sentence.
    data : mapping
        JSON values under string keys.
    id : int
        Given by the store, growing with time; 0 before the event is stored.
    """

    run: str
    kind: str
    text: str
    at: datetime
    round: int | None = None
    client: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    id: int = 0
