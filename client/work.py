"""What a node does with an order.

The way of an adapter: parcel → ``unseal`` → ``starting_adapter`` → the model → ``train`` → ``AdaptedModel.read`` →
``upload`` → answer. What a client keeps to itself joins it in between.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from flwr.app import RecordDict

from client.answers import keep_answer, order_key, stored_answer
from client.device import device_name, free_memory, largest_rank
from client.faults import dawdle, drop_out, is_attacker, lied
from client.held import held, hold
from client.memory import recall
from client.node import Node
from client.own import OWN, keep_own, with_own
from client.privacy.account import Permit, admit, settle
from client.privacy.telling import check_owner, check_telling, only_public
from client.privacy.training import prepare, train_privately
from client.secure.masking import Mask, join_sum
from client.secure.vault import end_session
from client.training import Position, train
from client.upload import upload
from common.adapter import Adapter
from common.errors import ClientError
from common.federation import Dispatch
from common.fingerprint import code_fingerprint
from common.messages import EvaluateAnswer, EvaluateOrder, ModelOrder, Presence, Query, TrainAnswer, TrainOrder
from common.seeds import derive_seed
from common.start import starting_adapter
from common.tasks import ClientData, Rows
from common.travel import untrained_hash
from common.wire import Parcel, read_message, unseal, write_message
from common.workspace import Workspace, choose_device, model_spec, workspace


@dataclass(frozen=True)
class Stopwatch:
    """When work on an order began, and how long it takes."""

    began: float = field(default_factory=lambda: round(time.time(), 3))
    _zero: float = field(default_factory=time.perf_counter)

    def seconds(self) -> float:
        """Return the time since then."""
        return round(time.perf_counter() - self._zero, 6)


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
    watch = Stopwatch()
    order, parcels = read_message(content, TrainOrder)
    check_order(order.fingerprint, order.client, node)
    key = order_key(order, _parcel(parcels, "start"))
    if node.folder and (stored := stored_answer(node.folder, key)):
        return stored
    drop_out(node, order.round)
    answer, update, permit = _train(node, order, parcels, join_sum(node, order, key), watch)
    if node.folder:
        keep_answer(node.folder, key, answer, update)
    if permit is not None:
        settle(node, permit)
    return write_message(answer, {"update": update})


def evaluate_order(node: Node, content: RecordDict) -> RecordDict:
    """Answer an evaluation order."""
    watch = Stopwatch()
    order, parcels = read_message(content, EvaluateOrder)
    check_order(order.fingerprint, order.client, node)
    end_session(node, order.round)
    place = workspace(node.experiment)
    check_telling(node, place.task)
    held_out = _data(place, node).held_out
    known = _known(node, order, parcels)
    start = unseal(_parcel(parcels, "start"), known)
    if known.keeps_b:
        start = with_own(start, recall(node.folder, OWN, order.round + 1))
    _use(place, node, order, parcels)
    place.adapted.load(start)
    answer = EvaluateAnswer(
        client=node.name,
        round=order.round,
        num_examples=float(len(held_out)),
        metrics=place.task.evaluate(place.adapted.model, held_out),
        holds=_holds(node, order),
        began=watch.began,
        seconds=watch.seconds(),
    )
    return write_message(answer)


def _train(
    node: Node, order: TrainOrder, parcels: Mapping[str, Parcel], mask: Mask | None, watch: Stopwatch
) -> tuple[TrainAnswer, Parcel, Permit | None]:
    place = workspace(node.experiment)
    rows = _data(place, node).train
    known = _known(node, order, parcels)
    dispatch = replace(known, start=unseal(_parcel(parcels, "start"), known))
    start = starting_adapter(dispatch, place.adapted.spec(node.experiment.seed))
    if dispatch.keeps_b:
        start = with_own(start, recall(node.folder, OWN, order.round))
    seed = derive_seed(node.experiment.seed, "dropout", order.round, node.name)
    _use(place, node, order, parcels)
    place.adapted.load(start, seed, dispatch)
    ready = watch.seconds()
    dawdle(node, order.round)
    metrics, permit = _learn(node, place, rows, order)
    trained = place.adapted.read()
    if is_attacker(node):
        trained = lied(start, trained, node.experiment.simulation.attack_scale)
    if dispatch.keeps_b:
        keep_own(_folder(node), order.round, trained)
    answer = TrainAnswer(
        client=node.name,
        round=order.round,
        base_version=order.base_version,
        num_examples=float(len(rows)),
        began=watch.began,
        ready=ready,
        seconds=watch.seconds(),
        metrics=metrics,
        holds=_holds(node, order),
        frozen_hash=untrained_hash(trained, dispatch),
    )
    answer = only_public(answer, node.experiment.privacy, permit)
    if mask is not None:
        return *mask.hide(answer, start, trained, dispatch), permit
    return answer, upload(node, order, dispatch, start, trained), permit


def _learn(node: Node, place: Workspace, rows: Rows, order: TrainOrder) -> tuple[dict[str, float], Permit | None]:
    """Train; where every row is protected, only as far as the ledger permits, and without a word about the rows."""
    position = Position(order.round, order.rounds, node.name)
    if not node.experiment.privacy.protects_rows:
        check_owner(node)
        return train(place, rows, position, order.trains, order.tail), None
    prepare(place, rows, node.name, order.trains)
    permit = admit(node, order, rows)
    train_privately(place, rows, position, permit, order.trains, order.tail)
    return {}, permit


def _known(node: Node, order: ModelOrder, parcels: Mapping[str, Parcel]) -> Dispatch:
    """Return what the order says of the adapter, beside its numbers."""
    frames = _received(node, order, "frames", order.frames_hash, parcels) if order.frames_hash else None
    trains, tail = (order.trains, order.tail) if isinstance(order, TrainOrder) else ("ab", None)
    return Dispatch(
        Adapter.empty(), order.rank, order.seed, trains, order.frozen_a, frames, order.keeps_b, order.density, tail
    )


def _received(node: Node, order: ModelOrder, kind: str, digest: str, parcels: Mapping[str, Parcel]) -> Adapter:
    """Return the global adapter or the frames, sent with the order or held from an earlier one."""
    sent = parcels.get(kind)
    if sent is None:
        return held(node.shared, digest, kind)
    if sent.digest != digest:
        raise ClientError(f"the {kind} adapter is not the one the order names")
    if node.shared is not None:
        hold(node.shared, sent, order.base_version, kind)
    return unseal(sent)


def _holds(node: Node, order: ModelOrder) -> tuple[str, ...]:
    return tuple(version for version in (order.global_hash, order.frames_hash) if version and node.shared)


def _folder(node: Node) -> Path:
    if node.folder is None:
        raise ClientError("the strategy needs a client that remembers, but this one has no folder of its own")
    return node.folder


def _data(place: Workspace, node: Node) -> ClientData:
    return place.task.client_data(node.name, node.clients, node.experiment.seed)


def _use(place: Workspace, node: Node, order: ModelOrder, parcels: Mapping[str, Parcel]) -> None:
    """Put the model on the order's global adapter."""
    version = order.global_hash
    if "global" in parcels or not place.adapted.holds(version):
        place.adapted.use_global(_received(node, order, "global", version, parcels), version)


def _parcel(parcels: Mapping[str, Parcel], name: str) -> Parcel:
    if name not in parcels:
        raise ClientError(f"the order came without its {name} adapter")
    return parcels[name]


def check_order(fingerprint: str, client: str, node: Node) -> None:
    """Refuse an order of other code, or for another client."""
    _check_code(fingerprint)
    if client != node.name:
        raise ClientError(f"the order is for client {client}, this is {node.name}")


def _check_code(fingerprint: str) -> None:
    if fingerprint != code_fingerprint():
        raise ClientError(
            f"the server runs code {fingerprint}, this node {code_fingerprint()}; install the same LoRAFleet version"
        )
