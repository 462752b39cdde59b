"""What a client sends of what it learned, and what it owes where the wire format cannot say it exactly.

int8 and int4 send the change since the start. With error feedback (Seide et al., 1-Bit Stochastic Gradient Descent,
Interspeech 2014; Karimireddy et al., arXiv 1901.09847) a client sends Q(change + owed) and owes what Q lost, so that
nothing is lost for good.
"""

from __future__ import annotations

import torch
from torch import Tensor

from client.memory import recall, remember
from client.node import Node
from common.adapter import Adapter
from common.federation import Dispatch
from common.messages import TrainOrder
from common.quantize import is_quantized
from common.travel import take
from common.wire import Parcel, seal_numbers, unseal_numbers

OWED = "owed"
"""Kind of the memory; one flat tensor for every part that travels."""


def upload(node: Node, order: TrainOrder, dispatch: Dispatch, start: Adapter, trained: Adapter) -> Parcel:
    """Encode an update in the experiment's format; where the order asks for it, pay what is owed and keep what is lost.

    Parameters
    ----------
    node : Node
        The client; one without a folder owes nothing.
    order : TrainOrder
        Says whether errors are fed back.
    dispatch : Dispatch
        Says what travels.
    start, trained : Adapter
        Before and after training, whole and of one layout.

    Raises
    ------
    ClientError
        If a number does not fit the format.
    """
    wire, part = node.experiment.federation.wire, dispatch.sends
    numbers = take(trained, part, dispatch)
    if not is_quantized(wire):
        return seal_numbers(numbers, trained.layout, wire, part, dispatch, hashed=False)
    change = numbers - take(start, part, dispatch)
    if not order.feedback or node.folder is None:
        return seal_numbers(change, trained.layout, wire, part, dispatch, hashed=False)
    memory = recall(node.folder, OWED, order.round) or {}
    change += _owed(memory.get(part), change)
    parcel = seal_numbers(change, trained.layout, wire, part, dispatch, hashed=False)
    remember(node.folder, OWED, order.round, memory | {part: change - unseal_numbers(parcel)})
    return parcel


def _owed(kept: Tensor | None, change: Tensor) -> Tensor:
    """Return what is owed; nothing where it is of another rank, or was damaged on the disk."""
    if kept is None or kept.shape != change.shape or not bool(torch.isfinite(kept).all()):
        return torch.zeros_like(change)
    return kept
