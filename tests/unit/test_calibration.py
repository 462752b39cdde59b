"""How much noise a budget needs and how far it reaches: exact to the step, from the safe side."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigurationError
from common.privacy.accounting import ORDERS, Mechanism, Spending
from common.privacy.calibration import NOTHING, affordable_steps, noise_multiplier
from common.privacy.settings import Accountant

DELTA = 1e-5


def needs(noise: float, rate: float, steps: int, spent: Spending = NOTHING, accountant: Accountant = "rdp") -> float:
    return (spent + Spending.of(Mechanism(noise, rate), steps)).epsilon(DELTA, accountant)


@pytest.mark.parametrize(("accountant", "opacus", "width"), [("rdp", 1.3745, 1e-6), ("prv", 1.2915, 1e-3)])
def test_the_noise_is_the_least_that_suffices(accountant: Accountant, opacus: float, width: float) -> None:
    """Opacus leaves up to 0.01 of slack in ε, on the safe side."""
    noise = noise_multiplier(3.0, DELTA, 0.05, 200, accountant=accountant)
    assert (
        needs(noise, 0.05, 200, accountant=accountant)
        <= 3.0
        < needs(noise * (1 - width), 0.05, 200, accountant=accountant)
    )
    assert opacus - 0.01 < noise < opacus


@settings(max_examples=10)
@given(st.floats(0.1, 30), st.floats(1e-4, 0.3), st.integers(1, 5000), st.integers(0, 40))
def test_whatever_the_plan_it_is_kept_and_hardly_anything_is_left(
    epsilon: float, rate: float, steps: int, before: int
) -> None:
    spent = Spending.of(Mechanism(8.0, 0.02), before)
    noise = noise_multiplier(epsilon, DELTA, rate, steps, spent)
    assert needs(noise, rate, steps, spent) <= epsilon
    assert noise <= 1e-3 or needs(noise * (1 - 1e-6), rate, steps, spent) > epsilon


def test_all_rows_in_one_step_has_a_closed_form() -> None:
    """At rate 1 each order α costs α / 2σ²: the least noise by hand, order by order."""
    orders = np.asarray(ORDERS)
    left = 2.0 + (np.log(DELTA) + np.log(orders)) / (orders - 1) - np.log1p(-1 / orders)
    by_hand = np.sqrt(10 * orders[left > 0] / (2 * left[left > 0])).min()
    assert noise_multiplier(2.0, DELTA, 1.0, 10) == pytest.approx(by_hand, rel=1e-8)


def test_a_budget_of_four_for_ten_rounds_of_eight_steps() -> None:
    given_noise = Mechanism(1.387908935546875, 0.1)  # Opacus's, for ε 4
    assert Spending.of(given_noise, 80).epsilon(DELTA) == pytest.approx(3.9956, abs=2e-4)
    assert Spending.of(given_noise, 88).epsilon(DELTA) == pytest.approx(4.177, abs=1e-3)
    assert affordable_steps(4.0, DELTA, given_noise) == 80


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_planned_rounds_are_afforded_and_not_one_step_more(accountant: Accountant) -> None:
    mechanism = Mechanism(noise_multiplier(4.0, DELTA, 0.1, 80, accountant=accountant), 0.1)
    assert affordable_steps(4.0, DELTA, mechanism, accountant=accountant) == 80
    assert affordable_steps(4.0, DELTA, mechanism, Spending.of(mechanism, 80), accountant) == 0


def test_what_was_spent_before_needs_more_noise_now() -> None:
    spent = Spending.of(Mechanism(2.0, 0.05), 100)
    noises = [noise_multiplier(3.0, DELTA, 0.05, 100, before) for before in (Spending(), spent, spent + spent)]
    assert noises == sorted(set(noises))


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_affordable_steps_are_those_of_counting_one_by_one(epsilon: float) -> None:
    mechanism, spent = Mechanism(1.5, 0.05), Spending.of(Mechanism(3.0, 0.02), 60)
    counted = 0
    while (spent + Spending.of(mechanism, counted + 1)).epsilon(DELTA) <= epsilon:
        counted += 1
    assert affordable_steps(epsilon, DELTA, mechanism, spent) == counted
    for most in (0, 1, counted - 1, counted, counted + 1):
        assert affordable_steps(epsilon, DELTA, mechanism, spent, most=most) == max(0, min(most, counted))


def test_a_budget_that_is_overspent_affords_nothing() -> None:
    spent = Spending.of(Mechanism(1.0, 0.1), 200)
    assert affordable_steps(1.0, DELTA, Mechanism(100.0, 0.01), spent) == 0
    assert affordable_steps(1e9, DELTA, Mechanism(100.0, 0.01)) == 1_000_000


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_a_budget_out_of_reach_is_refused_with_the_smallest_that_is_not(accountant: Accountant) -> None:
    with pytest.raises(
        ConfigurationError, match=r"ε = 0\.001 cannot be kept over 50 steps .* within reach is 0\.00"
    ) as told:
        noise_multiplier(0.001, DELTA, 0.1, 50, accountant=accountant)
    assert "spent before" not in str(told.value)
    least = float(str(told.value).split("within reach is ")[1].split(";")[0])
    assert noise_multiplier(least * 1.02, DELTA, 0.1, 50, accountant=accountant) > 100


def test_a_budget_that_is_spent_is_refused_with_what_was_spent() -> None:
    spent = Spending.of(Mechanism(1.0, 0.1), 200)
    words = rf"with ε = {spent.epsilon(DELTA):.4g} spent before: the smallest ε within reach"
    with pytest.raises(ConfigurationError, match=words):
        noise_multiplier(4.0, DELTA, 0.1, 10, spent)
