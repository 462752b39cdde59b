"""From the survivors' shares to the mean of their updates."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import ClientError, RejectedUpdate, SumFailed
from common.federation import ClientUpdate, ServerState
from common.messages import PublicKeys, SharesAnswer, UnmaskAnswer
from common.secure.fixed_point import decode
from common.secure.keys import KeyPair, Session
from common.secure.masks import Words, remove_masks
from common.secure.sealed_shares import SEALED_BYTES
from common.secure.shamir import PRIME, Share, join
from common.travel import complete
from server.orders import Order
from strategies.updates import COHORT, check_update

_SEALED = re.compile(f"[0-9a-f]{{{2 * SEALED_BYTES}}}")
_SHARE = re.compile("[0-9a-f]{1,132}")


def check_sealed(answer: SharesAnswer, receivers: Set[str]) -> None:
    """Refuse sealed shares that are not one for each receiver, or could never be opened.

    Raises
    ------
    ClientError
        With the reason.
    """
    if answer.shares.keys() != receivers:
        raise ClientError(f"it sent shares for {_listed(answer.shares)}, expected {_listed(receivers)}")
    if not all(_SEALED.fullmatch(text) for text in answer.shares.values()):
        raise ClientError("its sealed shares are not of the right form")


def check_shares(answer: UnmaskAnswer, survivors: Set[str], dropped: Set[str]) -> None:
    """Refuse shares that are not those asked for.

    Raises
    ------
    ClientError
        With the reason.
    """
    if answer.seeds.keys() != survivors or answer.mask_keys.keys() != dropped:
        raise ClientError("it sent shares of other clients' secrets than those asked for")
    for text in (*answer.seeds.values(), *answer.mask_keys.values()):
        if not _SHARE.fullmatch(text) or int(text, 16) >= PRIME:
            raise ClientError("its shares are out of range")


def lift_masks(
    total: Words,
    session: Session,
    answers: Mapping[str, UnmaskAnswer],
    keys: Mapping[str, PublicKeys],
    threshold: int,
) -> None:
    """Take the masks from a sum, in place.

    Parameters
    ----------
    total : uint64 array
        Sum of the survivors' uploads.
    session : Session
        The masks' session.
    answers : mapping of str to UnmaskAnswer
        At least ``threshold``, each checked: all speak of the same survivors and dropped clients.
    keys : mapping of str to PublicKeys
        Of all clients whose keys were announced; their order gives the shares' numbers.
    threshold : int
        Shares a secret needs.

    Raises
    ------
    SumFailed
        If shares do not give the secrets they are said to be of.
    """
    numbers = {name: number for number, name in enumerate(sorted(keys), start=1)}
    one = next(iter(answers.values()))

    def secret(kind: str, owner: str) -> bytes:
        shares = [Share(numbers[name], int(getattr(answer, kind)[owner], 16)) for name, answer in answers.items()]
        try:
            return join(shares, threshold)
        except ClientError as error:
            raise SumFailed(f"the masks of {owner} cannot be lifted: {error}") from None

    seeds = {owner: secret("seeds", owner) for owner in one.seeds}
    dropped = {owner: secret("mask_keys", owner) for owner in one.mask_keys}
    for owner, private in dropped.items():
        if KeyPair.of(private).public.hex() != keys[owner].mask:
            raise SumFailed(f"the masks of {owner} cannot be lifted: the shares give another key")
    remove_masks(total, session, seeds, dropped, {name: bytes.fromhex(key.mask) for name, key in keys.items()})


def unmasked(total: Words, clients: int, most_examples: int) -> tuple[NDArray[np.float64], float]:
    """Decode an unmasked sum: ``Σ n x`` and ``Σ n``.

    Parameters
    ----------
    total : uint64 array
        In fixed point.
    clients : int
        In the sum.
    most_examples : int
        Largest number of examples of one client.

    Raises
    ------
    RejectedUpdate
        If the weight is impossible, as after a wrong share.
    """
    numbers, weight = decode(total)
    if not (weight.is_integer() and clients <= weight <= clients * most_examples):
        raise RejectedUpdate(f"the unmasked sum claims {weight:g} examples of {clients} clients; a client cheated")
    return numbers, weight


def mean_update(
    numbers: NDArray[np.float64], weight: float, wide: Order, ranks: Sequence[int], state: ServerState
) -> ClientUpdate:
    """Divide a sum by its weight and make it one update, whole from what the widest client was given.

    Parameters
    ----------
    numbers, weight : float array, float
        ``Σ n x`` and ``Σ n``.
    wide : Order
        Of the widest client.
    ranks : sequence of int
        Of the clients in the sum; what is above the highest is padding.
    state : ServerState
        What they trained on.

    Raises
    ------
    RejectedUpdate
        If the mean does not fit the model.
    """
    mean = torch.from_numpy((numbers / weight).astype(np.float32))
    part, dispatch = wide.dispatch.sends, wide.dispatch
    start = wide.start if part in ("a", "b") and dispatch.frozen_a is None else None
    adapter = complete(mean, wide.start.layout, part, dispatch, start).narrowed(max(ranks))
    update = ClientUpdate(COHORT, adapter, weight, state.base_version)
    check_update(update, state)
    return update


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nobody"
