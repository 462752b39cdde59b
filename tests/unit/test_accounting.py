"""What noise costs: reference values, other libraries' accountants, and the laws of adding up."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.special import logsumexp

from common.privacy import accounting
from common.privacy.accounting import HOPELESS, ORDERS, Mechanism, Spending, bounds, curve, total

DELTA = 1e-5

HISTORIES: dict[str, list[tuple[Mechanism, int]]] = {
    "few rows": [(Mechanism(1.0, 0.01), 1000)],
    "all rows": [(Mechanism(2.0, 1.0), 50)],
    "one step": [(Mechanism(1.0, 1.0), 1)],
    "little noise": [(Mechanism(0.8, 0.004), 5000)],
    "much noise": [(Mechanism(20.0, 0.05), 10_000)],
    "two experiments": [(Mechanism(1.387, 0.1), 80), (Mechanism(2.0, 0.05), 40)],
}


def spent(history: Sequence[tuple[Mechanism, int]]) -> Spending:
    return total(Spending.of(mechanism, steps) for mechanism, steps in history)


def by_google(
    accountant: RdpAccountant | PLDAccountant, history: Sequence[tuple[Mechanism, int]], delta: float
) -> float:
    for (noise, rate), steps in history:
        gaussian = dp_accounting.GaussianDpEvent(noise)
        accountant.compose(gaussian if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, gaussian), steps)
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "rdp", "prv"),
    [(1.0, 0.01, 1000, 2.1014, 1.838), (2.0, 1.0, 50, 22.0199, 20.686), (0.8, 0.004, 5000, 2.9252, 2.509)],
)
def test_reference_values(noise: float, rate: float, steps: int, rdp: float, prv: float) -> None:
    found = Spending.of(Mechanism(noise, rate), steps)
    assert found.epsilon(DELTA) == pytest.approx(rdp, abs=6e-5)
    assert found.epsilon(DELTA, "prv") == pytest.approx(prv, abs=6e-4)


def divergence(mechanism: Mechanism, order: float) -> float:
    """Integrate a step's Rényi divergence numerically: E over z ~ N(0, σ²) of (1 - q + q·exp((2z - 1) / 2σ²))^α."""
    noise, rate = mechanism
    z, width = np.linspace(-12 * noise, order + 12 * noise, 200_001, retstep=True)
    ratio = np.logaddexp(np.log1p(-rate), np.log(rate) + (2 * z - 1) / (2 * noise**2))
    density = -(z**2) / (2 * noise**2) - np.log(noise * np.sqrt(2 * np.pi))
    return float((logsumexp(order * ratio + density) + np.log(width)) / (order - 1))


@pytest.mark.parametrize("mechanism", [Mechanism(0.6, 0.3), Mechanism(1.387, 0.1), Mechanism(3.0, 0.7)])
def test_every_order_is_what_integration_finds(mechanism: Mechanism) -> None:
    for number in (0, 5, 37, 90, 98, 99, 120, 152):
        assert curve(mechanism)[number] == pytest.approx(divergence(mechanism, ORDERS[number]), rel=1e-8)


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
@pytest.mark.parametrize("delta", [1e-3, 1e-8])
def test_orders_add_up_as_opacus_and_google_add_them(history: list[tuple[Mechanism, int]], delta: float) -> None:
    """At fractional orders Google's series is an upper bound only; so whole ones are compared."""
    opacus = RDPAccountant()
    opacus.history = [(*mechanism, steps) for mechanism, steps in history]
    assert spent(history).epsilon(delta) == pytest.approx(opacus.get_epsilon(delta, alphas=list(ORDERS)), rel=1e-6)
    whole = [number for number, order in enumerate(ORDERS) if order == int(order)]
    google = by_google(RdpAccountant([ORDERS[number] for number in whole]), history, delta)
    assert bounds(spent(history).rdp, delta)[whole].min() == pytest.approx(google, rel=1e-6)


SLOW = {"all rows", "little noise", "much noise"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in SLOW else []) for name in HISTORIES]
)
def test_the_composed_loss_is_near_googles_and_never_below(name: str) -> None:
    found = spent(HISTORIES[name]).epsilon(DELTA, "prv")
    google = by_google(PLDAccountant(), HISTORIES[name], DELTA)
    assert google - 1e-3 <= found <= google + 0.02
    assert found <= spent(HISTORIES[name]).epsilon(DELTA)


MECHANISMS = st.builds(Mechanism, st.sampled_from([0.7, 1.0, 1.5, 4.0]), st.sampled_from([0.01, 0.05, 1.0]))
PASTS = st.lists(st.tuples(MECHANISMS, st.integers(1, 300)), min_size=1, max_size=5)


@settings(max_examples=25)
@given(PASTS, st.randoms(use_true_random=False), st.integers(0, 299))
def test_neither_order_nor_rounds_matter(history: list[tuple[Mechanism, int]], order: object, part: int) -> None:
    shuffled = list(history)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    mechanism, steps = shuffled.pop()
    parts = [(mechanism, part % steps), (mechanism, steps - part % steps)]
    whole, split = spent(history), spent([*parts, *shuffled])
    assert whole.steps == split.steps
    assert split.epsilon(DELTA) == pytest.approx(whole.epsilon(DELTA), rel=1e-12)


def test_neither_order_nor_rounds_matter_to_the_composed_loss() -> None:
    one, other = Mechanism(1.4, 0.1), Mechanism(2.0, 0.05)
    found = {
        spent(history).epsilon(DELTA, "prv")
        for history in ([(one, 30), (other, 9)], [(other, 9), (one, 30)], [(one, 13), (other, 9), (one, 17)])
    }
    assert len(found) == 1


@settings(max_examples=8)
@given(
    st.floats(0.5, 20), st.floats(1e-4, 0.3), st.integers(1, 2000), st.floats(1e-8, 1e-2),
    st.floats(1.01, 3), st.floats(1.01, 3), st.integers(1, 2000),
)  # fmt: skip
def test_more_steps_more_rows_less_noise_and_a_smaller_delta_cost_more(
    noise: float, rate: float, steps: int, delta: float, quieter: float, more: float, further: int
) -> None:
    cost = Spending.of(Mechanism(noise, rate), steps).epsilon(delta)
    assert Spending.of(Mechanism(noise, rate), steps + further).epsilon(delta) >= cost
    assert Spending.of(Mechanism(noise, rate * more), steps).epsilon(delta) >= cost
    assert Spending.of(Mechanism(noise / quieter, rate), steps).epsilon(delta) >= cost
    assert Spending.of(Mechanism(noise, rate), steps).epsilon(delta / more) >= cost


def test_the_composed_loss_grows_with_every_round() -> None:
    costs = [Spending.of(Mechanism(1.3, 0.1), 8 * rounds).epsilon(DELTA, "prv") for rounds in (1, 2, 10, 11)]
    assert costs == sorted(set(costs))


def test_nothing_trained_costs_nothing() -> None:
    for nothing in (Spending(), Spending.of(Mechanism(1.0, 0.1), 0), total([])):
        assert nothing.epsilon(DELTA) == nothing.epsilon(DELTA, "prv") == 0.0


def test_a_curve_is_kept_and_cannot_be_changed_and_never_negative() -> None:
    assert curve(Mechanism(1.0, 0.1)) is curve(Mechanism(1.0, 0.1))
    with pytest.raises(ValueError, match="read-only"):
        curve(Mechanism(1.0, 0.1))[0] = 0
    assert (curve(Mechanism(81.2, 1.3e-7)) >= 0).all()  # rounding makes Opacus's -3e-16


def test_orders_reach_below_a_tenth() -> None:
    assert Spending.of(Mechanism(1000.0, 0.01), 1).epsilon(DELTA) == pytest.approx(0.0035, abs=1e-4)


# ---- where the composed loss is not asked, or has no answer


@pytest.mark.parametrize(
    ("spending", "delta"),
    [
        (Spending.of(Mechanism(0.3, 1.0), 10), DELTA),
        (Spending.of(Mechanism(1.0, 0.01), 1000), 1e-12),
    ],
    ids=["hopeless", "tiny delta"],
)
def test_without_a_composed_loss_the_orders_hold(
    spending: Spending, delta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At δ = 1e-12 Opacus's composed ε lies below Google's: rounding outweighs the tail."""
    monkeypatch.setattr(accounting, "_from_loss", None)
    assert spending.epsilon(delta, "prv") == spending.epsilon(delta)
    assert spending.epsilon(delta) > HOPELESS or delta < accounting.SMALLEST_DELTA


@pytest.mark.parametrize(
    "outcome", [OverflowError("inf"), ValueError("too small"), RuntimeError("mean"), MemoryError(), math.nan, math.inf]
)
def test_where_composing_fails_the_orders_hold(outcome: Exception | float, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(accountant: PRVAccountant, delta: float, **more: object) -> float:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(PRVAccountant, "get_epsilon", fails)
    accounting._from_loss.cache_clear()
    spending = Spending.of(Mechanism(1.7, 0.03), 77)
    assert spending.epsilon(DELTA, "prv") == spending.epsilon(DELTA)
    accounting._from_loss.cache_clear()


@pytest.mark.long
def test_long_histories_are_composed_more_coarsely_but_stay_bounds() -> None:
    spending = Spending.of(Mechanism(5.0, 0.05), 100_000)
    google = by_google(PLDAccountant(), list(spending.steps.items()), DELTA)
    assert google < spending.epsilon(DELTA, "prv") < google + 0.05 < spending.epsilon(DELTA)


def test_numbers_that_divide_by_zero_are_nobodys_business() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert Spending.of(Mechanism(3.1, 1.0), 3).epsilon(DELTA, "prv") > 0
