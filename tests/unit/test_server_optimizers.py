"""Server optimizers against the papers' equations in plain numpy, in coordinates and in products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from common.adapter import Adapter
from common.adapter_file import whole_adapter
from common.errors import ConfigurationError
from common.federation import ClientUpdate, ModelSpec, ServerState
from common.lowrank import Dense, LowRank, Update
from common.start import fresh_a
from strategies import aggregation_strategy
from strategies.aggregation.ffa_lora import frozen_seed
from strategies.coordinate_step import coordinate_step
from strategies.optimizers import OPTIMIZERS, ServerOptimizer
from strategies.server_rule import MOMENTUM, SQUARE, Rule
from tests.reference import cohorts, dense

Matrix = dense.Matrix
OPTIONS: dict[str, dict[str, Any]] = {
    "fedavgm": {"learning_rate": 0.5, "momentum": 0.7},
    "fedadam": {"learning_rate": 0.03, "beta1": 0.6, "beta2": 0.8, "tau": 0.02},
    "fedyogi": {"learning_rate": 0.03, "beta1": 0.6, "beta2": 0.8, "tau": 0.02},
}
NAMES = sorted(OPTIONS)


def optimizer(name: str, **options: Any) -> ServerOptimizer:
    return OPTIMIZERS.create(name, options)


def oracle(name: str, deltas: Sequence[Matrix], square: Callable[[Matrix], Any] = np.square) -> list[Matrix]:
    """Return the steps the papers' equations make of these changes."""
    chosen = OPTIONS[name]
    m, steps = np.zeros_like(deltas[0]), []
    v = square(np.zeros_like(deltas[0])) + chosen.get("tau", 0.0) ** 2
    for delta in deltas:
        found = square(delta)
        if name == "fedavgm":
            m = chosen["momentum"] * m + delta
            steps.append(chosen["learning_rate"] * m)
            continue
        m = chosen["beta1"] * m + (1 - chosen["beta1"]) * delta
        if name == "fedadam":
            v = chosen["beta2"] * v + (1 - chosen["beta2"]) * found
        else:
            v = v - (1 - chosen["beta2"]) * found * np.sign(v - found)
        steps.append(chosen["learning_rate"] * m / (np.sqrt(v) + chosen["tau"]))
    return steps


def state_of(numbers: Matrix, before: ServerState | None = None) -> ServerState:
    """Build a state whose start adapter holds these numbers."""
    spec = ModelSpec({"out": (2, 3)}, 0)
    start = Adapter.pack({"out": LowRank(torch.zeros(2, 1), torch.zeros(1, 3))})
    start = start.with_flat(torch.tensor(numbers))
    if before is not None:
        return replace(before, start=start, round=before.round + 1)
    return ServerState(spec, start, Adapter.empty(), round=1)


@pytest.mark.parametrize("name", NAMES)
def test_in_coordinates_every_number_follows_the_papers(name: str) -> None:
    numbers = np.random.default_rng(3)
    deltas = [numbers.normal(size=5) * 0.1 for _ in range(5)]
    strategy, chosen = aggregation_strategy("fedavg"), optimizer(name, **OPTIONS[name])
    x = numbers.normal(size=5)
    state = state_of(x)
    for delta, step in zip(deltas, oracle(name, deltas), strict=True):
        state = chosen.step(state, state_of(x + delta, state), strategy)
        x = x + step
        np.testing.assert_allclose(state.start.flat.numpy(), x, rtol=1e-13)
        x = state.start.flat.numpy()
    assert (state.base_version, state.global_adapter.layers) == (0, {})


def cohort(spec: ModelSpec, state: ServerState, number: int, ranks: Sequence[int] = (2, 3)) -> list[ClientUpdate]:
    return cohorts.cohort(spec, ranks, number, base_version=state.base_version)


def model(state: ServerState, layer: str) -> Matrix:
    whole = whole_adapter(state)
    return cohorts.matrix(whole, layer) if layer in whole.layers else np.zeros(state.spec.layers[layer])


def mean_square(change: Matrix) -> Any:
    return np.mean(change**2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strategy_name", ["flora", "lora_lego"])
def test_in_products_every_layer_moves_by_the_papers_step(strategy_name: str, name: str) -> None:
    """With one second moment a layer; over factors and, where they do not pay, matrices."""
    strategy, chosen = aggregation_strategy(strategy_name), optimizer(name, **OPTIONS[name])
    spec = cohorts.model_spec({"big": (40, 30), "small": (5, 6)})
    state = strategy.init(spec)
    deltas: dict[str, list[Matrix]] = {layer: [] for layer in spec.layers}
    kinds: list[type[Update]] = []
    for number in range(4):
        before = state
        merged = strategy.aggregate(state, cohort(spec, state, number))
        state = chosen.step(before, merged, strategy)
        for layer in spec.layers:
            deltas[layer].append(model(merged, layer) - model(before, layer))
            wanted = oracle(name, deltas[layer], mean_square)[-1]
            np.testing.assert_allclose(model(state, layer) - model(before, layer), wanted, rtol=1e-9, atol=1e-9)
        assert state.base_version == number + 1
        assert state.merged is merged.merged
        kinds.append(type(state.global_adapter.layers["big"]))
    assert kinds[0] is LowRank
    assert isinstance(state.global_adapter.layers["small"], Dense)


@pytest.mark.parametrize("name", NAMES)
def test_heads_move_in_coordinates_everywhere(name: str) -> None:
    """From the first round on: they were there before it."""
    strategy, chosen = aggregation_strategy("flora"), optimizer(name, **OPTIONS[name])
    spec = cohorts.model_spec()
    state, deltas = strategy.init(spec), []
    for number in range(3):
        before = state
        merged = strategy.aggregate(state, cohort(spec, state, number))
        state = chosen.step(before, merged, strategy)
        deltas.append(cohorts.numpy(merged.start.extras["score.weight"] - before.start.extras["score.weight"]))
        moved = cohorts.numpy(state.start.extras["score.weight"] - before.start.extras["score.weight"])
        np.testing.assert_allclose(moved, oracle(name, deltas)[-1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("strategy_name", ["fedavg", "ffa_lora"])
def test_the_first_rounds_factors_are_taken_as_merged(strategy_name: str) -> None:
    strategy, chosen = aggregation_strategy(strategy_name), optimizer("fedadam")
    spec = cohorts.model_spec(heads=False)
    state = strategy.init(spec)
    merged = strategy.aggregate(state, frozen(strategy_name, state, cohort(spec, state, 0, (3, 3))))
    after = chosen.step(state, merged, strategy)
    assert after.start.sha256() == merged.start.sha256()
    assert not after.extras[MOMENTUM].any()
    assert torch.equal(after.extras[SQUARE], torch.full_like(after.start.flat, 1e-6))


def frozen(strategy_name: str, state: ServerState, updates: list[ClientUpdate]) -> list[ClientUpdate]:
    """Give all clients the frozen factor of ffa_lora."""
    if strategy_name != "ffa_lora":
        return updates
    given = []
    for update in updates:
        layers = {
            layer: LowRank(part.b, fresh_a(frozen_seed(state), layer, *part.a.shape).to(part.b.dtype))
            for layer, part in update.adapter.layers.items()
            if isinstance(part, LowRank)
        }
        given.append(cohorts.with_factors(update, layers))
    return given


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_factor_keeps_its_bits_when_ranks_come_and_go(name: str) -> None:
    strategy, chosen = aggregation_strategy("ffa_lora"), optimizer(name)
    spec = cohorts.model_spec()
    state = strategy.init(spec)
    for number, ranks in enumerate([(2, 4), (2, 4), (2, 2), (3, 1), (4, 4)]):
        updates = frozen("ffa_lora", state, cohort(spec, state, number, ranks))
        state = chosen.step(state, strategy.aggregate(state, updates), strategy)
        assert len(state.extras[MOMENTUM]) == state.start.layout.numel
        for layer, part in state.start.layers.items():
            assert isinstance(part, LowRank)
            assert part.rank == max(ranks)
            assert torch.equal(part.a, fresh_a(frozen_seed(state), layer, *part.a.shape).double())
            assert part.b.isfinite().all()


def test_slots_that_stay_keep_their_memory_when_others_go_and_come() -> None:
    rule = Rule(1.0, 0.5)
    b, a = torch.zeros(2, 2), torch.ones(2, 3)
    wide = Adapter.pack({"out": LowRank(b, a)})
    moved = Adapter.pack({"out": LowRank(b + torch.tensor([1.0, 2.0]), a)})
    start, memory = coordinate_step(wide, moved, {}, rule)
    narrow = Adapter.pack({"out": LowRank(torch.full((2, 1), 3.0), a[:1])})
    after, memory = coordinate_step(start, narrow, memory, rule)
    held = after.layers["out"]
    assert isinstance(held, LowRank)
    assert held.b.tolist() == [[3.5], [3.5]]  # Δ = 3 − 1, and half the 1 before
    again, memory = coordinate_step(after, moved, memory, rule)
    held = again.layers["out"]
    assert isinstance(held, LowRank)
    assert held.b.tolist() == [[2.25, 2.0], [2.25, 2.0]]  # Δ = 1 − 3.5, m = 2.5; what came back is as merged
    assert memory[MOMENTUM].tolist() == [-1.25, 0, -1.25, 0, 0, 0, 0, 0, 0, 0]


def test_a_core_stays_between_its_frames() -> None:
    """Adam with one second moment per core, on ``frame @ core`` as on the core itself."""
    generator = torch.Generator().manual_seed(1)
    frame = torch.linalg.qr(torch.randn(9, 3, generator=generator, dtype=torch.float64)).Q
    inner = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    cores = [torch.randn(3, 3, generator=generator, dtype=torch.float64) for _ in range(4)]
    chosen = optimizer("fedadam", **OPTIONS["fedadam"])
    rule = Rule(0.03, 0.6, 0.4, 0.02, chosen.second)  # type: ignore[attr-defined]
    start = Adapter.pack({"out": LowRank(frame @ cores[0], inner)})
    memory: dict[str, torch.Tensor] = {}
    core, deltas = cores[0], []
    for merged in cores[1:]:
        deltas.append(cohorts.numpy(merged - core))
        start, memory = coordinate_step(
            start, Adapter.pack({"out": LowRank(frame @ merged, inner)}), memory, rule, by_layer=True
        )
        core = core + torch.from_numpy(oracle("fedadam", deltas, mean_square)[-1])
        held = start.layers["out"]
        assert isinstance(held, LowRank)
        torch.testing.assert_close(held.b, frame @ core, rtol=1e-10, atol=1e-10)
        assert torch.equal(held.a, inner)


@pytest.mark.parametrize("strategy_name", ["fedavg", "ffa_lora", "flora", "lora_lego"])
def test_momentum_of_nothing_is_no_optimizer(strategy_name: str) -> None:
    """To the bit, in products too: there is nothing to add to what was merged."""
    strategy, chosen = aggregation_strategy(strategy_name), optimizer("fedavgm", momentum=0.0)
    spec = cohorts.model_spec()
    plain = stepped = strategy.init(spec)
    for number in range(3):
        updates = frozen(strategy_name, plain, cohort(spec, plain, number, (3, 3)))
        plain = strategy.aggregate(plain, updates)
        stepped = chosen.step(stepped, strategy.aggregate(stepped, updates), strategy)
        assert cohorts.bits(stepped) == cohorts.bits(plain)
        assert stepped.base_version == plain.base_version


def test_a_round_that_changes_nothing_leaves_model_and_memory() -> None:
    strategy, chosen = aggregation_strategy("flora"), optimizer("fedadam")
    spec = cohorts.model_spec(heads=False)
    state = strategy.init(spec)
    state = chosen.step(state, strategy.aggregate(state, cohort(spec, state, 0)), strategy)
    again = chosen.step(state, replace(state, round=2), strategy)
    assert (again.global_adapter.sha256(), again.base_version) == (state.global_adapter.sha256(), state.base_version)
    assert again.extras.keys() == state.extras.keys()
    assert all(torch.equal(again.extras[name], state.extras[name]) for name in state.extras)


def test_a_cap_on_the_global_adapter_is_kept() -> None:
    strategy, chosen = aggregation_strategy("flora", global_rank=4), optimizer("fedavgm")
    spec = cohorts.model_spec({"big": (60, 50)})
    state = strategy.init(spec)
    for number in range(4):
        state = chosen.step(state, strategy.aggregate(state, cohort(spec, state, number)), strategy)
        held = state.global_adapter.layers["big"]
        assert isinstance(held, LowRank)
        assert held.rank == 4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strategy_name", ["flora", "lora_lego", "fedavg"])
def test_downloads_are_no_larger_than_planned(strategy_name: str, name: str) -> None:
    """In float32, where rounding could pass for slots."""
    strategy, chosen = aggregation_strategy(strategy_name), optimizer(name)
    spec = cohorts.model_spec({"big": (90, 80)})
    ranks = [3, 3]
    state = strategy.init(spec)
    for number in range(6):
        updates = cohorts.cohort(spec, ranks, number, dtype=torch.float32, base_version=state.base_version)
        state = chosen.step(state, strategy.aggregate(state, updates), strategy)
        start, total = chosen.expected_ranks(strategy, 3, ranks, number + 1)
        assert all(part.rank <= start for part in state.start.layers.values() if isinstance(part, LowRank))
        assert all(part.rank <= total for part in state.global_adapter.layers.values() if isinstance(part, LowRank))
        assert all(isinstance(part, LowRank) for part in state.global_adapter.layers.values())
    assert optimizer("none").expected_ranks(strategy, 3, ranks, 6) == strategy.expected_ranks(3, ranks, 6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fedavgm", {"momentum": 1.0}),
        ("fedavgm", {"momentum": -0.1}),
        ("fedavgm", {"learning_rate": 0}),
        ("fedadam", {"beta1": 1}),
        ("fedadam", {"beta2": 1}),
        ("fedadam", {"tau": 0}),
        ("fedyogi", {"learning_rate": float("inf")}),
        ("fedyogi", {"beta3": 0.5}),
    ],
)
def test_options_have_limits(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        OPTIMIZERS.create(name, options)


def test_the_defaults_are_the_papers() -> None:
    adaptive = {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3}
    assert optimizer("fedadam").model_dump() == optimizer("fedyogi").model_dump() == adaptive
    assert optimizer("fedavgm").model_dump() == {"learning_rate": 1.0, "momentum": 0.9}
