"""Secure aggregation: what the server computes for one sum of 16 clients' 8 MB adapters, without and with dropouts."""

from __future__ import annotations

import secrets
import time

import numpy as np
from reporting import report

from common.messages import PublicKeys, SecureSession, UnmaskAnswer
from common.secure.fixed_point import decode, encode
from common.secure.keys import KEY_BYTES, KeyPair, Session
from common.secure.masks import Words, add_own, add_pairwise
from common.secure.shamir import split
from common.secure.upload import masked_parcel, masked_words, threshold
from server.secure.recovery import lift_masks

NUMBERS = 2_000_000
CLIENTS = 16
DROPOUTS = (0, 3)
GOAL_S = 5.0


def main() -> None:
    """Measure what the server does between the last upload and the mean, and what a client does to mask."""
    names = [f"client-{number:02d}" for number in range(CLIENTS)]
    session = Session("bench", 1, secrets.token_hex(KEY_BYTES))
    pairs, seeds = {name: KeyPair.fresh() for name in names}, {name: secrets.token_bytes(KEY_BYTES) for name in names}
    publics = {name: pair.public for name, pair in pairs.items()}
    rng = np.random.default_rng(0)
    plain = [encode(rng.normal(size=NUMBERS).astype(np.float32), 100.0 + n, CLIENTS) for n in range(CLIENTS)]
    started = time.perf_counter()
    parcels = []
    for name, words in zip(names, plain, strict=True):
        masked = words.copy()
        add_own(masked, session, name, seeds[name])
        others = {other: key for other, key in publics.items() if other != name}
        add_pairwise(masked, session, name, pairs[name].private, others)
        parcels.append(masked_parcel(masked))
    masking = (time.perf_counter() - started) / CLIENTS
    needed = threshold(2 / 3, 3, CLIENTS)
    keys = {name: PublicKeys(cipher=key.hex(), mask=key.hex()) for name, key in publics.items()}
    shares = {
        name: (split(pairs[name].private, CLIENTS, needed), split(seeds[name], CLIENTS, needed)) for name in names
    }
    rows = []
    for gone in DROPOUTS:
        stayed = names[: CLIENTS - gone]
        answers = {name: _answer(names.index(name), stayed, shares, session) for name in stayed}
        started = time.perf_counter()
        total: Words = np.zeros(NUMBERS + 1, np.uint64)
        for parcel in parcels[: len(stayed)]:
            total += masked_words({"update": parcel}, NUMBERS + 1)
        lift_masks(total, session, answers, keys, needed)
        exact = np.array_equal(total, sum(plain[1 : len(stayed)], plain[0]))
        numbers, weight = decode(total)
        numbers /= weight
        spent = time.perf_counter() - started
        rows.append([gone, f"{spent:.2f}", "yes" if spent <= GOAL_S else "NO", "yes" if exact else "NO"])
    report(
        "secure",
        "Secure aggregation",
        f"Seconds of the server from {CLIENTS} masked uploads of {NUMBERS:,} numbers (8 MB as fp32, "
        f"{8 * (NUMBERS + 1) / 1e6:.0f} MB masked) to their mean: hashes checked, summed, secrets recovered, "
        f"masks lifted. Masking takes a client {masking:.2f} s.",
        ["dropouts after sharing", "seconds", f"at most {GOAL_S:g} s", "equals the plain sum bit for bit"],
        rows,
    )


def _answer(place: int, stayed: list[str], shares: dict, session: Session) -> UnmaskAnswer:  # type: ignore[type-arg]
    header = SecureSession(run=session.run, round=session.round, attempt=1, id=session.id)
    return UnmaskAnswer(
        session=header,
        client=stayed[place],
        seeds={name: f"{seed[place].y:x}" for name, (_, seed) in shares.items() if name in stayed},
        mask_keys={name: f"{key[place].y:x}" for name, (key, _) in shares.items() if name not in stayed},
    )


if __name__ == "__main__":
    main()
