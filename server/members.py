"""Who takes part in a run: what the server knows of each client, recorded when it first appears."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from common.store import Client
from server.cohort import DEFAULTS
from server.federation import Federation
from server.ranks import explained


def record_members(federation: Federation, online: Iterable[str]) -> None:
    """Record the clients that are online and were not before: their devices, and their ranks with the reason."""
    new = sorted(set(online) - federation.met)
    if new:
        now = datetime.now(UTC)
        federation.journal.meet([_member(federation, name, now) for name in new])
        federation.met.update(new)


def _member(federation: Federation, name: str, now: datetime) -> Client:
    known = federation.nodes.presence(name)
    trains = federation.clients.get(name, DEFAULTS).trains
    choice = federation.rank(name) if trains else None
    return Client(
        federation.run,
        name,
        now,
        rank=choice.rank if choice else None,
        rank_reason=explained(choice, federation.spec) if choice else "it only evaluates",
        device=known.device if known else "",
        memory_bytes=known.memory_bytes if known else 0,
        max_rank=known.max_rank if known else None,
    )
