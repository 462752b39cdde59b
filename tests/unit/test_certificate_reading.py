"""The server reads kept replies for the certificate a few layers at a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from common.federation import ClientUpdate
from server.certificate import layers_of
from strategies.updates import parts_by_layer
from tests.reference import cohorts

SPEC = cohorts.model_spec()


def kept(judged: list[ClientUpdate]) -> tuple[SimpleNamespace, list[ClientUpdate], list[str]]:
    """Return what stands for a collection, the replies it keeps, and a list of the clients it reads."""
    updates = cohorts.cohort(SPEC, [2, 3, 1])
    named = {update.client: update for update in updates}
    reads: list[str] = []

    def update(client: str) -> ClientUpdate:
        reads.append(client)
        return named[client]

    return SimpleNamespace(state=SimpleNamespace(spec=SPEC), judged=judged, update=update), updates, reads


@pytest.mark.parametrize(("held_bytes", "passes"), [(1 << 20, 1), (1, 3)])
def test_every_layer_comes_once_with_all_clients(held_bytes: int, passes: int) -> None:
    collection, updates, reads = kept([])
    clients = [update.client for update in updates]
    found = dict(layers_of(collection, clients, held_bytes))  # type: ignore[arg-type]
    expected = parts_by_layer(updates)
    assert list(found) == list(expected)
    for layer, parts in expected.items():
        assert list(found[layer]) == clients
        assert all(torch.equal(found[layer][client].dense(), part.dense()) for client, part in parts.items())
    assert sorted(reads) == sorted(clients * passes + clients[:1])  # the first one tells the size


def test_what_a_rule_put_in_a_clients_place_is_not_read() -> None:
    judged = [ClientUpdate("cohort", cohorts.cohort(SPEC, [2], seed=5)[0].adapter, 3.0)]
    collection, _, reads = kept(judged)
    found = dict(layers_of(collection, ["ada", "cohort"]))  # type: ignore[arg-type]
    assert set(reads) == {"ada"}
    part = judged[0].adapter.layers["up"]
    assert torch.equal(found["up"]["cohort"].dense(), part.dense())
