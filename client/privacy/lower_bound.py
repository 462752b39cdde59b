"""How much privacy was lost at least, judged from outside: two lower bounds on ε from canaries' scores.

Half the canaries took part by fair coins. Whoever can tell them from the others by their scores better than an ε allows
has shown that ε to be too small.

- By guesses (Steinke, Nasr, Jagielski, Privacy Auditing with One (1) Training Run, NeurIPS 2023, arXiv 2305.08846,
  theorem 5.2): nothing is assumed of the scores' distribution.
- By a Gaussian: the scores are taken to be normal, as they are where each step adds normal noise; a Gaussian mechanism
  whose means lie μ standard deviations apart has an ε in closed form (Balle, Wang, ICML 2018, arXiv 1805.06530,
  theorem 8; Dong, Roth, Su, arXiv 1905.02383). Sharper.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, log_ndtr
from scipy.stats import binom, norm

Scores = NDArray[np.float64]

SHARES = (0.01, 0.02, 0.05, 0.1, 0.16, 0.25)
"""Shares of the canaries guessed on either side; each that is tried is paid for in confidence."""

LARGEST = 1e6
"""Stands for any larger ε: without noise it is infinite."""


def epsilon_by_gaussian(included: Scores, excluded: Scores, delta: float, risk: float) -> float:
    """Return a lower bound on ε, taking scores to be normal.

    Parameters
    ----------
    included, excluded : ndarray
        Scores of the canaries that took part, and of those that did not.
    delta : float in (0, 1)
        At which ε is meant.
    risk : float in (0, 1)
        Probability that the bound is too high.
    """
    gap, spread = float(included.mean() - excluded.mean()), pooled_std(included, excluded)
    if gap <= 0:
        return 0.0
    return lower_epsilon(gap / max(spread, gap / LARGEST), len(included), len(excluded), delta, risk)


def lower_epsilon(apart: float, included: float, excluded: float, delta: float, risk: float) -> float:
    """Return the lower bound that follows from means found ``apart`` standard deviations apart in samples so large."""
    least = apart - float(norm.isf(risk)) * standard_error(apart, included, excluded)
    return min(LARGEST, gaussian_epsilon(least, delta))


def standard_error(apart: float, included: float, excluded: float) -> float:
    """Return how uncertain a standardised difference of means is (Hedges and Olkin, 1985, chapter 5)."""
    return math.sqrt(1 / included + 1 / excluded + apart**2 / (2 * (included + excluded)))


def epsilon_by_guesses(included: Scores, excluded: Scores, delta: float, risk: float) -> float:
    """Return a lower bound on ε from guesses alone: the highest scores took part, the lowest did not.

    Parameters as for :func:`epsilon_by_gaussian`.
    """
    scores = np.concatenate([included, excluded])
    truth = np.concatenate([np.ones(len(included)), np.zeros(len(excluded))])
    # Equal scores are told apart by nothing: their order must not be that of the truth.
    order = np.lexsort((np.random.default_rng().random(len(scores)), scores))
    ranked, canaries, found = truth[order], len(scores), 0.0
    for share in SHARES:
        if not (guesses := int(share * canaries)):
            continue
        right = int((1 - ranked[:guesses]).sum() + ranked[-guesses:].sum())
        found = max(found, _refuted(2 * guesses, right, canaries, delta, risk / len(SHARES)))
    return found


def gaussian_epsilon(apart: float, delta: float) -> float:
    """Return the ε at ``delta`` of a Gaussian mechanism whose means lie ``apart`` standard deviations apart."""

    def excess(epsilon: float) -> float:
        left = float(np.exp(log_ndtr(apart / 2 - epsilon / apart)))
        return left - float(np.exp(epsilon + log_ndtr(-apart / 2 - epsilon / apart))) - delta

    if apart <= 0 or excess(0.0) <= 0:
        return 0.0
    return float(brentq(excess, 0.0, apart**2 / 2 + apart * float(norm.isf(delta)) + 1))


def pooled_std(included: Scores, excluded: Scores) -> float:
    """Return the standard deviation within both groups."""
    squares = included.var() * len(included) + excluded.var() * len(excluded)
    return math.sqrt(squares / (len(included) + len(excluded) - 2))


def _refuted(guesses: int, right: int, canaries: int, delta: float, risk: float) -> float:
    """Return the largest ε under which so many right guesses would be less likely than ``risk``."""

    def too_likely(epsilon: float) -> float:
        return likelihood(guesses, right, canaries, epsilon, delta) - risk

    if too_likely(0.0) > 0:
        return 0.0
    return float(brentq(too_likely, 0.0, 50.0, xtol=1e-6))  # no guesses refute more: each may be right with 1 - e⁻⁵⁰


def likelihood(guesses: int, right: int, canaries: int, epsilon: float, delta: float) -> float:
    """Return a bound on the probability of at least ``right`` right ones of ``guesses`` under (ε, δ)."""
    tail = binom.sf(np.arange(-1, guesses), guesses, expit(epsilon))  # P[correct >= 0], P[>= 1], ...
    fewer = tail[right::-1][1:] - tail[right]  # P[right > correct >= right - i] for i = 1, 2, ...
    worst = float((fewer / np.arange(1, len(fewer) + 1)).max()) if len(fewer) else 0.0
    return float(min(1.0, tail[right] + 2 * canaries * delta * worst))
