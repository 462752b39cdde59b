"""Nothing a client sends is trusted: an answer becomes an update only after every check here."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from common.adapter import Adapter, Layout
from common.errors import RejectedUpdate
from common.experiment import FederationSettings
from common.federation import ClientUpdate, Dispatch, ModelSpec, ServerState
from common.lowrank import LowRank
from common.messages import EvaluateOrder, TrainAnswer, TrainOrder
from common.quantize import is_quantized
from common.start import frozen_hash
from common.travel import untrained_hash
from common.wire import Parcel, unseal
from server.orders import Order
from strategies.updates import check_update


def screen(
    order: Order, answer: TrainAnswer, parcels: Mapping[str, Parcel], state: ServerState, settings: FederationSettings
) -> ClientUpdate:
    """Turn a client's answer into an update, made whole from what the client was given.

    Raises
    ------
    ClientError
        With the reason why the answer is left out of the round.
    """
    _check_header(order.header, answer, settings)
    if set(parcels) != {"update"}:
        raise RejectedUpdate(f"expected one adapter named update, got: {', '.join(sorted(parcels)) or 'none'}")
    parcel = parcels["update"]
    _check_layers(parcel.layout, order)
    _check_heads(parcel.layout, state.spec)
    if parcel.part != order.dispatch.sends:
        raise RejectedUpdate(f"it sent the part {parcel.part!r} of its adapter, expected {order.dispatch.sends!r}")
    adapter = unseal(parcel, order.dispatch, order.start if _needs_start(parcel, order.dispatch) else None)
    _check_frozen(adapter, answer, order.dispatch)
    weight = answer.num_examples if settings.weighting == "examples" else 1.0
    metrics = {name: value for name, value in answer.metrics.items() if math.isfinite(value)}
    update = ClientUpdate(order.client, adapter, weight, answer.base_version, metrics)
    check_update(update, state)
    _check_norm(adapter, settings.max_update_norm)
    return update


def _needs_start(parcel: Parcel, dispatch: Dispatch) -> bool:
    """Tell whether an update means nothing without the start of its training."""
    return is_quantized(parcel.wire) or (dispatch.sends in ("a", "b") and dispatch.frozen_a is None)


def _check_norm(adapter: Adapter, bound: float | None) -> None:
    norm = float(torch.linalg.vector_norm(adapter.flat))
    if math.isinf(norm):
        raise RejectedUpdate("the update's norm is beyond float32; no sum with it would be finite")
    if bound is not None and norm > bound:
        raise RejectedUpdate(f"the update's norm {norm:.4g} exceeds federation.max_update_norm {bound}")


def _check_header(order: TrainOrder | EvaluateOrder, answer: TrainAnswer, settings: FederationSettings) -> None:
    if answer.client != order.client:
        raise RejectedUpdate(f"the answer is signed {answer.client!r}, expected {order.client!r}")
    if answer.round != order.round:
        raise RejectedUpdate(f"the answer is for round {answer.round}, this is round {order.round}")
    if not 0 < answer.num_examples <= settings.max_num_examples:
        raise RejectedUpdate(
            f"it claims {answer.num_examples} examples, expected 1 to {settings.max_num_examples} "
            "(federation.max_num_examples)"
        )


def _check_layers(layout: Layout, order: Order) -> None:
    """Compare layers and ranks with what was ordered, before anything is built from the manifest."""
    sent = {name: (out, inn, held) for name, out, inn, held in layout.layers}
    expected = {name: (*shape, _rank(order, name)) for name, shape in order.spec.layers.items()}
    if missing := sorted(set(expected) - set(sent)):
        raise RejectedUpdate(f"the update lacks layer {missing[0]} ({len(missing)} in all)")
    if extra := sorted(set(sent) - set(expected)):
        raise RejectedUpdate(f"the update has an unknown layer {extra[0][:100]!r} ({len(extra)} in all)")
    for name, size in expected.items():
        if sent[name] != size:
            raise RejectedUpdate(f"layer {name} is (out, in, rank) {sent[name]}, expected {size}")


def _check_heads(layout: Layout, spec: ModelSpec) -> None:
    sent, expected = dict(layout.extras), {name: tuple(head.shape) for name, head in spec.heads.items()}
    for name in sorted(sent.keys() | expected.keys()):
        if sent.get(name) != expected.get(name):
            raise RejectedUpdate(f"head {name[:100]!r} has shape {sent.get(name)}, expected {expected.get(name)}")


def _rank(order: Order, layer: str) -> int:
    """Return the rank a client was to train a layer at; -1 is a dense one."""
    if order.dispatch.density is not None:
        return -1
    rank = order.spec.layer_rank(layer, order.dispatch.rank)
    frame = order.dispatch.frames.layers[layer] if order.dispatch.frames is not None else None
    return min(rank, frame.rank) if isinstance(frame, LowRank) else rank


def _check_frozen(adapter: Adapter, answer: TrainAnswer, dispatch: Dispatch) -> None:
    """Compare the client's hash of the factor it was not to train with the one it was given."""
    shared = dispatch.sends == "b" and dispatch.frozen_a is not None
    expected = frozen_hash(adapter.layout, dispatch.frozen_a) if shared else untrained_hash(adapter, dispatch)
    if answer.frozen_hash != expected:
        raise RejectedUpdate("frozen factor differs: the update was not trained on the factor it was given")
