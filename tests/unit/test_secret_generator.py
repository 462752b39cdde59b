"""Generators nobody can repeat: more than the 32 bits that torch takes of a seed, from the operating system."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from common.errors import NotPrivate
from common.privacy import noise
from common.privacy.noise import secret_generator


def draws(generator: torch.Generator, count: int = 8) -> list[float]:
    return torch.randn(count, generator=generator).tolist()


def test_torch_takes_32_bits_of_a_seed() -> None:
    """The reason for all this; should it fail one day, seeds alone would do."""
    one, other = (torch.Generator().manual_seed(12_345 + (high << 32)) for high in (0, 7))
    assert draws(one) == draws(other)


def test_the_seed_alone_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same seed twice, and with every low half of one, the streams are others."""
    real = os.urandom
    monkeypatch.setattr(noise.os, "urandom", lambda count: bytes(8) if count == 8 else real(count))
    one, other = secret_generator("cpu"), secret_generator("cpu")
    assert draws(one) != draws(other)
    assert draws(secret_generator("cpu")) != draws(torch.Generator().manual_seed(0))


def test_every_word_of_the_state_comes_from_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise.os, "urandom", lambda count: bytes(range(256)) * (count // 256) + bytes(count % 256))
    state = secret_generator("cpu").get_state().numpy()[noise.WORDS].copy().view(np.uint64)
    drawn = np.frombuffer(bytes(range(256)) * 9 + bytes(192), np.uint32)
    assert state.tolist() == drawn.tolist()


def test_what_is_drawn_is_normal_and_uniform() -> None:
    generator = secret_generator("cpu")
    assert kstest(torch.randn(20_000, generator=generator).numpy(), "norm").pvalue > 1e-5
    assert kstest(torch.rand(20_000, generator=generator).numpy(), "uniform").pvalue > 1e-5


def test_another_layout_of_the_state_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "WORDS", slice(32, 32 + 624 * 8))
    with pytest.raises(NotPrivate, match="could be guessed"):
        secret_generator("cpu")


def test_a_test_seed_repeats() -> None:
    assert draws(secret_generator("cpu", 1, "noise", 2)) == draws(secret_generator("cpu", 1, "noise", 2))
    assert draws(secret_generator("cpu", 1, "noise", 2)) != draws(secret_generator("cpu", 1, "noise", 3))
