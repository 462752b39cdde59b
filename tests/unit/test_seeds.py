"""Seeds derived by hash."""

from __future__ import annotations

import hashlib

import torch

from common.seeds import chance, derive_seed


def test_seeds_are_what_they_were() -> None:
    """Stored runs resume by these numbers: 63 bits of SHA-256 of the parts, joined by the unit separator."""
    assert derive_seed(0) == int(hashlib.sha256(b"0").hexdigest()[:16], 16) // 2
    assert derive_seed(1, "a", "q") == int(hashlib.sha256(b"1\x1fa\x1fq").hexdigest()[:16], 16) // 2
    assert derive_seed(1, "a", "q") == 530169561836677748  # sha256sum, by hand


def test_seeds_differ_by_every_part_and_its_place() -> None:
    purposes: list[tuple[str | int, ...]] = [
        (),
        ("a",),
        ("a", 1),
        ("a", 2),
        (1, "a"),
        ("a1",),
        ("a", 1, "b"),
        ("a", "1b"),
    ]
    seeds = [derive_seed(seed, *purpose) for seed in (0, 1, -1) for purpose in purposes]
    assert len(set(seeds)) == len(seeds)


def test_seeds_fit_torch() -> None:
    seeds = [derive_seed(7, "client", i) for i in range(1000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))


def test_chance_is_repeatable_and_as_likely_as_asked() -> None:
    drawn = [chance(0.3, 7, "dropout", number, "ada") for number in range(5000)]
    assert drawn == [chance(0.3, 7, "dropout", number, "ada") for number in range(5000)]
    assert abs(sum(drawn) / len(drawn) - 0.3) < 0.02
    assert not any(chance(0.0, 7, number) for number in range(100))
    assert all(chance(1.0, 7, number) for number in range(100))
