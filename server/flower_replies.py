"""Replies of clients that are not ours: PEFT factors in Flower's records, trusted in nothing."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from torch import Tensor

from common.adapter import Layout
from common.errors import ConfigurationError, RejectedUpdate
from common.federation import ClientUpdate, ServerState
from common.peft_state import LoraScale, adapter_from_state
from strategies.updates import check_update

logger = logging.getLogger(__name__)

NUM_EXAMPLES, ALPHA, RSLORA, SCALING = "num-examples", "lora-alpha", "use-rslora", "lora-scaling"
"""Metrics that are a client's weight, and what it says of its LoRA's scale."""
NOT_AVERAGED = (NUM_EXAMPLES, ALPHA, RSLORA, SCALING)

DTYPES = ("float16", "float32", "float64")

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Limits:
    """What a reply must keep to.

    Parameters
    ----------
    max_num_examples : float
        Largest weight a client may claim.
    max_update_norm : float, optional
        Largest norm of a client's factors and heads.
    ranks : mapping of str to int, optional
        The ranks all clients must have, by layer, for strategies that need equal ones.
    """

    max_num_examples: float
    max_update_norm: float | None
    ranks: Mapping[str, int] | None


@dataclass(frozen=True, eq=False)
class Trained:
    """A reply that passed: the update, the scale its client trains at, and its metrics."""

    update: ClientUpdate
    scale: LoraScale
    metrics: Mapping[str, float]


def read_replies(replies: Iterable[Message], asked: Collection[int], read: Callable[[Message], T]) -> dict[int, T]:
    """Read what can be read, one reply of each node that was asked, in the order of the nodes; log the others."""
    found: dict[int, T] = {}
    for message in replies:
        node = message.metadata.src_node_id
        try:
            if message.has_error():
                raise RejectedUpdate(f"error {message.error.code}: {message.error.reason}")
            if node not in asked or node in found:
                raise RejectedUpdate("nobody asked for this reply")
            found[node] = read(message)
        except RejectedUpdate as error:
            logger.warning("node %d is left out: %s", node, error)
    return dict(sorted(found.items()))


def mean_metrics(weighed: Sequence[tuple[Mapping[str, float], float]]) -> dict[str, float]:
    """Average the metrics all clients have, by their weights."""
    if not weighed:
        return {}
    names = set.intersection(*(set(metrics) for metrics, _ in weighed))
    total = math.fsum(weight for _, weight in weighed)
    return {name: math.fsum(metrics[name] * weight for metrics, weight in weighed) / total for name in sorted(names)}


def read_trained(message: Message, client: str, state: ServerState, scale: LoraScale | None, limits: Limits) -> Trained:
    """Turn a reply into an update.

    Parameters
    ----------
    message : Message
        With one ArrayRecord, ``get_peft_model_state_dict``'s, and one MetricRecord.
    client : str
        Name of the node.
    state : ServerState
        What it was trained on.
    scale : LoraScale, optional
        What holds for clients that say nothing of their own.
    limits : Limits
        What the server accepts.

    Raises
    ------
    RejectedUpdate
        With the reason why the reply is left out.
    """
    said, weight = read_numbers(message, limits.max_num_examples)
    stated = _scale(said, scale)
    if len(records := message.content.array_records) != 1:
        raise RejectedUpdate(f"it has {len(records)} ArrayRecords; expected one, of get_peft_model_state_dict")
    try:
        adapter = adapter_from_state(read_tensors(next(iter(records.values()))), stated)
    except ConfigurationError as error:
        raise RejectedUpdate(str(error)) from None
    update = ClientUpdate(client, adapter, weight, state.base_version)
    check_update(update, state)
    _check_layers(adapter.layout, state, limits.ranks)
    _check_norm(adapter.flat, limits.max_update_norm)
    return Trained(update, stated, _metrics(said))


def read_evaluation(message: Message, max_num_examples: float) -> tuple[dict[str, float], float]:
    """Return an evaluation's finite metrics and its client's weight.

    Raises
    ------
    RejectedUpdate
        If they cannot be read.
    """
    said, weight = read_numbers(message, max_num_examples)
    return _metrics(said), weight


def read_numbers(message: Message, max_num_examples: float) -> tuple[dict[str, float], float]:
    """Read a reply's single numbers, and the weight among them.

    Raises
    ------
    RejectedUpdate
        If there is not exactly one MetricRecord, or no usable weight.
    """
    if len(records := message.content.metric_records) != 1:
        raise RejectedUpdate(f"it has {len(records)} MetricRecords; expected one, with {NUM_EXAMPLES}")
    record: MetricRecord = next(iter(records.values()))
    metrics = {name: float(value) for name, value in record.items() if isinstance(value, int | float)}
    weight = metrics.get(NUM_EXAMPLES)
    if weight is None or not 0 < weight <= max_num_examples:
        raise RejectedUpdate(f"its {NUM_EXAMPLES} is {weight}; expected a number above 0, at most {max_num_examples:g}")
    return metrics, weight


def read_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """Decode a record's arrays to float32.

    Raises
    ------
    RejectedUpdate
        If one of them is no array of floating-point numbers.
    """
    return {name: _tensor(name, array) for name, array in record.items()}


def _tensor(name: str, array: Array) -> Tensor:
    try:
        numbers = array.numpy()
    except Exception as error:  # numpy raises every kind of error on bytes that are no array
        raise RejectedUpdate(f"array {name[:100]!r} cannot be read: {type(error).__name__}") from None
    kind = str(getattr(numbers, "dtype", type(numbers).__name__))  # an archive of arrays is none itself
    if kind not in DTYPES:
        raise RejectedUpdate(f"array {name[:100]!r} is of {kind}; expected {', '.join(DTYPES)}")
    return torch.from_numpy(np.array(numbers)).float()


def _metrics(said: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in said.items() if math.isfinite(value) and name not in NOT_AVERAGED}


def _scale(said: Mapping[str, float], common: LoraScale | None) -> LoraScale:
    """Return what a client says of its scale, or else what holds for all."""
    try:
        if ALPHA in said:
            return LoraScale(said[ALPHA], bool(said.get(RSLORA, 0)))
        if SCALING in said:
            return LoraScale(fixed=said[SCALING])
    except ConfigurationError as error:
        raise RejectedUpdate(str(error)) from None
    if common is None:
        raise RejectedUpdate(f"it does not say its {ALPHA}; return it as a metric, or give FlowerStrategy lora_alpha")
    return common


def _check_layers(layout: Layout, state: ServerState, ranks: Mapping[str, int] | None) -> None:
    """Refuse updates that lack a layer, or are of other ranks where all must be equal."""
    held = {name: rank for name, _, _, rank in layout.layers}
    if missing := sorted(set(state.spec.layers) - set(held)):
        raise RejectedUpdate(f"it lacks layer {missing[0]} ({len(missing)} in all)")
    for name, rank in held.items():
        if ranks is not None and rank != ranks[name]:
            raise RejectedUpdate(f"layer {name} has rank {rank}; this strategy needs {ranks[name]}, as initial_arrays")


def _check_norm(flat: Tensor, bound: float | None) -> None:
    norm = float(torch.linalg.vector_norm(flat.double()))
    if bound is not None and norm > bound:
        raise RejectedUpdate(f"its norm {norm:.4g} exceeds max_update_norm {bound}")
