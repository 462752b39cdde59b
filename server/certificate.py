"""What a merge did to the exact average: measured from the kept replies, while clients evaluate.

Where a robust rule judged them, the average is that of what it left. A large cohort's replies are never in memory all
at once: they are read several times, a few layers of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from common.adapter import Adapter
from common.federation import ServerState
from common.lowrank import Update
from common.store.columns import JSON_LENGTH
from common.workspace import cpu_threads
from server.federation import Federation
from server.training import Collection
from strategies.certificate import Certificate, certificate

COMPARED_CLIENTS = 200
"""Beyond that many, the table of cosines is left out."""
COSINE_DIGITS = 4

HELD_BYTES = 1 << 28
"""Of all clients' layers that are held at a time; small cohorts fit as a whole."""


def write_certificate(federation: Federation, state: ServerState, collection: Collection) -> None:
    """Measure a round's merge and write it into its record."""
    record = collection.record
    private = federation.experiment.privacy.protects_clients
    record.exact = federation.strategy.is_exact() and not private
    hidden = private or federation.experiment.secure_aggregation.enabled
    if hidden or not federation.experiment.evaluation.certificate or state.merged is None:
        return
    weights = {name: collection.weights[name] for name in collection.accepted}
    if collection.judged:
        judged = {update.client: update.num_examples for update in collection.judged}
        weights = dict.fromkeys(weights, 0.0) | judged
    with cpu_threads(federation.experiment.training.threads):
        measured = certificate(state.merged, layers_of(collection, list(weights)), weights)
    record.error = measured.error
    for client in collection.accepted:
        record.measure("cosine_to_mean", measured.cosine[client], client)
        record.measure("update_norm", measured.client_norm[client], client)
    for layer, rank in measured.effective_rank.items():
        record.measure("effective_rank", rank, layer=layer)
        record.measure("merged_norm", measured.norm[layer], layer=layer)
    record.statistics |= {
        "similarity": similarity(measured, collection.accepted),
        "layers": by_layer(measured, collection.accepted),
    }


def similarity(measured: Certificate, clients: Sequence[str]) -> dict[str, Any]:
    """Tell how alike the updates of some clients are, as it is stored; a note in its place where they are too many."""
    if len(clients) > COMPARED_CLIENTS:
        return {"left_out": f"{len(clients):,} clients; they are compared with each other up to {COMPARED_CLIENTS}"}
    rows = _rows(measured, clients)
    cosine = measured.similarity[rows][:, rows].round(decimals=COSINE_DIGITS)
    return {"clients": list(clients), "cosine": cosine.tolist()}


def by_layer(measured: Certificate, clients: Sequence[str]) -> dict[str, Any]:
    """Tell which rank some clients trained in each layer and how much of it they used, as it is stored.

    A note in its place where there are too many numbers.
    """
    layers, rows = list(measured.ranks), _rows(measured, clients)
    numbers = 2 * len(layers) * len(rows)
    if 2 * numbers > JSON_LENGTH:  # a digit and a comma each; what is longer only when written, the store notes
        return {"left_out": f"{numbers:,} numbers, which take more than the {JSON_LENGTH:,} characters that are kept"}
    return {
        "clients": list(clients),
        "layers": layers,
        "rank": [[measured.ranks[layer][row] for layer in layers] for row in rows],
        "effective_rank": [[measured.energy_ranks[layer][row] for layer in layers] for row in rows],
    }


def _rows(measured: Certificate, clients: Sequence[str]) -> list[int]:
    places = {client: row for row, client in enumerate(measured.client_norm)}
    return [places[client] for client in clients]


def layers_of(
    collection: Collection, clients: Sequence[str], held_bytes: int = HELD_BYTES
) -> Iterator[tuple[str, dict[str, Update]]]:
    """Yield each layer with every client's part of it, reading the replies as often as their size demands."""
    judged = {update.client: update.adapter for update in collection.judged}

    def read(client: str) -> Adapter:
        return judged[client] if client in judged else collection.update(client).adapter

    names = sorted(collection.state.spec.layers)
    at_once = max(1, len(names) * held_bytes // max(len(clients) * read(clients[0]).nbytes, 1))
    for first in range(0, len(names), at_once):
        held = {client: _layers(read(client), names[first : first + at_once]) for client in clients}
        for name in names[first : first + at_once]:
            yield name, {client: layers[name] for client, layers in held.items() if name in layers}


def _layers(adapter: Adapter, names: Sequence[str]) -> dict[str, Update]:
    """Return some layers of an adapter, copied, so that its buffer is let go."""
    found = {name: adapter.layers[name] for name in names if name in adapter.layers}
    return dict(adapter.layers if len(found) == len(adapter.layers) else Adapter.pack(found).layers)
