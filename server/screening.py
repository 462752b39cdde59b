"""Nothing a client sends is trusted: an answer becomes an update only after every check here."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from common.adapter import Adapter, Layout
from common.errors import RejectedUpdate
from common.experiment import FederationSettings
from common.federation import ClientUpdate, Dispatch, ModelSpec, ServerState
from common.messages import TrainAnswer, TrainOrder
from common.start import frozen_hash
from common.wire import Parcel, unseal
from strategies.updates import check_update


def screen(
    order: TrainOrder,
    dispatch: Dispatch,
    answer: TrainAnswer,
    parcels: Mapping[str, Parcel],
    state: ServerState,
    settings: FederationSettings,
) -> ClientUpdate:
    """Turn a client's answer into an update.

    Raises
    ------
    ClientError
        With the reason why the answer is left out of the round.
    """
    _check_header(order, answer, settings)
    if set(parcels) != {"update"}:
        raise RejectedUpdate(f"expected one adapter named update, got: {', '.join(sorted(parcels)) or 'none'}")
    parcel = parcels["update"]
    _check_layers(parcel.layout, state.spec, order.rank)
    _check_heads(parcel.layout, state.spec)
    if dispatch.frozen_a is not None:
        _check_frozen(parcel, answer, dispatch.frozen_a)
    adapter = unseal(parcel, dispatch.frozen_a)
    weight = answer.num_examples if settings.weighting == "examples" else 1.0
    metrics = {name: value for name, value in answer.metrics.items() if math.isfinite(value)}
    update = ClientUpdate(order.client, adapter, weight, answer.base_version, metrics)
    check_update(update, state)
    _check_norm(adapter, settings.max_update_norm)
    return update


def _check_norm(adapter: Adapter, bound: float | None) -> None:
    norm = float(torch.linalg.vector_norm(adapter.flat))
    if math.isinf(norm):
        raise RejectedUpdate("the update's norm is beyond float32; no sum with it would be finite")
    if bound is not None and norm > bound:
        raise RejectedUpdate(f"the update's norm {norm:.4g} exceeds federation.max_update_norm {bound}")


def _check_header(order: TrainOrder, answer: TrainAnswer, settings: FederationSettings) -> None:
    if answer.client != order.client:
        raise RejectedUpdate(f"the answer is signed {answer.client!r}, expected {order.client!r}")
    if answer.round != order.round:
        raise RejectedUpdate(f"the answer is for round {answer.round}, this is round {order.round}")
    if not 0 < answer.num_examples <= settings.max_num_examples:
        raise RejectedUpdate(
            f"it claims {answer.num_examples} examples, expected 1 to {settings.max_num_examples} "
            "(federation.max_num_examples)"
        )


def _check_layers(layout: Layout, spec: ModelSpec, rank: int) -> None:
    """Compare layers and ranks with what was ordered, before anything is built from the manifest."""
    sent = {name: (out, inn, held) for name, out, inn, held in layout.layers}
    expected = {name: (*shape, spec.layer_rank(name, rank)) for name, shape in spec.layers.items()}
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


def _check_frozen(parcel: Parcel, answer: TrainAnswer, seed: int) -> None:
    if parcel.whole or answer.frozen_hash != frozen_hash(parcel.layout, seed):
        raise RejectedUpdate("frozen factor differs: the update was not trained on the shared frozen a")
