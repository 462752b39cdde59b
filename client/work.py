"""What a node does with an order.

The way of an adapter: parcel → ``unseal`` → ``starting_adapter`` → the model → ``train`` → ``AdaptedModel.read`` →
``seal`` → answer.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping

from flwr.app import RecordDict

from client.answers import keep_answer, order_key, stored_answer
from client.device import device_name, free_memory, largest_rank
from client.faults import suffer
from client.held import held, hold
from client.node import Node
from client.training import Position, train
from common.adapter import tensor_bytes
from common.errors import ClientError
from common.federation import Dispatch
from common.fingerprint import code_fingerprint
from common.messages import EvaluateAnswer, EvaluateOrder, Presence, Query, TrainAnswer, TrainOrder
from common.seeds import derive_seed
from common.start import starting_adapter
from common.tasks import ClientData
from common.wire import Parcel, read_message, seal, unseal, write_message
from common.workspace import Workspace, choose_device, model_spec, workspace


def present(node: Node, content: RecordDict) -> RecordDict:
    """Answer a query."""
    order, _ = read_message(content, Query)
    _check_code(order.fingerprint)
    device = choose_device(node.experiment.training.device)
    memory = free_memory(device)
    limit = largest_rank(model_spec(node.experiment), memory)
    return write_message(Presence(client=node.name, device=device_name(device), memory_bytes=memory, max_rank=limit))


def train_order(node: Node, content: RecordDict) -> RecordDict:
    """Answer a training order, from the stored answer if it was done before."""
    order, parcels = read_message(content, TrainOrder)
    _check(order.fingerprint, order.client, node)
    key = order_key(order, _parcel(parcels, "start"))
    if node.folder and (stored := stored_answer(node.folder, key)):
        return stored
    suffer(node, order.round)
    answer, update = _train(node, order, parcels)
    if node.folder:
        keep_answer(node.folder, key, answer, update)
    return write_message(answer, {"update": update})


def evaluate_order(node: Node, content: RecordDict) -> RecordDict:
    """Answer an evaluation order."""
    order, parcels = read_message(content, EvaluateOrder)
    _check(order.fingerprint, order.client, node)
    started = time.perf_counter()
    place = workspace(node.experiment)
    held_out = _data(place, node).held_out
    start = unseal(_parcel(parcels, "start"), order.frozen_a)
    _use(place, node, order.global_hash, parcels)
    place.adapted.load(start)
    answer = EvaluateAnswer(
        client=node.name,
        round=order.round,
        num_examples=float(len(held_out)),
        metrics=place.task.evaluate(place.adapted.model, held_out),
        holds=order.global_hash if node.shared else "",
        seconds=time.perf_counter() - started,
    )
    return write_message(answer)


def _train(node: Node, order: TrainOrder, parcels: Mapping[str, Parcel]) -> tuple[TrainAnswer, Parcel]:
    started = time.perf_counter()
    place = workspace(node.experiment)
    rows = _data(place, node).train
    given = unseal(_parcel(parcels, "start"), order.frozen_a)
    dispatch = Dispatch(given, order.rank, order.seed, order.trains, order.frozen_a)
    start = starting_adapter(dispatch, place.adapted.spec(node.experiment.seed))
    seed = derive_seed(node.experiment.seed, "dropout", order.round, node.name)
    _use(place, node, order.global_hash, parcels)
    place.adapted.load(start, seed)
    metrics = train(place, rows, Position(order.round, order.rounds, node.name), order.trains)
    trained = place.adapted.read()
    frozen = order.frozen_a is not None
    answer = TrainAnswer(
        client=node.name,
        round=order.round,
        base_version=order.base_version,
        num_examples=float(len(rows)),
        seconds=time.perf_counter() - started,
        metrics=metrics,
        holds=order.global_hash if node.shared else "",
        frozen_hash=hashlib.sha256(tensor_bytes(trained.inner_factors)).hexdigest() if frozen else None,
    )
    return answer, seal(trained, node.experiment.federation.wire, whole=not frozen, hashed=False)


def _data(place: Workspace, node: Node) -> ClientData:
    return place.task.client_data(node.name, node.clients, node.experiment.seed)


def _use(place: Workspace, node: Node, version: str, parcels: Mapping[str, Parcel]) -> None:
    """Put the model on a version of the global adapter, sent with the order or held from an earlier one."""
    sent = parcels.get("global")
    if sent is not None and sent.digest != version:
        raise ClientError("the global adapter is not the one the order names")
    if sent is not None and node.shared is not None:
        hold(node.shared, sent)
    if not place.adapted.holds(version):
        place.adapted.use_global(unseal(sent) if sent is not None else held(node.shared, version), version)


def _parcel(parcels: Mapping[str, Parcel], name: str) -> Parcel:
    if name not in parcels:
        raise ClientError(f"the order came without its {name} adapter")
    return parcels[name]


def _check(fingerprint: str, client: str, node: Node) -> None:
    _check_code(fingerprint)
    if client != node.name:
        raise ClientError(f"the order is for client {client}, this is {node.name}")


def _check_code(fingerprint: str) -> None:
    if fingerprint != code_fingerprint():
        raise ClientError(
            f"the server runs code {fingerprint}, this node {code_fingerprint()}; install the same LoRAFleet version"
        )
