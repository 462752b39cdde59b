"""Seeds derived by hash, so that a run needs no random state to be saved."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Derive an independent seed for one purpose.

    Parameters
    ----------
    seed : int
        The run's seed.
    *purpose : str or int
        What the seed is for, from general to special: ``"batches", round, client``.

    Returns
    -------
    int
        In [0, 2**63), equal on every machine and Python version.
    """
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def chance(probability: float, seed: int, *purpose: str | int) -> bool:
    """Draw once, with this probability, for one purpose; the same arguments always give the same answer."""
    return derive_seed(seed, *purpose) < probability * 2**63
