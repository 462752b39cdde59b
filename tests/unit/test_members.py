"""Every client is recorded once, when it first appears."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from common.experiment import ClientSettings
from common.federation import ModelSpec
from common.messages import Presence
from common.store import Client
from server.members import record_members
from server.ranks import RankChoice

PRESENCES = {"ada": Presence(client="ada", device="GPU\0", memory_bytes=8, max_rank=4), "dot": None}


def told(client: Client) -> tuple[Any, ...]:
    return (client.client, client.rank, client.rank_reason, client.device, client.memory_bytes, client.max_rank)


def test_late_ones_are_recorded_when_they_come_and_nobody_twice() -> None:
    recorded: list[list[Client]] = []
    federation: Any = SimpleNamespace(
        run="r1",
        met=set(),
        clients={"eve": ClientSettings(trains=False)},
        spec=ModelSpec({"layer": (2, 9)}, seed=0),
        nodes=SimpleNamespace(presence=PRESENCES.get),
        journal=SimpleNamespace(meet=recorded.append),
        rank=lambda name: RankChoice(4, "so"),
    )
    for online in (["ada"], ["ada"], ["ada", "eve", "dot"], []):
        record_members(federation, online)
    assert [[told(client) for client in clients] for clients in recorded] == [
        [("ada", 4, "so; clamped to 2 in 1 of 1 layers", "GPU\0", 8, 4)],
        [
            ("dot", 4, "so; clamped to 2 in 1 of 1 layers", "", 0, None),
            ("eve", None, "it only evaluates", "", 0, None),
        ],
    ]
