"""What every operation on factors must keep, compared with dense matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigurationError
from common.lowrank import Dense, LowRank, add, inner, kept_rank, resolution, stack
from tests.reference import cohorts, dense

SIZES = st.integers(1, 24)
RANKS = st.integers(0, 30)
SEEDS = st.integers(0, 10_000)
DTYPES = st.sampled_from([torch.float16, torch.float32, torch.float64])


@st.composite
def updates(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> LowRank:
    """Any shape, any rank: also none, and above both dimensions."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    return cohorts.low_rank(draw(SIZES), draw(SIZES), draw(RANKS), generator, dtype)


def matrix(update: LowRank) -> dense.Matrix:
    return dense.product(cohorts.numpy(update.b), cohorts.numpy(update.a))


@given(updates())
def test_the_matrix_is_the_sum_of_its_slots(update: LowRank) -> None:
    assert dense.distance(update.dense().numpy(), matrix(update)) < 1e-13
    assert update.norm() == pytest.approx(np.linalg.norm(matrix(update)), rel=1e-6, abs=1e-12)
    assert update.shape == matrix(update).shape


@given(updates())
def test_the_svd_is_one(update: LowRank) -> None:
    u, s, vh = update.svd()
    assert dense.distance(((u * s) @ vh).numpy(), matrix(update)) < 1e-12
    eye = torch.eye(len(s), dtype=torch.float64)
    torch.testing.assert_close(u.T @ u, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(vh @ vh.T, eye, rtol=0, atol=1e-12)
    assert bool((s[:-1] >= s[1:]).all())


@given(updates())
def test_truncating_without_a_bound_keeps_the_sum(update: LowRank) -> None:
    kept, discarded = update.truncate()
    assert dense.distance(matrix(kept), matrix(update)) < 1e-12
    assert kept.rank == np.linalg.matrix_rank(matrix(update))
    assert discarded < 1e-24
    torch.testing.assert_close(kept.b.norm(dim=0), kept.a.norm(dim=1))


@given(st.sampled_from(["graded", "unbalanced", "cancelling", "repeated"]), SEEDS)
def test_badly_conditioned_factors_lose_no_more_than_float32_rounds(kind: str, seed: int) -> None:
    """Factors over 8 decades, slots of length 1e±12, parts that cancel to 1e-4, parts that are twice there."""
    generator = torch.Generator().manual_seed(seed)
    part, other = (cohorts.low_rank(30, 24, 5, generator, torch.float64) for _ in range(2))
    gain = torch.logspace(0, -8, 5, dtype=torch.float64)
    update = {
        "graded": LowRank(torch.linalg.qr(part.b).Q * gain @ other.b[:5], other.a * gain[:, None]),
        "unbalanced": cohorts.scaled_slots(part, gain.flip(0) ** 3 * 1e12),
        "cancelling": stack([part, LowRank(-part.b, part.a + 1e-4 * other.a)]),
        "repeated": stack([part, part]),
    }[kind]
    narrow = LowRank(update.b.float(), update.a.float())
    kept, _ = narrow.truncate()
    assert kept.rank <= 5
    assert dense.distance(matrix(kept), matrix(narrow)) < 2e-7
    torch.testing.assert_close(kept.b.norm(dim=0), kept.a.norm(dim=1))
    unit = kept.b.double() / kept.b.double().norm(dim=0)
    torch.testing.assert_close(unit.T @ unit, torch.eye(kept.rank, dtype=torch.float64), rtol=0, atol=1e-6)


@given(updates(), st.integers(0, 8))
def test_the_error_of_a_truncation_is_the_tail_of_the_singular_values(update: LowRank, rank: int) -> None:
    kept, discarded = update.truncate(rank=rank)
    lost = dense.tail(matrix(update), rank)
    whole = float(np.sum(matrix(update) ** 2))
    assert kept.rank <= rank
    assert np.sum((matrix(kept) - matrix(update)) ** 2) == pytest.approx(lost, rel=1e-8, abs=1e-18 * (1 + whole))
    assert discarded * whole == pytest.approx(lost, rel=1e-8, abs=1e-18 * (1 + whole))


@given(updates(), st.floats(0.01, 0.999))
def test_an_energy_bound_keeps_the_fewest_values(update: LowRank, energy: float) -> None:
    kept, discarded = update.truncate(energy=energy)
    assert kept.rank == dense.energy_rank(matrix(update), energy)
    assert discarded <= 1 - energy + 1e-12


@given(SIZES, SIZES, st.integers(0, 12), SEEDS, DTYPES)
def test_truncating_widens_to_float32_and_never_narrows(
    out: int, inn: int, rank: int, seed: int, dtype: torch.dtype
) -> None:
    update = cohorts.low_rank(out, inn, rank, torch.Generator().manual_seed(seed), dtype)
    kept, _ = update.truncate()
    assert kept.b.dtype == kept.a.dtype == torch.promote_types(dtype, torch.float32)
    assert dense.distance(matrix(kept), matrix(update)) < (1e-12 if dtype == torch.float64 else 2e-6)


@given(SIZES, SIZES, st.lists(st.tuples(st.integers(0, 6), st.floats(0.01, 9)), min_size=1, max_size=5), SEEDS)
def test_stacking_is_the_weighted_sum(out: int, inn: int, parts: list[tuple[int, float]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    held = [cohorts.low_rank(out, inn, rank, generator, torch.float64) for rank, _ in parts]
    weights = [weight for _, weight in parts]
    stacked = stack(held, weights)
    assert stacked.rank == sum(rank for rank, _ in parts)
    wanted = dense.average([(cohorts.numpy(p.b), cohorts.numpy(p.a)) for p in held], weights, 1.0)
    assert dense.distance(matrix(stacked), wanted) < 1e-12
    assert torch.equal(stacked.a, torch.cat([part.a for part in held]))


@given(updates(), st.booleans(), st.booleans(), SEEDS)
def test_sums_and_inner_products_of_any_two_forms(x: LowRank, x_dense: bool, y_dense: bool, seed: int) -> None:
    y = cohorts.low_rank(*x.shape, 3, torch.Generator().manual_seed(seed), torch.float64)
    one, other = Dense(x.dense()) if x_dense else x, Dense(y.dense()) if y_dense else y
    both = matrix(x) + matrix(y)
    assert dense.distance(add(one, other).dense().numpy(), both) < 1e-12
    assert isinstance(add(one, other), Dense) == (x_dense or y_dense)
    wanted = float(np.sum(matrix(x) * matrix(y)))
    size = 1e-10 * (1 + x.norm() * y.norm())
    assert inner(one, other) == pytest.approx(wanted, abs=size)
    assert inner(other, one) == pytest.approx(wanted, abs=size)


@given(updates(), st.floats(-4, 4))
def test_scaling_is_in_b(update: LowRank, factor: float) -> None:
    assert torch.equal(update.scaled(factor).a, update.a)
    assert dense.distance(matrix(update.scaled(factor)), factor * matrix(update)) < 1e-12
    scaled = Dense(update.dense()).scaled(factor)
    assert scaled.norm() == pytest.approx(abs(factor) * update.norm(), abs=1e-6)
    assert scaled.shape == update.shape


def test_zero_has_no_singular_vectors() -> None:
    kept, discarded = LowRank(torch.zeros(5, 2), torch.randn(2, 4)).truncate()
    assert (kept.rank, kept.shape, discarded) == (0, (5, 4), 0.0)


def test_rounding_is_dropped_and_small_signals_are_kept() -> None:
    spectrum = torch.tensor([1.0, 1e-5, 1e-8], dtype=torch.float64)
    assert kept_rank(spectrum, None, None, resolution(torch.float32, (10, 10))) == 2
    assert kept_rank(spectrum, None, None, resolution(torch.float64, (10, 10))) == 3
    assert kept_rank(spectrum, 1, None, 0.0) == 1
    assert kept_rank(spectrum, None, 0.5, 0.0) == 1
    assert kept_rank(torch.zeros(3), None, None, 0.0) == 0
    assert resolution(torch.float64, (4096, 4096)) < 1e-12


def test_high_rank_factors_cost_no_more_than_the_matrix() -> None:
    """Rank above both dimensions: the decomposition is of the matrix, and as exact."""
    update = cohorts.low_rank(5, 7, 40, torch.Generator().manual_seed(1), torch.float64)
    assert len(update.svd().s) == 5
    assert update.svd().s[0] == pytest.approx(np.linalg.svd(matrix(update), compute_uv=False)[0])
    assert math.isclose(update.norm(), float(update.svd().s.norm()))


@pytest.mark.parametrize(
    ("b", "a"),
    [
        pytest.param((4, 2), (3, 5), id="ranks differ"),
        pytest.param((4,), (4, 5), id="vector"),
        pytest.param((4, 2, 1), (2, 5), id="three dimensions"),
    ],
)
def test_factors_that_do_not_fit_are_refused(b: tuple[int, ...], a: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match=r"do not form b \(out, r\) @ a \(r, in\)"):
        LowRank(torch.zeros(b), torch.zeros(a))


@given(updates())
def test_a_matrix_can_be_factored_again(update: LowRank) -> None:
    factored = Dense(update.dense()).low_rank()
    assert dense.distance(matrix(factored), matrix(update)) < 1e-12
    assert factored.rank == np.linalg.matrix_rank(matrix(update))
