"""Lower bounds on ε: against other libraries, exact sums, and mechanisms whose ε is known."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import dp_accounting
import numpy as np
import pytest
from scipy.special import expit

from client.privacy.lower_bound import (
    epsilon_by_gaussian,
    epsilon_by_guesses,
    gaussian_epsilon,
    likelihood,
)

DELTA = 1e-5


@pytest.mark.parametrize("apart", [0.05, 0.3, 1.0, 2.5, 10.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-8])
def test_a_gaussian_costs_what_googles_closed_form_says(apart: float, delta: float) -> None:
    assert gaussian_epsilon(apart, delta) == pytest.approx(
        dp_accounting.get_epsilon_gaussian(1 / apart, delta), abs=1e-6
    )


def test_nothing_apart_costs_nothing() -> None:
    assert gaussian_epsilon(0.0, DELTA) == gaussian_epsilon(-1.0, DELTA) == 0.0
    same = np.arange(100.0)
    assert epsilon_by_gaussian(same, same + 0.1, DELTA, 0.05) == 0.0


def test_without_noise_the_bound_is_as_large_as_any() -> None:
    assert epsilon_by_gaussian(np.ones(50), np.zeros(50), DELTA, 0.05) == 1e6


def test_the_gaussian_bound_is_too_high_as_often_as_its_risk() -> None:
    """1,000 draws; a binomial count of risk 0.05 is between 30 and 72 but for 4 in 1,000 seeds, and this is one."""
    numbers, true = np.random.default_rng(5), gaussian_epsilon(1.0, DELTA)
    found = [
        epsilon_by_gaussian(numbers.normal(1, 1, 300), numbers.normal(0, 1, 300), DELTA, 0.05) for _ in range(1000)
    ]
    assert 30 <= sum(bound > true for bound in found) <= 72
    assert np.mean(found) > 0.75 * true


def exact_likelihood(guesses: int, right: int, canaries: int, epsilon: float, delta: float) -> float:
    """Add up the theorem's sums in rational numbers."""
    sure = Fraction(float(expit(epsilon)))
    chances = [comb(guesses, k) * sure**k * (1 - sure) ** (guesses - k) for k in range(guesses + 1)]
    worst = max((sum(chances[right - i : right]) / i for i in range(1, right + 1)), default=Fraction(0))
    return float(min(1, sum(chances[right:]) + 2 * canaries * Fraction(delta) * worst))


@pytest.mark.parametrize(("guesses", "right"), [(1, 0), (1, 1), (20, 13), (40, 40), (40, 0)])
@pytest.mark.parametrize("epsilon", [0.0, 0.7, 4.0])
def test_the_likelihood_of_guesses_is_the_theorems(guesses: int, right: int, epsilon: float) -> None:
    expected = exact_likelihood(guesses, right, 100, epsilon, 1e-3)
    assert likelihood(guesses, right, 100, epsilon, 1e-3) == pytest.approx(expected, rel=1e-9)


def randomised_response(epsilon: float, canaries: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tell of each canary whether it took part, truly with a probability of exactly what ε allows."""
    numbers = np.random.default_rng(seed)
    truth = numbers.random(canaries) < 0.5
    told = np.where(numbers.random(canaries) < expit(epsilon), truth, ~truth) + numbers.random(canaries) / 2
    return told[truth], told[~truth]


def test_guesses_come_near_an_epsilon_that_is_used_up_and_not_above_it() -> None:
    found = [epsilon_by_guesses(*randomised_response(2.0, 10_000, seed), 0.0, 0.05) for seed in range(12)]
    assert sum(bound > 2 for bound in found) <= 3  # 0.6 expected; 4 or more in 2 of 1,000 draws
    assert np.mean(found) > 1.7


def test_scores_that_are_all_equal_tell_nothing() -> None:
    assert epsilon_by_guesses(np.zeros(500), np.zeros(500), DELTA, 0.05) < 1
    assert epsilon_by_guesses(np.ones(500), np.zeros(500), DELTA, 0.05) > 3


def test_a_delta_makes_guesses_prove_less() -> None:
    scores = randomised_response(2.0, 10_000, 1)
    bounds = [epsilon_by_guesses(*scores, delta, 0.05) for delta in (0.0, 1e-6, 1e-4)]
    assert bounds[0] >= bounds[1] > bounds[2]
