"""How what a client has trained becomes an upload that only a sum over all clients can make use of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from client.node import Node
from client.secure.vault import Vault, bound, digits, needed, open_vault, write_vault
from common.adapter import Adapter, Layout
from common.errors import ClientError, ConfigurationError
from common.federation import Dispatch
from common.messages import Masking, TrainAnswer, TrainOrder
from common.privacy.clipping import clip_change
from common.secure.fixed_point import encode, resolution
from common.secure.masks import add_own, add_pairwise
from common.secure.sealed_shares import unseal
from common.secure.upload import masked_parcel, widened
from common.travel import take
from common.wire import Parcel


@dataclass(frozen=True, eq=False)
class Mask:
    """A client's part in a secure sum.

    Parameters
    ----------
    node : Node
        The client.
    vault : Vault
        Its secrets, with the shares of all clients that take part.
    wide : Layout
        Of the widest client's adapter.
    """

    node: Node
    vault: Vault
    wide: Layout

    def hide(
        self, answer: TrainAnswer, start: Adapter, trained: Adapter, dispatch: Dispatch
    ) -> tuple[TrainAnswer, Parcel]:
        """Mask what would travel, times its examples, and their number; the answer says neither, nor any metric.

        Where clients are protected, the update is clipped here: of a sum the server cannot clip one client's part.
        """
        numbers, privacy = take(trained, dispatch.sends, dispatch), self.node.experiment.privacy
        if privacy.protects_clients:
            numbers = within(numbers, take(start, dispatch.sends, dispatch), privacy.clipping_norm)
        numbers = widened(numbers, dispatch.sends, trained.layout, self.wide)
        equal = self.node.experiment.federation.weighting == "equal"
        words = encode(numbers.cpu().numpy(), 1.0 if equal else answer.num_examples, len(self.vault.shares))
        session, name = bound(self.vault.session), self.node.name
        others = {other: bytes.fromhex(self.vault.keys[other].mask) for other in self.vault.shares if other != name}
        add_own(words, session, name, bytes.fromhex(self.vault.seed))
        add_pairwise(words, session, name, bytes.fromhex(self.vault.mask), others)
        hidden = answer.model_copy(update={"num_examples": 1.0, "metrics": {}, "session": session.id})
        return hidden, masked_parcel(words)


def within(trained: Tensor, start: Tensor, limit: float) -> Tensor:
    """Return what was trained, fp64, its change clipped so far that the rounding to fixed point stays within, too."""
    rounding = math.sqrt(len(trained)) * resolution(1)
    return start.to("cpu", torch.float64) + clip_change(trained, start, max(limit - rounding, 0.0)).change


def join_sum(node: Node, order: TrainOrder, key: str) -> Mask | None:
    """Take part in the order's secure sum; None where the experiment has no secure aggregation.

    Parameters
    ----------
    node : Node
        The client.
    order : TrainOrder
        Names the session and brings the others' shares.
    key : str
        Identifies order and start: within a session, only this one is trained and masked.

    Raises
    ------
    ClientError
        If the order wants a plain upload, or the session cannot be joined.
    """
    if order.masking is None:
        if node.experiment.secure_aggregation.enabled:
            raise ClientError("the order asks for a plain update, but this experiment masks them; it is refused")
        return None
    vault = open_vault(node, order.masking.session)
    if vault.trained and vault.trained != key:
        raise ClientError("this secure session already has an update of this client, of another order")
    if not vault.mask:
        raise ClientError("this secure session is over; its secrets are gone")
    vault = vault.model_copy(update={"trained": key, "shares": _opened(node, vault, order.masking)})
    write_vault(node, vault)
    return Mask(node, vault, _layout(order.masking))


def _opened(node: Node, vault: Vault, masking: Masking) -> dict[str, tuple[str, str]]:
    """Open the others' shares; whoever sent none takes no part."""
    senders = set(masking.shares) - {node.name}
    if not vault.sealed or not senders <= set(vault.sealed):
        raise ClientError("the shares of the secure session are not from the clients whose keys were announced")
    if len(senders) + 1 < needed(node, vault):
        raise ClientError(f"{len(senders) + 1} clients take part in the secure sum, {needed(node, vault)} are needed")
    found = {node.name: vault.shares[node.name]}
    for sender in sorted(senders):
        public = bytes.fromhex(vault.keys[sender].cipher)
        sealed = _bytes(masking.shares[sender], sender)
        private = bytes.fromhex(vault.cipher)
        found[sender] = digits(unseal(sealed, bound(vault.session), sender, node.name, private, public))
    return found


def _bytes(text: str, sender: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise ClientError(f"the shares from {sender} cannot be read") from None


def _layout(masking: Masking) -> Layout:
    try:
        return Layout.from_json(masking.layout)
    except ConfigurationError as error:
        raise ClientError(f"the secure sum's layout cannot be used: {error}") from None
