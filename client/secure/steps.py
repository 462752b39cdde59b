"""What a client answers in the steps of a secure sum beside the training: keys, shares, and what lifts the masks.

Asked again for the same, it answers the same; asked for anything else in the same step, it refuses.
"""

from __future__ import annotations

import secrets

from flwr.app import RecordDict

from client.node import Node
from client.secure.vault import Vault, bound, digits, needed, open_vault, read_vault, write_vault
from client.work import check_order
from common.errors import ClientError
from common.messages import (
    KeysAnswer,
    KeysOrder,
    PublicKeys,
    SecureSession,
    SharesAnswer,
    SharesOrder,
    UnmaskAnswer,
    UnmaskOrder,
)
from common.secure.keys import KEY_BYTES, KeyPair
from common.secure.sealed_shares import SecretShares, seal
from common.secure.shamir import split
from common.wire import read_message, write_message


def give_keys(node: Node, content: RecordDict) -> RecordDict:
    """Answer with the public keys of a session, fresh ones if it is new."""
    order, _ = read_message(content, KeysOrder)
    check_order(order.fingerprint, order.client, node)
    vault = read_vault(node)
    if vault is None or vault.session != order.session:
        _check_newer(order.session, vault)
        cipher, mask = KeyPair.fresh(), KeyPair.fresh()
        vault = Vault(
            session=order.session,
            cipher=cipher.private.hex(),
            mask=mask.private.hex(),
            seed=secrets.token_hex(KEY_BYTES),
        )
        write_vault(node, vault)
    return write_message(KeysAnswer(session=order.session, client=node.name, keys=public_keys(vault)))


def give_shares(node: Node, content: RecordDict) -> RecordDict:
    """Answer with shares of the client's secrets, one sealed for every other client."""
    order, _ = read_message(content, SharesOrder)
    check_order(order.fingerprint, order.client, node)
    vault = open_vault(node, order.session)
    if not vault.keys:
        vault = _shared(node, vault, order.keys)
        write_vault(node, vault)
    elif vault.keys != order.keys:
        raise ClientError("the shares of this secure session were already sent, to other clients")
    return write_message(SharesAnswer(session=order.session, client=node.name, shares=vault.sealed))


def lift_masks(node: Node, content: RecordDict) -> RecordDict:
    """Answer with what lifts the masks of a sum: of survivors the seeds' shares, of the others the mask keys'.

    Never both of one client. After that the secrets are gone.
    """
    order, _ = read_message(content, UnmaskOrder)
    check_order(order.fingerprint, order.client, node)
    vault = open_vault(node, order.session)
    survivors = tuple(sorted(set(order.survivors)))
    if vault.answer is None:
        _check_survivors(node, vault, survivors)
        answer = UnmaskAnswer(
            session=order.session,
            client=node.name,
            seeds={name: seed for name, (_, seed) in vault.shares.items() if name in survivors},
            mask_keys={name: key for name, (key, _) in vault.shares.items() if name not in survivors},
        )
        vault = vault.model_copy(update={"survivors": survivors, "answer": answer}).emptied()
        write_vault(node, vault)
    elif vault.survivors != survivors:
        raise ClientError("the masks of this secure session were already lifted for another sum")
    assert vault.answer is not None
    return write_message(vault.answer)


def public_keys(vault: Vault) -> PublicKeys:
    """Return the client's own public keys."""
    if not vault.mask:
        raise ClientError("this secure session is over; its secrets are gone")
    cipher, mask = (KeyPair.of(bytes.fromhex(key)) for key in (vault.cipher, vault.mask))
    return PublicKeys(cipher=cipher.public.hex(), mask=mask.public.hex())


def _check_newer(session: SecureSession, known: Vault | None) -> None:
    """Refuse to go back: one sum per round, since two sums of the same updates tell the difference of the two."""
    if known is None:
        return
    last = known.session
    if session.round < last.round or (session.round == last.round and session.attempt <= last.attempt):
        raise ClientError(f"this client already is in a newer secure session, of round {last.round}")
    if session.round == last.round and known.answer is not None:
        raise ClientError(
            f"the masks of round {last.round} were already lifted once; its updates cannot be summed again"
        )


def _shared(node: Node, vault: Vault, keys: dict[str, PublicKeys]) -> Vault:
    if keys.get(node.name) != public_keys(vault):
        raise ClientError("the keys of the secure session are not those this client sent")
    if len({key.mask for key in keys.values()} | {key.cipher for key in keys.values()}) < 2 * len(keys):
        raise ClientError("two clients of the secure session have the same key; it cannot be used")
    least = node.experiment.secure_aggregation.min_cohort
    if len(keys) < least:
        raise ClientError(f"{len(keys)} clients began the secure sum, at least {least} are needed")
    vault = vault.model_copy(update={"keys": keys})
    names, enough = sorted(keys), needed(node, vault)
    mask_shares, seed_shares = (split(bytes.fromhex(key), len(names), enough) for key in (vault.mask, vault.seed))
    pieces = {
        name: SecretShares(key.y, seed.y) for name, key, seed in zip(names, mask_shares, seed_shares, strict=True)
    }
    private, own = bytes.fromhex(vault.cipher), pieces.pop(node.name)
    sealed = {
        name: seal(piece, bound(vault.session), node.name, name, private, bytes.fromhex(keys[name].cipher)).hex()
        for name, piece in pieces.items()
    }
    return vault.model_copy(update={"sealed": sealed, "shares": {node.name: digits(own)}})


def _check_survivors(node: Node, vault: Vault, survivors: tuple[str, ...]) -> None:
    if not vault.trained:
        raise ClientError("this client sent nothing that could be unmasked")
    if node.name not in survivors:
        raise ClientError("the sum to unmask does not hold this client's own update")
    if unknown := sorted(set(survivors) - set(vault.shares)):
        raise ClientError(f"the sum to unmask holds {unknown[0]}, who has no part in this secure session")
    if len(survivors) < needed(node, vault):
        raise ClientError(
            f"the sum to unmask holds {len(survivors)} clients, {needed(node, vault)} are needed; nothing is revealed"
        )
