"""SLoRA: one mask for all, the best low-rank part at the switch, and FedIT from there on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.errors import ConfigurationError, RejectedUpdate
from common.federation import ClientInfo, ClientUpdate, ServerState
from common.lowrank import Dense, LowRank
from common.start import starting_adapter
from common.travel import complete, places, take
from strategies import AggregationStrategy, aggregation_strategy
from strategies.sparse_svd import leading_part
from tests.reference import cohorts
from tests.tiny import drive, synthetic

SPEC = cohorts.model_spec()
DENSITY = 0.3


def slora(**options: object) -> AggregationStrategy:
    return aggregation_strategy("slora", **({"density": DENSITY} | options))


def trained(strategy: AggregationStrategy, state: ServerState, name: str, rank: int = 3) -> ClientUpdate:
    dispatch = strategy.dispatch(state, ClientInfo(name, rank))
    start = starting_adapter(dispatch, SPEC)
    numbers = take(start, dispatch.sends, dispatch)
    noise = torch.randn(numbers.shape, generator=torch.Generator().manual_seed(state.round + sum(map(ord, name))))
    adapter = complete(numbers + 0.3 * noise, start.layout, dispatch.sends, dispatch)
    return ClientUpdate(name, adapter, float(len(name)))


def run(strategy: AggregationStrategy, rounds: int) -> ServerState:
    state = strategy.init(SPEC)
    for _ in range(rounds):
        state = strategy.aggregate(state, [trained(strategy, state, name) for name in cohorts.NAMES[:3]])
    return state


def sparse(out: int, inn: int, entries: int, seed: int = 0) -> Tensor:
    numbers = torch.Generator().manual_seed(seed)
    matrix = torch.zeros(out * inn)
    matrix[torch.randperm(out * inn, generator=numbers)[:entries]] = torch.randn(entries, generator=numbers)
    return matrix.view(out, inn)


def best(matrix: Tensor, rank: int) -> Tensor:
    """The obvious way: a dense SVD."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    nearest: Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return nearest


class TestStages:
    @pytest.mark.parametrize("rounds", [1, 2])
    def test_outside_the_mask_every_bit_is_zero(self, rounds: int) -> None:
        strategy = slora(sparse_rounds=3)
        state = run(strategy, rounds)
        dispatch = strategy.dispatch(state, ClientInfo("ada", 3))
        for layer, part in state.start.layers.items():
            assert isinstance(part, Dense)
            mask = torch.zeros(part.w.numel(), dtype=torch.bool)
            mask[places(dispatch.seed, layer, part.w.numel(), DENSITY)] = True
            assert torch.equal(part.w.flatten()[~mask], torch.zeros(int((~mask).sum())))
            assert part.w.flatten()[mask].all()

    def test_the_mask_is_the_same_for_all_clients_and_rounds(self) -> None:
        strategy = slora(sparse_rounds=3)
        seeds = {
            strategy.dispatch(run(strategy, rounds), ClientInfo(name, 3)).seed
            for rounds in range(3)
            for name in cohorts.NAMES
        }
        assert len(seeds) == 1

    @pytest.mark.parametrize("rank", [1, 2, 64])
    def test_the_model_at_the_switch_is_the_nearest_of_its_rank(self, rank: int) -> None:
        strategy = slora(sparse_rounds=2, rank=rank)
        before = run(strategy, 1)
        updates = [trained(strategy, before, name) for name in cohorts.NAMES[:3]]
        after = strategy.aggregate(before, updates)
        left_out = whole = 0.0
        for layer in SPEC.layers:
            mean = torch.from_numpy(cohorts.exact(updates, layer))
            found = after.start.layers[layer]
            assert isinstance(found, LowRank)
            torch.testing.assert_close(found.dense().double(), best(mean, rank), rtol=1e-4, atol=1e-6)
            square = torch.linalg.svdvals(mean).square()
            left_out, whole = left_out + float(square[rank:].sum()), whole + float(square.sum())
        assert after.metrics["discarded_energy"] == pytest.approx(left_out / whole, abs=1e-6)
        assert strategy.dispatch(after, ClientInfo("ada", 3)).trains == "ab"

    def test_stage_2_averages_factors_as_fedavg_does(self) -> None:
        strategy, plain = slora(sparse_rounds=2), aggregation_strategy("fedavg")
        state = run(strategy, 2)
        updates = [trained(strategy, state, name) for name in cohorts.NAMES[:3]]
        ours, theirs = strategy.aggregate(state, updates), plain.aggregate(state, updates)
        assert ours.start.sha256() == theirs.start.sha256()

    def test_without_a_stage_1_a_run_is_fedavgs_bit_for_bit(self, tmp_path: Path) -> None:
        ends = [
            drive(synthetic(f"strategy.name={name}", *options, ranks=(4,) * 4), tmp_path / name).run.adapter_sha256
            for name, options in {"slora": ("strategy.options.sparse_rounds=0",), "fedavg": ()}.items()
        ]
        assert ends[0] is not None
        assert ends[0] == ends[1]

    def test_an_update_of_nothing_goes_on_from_nothing(self) -> None:
        strategy = slora(sparse_rounds=1)
        state = strategy.init(SPEC)
        zero = replace(trained(strategy, state, "ada"), adapter=state.start)
        after = strategy.aggregate(state, [zero])
        assert {part.rank for part in after.start.layers.values() if isinstance(part, LowRank)} == {0}
        assert after.metrics == {"discarded_energy": 0.0}
        start = starting_adapter(strategy.dispatch(after, ClientInfo("ada", 3)), SPEC)
        assert all(isinstance(part, LowRank) and part.a.all() and not part.b.any() for part in start.layers.values())

    def test_replies_of_the_other_stage_are_refused(self) -> None:
        strategy = slora(sparse_rounds=1)
        first, later = strategy.init(SPEC), run(strategy, 1)
        matrices, factors = trained(strategy, first, "ada"), trained(strategy, later, "ada")
        with pytest.raises(RejectedUpdate, match="client ada, layer down: factors; this stage trains a matrix"):
            strategy.aggregate(first, [factors])
        with pytest.raises(RejectedUpdate, match="client ada, layer down: a dense matrix"):
            strategy.aggregate(later, [matrices])
        with pytest.raises(RejectedUpdate, match="client ada, layer down: a matrix; this stage trains factors"):
            strategy.add(strategy.begin(later), matrices)

    def test_the_plan_knows_the_ranks(self) -> None:
        strategy = slora(sparse_rounds=2, rank=6)
        assert [strategy.expected_ranks(4, [4, 4], merges)[0] for merges in range(4)] == [4, 4, 4, 4]
        assert [strategy.expected_ranks(99, [4, 4], merges)[0] for merges in range(4)] == [99, 99, 6, 4]
        plain = slora(sparse_rounds=0)
        assert [plain.expected_ranks(99, [4, 4], merges)[0] for merges in range(3)] == [0, 4, 4]

    @pytest.mark.parametrize("options", [{"density": 0}, {"density": 1.5}, {"rank": 0}, {"sparse_rounds": -1}])
    def test_options_have_limits(self, options: dict[str, object]) -> None:
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            slora(**options)

    def test_no_reply_of_a_run_is_refused(self, tmp_path: Path) -> None:
        options = ("strategy.name=slora", "strategy.options.density=0.2", "training.steps=6")
        finished = drive(synthetic(*options, ranks=(4,) * 4), tmp_path)
        losses = finished.metrics["held_out_loss"]
        assert losses[4] < losses[2] < losses[0]
        assert finished.rounds[1].error == pytest.approx(0, abs=1e-6)
        assert [metric.round for metric in finished.measured if metric.name == "discarded_energy"] == [2]


class TestLeadingPart:
    @pytest.mark.parametrize("rank", [1, 4, 32])
    @pytest.mark.parametrize("entries", [1200, 12000])
    def test_arnoldi_finds_what_a_dense_svd_finds(self, entries: int, rank: int) -> None:
        matrix = sparse(400, 300, entries)
        found = leading_part(matrix, rank, seed=3)
        assert found.rank == rank
        nearest = best(matrix, rank)
        assert float((found.dense() - nearest).norm() / nearest.norm()) < 1e-6
        again = leading_part(matrix, rank, seed=3)
        assert torch.equal(found.b, again.b)
        assert torch.equal(found.a, again.a)

    @pytest.mark.parametrize("entries", [1, 3, 5, 50])
    def test_fewer_directions_than_asked_for_give_fewer_slots_and_equal_bits(self, entries: int) -> None:
        matrix = sparse(400, 300, entries)
        found, again = leading_part(matrix, 64, seed=3), leading_part(matrix, 64, seed=3)
        assert found.rank == int(torch.linalg.matrix_rank(matrix.double())) <= entries
        torch.testing.assert_close(found.dense(), matrix, rtol=1e-5, atol=1e-6)
        assert torch.equal(found.b, again.b)
        assert torch.equal(found.a, again.a)

    @pytest.mark.parametrize("shape", [(400, 300), (3, 500), (1, 1)])
    def test_zeros_have_no_slots(self, shape: tuple[int, int]) -> None:
        found = leading_part(torch.zeros(shape), 4, seed=3)
        assert (found.rank, found.shape) == (0, shape)

    def test_values_are_split_over_both_factors(self) -> None:
        found = leading_part(sparse(30, 20, 100), 5, seed=3)
        torch.testing.assert_close(found.b.norm(dim=0), found.a.norm(dim=1))
        assert found.b.dtype == torch.float32

    def test_a_full_matrix_of_low_rank_is_found_too(self) -> None:
        numbers = torch.Generator().manual_seed(1)
        matrix = torch.randn(300, 3, generator=numbers) @ torch.randn(3, 280, generator=numbers)
        torch.testing.assert_close(leading_part(matrix, 3, seed=1).dense(), matrix, rtol=1e-4, atol=1e-4)
