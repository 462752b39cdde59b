"""Laws of secure aggregation's parts: what is split, sealed, masked and encoded comes back."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.secure.fixed_point import decode, encode, largest, resolution
from common.secure.keys import KEY_BYTES, KeyPair, Session
from common.secure.masks import add_own, add_pairwise, remove_masks
from common.secure.sealed_shares import SecretShares, seal, unseal
from common.secure.shamir import PRIME, join, split

NAMES = st.text(min_size=1, max_size=8)
VALUES = st.integers(0, PRIME - 1)


@given(st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES), st.integers(1, 8), st.data())
def test_enough_shares_give_the_secret(secret: bytes, count: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, count))
    shares = data.draw(st.permutations(split(secret, count, threshold)))
    assert join(shares[: data.draw(st.integers(threshold, count))], threshold) == secret


@given(VALUES, VALUES, NAMES, NAMES, st.integers(0), st.text())
def test_sealed_shares_open(mask_key: int, seed: int, sender: str, receiver: str, number: int, run: str) -> None:
    session, mine, theirs = Session(run, number, "id"), KeyPair.fresh(), KeyPair.fresh()
    shares = SecretShares(mask_key, seed)
    sealed = seal(shares, session, sender, receiver, mine.private, theirs.public)
    assert unseal(sealed, session, sender, receiver, theirs.private, mine.public) == shares


@given(st.text(), st.text(), st.lists(st.text(), max_size=3), st.lists(st.text(), max_size=3))
def test_infos_are_equal_only_for_equal_names(a: str, b: str, ours: list[str], theirs: list[str]) -> None:
    left, right = Session(a, 1, "x").info("share", *ours), Session(b, 1, "x").info("share", *theirs)
    assert (left == right) == ((a, ours) == (b, theirs))


CLIENTS = 4
BOUND = float(np.float32(largest(CLIENTS) / 128))


def filled(value: float) -> np.ndarray:
    return np.full(6, value, np.float32)


CANCELLING = [(filled(BOUND), 100), (filled(1e-9), 77), (filled(0.1), 99), (filled(-BOUND), 100)]


@example(CANCELLING, set())
@example(CANCELLING, {3})
@given(
    st.lists(
        st.tuples(
            hnp.arrays(np.float32, 6, elements=st.floats(-BOUND, BOUND, width=32)),
            st.integers(1, 100),
        ),
        min_size=CLIENTS,
        max_size=CLIENTS,
    ),
    st.sets(st.integers(0, CLIENTS - 1), max_size=CLIENTS - 1),
)
def test_masked_sums_are_the_plain_ones(updates: list[tuple[np.ndarray, int]], gone: set[int]) -> None:
    session, names = Session("run", 1, "id"), [f"client-{number}" for number in range(CLIENTS)]
    pairs = {name: KeyPair.fresh() for name in names}
    publics = {name: pair.public for name, pair in pairs.items()}
    total, plain, stayed = np.zeros(7, np.uint64), np.zeros(7, np.uint64), {}
    for number, (numbers, weight) in enumerate(updates):
        if number in gone:
            continue
        name, words = names[number], encode(numbers, weight, CLIENTS)
        plain += words
        add_own(words, session, name, bytes([number]) * 32)
        add_pairwise(words, session, name, pairs[name].private, {n: k for n, k in publics.items() if n != name})
        total += words
        stayed[name] = bytes([number]) * 32
    remove_masks(total, session, stayed, {names[n]: pairs[names[n]].private for n in gone}, publics)
    assert np.array_equal(total, plain)
    numbers, weight = decode(total)
    counted = [update for number, update in enumerate(updates) if number not in gone]
    assert weight == sum(weight for _, weight in counted)
    # Products are exact in fp64 and fsum rounds once: a running sum would lose small terms where large ones cancel.
    exact = np.array([math.fsum(float(x[at]) * weight for x, weight in counted) for at in range(6)])
    assert np.all(np.abs(numbers - exact) <= resolution(CLIENTS) + np.spacing(np.abs(exact)))
