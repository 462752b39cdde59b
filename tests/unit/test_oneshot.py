"""One-shot merges of a layer against dense numpy arithmetic, the golden vectors and PEFT's own combinations."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.errors import ConfigurationError
from common.lowrank import LowRank
from strategies.oneshot import ONESHOT
from tests.reference import cohorts, dense

VECTORS = Path(__file__).parents[1] / "vectors"
WEIGHTS = [0.5, 2.0, 1.25]
NAMES = ONESHOT.names()
SHAPE = (12, 9)


def parts(ranks: Sequence[int] = (2, 4, 3), seed: int = 0, dtype: torch.dtype = torch.float64) -> list[LowRank]:
    generator = torch.Generator().manual_seed(seed)
    return [cohorts.low_rank(*SHAPE, rank, generator, dtype) for rank in ranks]


def merged(
    name: str, given: Sequence[LowRank], weights: Sequence[float] = WEIGHTS, seed: int = 1, **options: Any
) -> dense.Matrix:
    update = ONESHOT.create(name, options).merge(given, weights, seed)
    return cohorts.numpy(update.dense())


def matrix(part: LowRank) -> dense.Matrix:
    return dense.product(cohorts.numpy(part.b), cohorts.numpy(part.a))


def exact(given: Sequence[LowRank], weights: Sequence[float] = WEIGHTS) -> dense.Matrix:
    return dense.average([(cohorts.numpy(p.b), cohorts.numpy(p.a)) for p in given], weights, 1.0)


def cut(whole: dense.Matrix, rank: int) -> dense.Matrix:
    u, s, vh = np.linalg.svd(whole, full_matrices=False)
    best: dense.Matrix = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return best


def test_the_family_is_complete() -> None:
    assert {"average", "dare", "lora_lego", "stack", "svd", "ties"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is(name: str) -> None:
    plugin = ONESHOT.plugin(name)
    assert plugin.__doc__
    assert "arXiv" in (sys.modules[plugin.__module__].__doc__ or "") or name == "svd"
    for option, field in plugin.model_fields.items():
        assert field.description, option
        assert not field.is_required(), option


@pytest.mark.parametrize("weights", [[1 / 3] * 3, WEIGHTS])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("ties", "dare")])
def test_identical_adapters_come_out_as_themselves_times_the_weights(name: str, weights: list[float]) -> None:
    """No √w√w, no division by N twice; ties and dare leave out entries even of a single adapter."""
    part = parts([3])[0]
    assert dense.distance(merged(name, [part] * 3, weights), sum(weights) * matrix(part)) < 1e-12


@pytest.mark.parametrize("ranks", [(2, 4, 3), (4, 4, 4), (1, 1, 1)])
def test_stacking_is_the_exact_sum(ranks: tuple[int, ...]) -> None:
    given = parts(ranks)
    update = ONESHOT.create("stack").merge(given, WEIGHTS, 0)
    assert dense.distance(cohorts.numpy(update.dense()), exact(given)) < 1e-12
    assert update.rank == min(sum(ranks), *SHAPE)


@pytest.mark.parametrize("rank", [1, 3, 5, 9, 30])
def test_svd_is_the_nearest_of_its_rank(rank: int) -> None:
    given = parts()
    update = ONESHOT.create("svd", {"rank": rank}).merge(given, WEIGHTS, 0)
    assert dense.distance(cohorts.numpy(update.dense()), cut(exact(given), rank)) < 1e-10
    assert update.rank == min(rank, *SHAPE)


@pytest.mark.parametrize("name", ["svd", "lora_lego", "ties", "dare"])
def test_the_largest_rank_is_the_default(name: str) -> None:
    assert ONESHOT.create(name).merge(parts(), WEIGHTS, 0).rank == 4
    assert ONESHOT.create(name, {"rank": 2}).merge(parts(), WEIGHTS, 0).rank == 2


def test_the_average_is_that_of_each_factor() -> None:
    given = parts((3, 3, 3))
    whole = sum(WEIGHTS)
    b = np.sum([w / whole * cohorts.numpy(part.b) for w, part in zip(WEIGHTS, given, strict=True)], axis=0)
    a = np.sum([w / whole * cohorts.numpy(part.a) for w, part in zip(WEIGHTS, given, strict=True)], axis=0)
    assert dense.distance(merged("average", given), whole * (b @ a)) < 1e-12


def test_an_average_over_a_shared_factor_is_exact() -> None:
    given = [LowRank(part.b, parts((3,))[0].a) for part in parts((3, 3, 3))]
    assert dense.distance(merged("average", given), exact(given)) < 1e-12


def test_other_ranks_cannot_be_averaged() -> None:
    with pytest.raises(ConfigurationError, match=r"average needs equal ranks, not \[2, 3, 4\]; use svd, stack or"):
        merged("average", parts())


@pytest.mark.parametrize("layer", ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"])
def test_lora_lego_is_the_golden_vector(layer: str) -> None:
    expected = json.loads((VECTORS / "expected.json").read_text())["lego"]
    tensors = load_file(VECTORS / "lego.safetensors")
    layer = f"layers.0.{layer}"
    clients = expected["clients"]
    scales = expected.get("scales") or [expected["scale"]] * len(clients)
    given = [
        LowRank(tensors[f"{layer}/c{i}/B_gauge"] * scale, tensors[f"{layer}/c{i}/A_gauge"])
        for i, scale in enumerate(scales)
    ]
    numbers = [float(client["n"]) for client in clients]
    weighted = merged("lora_lego", given, [n / sum(numbers) for n in numbers], rank=3)
    assert dense.distance(weighted, cohorts.numpy(tensors[f"{layer}/lego_weighted/delta_mass"])) < 1e-12
    tripled = merged("lora_lego", given, [3 * n / sum(numbers) for n in numbers], rank=3)
    assert dense.distance(tripled, 3 * weighted) < 1e-12
    uniform = merged("lora_lego", given, [1 / 3] * 3, rank=3, scale="paper")
    assert dense.distance(uniform, cohorts.numpy(tensors[f"{layer}/lego_uniform/delta_inf"])) < 1e-12


def test_lora_lego_with_a_cluster_per_slot_is_exact() -> None:
    given = parts((2, 4, 3))
    assert dense.distance(merged("lora_lego", given, rank=9), exact(given)) < 1e-12


def test_nothing_at_all_stays_nothing() -> None:
    nothing = [part.scaled(0.0) for part in parts((2, 2))]
    for name in NAMES:
        assert not ONESHOT.create(name).merge(nothing, [0.5, 0.5], 0).dense().any()


def ties(matrices: Sequence[dense.Matrix], weights: Sequence[float], density: float) -> dense.Matrix:
    """Trim, elect, average by loops over entries, with weights relative to their mean."""
    trimmed = []
    for update in matrices:
        least = sorted(np.abs(update).ravel(), reverse=True)[int(density * update.size) - 1]
        trimmed.append(np.where(np.abs(update) >= least, update, 0.0))
    total = np.zeros_like(matrices[0])
    for place in np.ndindex(*total.shape):
        values = [update[place] for update in trimmed]
        sign = 1.0 if sum(values) >= 0 else -1.0
        agree = [(v, w) for v, w in zip(values, weights, strict=True) if np.sign(v) == sign]
        if agree:
            total[place] = sum(v * w * len(weights) / sum(weights) for v, w in agree) / len(agree)
    return sum(weights) * total


@pytest.mark.parametrize("density", [0.2, 0.6])
@pytest.mark.parametrize("weights", [[1 / 3] * 3, WEIGHTS])
def test_ties_trims_elects_and_averages(weights: list[float], density: float) -> None:
    given = parts(dtype=torch.float32)
    wanted = ties([cohorts.numpy(part.dense()) for part in given], weights, density)
    assert dense.distance(merged("ties", given, weights, density=density, rank=9), wanted) < 1e-6
    assert dense.distance(merged("ties", given, weights, density=density, rank=2), cut(wanted, 2)) < 1e-5


def test_ties_of_adapters_that_agree_is_their_trimmed_mean() -> None:
    part = LowRank(torch.ones(12, 1), torch.ones(1, 9))
    assert dense.distance(merged("ties", [part, part], [0.5, 0.5], density=0.999), np.ones(SHAPE)) < 0.2


@pytest.mark.parametrize("weights", [[1 / 3] * 3, WEIGHTS])
def test_dare_drops_at_random_and_scales_up(weights: list[float]) -> None:
    """Over many seeds the mean is the exact sum; one of them has the seed's own masks."""
    given = parts(dtype=torch.float32)
    total = np.mean([merged("dare", given, weights, seed=seed, rank=9) for seed in range(400)], axis=0)
    assert dense.distance(total, exact(given, weights)) < 0.1
    generator = torch.Generator().manual_seed(5)
    masks = [torch.bernoulli(torch.full(SHAPE, 0.5), generator=generator) for _ in given]
    pairs = zip(given, weights, masks, strict=True)
    wanted = np.sum([cohorts.numpy(part.dense() * mask) * weight / 0.5 for part, weight, mask in pairs], axis=0)
    assert dense.distance(merged("dare", given, weights, seed=5, rank=9), wanted) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_equal_seeds_give_equal_bits_and_torchs_own_generator_is_left_alone(name: str) -> None:
    given = parts((3, 3, 3))
    before = torch.random.get_rng_state()
    one = ONESHOT.create(name).merge(given, WEIGHTS, 7)
    torch.rand(1)
    torch.random.set_rng_state(before)
    other = ONESHOT.create(name).merge(given, WEIGHTS, 7)
    assert torch.equal(one.b, other.b)
    assert torch.equal(one.a, other.a)
    assert torch.equal(torch.random.get_rng_state(), before)
    if name == "dare":
        assert not torch.equal(ONESHOT.create(name).merge(given, WEIGHTS, 8).b, one.b)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("svd", {"rank": 0}),
        ("lora_lego", {"scale": "length"}),
        ("ties", {"density": 0}),
        ("ties", {"density": 1}),
        ("dare", {"density": 1.5}),
        ("stack", {"rank": 4}),
    ],
)
def test_options_have_limits(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        ONESHOT.create(name, options)
