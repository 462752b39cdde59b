"""Laws that every robust rule must keep, on random cohorts."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.adapter import Adapter
from common.federation import ClientUpdate
from common.lowrank import LowRank
from strategies.gram import gram_of_changes, squared_distances
from strategies.robust import ROBUST
from strategies.robust.geometric_median import median_weights
from strategies.weights import capped_weights
from tests.reference import cohorts

SPEC = cohorts.model_spec()
SEEDS = st.integers(0, 10_000)
COUNTS = st.integers(1, 8)
RULES = [name for name in ROBUST.names() if name != "none"]
ON_PRODUCTS = [name for name in RULES if not ROBUST.plugin(name).needs_linear]


def cohort(count: int, seed: int, equal: bool = True) -> tuple[list[ClientUpdate], dict[str, Adapter]]:
    """Clients a small way from a common start, or each of its own rank from its own."""
    ranks = [3] * count if equal else [1 + (seed + i) % 5 for i in range(count)]
    steps = cohorts.cohort(SPEC, ranks, seed)
    starts = [cohorts.cohort(SPEC, [rank], seed + 1)[0].adapter for rank in ranks]
    updates = [
        replace(step, adapter=step.adapter.with_flat(start.flat + 0.3 * step.adapter.flat))
        for step, start in zip(steps, starts, strict=True)
    ]
    return updates, {update.client: start for update, start in zip(updates, starts, strict=True)}


def regauged(adapter: Adapter, generator: torch.Generator) -> Adapter:
    """Rewrite every layer as ``(b G) (G⁻¹ a)``, which changes no product."""
    layers = {}
    for layer, part in adapter.layers.items():
        assert isinstance(part, LowRank)
        q, _ = torch.linalg.qr(torch.randn(part.rank, part.rank, generator=generator, dtype=torch.float64))
        gain = torch.rand(part.rank, generator=generator, dtype=torch.float64) + 0.5
        layers[layer] = LowRank(part.b @ (q * gain), (q / gain).T @ part.a)
    return Adapter.pack(layers, adapter.extras, adapter.method)


@given(COUNTS, SEEDS)
@pytest.mark.parametrize("rule", ON_PRODUCTS)
def test_how_an_update_is_factored_does_not_matter(rule: str, count: int, seed: int) -> None:
    updates, starts = cohort(count, seed, equal=False)
    generator = torch.Generator().manual_seed(seed)
    rewritten = [replace(update, adapter=regauged(update.adapter, generator)) for update in updates]
    torch.testing.assert_close(gram_of_changes(rewritten, starts), gram_of_changes(updates, starts))
    if rule == "norm_bounding":
        return  # shortens along the client's own factors: only who is shortened is the same
    one, other = (ROBUST.create(rule).judge(each, starts).trust for each in (updates, rewritten))
    assert other == pytest.approx(one, rel=1e-6, abs=1e-6)


@given(st.sampled_from([1, 4, 5, 8]), SEEDS, st.randoms(use_true_random=False))
@pytest.mark.parametrize("rule", RULES)
def test_who_a_client_is_does_not_matter(rule: str, count: int, seed: int, shuffle: random.Random) -> None:
    """But for ties: of two nearest neighbours that look at nobody else, the first one is krum's."""
    updates, starts = cohort(count, seed)
    names = [update.client for update in updates]
    shuffle.shuffle(names)
    renamed = sorted(
        (replace(update, client=name) for update, name in zip(updates, names, strict=True)), key=lambda u: u.client
    )
    known = dict(zip(names, (starts[update.client] for update in updates), strict=True))
    one = ROBUST.create(rule).judge(updates, starts)
    other = ROBUST.create(rule).judge(renamed, known)
    for update, name in zip(updates, names, strict=True):
        assert other.trust[name] == pytest.approx(one.trust[update.client], abs=1e-3)
    assert sorted(each.adapter.flat.sum().item() for each in other.updates) == pytest.approx(
        sorted(each.adapter.flat.sum().item() for each in one.updates), abs=1e-3
    )


@given(st.integers(3, 8), SEEDS, st.floats(10, 1e6), st.booleans())
@pytest.mark.parametrize("rule", RULES)
def test_liars_far_away_do_not_carry_the_merge_off(
    rule: str, count: int, seed: int, distance: float, together: bool
) -> None:
    """As many liars as the rule stands, all on one side or each on its own: the mean stays among the honest."""
    liars = max(0, (count - 3) // 2) if "krum" in rule else count // 4 if rule == "trimmed_mean" else (count - 1) // 2
    updates, starts = cohort(count, seed)
    base = updates[0].adapter.flat
    for i in range(count):
        noise = cohorts.cohort(SPEC, [3], seed + 2 + i)[0].adapter.flat
        flat = starts[updates[i].client].flat + 0.1 * noise
        if i < liars:
            flat = base + distance * (1 if together else (-1) ** i) * torch.ones_like(flat)
        updates[i] = replace(updates[i], adapter=updates[i].adapter.with_flat(flat), num_examples=1.0)
    judgement = ROBUST.create(rule).judge(updates, starts)
    weights = [each.num_examples for each in judgement.updates]
    flats = [each.adapter.flat for each in judgement.updates]
    mean = sum(w * flat for w, flat in zip(weights, flats, strict=True)) / sum(weights)
    honest = torch.stack([update.adapter.flat for update in updates[liars:]])
    radius = float((honest - honest.mean(0)).norm(dim=1).max())
    assert float((mean - honest.mean(0)).norm()) <= 8 * radius
    if "krum" in rule:
        assert all(judgement.trust[update.client] == 0 for update in updates[:liars])


@given(COUNTS, SEEDS)
@pytest.mark.parametrize("rule", RULES)
def test_where_all_agree_nothing_changes(rule: str, count: int, seed: int) -> None:
    updates, starts = cohort(1, seed)
    one = updates[0]
    copies = [replace(one, client=f"c{i}", num_examples=1.0 + i) for i in range(count)]
    judgement = ROBUST.create(rule).judge(copies, {copy.client: starts[one.client] for copy in copies})
    assert all(torch.equal(each.adapter.flat, one.adapter.flat) for each in judgement.updates)
    total = math.fsum(each.num_examples for each in copies)
    if "krum" not in rule:
        assert math.fsum(each.num_examples for each in judgement.updates) == pytest.approx(total)
        assert set(judgement.trust.values()) == {1.0}


@given(COUNTS, SEEDS, st.floats(0.01, 10))
def test_no_change_is_longer_than_the_bound(count: int, seed: int, bound: float) -> None:
    updates, starts = cohort(count, seed, equal=False)
    judged = ROBUST.create("norm_bounding", {"bound": bound}).judge(updates, starts).updates
    norms = gram_of_changes(judged, starts).diagonal().sqrt()
    assert float(norms.max()) <= bound * (1 + 1e-6)


@given(st.integers(3, 8), st.integers(1, 4), SEEDS)
def test_the_geometric_median_has_the_least_sum_of_distances(count: int, dimensions: int, seed: int) -> None:
    points = torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = median_weights(torch.cdist(points, points).square(), 2000, 1e-13) @ points

    def cost(point: torch.Tensor) -> float:
        return float((points - point).norm(dim=1).sum())

    near = [found + 1e-2 * step for step in torch.cat([torch.eye(dimensions), -torch.eye(dimensions)]).double()]
    assert cost(found) <= min(map(cost, [*near, *points])) + 1e-4


@given(COUNTS, SEEDS)
def test_distances_are_those_of_the_products(count: int, seed: int) -> None:
    updates, starts = cohort(count, seed, equal=False)
    squares = squared_distances(gram_of_changes(updates, starts))
    assert torch.equal(squares, squares.T)
    assert not squares.diagonal().any()
    assert bool((squares >= 0).all())


@given(st.lists(st.floats(1e-3, 1e7), min_size=1, max_size=12), st.floats(0.05, 1))
def test_capped_weights_keep_sum_order_and_cap(weights: Sequence[float], share: float) -> None:
    named = {f"c{i}": weight for i, weight in enumerate(weights)}
    capped = capped_weights(named, share)
    total = math.fsum(weights)
    assert math.fsum(capped.values()) == pytest.approx(total)
    assert max(capped.values()) <= max(share, 1 / len(weights)) * total * (1 + 1e-9)
    ordered = sorted(named, key=named.__getitem__)
    assert all(capped[x] <= capped[y] * (1 + 1e-9) for x, y in pairwise(ordered))
    assert capped_weights(capped, share) == pytest.approx(capped)
