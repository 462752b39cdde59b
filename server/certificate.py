"""What a merge did to the exact average: measured from the kept replies, while clients evaluate.

Where a robust rule judged them, the average is that of what it left.
"""

from __future__ import annotations

from common.federation import ServerState
from common.workspace import cpu_threads
from server.federation import Federation
from server.training import Collection
from strategies.certificate import certificate
from strategies.updates import parts_by_layer


def write_certificate(federation: Federation, state: ServerState, collection: Collection) -> None:
    """Measure a round's merge and write it into its record."""
    record = collection.record
    record.exact = federation.strategy.is_exact()
    hidden = federation.experiment.secure_aggregation.enabled
    if hidden or not federation.experiment.evaluation.certificate or state.merged is None:
        return
    updates = {name: collection.update(name) for name in collection.accepted}
    weights = {name: update.num_examples for name, update in updates.items()}
    if collection.judged:
        updates |= {update.client: update for update in collection.judged}
        weights = dict.fromkeys(updates, 0.0) | {update.client: update.num_examples for update in collection.judged}
    with cpu_threads(federation.experiment.training.threads):
        measured = certificate(state.merged, parts_by_layer(list(updates.values())).items(), weights)
    record.error = measured.error
    for client in collection.accepted:
        record.measure("cosine_to_mean", measured.cosine[client], client)
        record.measure("update_norm", measured.client_norm[client], client)
    for layer, rank in measured.effective_rank.items():
        record.measure("effective_rank", rank, layer=layer)
        record.measure("merged_norm", measured.norm[layer], layer=layer)
