"""Keys, masks, shares and fixed point against published vectors, slow definitions and chance."""

from __future__ import annotations

import hashlib
import hmac
import math
from itertools import combinations

import numpy as np
import pytest

from common.errors import ClientError
from common.secure.fixed_point import decode, encode, largest, resolution
from common.secure.keys import KeyPair, Session, agreed_key, derived_key
from common.secure.masks import BLOCK, Words, add_own, add_pairwise, add_stream, remove_masks
from common.secure.sealed_shares import SEALED_BYTES, SecretShares, seal, unseal
from common.secure.shamir import PRIME, Share, join, split

SESSION = Session("run", 3, "5e55")
NAMES = ("ada", "ben", "cyd", "dot", "eve")


def looks_uniform(data: bytes) -> bool:
    """Compare the bytes' counts with equal chances: chi-square within seven standard deviations of its mean."""
    counts, expected = np.bincount(np.frombuffer(data, np.uint8), minlength=256), len(data) / 256
    return abs(float(((counts - expected) ** 2 / expected).sum()) - 255) < 7 * math.sqrt(2 * 255)


def fresh_pairs() -> dict[str, KeyPair]:
    return {name: KeyPair.fresh() for name in NAMES}


# Keys


def test_x25519_follows_rfc_7748() -> None:
    # Section 6.1: both key pairs and the secret they agree on.
    alice = KeyPair.of(bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"))
    bob = KeyPair.of(bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"))
    assert alice.public.hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert bob.public.hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    secret = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    for mine, theirs in ((alice, bob), (bob, alice)):
        assert agreed_key(mine.private, theirs.public, b"for this") == derived_key(secret, b"for this")


def test_derived_keys_follow_rfc_5869() -> None:
    # Section 2, with a salt of zeros and one block of output: HMAC(HMAC(salt, secret), info ‖ 1).
    secret, info = bytes(range(32)), SESSION.info("mask", "ada", "ben")
    inner = hmac.digest(bytes(32), secret, hashlib.sha256)
    assert derived_key(secret, info) == hmac.digest(inner, info + b"\x01", hashlib.sha256)


def test_no_two_purposes_share_a_key() -> None:
    sessions = (SESSION, Session("run", 3, "5e56"), Session("run", 4, "5e55"), Session("other", 3, "5e55"))
    uses = [
        ("mask", "ada", "ben"),
        ("share", "ada", "ben"),
        ("share", "ben", "ada"),
        ("own", "ada"),
        ("own", "ada,ben"),
    ]
    infos = [session.info(*use) for session in sessions for use in uses]
    assert len({derived_key(bytes(32), info) for info in infos}) == len(infos)


@pytest.mark.parametrize("public", [bytes(32), b"short", b"\x01" + bytes(31)])
def test_unusable_public_keys_are_refused(public: bytes) -> None:
    with pytest.raises(ClientError, match="public key"):
        agreed_key(KeyPair.fresh().private, public, b"")


def test_a_key_pair_does_not_show_its_private_key() -> None:
    pair = KeyPair.fresh()
    assert pair.private.hex() not in repr(pair)
    assert repr(pair.private) not in repr(pair)


# Masks


def test_the_stream_follows_rfc_8439() -> None:
    # Appendix A.1, vectors 1 and 2: key, nonce zero; counters 0 and 1.
    expected = bytes.fromhex(
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )
    total = np.zeros(16, np.uint64)
    add_stream(total, bytes(32))
    assert total.astype("<u8").tobytes() == expected
    add_stream(total, bytes(32), -1)
    assert not total.any()


def test_long_streams_go_on_where_short_ones_end() -> None:
    whole, part = np.zeros(2 * BLOCK + 5, np.uint64), np.zeros(BLOCK + 3, np.uint64)
    key = bytes(range(32))
    add_stream(whole, key)
    add_stream(part, key)
    assert np.array_equal(whole[: len(part)], part)
    assert len(np.unique(whole)) == len(whole)
    assert looks_uniform(whole.tobytes())


def test_pairwise_masks_cancel_exactly() -> None:
    pairs, total = fresh_pairs(), np.arange(100, dtype=np.uint64)
    for name, pair in pairs.items():
        masked = np.zeros(100, np.uint64)
        add_pairwise(masked, SESSION, name, pair.private, {n: p.public for n, p in pairs.items() if n != name})
        assert np.count_nonzero(masked) == 100
        total += masked
    assert np.array_equal(total, np.arange(100, dtype=np.uint64))


def mask(numbers: Words, name: str, pairs: dict[str, KeyPair], seed: bytes) -> Words:
    masked = numbers.copy()
    add_own(masked, SESSION, name, seed)
    add_pairwise(masked, SESSION, name, pairs[name].private, {n: p.public for n, p in pairs.items() if n != name})
    return masked


@pytest.mark.parametrize("gone", [(), ("ada",), ("cyd", "eve"), ("ada", "ben", "dot")])
def test_without_some_clients_the_sum_of_the_others_comes_out_bit_for_bit(gone: tuple[str, ...]) -> None:
    pairs, seeds = fresh_pairs(), {name: bytes([number]) * 32 for number, name in enumerate(NAMES)}
    plain = {name: np.random.default_rng(n).integers(0, 2**64, 50, np.uint64) for n, name in enumerate(NAMES)}
    stayed = [name for name in NAMES if name not in gone]
    total = sum((mask(plain[name], name, pairs, seeds[name]) for name in stayed), np.zeros(50, np.uint64))
    remove_masks(
        total,
        SESSION,
        {name: seeds[name] for name in stayed},
        {name: pairs[name].private for name in gone},
        {name: pair.public for name, pair in pairs.items()},
    )
    assert np.array_equal(total, sum((plain[name] for name in stayed), np.zeros(50, np.uint64)))


def test_masked_numbers_look_uniform_and_say_nothing_of_the_plain_ones() -> None:
    pairs = fresh_pairs()
    plain = encode(np.full(20_000, 0.5), 7.0, 5)
    masked = mask(plain, "ada", pairs, bytes(32))
    assert looks_uniform(masked.tobytes())
    assert not looks_uniform(plain.tobytes())
    assert abs(np.corrcoef(masked.astype(float)[:-1], np.arange(20_000))[0, 1]) < 5 / math.sqrt(20_000)


def test_without_its_own_mask_or_one_pairwise_mask_an_upload_stays_hidden() -> None:
    pairs = fresh_pairs()
    total = mask(encode(np.zeros(5_000), 7.0, 5), "ada", pairs, bytes(32))
    for other in NAMES[1:-1]:  # everybody colludes but eve
        key = agreed_key(pairs[other].private, pairs["ada"].public, SESSION.info("mask", "ada", other))
        add_stream(total, key, -1)
    add_own(total, SESSION, "ada", bytes(32), -1)
    assert looks_uniform(total.tobytes())


# Shares


@pytest.mark.parametrize(("count", "threshold"), [(1, 1), (3, 2), (5, 4), (5, 5)])
def test_any_threshold_shares_give_the_secret(count: int, threshold: int) -> None:
    secret = bytes(range(1, 33))
    shares = split(secret, count, threshold)
    for chosen in combinations(shares, threshold):
        assert join(chosen, threshold) == secret
    assert join(shares[::-1], threshold) == secret


def test_one_share_too_few_fits_every_secret_equally_well() -> None:
    known = split(b"\x07" * 32, 5, 3)[:2]
    for other in (bytes(32), b"\xff" * 32):
        # the line of degree 2 through two shares and (0, other), continued to x = 3
        (x1, y1), (x2, y2), zero = known[0], known[1], int.from_bytes(other, "big")
        third = (zero - 3 * y1 + 3 * y2) % PRIME  # third difference of a quadratic is zero
        assert (x1, x2) == (1, 2)
        assert join([*known, Share(3, third)], 3) == other


def test_shares_look_uniform_whatever_the_secret() -> None:
    for secret in (bytes(32), b"\xff" * 32):
        low = bytes(share.y & 0xFF for _ in range(400) for share in split(secret, 20, 11)[:10])
        assert looks_uniform(low)


def test_shares_that_cannot_be_joined_are_refused() -> None:
    shares = split(bytes(32), 4, 3)
    for wrong, words in (
        (shares[:2], "2 shares of a secret, 3 are needed"),
        ([*shares[:2], shares[0]], "two shares"),
        ([*shares[:2], Share(0, 1)], "out of range"),
        ([*shares[:2], Share(3, PRIME)], "out of range"),
        ([*shares[:2], split(bytes(32), 4, 3)[2]], "not of one secret"),
    ):
        with pytest.raises(ClientError, match=words):
            join(wrong, 3)


def test_two_splits_of_one_secret_have_nothing_in_common() -> None:
    assert {share.y for share in split(bytes(32), 5, 3)}.isdisjoint(share.y for share in split(bytes(32), 5, 3))


# Sealed shares


def sealed_for_ben() -> tuple[bytes, KeyPair, KeyPair]:
    ada, ben = KeyPair.fresh(), KeyPair.fresh()
    return seal(SecretShares(5, PRIME - 1), SESSION, "ada", "ben", ada.private, ben.public), ada, ben


def test_only_the_receiver_opens_a_share() -> None:
    sealed, ada, ben = sealed_for_ben()
    assert len(sealed) == SEALED_BYTES
    assert unseal(sealed, SESSION, "ada", "ben", ben.private, ada.public) == SecretShares(5, PRIME - 1)
    eve = KeyPair.fresh()
    for session, sender, receiver, key in (
        (SESSION, "ada", "ben", eve.private),
        (SESSION, "ben", "ada", ben.private),
        (SESSION, "ada", "eve", ben.private),
        (Session("run", 3, "another"), "ada", "ben", ben.private),
        (Session("run", 4, "5e55"), "ada", "ben", ben.private),
    ):
        with pytest.raises(ClientError, match="cannot be opened"):
            unseal(sealed, session, sender, receiver, key, ada.public)


@pytest.mark.parametrize("place", [0, 20, SEALED_BYTES - 1])
def test_damaged_shares_are_refused(place: int) -> None:
    sealed, ada, ben = sealed_for_ben()
    damaged = bytes(byte ^ (number == place) for number, byte in enumerate(sealed))
    for wrong in (damaged, sealed[:-1], b""):
        with pytest.raises(ClientError, match="cannot be opened"):
            unseal(wrong, SESSION, "ada", "ben", ben.private, ada.public)


def test_shares_out_of_range_are_refused() -> None:
    ada, ben = KeyPair.fresh(), KeyPair.fresh()
    sealed = seal(SecretShares(0, PRIME), SESSION, "ada", "ben", ada.private, ben.public)
    with pytest.raises(ClientError, match="out of range"):
        unseal(sealed, SESSION, "ada", "ben", ben.private, ada.public)


# Fixed point


def test_encoding_is_twos_complement_with_32_fraction_bits() -> None:
    words = encode(np.array([1.0, -1.0, 0.25, 2.0**-33, 3 * 2.0**-33]), 2.0, 2)
    assert words.tolist() == [2**33, 2**64 - 2**33, 2**31, 1, 3, 2**33]
    assert encode(np.array([2.0**-33, 1.5 * 2.0**-32]), 1.0, 2).tolist() == [0, 2, 2**32]  # halves go to even


def test_a_sum_is_exact_and_order_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    updates = [(rng.normal(size=40).astype(np.float32), float(weight)) for weight in (3, 1000, 17, 1)]
    parts = [encode(numbers, weight, 4) for numbers, weight in updates]
    total = sum(parts, np.zeros(41, np.uint64))
    assert np.array_equal(total, sum(parts[::-1], np.zeros(41, np.uint64)))
    numbers, weight = decode(total)
    exact = sum(np.float64(weight) * numbers.astype(np.float64) for numbers, weight in updates)
    assert weight == 1021
    assert np.abs(numbers - exact).max() <= resolution(4)


@pytest.mark.parametrize("clients", [2, 3, 16, 1000, 5000])
def test_the_largest_numbers_of_all_clients_do_not_overflow(clients: int) -> None:
    most = np.nextafter(largest(clients), 0)
    for sign in (1, -1):
        words = encode(np.array([sign * most]), 1.0, clients)
        total = sum((words for _ in range(clients)), np.zeros(2, np.uint64))
        assert decode(total)[0][0] == pytest.approx(sign * most * clients, rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_numbers_that_no_sum_holds_are_refused(value: float) -> None:
    with pytest.raises(ClientError):
        encode(np.array([0.0, value]), 1e10, 3)


def test_too_large_numbers_name_the_remedy() -> None:
    with pytest.raises(ClientError, match=r'lower training\.learning_rate or choose federation\.weighting = "equal"'):
        encode(np.array([largest(3)]), 1.0, 3)
