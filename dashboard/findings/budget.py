"""The account of a run's privacy in words and numbers: what was promised, what is spent, how long the rest lasts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from common.store import Run
from common.wording import counted
from dashboard.settings import positive, setting
from dashboard.words import visible

LOOKED_BACK = 20
"""Rounds whose pace is taken for the pace of those to come, at most."""

UNITS = {
    "sample": "one row of a client's data set",
    "client": "all of one client's data",
}


@dataclass(frozen=True)
class Policy:
    """What a run's settings promise; None where they do not say.

    Parameters
    ----------
    mode : str
        ``none``, ``sample`` or ``client``, or whatever the settings hold; empty where they hold nothing.
    epsilon, delta, clipping_norm, noise_multiplier : float or None
        Positive and finite.
    accountant : str
        Name of the method that adds the spending up.
    """

    mode: str = ""
    epsilon: float | None = None
    delta: float | None = None
    clipping_norm: float | None = None
    noise_multiplier: float | None = None
    accountant: str = ""

    @classmethod
    def of(cls, run: Run) -> Self:
        """Read a run's settings."""
        held = setting(run, "privacy")
        if not isinstance(held, dict):
            return cls()
        keys = ("epsilon", "delta", "clipping_norm", "noise_multiplier")
        numbers = {key: positive(held.get(key)) for key in keys}
        return cls(mode=_word(held.get("mode")), accountant=_word(held.get("accountant")), **numbers)

    @property
    def promises(self) -> bool:
        """Tell whether the settings ask for privacy."""
        return self.mode not in ("", "none")


def unit(policy: Policy) -> str:
    """Say in a sentence whom the numbers protect."""
    known = UNITS.get(policy.mode)
    if known is None:
        return "The settings of this run do not say what one unit of its privacy is."
    if policy.mode == "sample":
        return (
            f"What is protected is **{known}**: with or without it, the run would have turned out nearly the same. "
            "Somebody who has several rows, or rows at several clients, is protected less."
        )
    return (
        f"What is protected is **{known}**: with or without it, the run would have turned out nearly the same. "
        "Rows within a client are not counted one by one."
    )


def pace(rounds: Sequence[int], spent: Sequence[float], back: int = LOOKED_BACK) -> tuple[float, int] | None:
    """Return the spending per round over the last rounds, and over how many; None where none can be told."""
    if len(rounds) < 2:
        return None
    first = max(0, len(rounds) - 1 - back)
    width = rounds[-1] - rounds[first]
    grown = spent[-1] - spent[first]
    return (grown / width, width) if width > 0 and grown > 0 else None


def rounds_left(budget: float, spent: float, per_round: float) -> int:
    """Return for how many whole rounds the rest lasts at a pace."""
    left = (budget - spent) / per_round if budget > spent else 0.0
    return int(min(left + 1e-9, 1e9))


def answer(policy: Policy, rounds: Sequence[int], spent: Sequence[float], planned: int, running: bool) -> str:
    """Say in Markdown what is spent and how long the rest lasts, as far as that is known.

    Parameters
    ----------
    policy : Policy
        With the budget.
    rounds, spent : sequence
        Rounds and the largest spending over the clients after each; not empty.
    planned : int
        Rounds the run is to have.
    running : bool
        Whether further rounds are to come.
    """
    now = spent[-1]
    if policy.epsilon is None:
        return f"**The client that spent most is at ε = {now:.3g}.** The settings of this run name no budget."
    budget = policy.epsilon
    said = f"**ε = {now:.3g} of {budget:g} is spent ({now / budget:.0%}).**"
    if now >= budget:
        return f"{said} Nothing is left: a further round would break the promise."
    found = pace(rounds, spent)
    if found is None:
        return said
    left, still = rounds_left(budget, now, found[0]), max(0, planned - rounds[-1])
    lasts = "lasts" if running else "would last"
    over = f"At the pace of the last {counted(found[1], 'round')} the rest {lasts} about {counted(left, 'round')}"
    if running:
        enough = left >= still
        over += f"; the run plans {still} more" if enough else f", but the run plans {still}: it will not reach the end"
    return f"{said} {over}. This extends a straight line; it is no account of rounds that are not run yet."


def odds(epsilon: float) -> str:
    """Say how much more probable an outcome may be with a unit than without."""
    return f"{math.exp(epsilon):,.3g} times" if epsilon <= 20 else "more than a hundred million times"


def _word(value: Any) -> str:
    return visible(value, 40) if isinstance(value, str) else ""
