"""Shamir's secret sharing: any ``threshold`` shares give the secret, fewer tell nothing about it.

The secret is the value at 0 of a random polynomial of degree ``threshold`` - 1 over the integers modulo the prime
2⁵²¹ - 1; share x is its value at x. Shamir: How to share a secret, CACM 22 (11), 1979.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import NamedTuple

from common.errors import ClientError
from common.secure.keys import KEY_BYTES

PRIME = 2**521 - 1
"""A Mersenne prime, above every secret; its surplus bits betray shares that do not belong together."""

VALUE_BYTES = 66
"""Length of a share's value as bytes."""


class Share(NamedTuple):
    """A polynomial's value ``y``, in [0, 2⁵²¹ - 1), at ``x``, from 1."""

    x: int
    y: int


def split(secret: bytes, count: int, threshold: int) -> list[Share]:
    """Split a secret of 32 bytes into ``count`` shares, for x = 1 to ``count``.

    Parameters
    ----------
    secret : bytes, length 32
        What is shared.
    count : int, at least ``threshold``
        Number of shares.
    threshold : int, at least 1
        Shares needed to get the secret back.
    """
    assert len(secret) == KEY_BYTES
    assert 1 <= threshold <= count < PRIME
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [Share(x, _value(coefficients, x)) for x in range(1, count + 1)]


def join(shares: Sequence[Share], threshold: int) -> bytes:
    """Get the secret back, by Lagrange's interpolation at 0.

    Raises
    ------
    ClientError
        If there are fewer than ``threshold`` shares, two for one x, one out of range, or they are not of one secret.
    """
    points = {share.x for share in shares}
    if len(points) < len(shares):
        raise ClientError("two shares of a secret are for the same client; expected one of each")
    if len(shares) < threshold:
        raise ClientError(f"{len(shares)} shares of a secret, {threshold} are needed")
    if any(not 0 < share.x < PRIME or not 0 <= share.y < PRIME for share in shares):
        raise ClientError("a share of a secret is out of range; its client must be left out")
    chosen = sorted(shares)[:threshold]
    secret = sum(share.y * _weight(share.x, [other.x for other in chosen]) for share in chosen) % PRIME
    if secret >= 1 << (8 * KEY_BYTES):
        raise ClientError("the shares are not of one secret; a client sent a wrong one")
    return secret.to_bytes(KEY_BYTES, "big")


def _value(coefficients: Sequence[int], x: int) -> int:
    """Evaluate by Horner's rule."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value


def _weight(x: int, points: Sequence[int]) -> int:
    """Return Lagrange's weight of the value at ``x``, for the value at 0."""
    above = below = 1
    for other in points:
        if other != x:
            above = above * other % PRIME
            below = below * (other - x) % PRIME
    return above * pow(below, -1, PRIME) % PRIME
