"""What of a certificate is stored for charts: rounded, of the clients that were merged, and never too much."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from common.store.columns import JSON_LENGTH, to_json
from server.certificate import COMPARED_CLIENTS, by_layer, similarity
from strategies.certificate import Certificate, certificate
from strategies.updates import parts_by_layer
from tests.reference import cohorts

SPEC = cohorts.model_spec()


@pytest.fixture
def measured() -> Certificate:
    updates = cohorts.cohort(SPEC, [2, 3, 1])
    weights = {update.client: update.num_examples for update in updates}
    return certificate(updates[0].adapter, parts_by_layer(updates).items(), weights)


def crowd(measured: Certificate, count: int, layers: int = 1) -> tuple[Certificate, list[str]]:
    """Let many clients have trained alike."""
    names = [f"client-{number}" for number in range(count)]
    ranks = {f"layer-{number}": (8,) * count for number in range(layers)}
    norms = dict.fromkeys(names, 1.0)
    alike = torch.full((count, count), -0.123456, dtype=torch.float64)
    return replace(measured, client_norm=norms, similarity=alike, ranks=ranks, energy_ranks=ranks), names


def test_only_the_clients_named_are_told_of_in_their_order(measured: Certificate) -> None:
    found = similarity(measured, ["cy", "ada"])
    assert found["clients"] == ["cy", "ada"]
    exact = float(measured.similarity[2, 0])
    assert found["cosine"] == [[1.0, round(exact, 4)], [round(exact, 4), 1.0]]
    assert by_layer(measured, ["cy", "ada"]) == {
        "clients": ["cy", "ada"],
        "layers": ["down", "out", "up"],
        "rank": [[1, 1, 1], [2, 2, 2]],
        "effective_rank": [[measured.energy_ranks[layer][row] for layer in SPEC.layers] for row in (2, 0)],
    }


def test_as_many_as_are_compared_fit_the_store_and_more_are_not(measured: Certificate) -> None:
    assert len(to_json(similarity(*crowd(measured, COMPARED_CLIENTS)))) < JSON_LENGTH
    noted = similarity(*crowd(measured, COMPARED_CLIENTS + 1))
    assert noted == {"left_out": "201 clients; they are compared with each other up to 200"}


def test_more_numbers_than_the_store_holds_are_left_out_before_they_are_written(measured: Certificate) -> None:
    assert "rank" in by_layer(*crowd(measured, 1000, layers=250))
    noted = by_layer(*crowd(measured, 1000, layers=251))
    assert noted == {"left_out": "502,000 numbers, which take more than the 1,000,000 characters that are kept"}
