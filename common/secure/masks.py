"""Masks: streams of uniform 64-bit numbers that cancel in the sum over all clients.

A stream is ChaCha20's key stream (RFC 8439), read as little-endian 64-bit numbers. Nonce and counter begin at zero,
which is sound because every key comes from `common.secure.keys` and serves one stream only; the counter's 32 bits hold
2³² blocks of 64 bytes, so a stream ends after 2³⁵ numbers.

Each pair of clients shares one stream: the client whose name comes first adds it, the other one subtracts it, modulo
2⁶⁴. Each client adds one more stream, its own, so that an upload stays masked even if its pairwise masks become known.

Bonawitz, Ivanov, Kreuter, Marcedone, McMahan, Patel, Ramage, Segal, Seth: Practical Secure Aggregation for
Privacy-Preserving Machine Learning, CCS 2017.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from common.secure.keys import Session, agreed_key, derived_key

Words = NDArray[np.uint64]
"""Numbers modulo 2⁶⁴."""

LONGEST = 2**35
"""Numbers in the longest stream."""

BLOCK = 1 << 15
"""Numbers drawn at a time: 256 KiB stay in the processor's cache."""


def add_stream(total: Words, key: bytes, sign: int = 1) -> None:
    """Add a key's stream to ``total`` in place, or subtract it where ``sign`` is -1.

    Parameters
    ----------
    total : uint64 array, shape (numbers,)
        Contiguous; sums wrap around at 2⁶⁴.
    key : bytes, length 32
        Used for this stream only.
    sign : {1, -1}
        Add or subtract.
    """
    assert len(total) <= LONGEST
    encryptor = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    zeros, stream = bytes(8 * min(BLOCK, len(total))), bytearray(8 * min(BLOCK, len(total)))
    words = np.frombuffer(stream, dtype="<u8")
    change = np.add if sign > 0 else np.subtract
    for start in range(0, len(total), BLOCK):
        part = total[start : start + BLOCK]
        encryptor.update_into(memoryview(zeros)[: 8 * len(part)], stream)
        change(part, words[: len(part)], out=part)


def add_pairwise(total: Words, session: Session, name: str, private: bytes, others: Mapping[str, bytes]) -> None:
    """Add the masks one client shares with others to ``total`` in place.

    Parameters
    ----------
    total : uint64 array
        The client's numbers.
    session : Session
        The masks' session.
    name, private : str, bytes
        The client, and its private mask key.
    others : mapping of str to bytes
        Public mask keys of the clients to share a mask with, by name.
    """
    for other, public in sorted(others.items()):
        key = agreed_key(private, public, session.info("mask", *sorted((name, other))))
        add_stream(total, key, 1 if name < other else -1)


def add_own(total: Words, session: Session, name: str, seed: bytes, sign: int = 1) -> None:
    """Add one client's own mask to ``total`` in place, or take it away where ``sign`` is -1."""
    add_stream(total, derived_key(seed, session.info("own", name)), sign)


def remove_masks(
    total: Words,
    session: Session,
    seeds: Mapping[str, bytes],
    dropped: Mapping[str, bytes],
    publics: Mapping[str, bytes],
) -> None:
    """Take from the sum of some clients' masked numbers, in place, every mask that has not cancelled.

    Parameters
    ----------
    total : uint64 array
        ``Σ`` of what the clients sent.
    session : Session
        The masks' session.
    seeds : mapping of str to bytes
        Of the own masks of exactly the clients in the sum, by name.
    dropped : mapping of str to bytes
        Private mask keys of the clients the others share a mask with, but who are not in the sum.
    publics : mapping of str to bytes
        Public mask keys of the clients in the sum, at least.

    Notes
    -----
    The pairwise masks of a client that is missing are added in its place, which cancels the others' halves.
    """
    for name, seed in sorted(seeds.items()):
        add_own(total, session, name, seed, -1)
    partners = {name: publics[name] for name in seeds}
    for name, private in sorted(dropped.items()):
        add_pairwise(total, session, name, private, partners)
