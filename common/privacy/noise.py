"""Randomness that nobody can repeat: seeded from the operating system, never logged and never stored.

Only a run that is marked not private (``privacy.test_seed``) draws from a seed of its own.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from common.errors import NotPrivate
from common.seeds import derive_seed

WORDS = slice(24, 24 + 624 * 8)
"""Where the words of the Mersenne Twister lie in a CPU generator's state, 32 bits in 64 each."""

DRAWS = 4
"""Independent Gaussians added up per number: fewer bits of floating point tell what lies below the noise
(Holohan, Braghin, Secure Random Sampling in Differential Privacy, ESORICS 2021, arXiv 2107.10138, section 5.1)."""


def secret_generator(device: torch.device | str, test_seed: int | None = None, *purpose: str | int) -> torch.Generator:
    """Return a generator seeded from the operating system; with ``test_seed``, from that and the purpose."""
    if test_seed is not None:
        return torch.Generator(device).manual_seed(derive_seed(test_seed, *purpose))
    seed = int.from_bytes(os.urandom(8), "little")
    generator = torch.Generator(device).manual_seed(seed)
    if generator.device.type == "cpu":
        generator.set_state(_drawn_state(generator.get_state(), seed))
    return generator


def _drawn_state(seeded: Tensor, seed: int) -> Tensor:
    """Draw all words of a CPU generator's state: of a seed it takes 32 bits, few enough to try them one by one."""
    state = seeded.numpy().copy()
    words = state[WORDS].view(np.uint64)
    if int(words[0]) != seed & 0xFFFFFFFF:
        raise NotPrivate("this version of torch keeps its generator's state another way; its noise could be guessed")
    words[:] = np.frombuffer(os.urandom(4 * len(words)), np.uint32)
    return torch.from_numpy(state)


def gaussian(like: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Draw noise of standard deviation ``std`` in the shape of ``like``, fp32, as Opacus's secure mode does."""
    shape, device = like.shape, like.device
    torch.normal(0.0, std, (1,), generator=generator, device=device)  # the first draw is thrown away
    share = std / DRAWS**0.5
    total = torch.normal(0.0, share, shape, generator=generator, device=device)
    for _ in range(DRAWS - 1):
        total += torch.normal(0.0, share, shape, generator=generator, device=device)
    return total
