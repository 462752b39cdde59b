"""One entry of a ledger: what it says, and the hash that binds it to the one before."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal

import numpy as np

from common.privacy.accounting import ORDERS, Curve, Mechanism, curve
from common.privacy.settings import Accountant

Kind = Literal["plan", "reserve", "done"]

FIRST = "0" * 64
"""What the first entry is bound to."""

_ORDERS = hashlib.sha256(np.asarray(ORDERS, dtype="<f8").tobytes()).digest()[:8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of the ledger.

    Parameters
    ----------
    sequence : int
        1, 2, 3 …; the order of entries, whatever the clock said.
    moment : int
        Microseconds since the epoch, never before the entry before.
    kind : {"plan", "reserve", "done"}
        What a run will need, the steps of one round that count from now on, and that their answer was kept.
    client, run : str
        Who trains, and for which run.
    round, attempt : int
        Of the order.
    label, fingerprint : str
        Name of the data set, and hashes of its records.
    noise_multiplier, sample_rate, clipping_norm : float
        The mechanism of one step.
    steps : int
        Of one round.
    rounds : int
        Planned for the whole run; 0 where ε alone ends it.
    delta, epsilon : float
        What the experiment asks for.
    accountant : {"rdp", "prv"}
        Decides.
    budget_epsilon, budget_delta : float or None
        The owner's own limit at that time.
    spent : float
        ε of the run, this entry included, as it was decided on.
    test_seed : int or None
        With which noise was drawn from a seed: not private.
    settles : int or None
        Sequence of the reservation that is done.
    curve : bytes
        Rényi divergence of one step at each order; empty where ``settles`` names the entry that has it.
    previous, digest : str
        Hash of the entry before, and of this one.
    """

    sequence: int = 0
    moment: int = 0
    kind: Kind
    client: str
    run: str
    round: int
    attempt: int
    label: str
    fingerprint: str
    noise_multiplier: float
    sample_rate: float
    clipping_norm: float
    steps: int
    rounds: int
    delta: float
    epsilon: float
    accountant: Accountant
    budget_epsilon: float | None
    budget_delta: float | None
    spent: float
    test_seed: int | None
    settles: int | None = None
    curve: bytes
    previous: str = FIRST
    digest: str = ""

    @property
    def mechanism(self) -> Mechanism:
        """The mechanism of one step."""
        return Mechanism(self.noise_multiplier, self.sample_rate)


_SAID = sorted({field.name for field in fields(Entry)} - {"digest"})


def digest_of(entry: Entry) -> str:
    """Hash everything an entry says, the hash of the one before included, but its own."""
    text = json.dumps({name: getattr(entry, name) for name in _SAID}, separators=(",", ":"), default=_told)
    return hashlib.sha256(text.encode()).hexdigest()


def _told(value: object) -> dict[str, str]:
    """Write bytes so that no text is mistaken for them."""
    assert isinstance(value, bytes)
    return {"sha256": hashlib.sha256(value).hexdigest()}


def curve_bytes(values: Curve) -> bytes:
    """Write the Rényi curve of one step; which orders it is for stands before it."""
    return _ORDERS + values.astype("<f8").tobytes()


@lru_cache(maxsize=4096)
def stored_curve(mechanism: Mechanism, written: bytes) -> Curve:
    """Read what :func:`curve_bytes` wrote; computed anew where another version wrote it for other orders."""
    if written[:8] != _ORDERS or len(written) != 8 + 8 * len(ORDERS):
        return curve(mechanism)
    values: Curve = np.frombuffer(written, dtype="<f8", offset=8).astype(np.float64)
    values.setflags(write=False)
    return values
