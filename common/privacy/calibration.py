"""How much noise a budget needs, and how far a budget reaches."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

from opacus.accountants.analysis.rdp import compute_rdp
from scipy.optimize import brentq

from common.errors import ConfigurationError
from common.privacy.accounting import ORDERS, Mechanism, Spending, bounds
from common.privacy.settings import Accountant

LEAST_NOISE, MOST_NOISE = 0.01, 1e3
"""Less noise is none, and with more nothing is learned."""

ALL_BUT = 0.99
"""A budget of which so much is spent is spent: what is left would be trained on noise alone."""

EXACT, COMPOSED = 1e-9, 1e-4
"""Relative widths at which searches for the noise end: by one order, and by the composed loss, which is coarser."""

NOTHING = Spending()


def noise_multiplier(
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    spent: Spending = NOTHING,
    accountant: Accountant = "rdp",
) -> float:
    """Return the least noise with which ``steps`` further steps stay within a budget.

    Parameters
    ----------
    epsilon, delta : float
        The budget, for everything spent and planned.
    sample_rate : float in (0, 1]
        Of a step.
    steps : int >= 1
        Planned.
    spent : Spending
        What counts already.
    accountant : {"rdp", "prv"}
        Decides.

    Returns
    -------
    float
        Noise multiplier, from the safe side of the search.

    Raises
    ------
    ConfigurationError
        If no noise suffices; names the smallest ε that can be reached.
    """

    @cache
    def needs(noise: float) -> float:
        return (spent + Spending.of(Mechanism(noise, sample_rate), steps)).epsilon(delta, accountant)

    before, least = spent.epsilon(delta, accountant), 0.0
    enough = _least_by_orders(epsilon, delta, sample_rate, steps, spent) if before <= ALL_BUT * epsilon else None
    if enough is None and (before > ALL_BUT * epsilon or (least := needs(MOST_NOISE)) > epsilon):
        least = max(least, before)
        already = f" with ε = {before:.4g} spent before" if spent.steps else ""
        advice = "as good as nothing is left of it" if before > epsilon / 2 else "raise epsilon or plan fewer rounds"
        raise ConfigurationError(
            f"a budget of ε = {epsilon:g} cannot be kept over {steps} steps at δ = {delta:g}{already}: "
            f"the smallest ε within reach is {least:.4g}; {advice}"
        )
    if accountant == "rdp" and enough is not None:
        return enough

    def over(noise: float) -> float:
        gap = needs(noise) - epsilon
        return 0.0 if -COMPOSED * epsilon < gap <= 0 else gap

    return _least(over, enough or MOST_NOISE, COMPOSED)


def affordable_steps(
    epsilon: float,
    delta: float,
    mechanism: Mechanism,
    spent: Spending = NOTHING,
    accountant: Accountant = "rdp",
    most: int = 1_000_000,
) -> int:
    """Return how many further steps of a mechanism a budget allows, at most ``most``."""

    @cache
    def fits(steps: int) -> bool:
        return (spent + Spending.of(mechanism, steps)).epsilon(delta, accountant) <= epsilon

    if most < 1 or not fits(0) or not fits(1):
        return 0
    # What the orders allow the composed loss allows, too, and a little more.
    low = 1 if accountant == "rdp" else max(1, affordable_steps(epsilon, delta, mechanism, spent, "rdp", most))
    width = max(1, low // 8)
    while low < most and fits(min(low + width, most)):
        low, width = min(low + width, most), 2 * width
    high = min(low + width, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _least_by_orders(epsilon: float, delta: float, sample_rate: float, steps: int, spent: Spending) -> float | None:
    """Search by Rényi orders, one at a time: what suffices by one suffices, and a better one may then be found.

    It ends where the best order is the one that was searched: there the least over all orders is the budget itself.
    None if no noise suffices.
    """
    known = bounds(spent.rdp, delta)

    @cache
    def over(order: int, noise: float) -> float:
        rdp = compute_rdp(q=sample_rate, noise_multiplier=noise, steps=1, orders=float(ORDERS[order]))
        return float(known[order] + steps * rdp) - epsilon

    noise, order = MOST_NOISE, _best_order(partial(over, noise=MOST_NOISE))
    if over(order, noise) > 0:
        return None
    while True:
        found = _least(partial(over, order), noise, EXACT)
        if found > noise * (1 - 10 * EXACT):
            return noise
        noise, order = found, _best_order(partial(over, noise=found))


def _best_order(bound: Callable[[int], float]) -> int:
    """Return the number of the order of the smallest bound: bounds fall up to there and rise from there on."""
    best = len(ORDERS) // 2
    for step in (64, 32, 16, 8, 4, 2, 1):
        best = min((number for number in (best, best - step, best + step) if 0 <= number < len(ORDERS)), key=bound)
    return best


def _least(over: Callable[[float], float], enough: float, width: float) -> float:
    """Return the least noise at which a falling function is not positive; ``enough`` is one where it is not."""
    factor = 1.25
    while (low := max(enough / factor, LEAST_NOISE)) < enough and over(low) <= 0:
        enough, factor = low, factor**2
    if low >= enough:
        return enough
    root = near = math.exp(brentq(lambda x: over(math.exp(x)), math.log(low), math.log(enough), xtol=width / 4))
    while near < enough and over(near) > 0:
        near, width = root * (1 + width), 2 * width
    return min(near, enough)
