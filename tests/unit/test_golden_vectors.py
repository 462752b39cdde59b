"""The strategies against vectors written by independent numpy loops (tests/vectors/make_vectors.py).

A failure of ``v_proj`` alone points to a rank above the dimension; of every layer in hetero but not in homo,
to the clients' scales.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from common.adapter import Adapter
from common.federation import ClientInfo, ClientUpdate, ModelSpec, ServerState
from common.lowrank import LowRank
from strategies import AggregationStrategy, aggregation_strategy
from strategies.aggregation import ffa_lora
from strategies.aggregation.hetlora import norm_shares
from strategies.aggregation.lora_fair import correction
from strategies.kmeans import Clusters, kmeans, singletons
from strategies.residual import covariance
from strategies.units import Centroids, Units, centroids, pool, stretch

VECTORS = Path(__file__).parents[1] / "vectors"
EXPECTED = json.loads((VECTORS / "expected.json").read_text())
LAYERS = [
    pytest.param("layers.0.self_attn.q_proj", id="q_proj"),
    pytest.param("layers.0.self_attn.v_proj", id="v_proj"),
    pytest.param("layers.0.mlp.up_proj", id="up_proj"),
]
GAUGES = [pytest.param("", id="as_is"), pytest.param("_gauge", id="scrambled")]


def numbers(case: str) -> list[float]:
    return EXPECTED[case].get("n") or [client["n"] for client in EXPECTED[case]["clients"]]


def scales(case: str) -> list[float]:
    return EXPECTED[case].get("scales") or [EXPECTED[case]["scale"]] * len(numbers(case))


def parts(case: str, layer: str, gauge: str = "") -> list[LowRank]:
    """Return the clients' updates of a layer, scale folded into b."""
    tensors = load_file(VECTORS / f"{case}.safetensors")
    return [
        LowRank(tensors[f"{layer}/c{i}/B{gauge}"] * scale, tensors[f"{layer}/c{i}/A{gauge}"])
        for i, scale in enumerate(scales(case))
    ]


def merge(strategy: AggregationStrategy, layer: str, updates: list[LowRank], examples: list[float]) -> ServerState:
    spec = ModelSpec({layer: updates[0].shape}, seed=0)
    cohort = [
        ClientUpdate(f"c{i}", Adapter.pack({layer: part}), n)
        for i, (part, n) in enumerate(zip(updates, examples, strict=True))
    ]
    return strategy.aggregate(strategy.init(spec), cohort)


def merged(state: ServerState, layer: str) -> Tensor:
    assert state.merged is not None
    assert state.merged.flat.dtype == torch.float64
    return state.merged.layers[layer].dense()


def expected(case: str, key: str) -> Tensor:
    return load_file(VECTORS / f"{case}.safetensors")[key]


def assert_close(given: Tensor, wanted: Tensor) -> None:
    assert float((given - wanted).norm() / wanted.norm()) < 1e-12


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("case", ["hetero", "homo", "lego"])
def test_flora_is_the_exact_average(case: str, layer: str) -> None:
    state = merge(aggregation_strategy("flora"), layer, parts(case, layer), numbers(case))
    assert_close(merged(state, layer), expected(case, f"{layer}/exact/delta"))
    assert_close(state.global_adapter.layers[layer].dense(), expected(case, f"{layer}/exact/delta"))


@pytest.mark.parametrize("layer", LAYERS)
def test_flora_equals_the_stacked_factors(layer: str) -> None:
    state = merge(aggregation_strategy("flora"), layer, parts("hetero", layer), numbers("hetero"))
    stacked = expected("hetero", f"{layer}/flora/B") @ expected("hetero", f"{layer}/flora/A")
    assert_close(merged(state, layer), stacked)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rank", [2, 3, 4, 8])
def test_capped_flora_is_the_nearest_of_its_rank(rank: int, layer: str) -> None:
    strategy = aggregation_strategy("flora", global_rank=rank)
    state = merge(strategy, layer, parts("hetero", layer), numbers("hetero"))
    assert_close(merged(state, layer), expected("hetero", f"{layer}/flexlora/delta_r{rank}"))


@pytest.mark.parametrize("layer", LAYERS)
def test_flora_keeps_the_fewest_values_of_an_energy(layer: str) -> None:
    """Where the values kept fill the whole matrix, as in v_proj (6 of 8 · 24 / 32), nothing is lost."""
    strategy = aggregation_strategy("flora", global_energy=EXPECTED["hetero"]["florist_tau"])
    state = merge(strategy, layer, parts("hetero", layer), numbers("hetero"))
    out, inn = EXPECTED["hetero"]["layers"][layer]["shape"]
    pays = EXPECTED["hetero"]["layers"][layer]["florist_rank"] * (out + inn) < out * inn
    wanted = expected("hetero", f"{layer}/florist/delta" if pays else f"{layer}/exact/delta")
    assert pays == ("v_proj" not in layer)
    assert_close(merged(state, layer), wanted)


@pytest.mark.parametrize("layer", LAYERS)
def test_fedavg_is_the_mean_of_the_factors(layer: str) -> None:
    state = merge(aggregation_strategy("fedavg"), layer, parts("homo", layer), numbers("homo"))
    factors = state.start.layers[layer]
    assert isinstance(factors, LowRank)
    assert_close(factors.a, expected("homo", f"{layer}/fedit/A"))
    assert_close(factors.b / EXPECTED["homo"]["scale"], expected("homo", f"{layer}/fedit/B"))
    assert_close(merged(state, layer), expected("homo", f"{layer}/fedit/delta"))
    residual = expected("homo", f"{layer}/exact/delta") - merged(state, layer)
    assert_close(residual, expected("homo", f"{layer}/fedex/residual"))


@pytest.mark.parametrize("layer", LAYERS)
def test_ffa_lora_is_exact_over_a_shared_factor(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = expected("homo", f"{layer}/ffa/A_shared")
    monkeypatch.setattr(ffa_lora, "frozen_factors", lambda layout, seed: shared.flatten())
    updates = [LowRank(part.b, shared) for part in parts("homo", layer)]
    state = merge(aggregation_strategy("ffa_lora"), layer, updates, numbers("homo"))
    factors = state.start.layers[layer]
    assert isinstance(factors, LowRank)
    assert torch.equal(factors.a, shared)
    assert_close(factors.b / EXPECTED["homo"]["scale"], expected("homo", f"{layer}/ffa/B"))
    assert_close(merged(state, layer), expected("homo", f"{layer}/ffa/delta"))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize(
    ("options", "key"),
    [
        pytest.param({}, "delta_mass", id="mass"),
        pytest.param({"scale": "paper", "norm": "inf"}, "delta_inf", id="inf"),
        pytest.param({"scale": "paper", "norm": "l2"}, "delta_l2", id="l2"),
    ],
)
def test_lora_lego_weighted(options: dict[str, Any], key: str, gauge: str, layer: str) -> None:
    strategy = aggregation_strategy("lora_lego", clusters=3, **options)
    state = merge(strategy, layer, parts("lego", layer, gauge), numbers("lego"))
    assert_close(merged(state, layer), expected("lego", f"{layer}/lego_weighted/{key}"))
    assert state.metrics["refactored_layers"] == 0


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("norm", ["inf", "l2"])
def test_lora_lego_uniform(norm: str, gauge: str, layer: str) -> None:
    strategy = aggregation_strategy("lora_lego", clusters=3, scale="paper", norm=norm)
    state = merge(strategy, layer, parts("lego", layer, gauge), [1, 1, 1])
    assert_close(merged(state, layer), expected("lego", f"{layer}/lego_uniform/delta_{norm}"))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("gauge", GAUGES)
def test_lora_lego_with_a_cluster_per_unit_is_exact(gauge: str, layer: str) -> None:
    strategy = aggregation_strategy("lora_lego", clusters=8)
    state = merge(strategy, layer, parts("lego", layer, gauge), numbers("lego"))
    assert_close(merged(state, layer), expected("lego", f"{layer}/exact/delta"))


def lego_units(layer: str, gauge: str, tag: str) -> Units:
    units = pool(parts("lego", layer, gauge), EXPECTED["lego"]["weights"])
    return units if tag == "weighted" else replace(units, weight=torch.ones_like(units.weight))


FACTORS: dict[str, Callable[[Units, Clusters, Centroids], Tensor]] = {
    "delta_plain": lambda units, clusters, means: torch.ones_like(means.mass),
    "delta_mass": lambda units, clusters, means: means.mass,
    "delta_inf": lambda units, clusters, means: (
        stretch(units, clusters, means, "inf", 10)[0].square() * (units.mean_rank / clusters.count) ** 0.5
    ),
    "delta_l2": lambda units, clusters, means: (
        stretch(units, clusters, means, "l2", 10)[0].square() * (units.mean_rank / clusters.count) ** 0.5
    ),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("tag", ["uniform", "weighted"])
@pytest.mark.parametrize("key", FACTORS)
def test_centroids(key: str, tag: str, gauge: str, layer: str) -> None:
    units = lego_units(layer, gauge, tag)
    clusters = kmeans(units.gram(), units.weight, 3, seed=5)
    means = centroids(units, clusters)
    update = means.update(FACTORS[key](units, clusters, means), torch.float64)
    assert_close(update.dense(), expected("lego", f"{layer}/lego_{tag}/{key}"))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("tag", ["uniform", "weighted"])
def test_centroids_one_by_one(tag: str, layer: str) -> None:
    """The centroids themselves, their masses and their sign, as a set."""
    units = lego_units(layer, "", tag)
    means = centroids(units, kmeans(units.gram(), units.weight, 3, seed=5))
    wanted = torch.cat([expected("lego", f"{layer}/lego_{tag}/A"), expected("lego", f"{layer}/lego_{tag}/B").T], dim=1)
    given = torch.cat([means.a, means.b], dim=1)
    nearest = torch.cdist(wanted, given).argmin(1)
    assert sorted(nearest.tolist()) == [0, 1, 2]
    assert_close(given[nearest], wanted)
    assert_close(means.mass[nearest], expected("lego", f"{layer}/lego_{tag}/mass"))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_cluster_per_unit_without_scaling_is_the_plain_sum(layer: str) -> None:
    units = lego_units(layer, "", "weighted")
    means = centroids(units, singletons(len(units)))
    update = means.update(torch.ones_like(means.mass), torch.float64)
    assert_close(update.dense(), expected("lego", f"{layer}/lego_full/delta_plain"))


def root_scaled(layer: str) -> list[LowRank]:
    """Return the hetero clients with the root of the scale in both factors, as the HetLoRA vectors have it."""
    clients = zip(parts("hetero", layer), scales("hetero"), strict=True)
    return [LowRank(part.b / math.sqrt(scale), part.a * math.sqrt(scale)) for part, scale in clients]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("weights", "key"), [("norm", "hetlora"), ("examples", "zeropad")])
def test_hetlora_is_the_padded_mean(weights: str, key: str, layer: str) -> None:
    strategy = aggregation_strategy("hetlora", weights=weights)
    factors = merge(strategy, layer, root_scaled(layer), numbers("hetero")).start.layers[layer]
    assert isinstance(factors, LowRank)
    assert_close(factors.a, expected("hetero", f"{layer}/{key}/A"))
    assert_close(factors.b, expected("hetero", f"{layer}/{key}/B"))


@pytest.mark.parametrize("layer", LAYERS)
def test_hetlora_weighs_by_the_norm_of_the_product(layer: str) -> None:
    given = torch.tensor(norm_shares(parts("hetero", layer)), dtype=torch.float64)
    assert_close(given, expected("hetero", f"{layer}/hetlora/p"))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rank", [2, 3, 4, 8])
@pytest.mark.parametrize("split", ["balanced", "paper"])
def test_flexlora_gives_each_client_the_nearest_of_its_rank(split: str, rank: int, layer: str) -> None:
    strategy = aggregation_strategy("flexlora", split=split)
    state = merge(strategy, layer, parts("hetero", layer), numbers("hetero"))
    sent = strategy.dispatch(state, ClientInfo("any", rank)).start.layers[layer]
    assert_close(sent.dense(), expected("hetero", f"{layer}/flexlora/delta_r{rank}"))
    if rank == 8:
        assert_close(merged(state, layer), sent.dense())
        assert isinstance(sent, LowRank)
        values = sent.b.norm(dim=0) * sent.a.norm(dim=1)
        assert_close(values, expected("hetero", f"{layer}/flexlora/singular_values")[:8])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rank", [None, 2, 3, 4, 8])
def test_fedavg_svd_is_the_nearest_of_one_rank(rank: int | None, layer: str) -> None:
    """Without an option the smallest rank of the clients, 2, counts."""
    state = merge(aggregation_strategy("fedavg_svd", rank=rank), layer, parts("hetero", layer), numbers("hetero"))
    assert_close(merged(state, layer), expected("hetero", f"{layer}/flexlora/delta_r{rank or 2}"))
    assert_close(state.start.layers[layer].dense(), merged(state, layer))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("error_feedback", [False, True])
def test_florist_keeps_the_fewest_values_of_an_energy(error_feedback: bool, layer: str) -> None:
    energy = EXPECTED["hetero"]["florist_tau"]
    strategy = aggregation_strategy("florist", energy=energy, error_feedback=error_feedback)
    state = merge(strategy, layer, parts("hetero", layer), numbers("hetero"))
    assert state.merged is not None
    kept = state.merged.layers[layer]
    assert isinstance(kept, LowRank)
    assert kept.rank == EXPECTED["hetero"]["layers"][layer]["florist_rank"]
    assert_close(merged(state, layer), expected("hetero", f"{layer}/florist/delta"))
    assert_close(state.global_adapter.layers[layer].dense(), expected("hetero", f"{layer}/florist/delta"))


@pytest.mark.parametrize("layer", LAYERS)
def test_florist_that_keeps_all_energy_is_flora(layer: str) -> None:
    state = merge(aggregation_strategy("florist", energy=1), layer, parts("hetero", layer), numbers("hetero"))
    assert_close(merged(state, layer), expected("hetero", f"{layer}/exact/delta"))


@pytest.mark.parametrize("layer", LAYERS)
def test_fedex_lora_puts_the_residual_into_the_global_adapter(layer: str) -> None:
    state = merge(aggregation_strategy("fedex_lora"), layer, parts("homo", layer), numbers("homo"))
    start = state.start.layers[layer]
    assert isinstance(start, LowRank)
    assert_close(start.a, expected("homo", f"{layer}/fedit/A"))
    assert_close(start.b / EXPECTED["homo"]["scale"], expected("homo", f"{layer}/fedit/B"))
    assert_close(state.global_adapter.layers[layer].dense(), expected("homo", f"{layer}/fedex/residual"))
    assert_close(merged(state, layer), expected("homo", f"{layer}/exact/delta"))
    assert state.merged is not None
    whole = state.merged.layers[layer]
    assert isinstance(whole, LowRank)
    assert whole.rank == start.rank + EXPECTED["homo"]["layers"][layer]["residual_rank"]


@pytest.mark.parametrize("layer", LAYERS)
def test_lora_fair_corrects_by_ridge_regression(layer: str) -> None:
    """The vectors' λ is absolute, the option's relative to the mean squared length of the rows."""
    mean = LowRank(
        expected("homo", f"{layer}/fedit/B") * EXPECTED["homo"]["scale"], expected("homo", f"{layer}/fedit/A")
    )
    residual = covariance(parts("homo", layer), EXPECTED["homo"]["weights"], mean)
    wanted = expected("homo", f"{layer}/fair_ridge/dB") * EXPECTED["homo"]["scale"]
    assert_close(correction(residual, mean.a, EXPECTED["homo"]["fair_lambda"]), wanted)
    relative = EXPECTED["homo"]["fair_lambda"] * mean.rank / float(mean.a.square().sum())
    state = merge(aggregation_strategy("lora_fair", ridge=relative), layer, parts("homo", layer), numbers("homo"))
    start = state.start.layers[layer]
    assert isinstance(start, LowRank)
    assert_close(start.a, mean.a)
    assert_close(start.b - mean.b, wanted)
    exact = expected("homo", f"{layer}/exact/delta")
    missed = float((merged(state, layer) - exact).norm() / exact.norm())
    assert missed == pytest.approx(EXPECTED["homo"]["layers"][layer]["fair_ridge_rel_err"], rel=1e-12)


def merge_from(
    strategy: AggregationStrategy,
    layer: str,
    start: LowRank,
    rounds: int,
    updates: list[LowRank],
    extras: dict[str, Tensor] | None = None,
) -> ServerState:
    """Merge the homo clients' updates of a run that has merged some rounds, whose clients began with these factors."""
    before = strategy.init(ModelSpec({layer: start.shape}, seed=0))
    before = replace(before, start=Adapter.pack({layer: start}), round=rounds, extras=extras or {})
    pairs = zip(updates, numbers("homo"), strict=True)
    return strategy.aggregate(
        before, [ClientUpdate(f"c{i}", Adapter.pack({layer: part}), n) for i, (part, n) in enumerate(pairs)]
    )


@pytest.mark.parametrize("layer", LAYERS)
def test_rolora_averages_a_over_one_b(layer: str) -> None:
    """Clients hold factors in float32, so the vectors' b is rounded to that first."""
    shared = (expected("homo", f"{layer}/rolora_a_round/B_shared") * EXPECTED["homo"]["scale"]).float().double()
    updates = [LowRank(shared, part.a) for part in parts("homo", layer)]
    start = LowRank(shared, torch.zeros_like(updates[0].a))
    state = merge_from(aggregation_strategy("rolora"), layer, start, 1, updates)
    factors = state.start.layers[layer]
    assert isinstance(factors, LowRank)
    assert torch.equal(factors.b, shared)
    assert_close(factors.a, expected("homo", f"{layer}/rolora_a_round/A"))
    delta = expected("homo", f"{layer}/rolora_a_round/delta")
    assert float((merged(state, layer) - delta).norm() / delta.norm()) < 1e-7


@pytest.mark.parametrize("layer", LAYERS)
def test_rolora_averages_b_over_one_a(layer: str) -> None:
    shared = expected("homo", f"{layer}/ffa/A_shared").float().double()
    updates = [LowRank(part.b, shared) for part in parts("homo", layer)]
    start = LowRank(torch.zeros_like(updates[0].b), shared)
    state = merge_from(aggregation_strategy("rolora"), layer, start, 2, updates)
    factors = state.start.layers[layer]
    assert isinstance(factors, LowRank)
    assert torch.equal(factors.a, shared)
    assert_close(factors.b / EXPECTED["homo"]["scale"], expected("homo", f"{layer}/ffa/B"))
    delta = expected("homo", f"{layer}/ffa/delta")
    assert float((merged(state, layer) - delta).norm() / delta.norm()) < 1e-7


@pytest.mark.parametrize("layer", LAYERS)
def test_fedsa_lora_averages_a_alone(layer: str) -> None:
    updates = [LowRank(torch.zeros_like(part.b), part.a) for part in parts("homo", layer)]
    state = merge(aggregation_strategy("fedsa_lora"), layer, updates, numbers("homo"))
    factors = state.start.layers[layer]
    assert isinstance(factors, LowRank)
    assert not factors.b.any()
    assert_close(factors.a, expected("homo", f"{layer}/fedsa/A"))
    for i, part in enumerate(parts("homo", layer)):
        assert_close(part.b @ factors.a, expected("homo", f"{layer}/fedsa/delta_c{i}"))


@pytest.mark.parametrize("layer", LAYERS)
def test_fed_sb_averages_cores_between_frames(layer: str) -> None:
    b, a = expected("homo", f"{layer}/fedsb/B"), expected("homo", f"{layer}/fedsb/A")
    scale = EXPECTED["homo"]["scale"]
    cores = [expected("homo", f"{layer}/fedsb/c{i}/R") * scale for i in range(3)]
    extras = {f"fed_sb.b/{layer}": b, f"fed_sb.a/{layer}": a}
    updates = [LowRank(b @ core, a) for core in cores]
    state = merge_from(aggregation_strategy("fed_sb"), layer, LowRank(b @ cores[0], a), 2, updates, extras)
    assert_close(merged(state, layer), expected("homo", f"{layer}/fedsb/delta"))
    assert_close(b.T @ merged(state, layer) @ a.T / scale, expected("homo", f"{layer}/fedsb/R"))
    assert {name: value.data_ptr() for name, value in state.extras.items()} == {
        name: value.data_ptr() for name, value in extras.items()
    }
