"""The account of a run's privacy in words and numbers: what was promised, what is spent, how long the rest lasts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from common.store import Run
from common.wording import counted
from dashboard.settings import positive, setting
from dashboard.words import plain, visible

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
    seeded : bool
        Whether noise comes from a seed of the experiment: then nothing is private.
    """

    mode: str = ""
    epsilon: float | None = None
    delta: float | None = None
    clipping_norm: float | None = None
    noise_multiplier: float | None = None
    accountant: str = ""
    seeded: bool = False

    @classmethod
    def of(cls, run: Run) -> Self:
        """Read a run's settings."""
        held = setting(run, "privacy")
        if not isinstance(held, dict):
            return cls()
        keys = ("epsilon", "delta", "clipping_norm", "noise_multiplier")
        numbers = {key: positive(held.get(key)) for key in keys}
        mode, accountant = _word(held.get("mode")), _word(held.get("accountant"))
        return cls(mode=mode, accountant=accountant, seeded=held.get("test_seed") is not None, **numbers)

    @property
    def promises(self) -> bool:
        """Tell whether the settings ask for privacy."""
        return self.mode not in ("", "none")

    @property
    def may_end_early(self) -> bool:
        """Tell whether the budget may be spent before the planned rounds: noise worked out for them lasts that long."""
        return self.noise_multiplier is not None or not self.promises

    @property
    def repeats(self) -> bool:
        """Tell whether the same settings give the same numbers: noise from the operating system does not."""
        return self.seeded or not self.promises


def unit(policy: Policy, row: str = "") -> str:
    """Say in Markdown whom the numbers protect; ``row`` is what the run itself says of it, of a stranger's making."""
    known = UNITS.get(policy.mode)
    if known is None:
        return "The settings of this run do not say what one unit of its privacy is."
    if policy.mode == "sample":
        what = f" (here a row is {plain(row)})" if row else ""
        return (
            f"What is protected is **{known}**{what}: with or without it, the run would have turned out nearly the "
            "same. Somebody who has several rows, or rows at several clients, is protected less."
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


NOT_PRIVATE = (
    "**This run is not private:** its noise was drawn from a seed (`privacy.test_seed`) that anybody can repeat. What "
    "follows is what it would have spent."
)


def answer(
    policy: Policy,
    rounds: Sequence[int],
    spent: Sequence[float],
    planned: int,
    running: bool,
    left: int | None = None,
) -> str:
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
    left : int, optional
        Rounds left by the clients' own accounts; without it a straight line is extended.
    """
    now = spent[-1]
    if policy.epsilon is None:
        return f"**The client that spent most is at ε = {now:.3g}.** The settings of this run name no budget."
    budget = policy.epsilon
    said = f"**ε = {now:.3g} of {budget:g} is spent ({now / budget:.0%}).**"
    if left == 0 or (left is None and now >= budget):
        return f"{said} Nothing is left: a further round would break the promise."
    if left is not None:
        return f"{said} {_accounted(left, max(0, planned - rounds[-1]), running)}"
    found = pace(rounds, spent)
    if found is None:
        return said
    reach, still = rounds_left(budget, now, found[0]), max(0, planned - rounds[-1])
    lasts = "lasts" if running else "would last"
    over = f"At the pace of the last {counted(found[1], 'round')} the rest {lasts} about {counted(reach, 'round')}"
    if running:
        over += _beside_plan(reach, still)
    return f"{said} {over}. This extends a straight line; it is no account of rounds that are not run yet."


def _accounted(left: int, still: int, running: bool) -> str:
    """Say how long the rest lasts by the clients' accounts."""
    lasts = "lasts" if running else "would have lasted"
    over = f"By the clients' own accounts the rest {lasts} {counted(left, 'round')}"
    return f"{over}{_beside_plan(left, still) if running else ''}."


def _beside_plan(reach: int, still: int) -> str:
    more = f"; the run plans {still} more"
    return more if reach >= still else f", but the run plans {still}: it will not reach the end"


def odds(epsilon: float) -> str:
    """Say how much more probable an outcome may be with a unit than without."""
    if epsilon > 20:
        return "more than a hundred million times"
    factor = math.exp(epsilon)
    return f"{factor:,.0f} times" if factor >= 100 else f"{factor:.3g} times"


def _word(value: Any) -> str:
    return visible(value, 40) if isinstance(value, str) else ""
