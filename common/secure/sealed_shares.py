"""Shares on their way from one client to another, past a server that must not read them.

ChaCha20-Poly1305 (RFC 8439) under a key that only sender and receiver can derive, for this session and direction. Run,
round, session, sender and receiver are authenticated, too: a share put in another place is refused.
"""

from __future__ import annotations

import secrets
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from common.errors import ClientError
from common.secure.keys import Session, agreed_key
from common.secure.shamir import PRIME, VALUE_BYTES

NONCE_BYTES, TAG_BYTES = 12, 16
SEALED_BYTES = NONCE_BYTES + 2 * VALUE_BYTES + TAG_BYTES


class SecretShares(NamedTuple):
    """What one client entrusts to another: shares of its private mask key and of its own mask's seed."""

    mask_key: int
    seed: int


def seal(shares: SecretShares, session: Session, sender: str, receiver: str, private: bytes, public: bytes) -> bytes:
    """Encrypt shares for another client.

    Parameters
    ----------
    shares : SecretShares
        For the receiver.
    session : Session
        Their session.
    sender, receiver : str
        Names of the clients.
    private, public : bytes, length 32
        Private cipher key of the sender, public one of the receiver.
    """
    info = session.info("share", sender, receiver)
    text = b"".join(value.to_bytes(VALUE_BYTES, "big") for value in shares)
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + ChaCha20Poly1305(agreed_key(private, public, info)).encrypt(nonce, text, info)


def unseal(sealed: bytes, session: Session, sender: str, receiver: str, private: bytes, public: bytes) -> SecretShares:
    """Decrypt shares from another client, with the receiver's private and the sender's public cipher key.

    Raises
    ------
    ClientError
        If they are not from that sender, not for that receiver, of another session, or damaged.
    """
    info = session.info("share", sender, receiver)
    cipher = ChaCha20Poly1305(agreed_key(private, public, info))
    try:
        if len(sealed) != SEALED_BYTES:
            raise InvalidTag
        text = cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], info)
    except InvalidTag:
        raise ClientError(f"the shares from {sender} cannot be opened: they are not for {receiver} here") from None
    values = SecretShares(int.from_bytes(text[:VALUE_BYTES], "big"), int.from_bytes(text[VALUE_BYTES:], "big"))
    if max(values) >= PRIME:
        raise ClientError(f"the shares from {sender} are out of range; it must be left out")
    return values
