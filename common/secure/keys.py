"""Key pairs of one session, and the keys two clients derive from them.

Every key is bound to what it is for: HKDF-SHA256 takes run, round, session, purpose and names as its info string, so no
key serves twice, and all are as long as ChaCha20 wants them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.errors import ClientError

KEY_BYTES = 32
"""Length of private keys, public keys, seeds and derived keys."""


@dataclass(frozen=True)
class Session:
    """One attempt at one sum; nothing secret of it is ever used in another one.

    Parameters
    ----------
    run : str
        Id of the run.
    round : int
        Number of the training round.
    id : str
        Drawn by the server when the session begins.
    """

    run: str
    round: int
    id: str

    def info(self, purpose: str, *names: str) -> bytes:
        """Write session, purpose and names as one string that no other combination has."""
        return json.dumps(["lorafleet secure aggregation 1", self.run, self.round, self.id, purpose, *names]).encode()


@dataclass(frozen=True)
class KeyPair:
    """An X25519 key pair, both keys 32 raw bytes; the private one is not shown."""

    private: bytes
    public: bytes

    def __repr__(self) -> str:
        return f"KeyPair(public={self.public.hex()})"

    @classmethod
    def fresh(cls) -> KeyPair:
        """Draw a new pair from the operating system's generator."""
        return cls.of(X25519PrivateKey.generate().private_bytes_raw())

    @classmethod
    def of(cls, private: bytes) -> KeyPair:
        """Complete a private key."""
        return cls(private, X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw())


def agreed_key(private: bytes, public: bytes, info: bytes) -> bytes:
    """Derive the key that the owners of two pairs share for one purpose.

    Parameters
    ----------
    private : bytes, length 32
        Of one side.
    public : bytes, length 32
        Of the other side.
    info : bytes
        What the key is for, from `Session.info`.

    Raises
    ------
    ClientError
        If ``public`` is no key: of another length, or one of the few points every exchange with which gives zero.
    """
    try:
        secret = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise ClientError("a public key of the session is not usable; its owner must send a fresh one") from None
    return derived_key(secret, info)


def derived_key(secret: bytes, info: bytes) -> bytes:
    """Derive a key from a secret for one purpose, by HKDF-SHA256 without salt."""
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=info).derive(secret)
