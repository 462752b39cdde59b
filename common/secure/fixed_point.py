"""Weighted numbers as 64-bit integers, so that masked sums are exact and wrap around without harm.

``⌊n · x · 2³²⌉`` modulo 2⁶⁴, in two's complement. A number is rounded once, by at most 2⁻³³; sums of integers are
exact in any order. Of one client's numbers ``|n · x|`` may reach 2³⁰ / clients, so no sum over the clients overflows:
one bit is the sign's, one is spare.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from common.errors import ClientError
from common.secure.masks import Words

FRACTION_BITS = 32
WORD_BYTES = 8


def resolution(clients: int) -> float:
    """Return the largest rounding error of a sum over so many clients: half a unit of each."""
    return clients * 2.0 ** -(FRACTION_BITS + 1)


def largest(clients: int) -> float:
    """Return how large ``|n · x|`` may be, so that a sum over so many clients stays below 2³⁰."""
    return 2.0 ** (62 - FRACTION_BITS) / clients


def encode(numbers: NDArray[np.floating], weight: float, clients: int) -> Words:
    """Encode ``weight · numbers`` with the weight itself as one more number at the end.

    Parameters
    ----------
    numbers : float array, shape (numbers,)
        fp32 or fp64; the product is formed in fp64.
    weight : float
        Examples trained on; positive.
    clients : int
        Clients the sum may hold.

    Returns
    -------
    uint64 array, shape (numbers + 1,)

    Raises
    ------
    ClientError
        If a number is not finite or too large for the sum.
    """
    weighted = np.empty(len(numbers) + 1)
    with np.errstate(over="ignore", invalid="ignore"):  # seen below
        np.multiply(numbers, weight, out=weighted[:-1], dtype=np.float64)
    weighted[-1] = weight
    reached = float(np.abs(weighted).max())
    if not math.isfinite(reached):
        raise ClientError("the update has NaN or infinity; it cannot be summed securely")
    if reached >= largest(clients):
        raise ClientError(
            f"the update times its examples reaches {reached:.4g}; a secure sum of {clients} clients holds "
            f'{largest(clients):.4g}: lower training.learning_rate or choose federation.weighting = "equal"'
        )
    weighted *= 2.0**FRACTION_BITS
    words: Words = np.rint(weighted, out=weighted).astype(np.int64).view(np.uint64)
    return words


def decode(total: Words) -> tuple[NDArray[np.float64], float]:
    """Decode a sum of what `encode` gave: ``Σ n x`` and ``Σ n``."""
    numbers = total.view(np.int64).astype(np.float64)
    numbers *= 2.0**-FRACTION_BITS
    return numbers[:-1], float(numbers[-1])
