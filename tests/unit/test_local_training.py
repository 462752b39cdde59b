"""Local training: batches, learning rates, bits that follow from seeds, and what a failed round leaves behind."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from client.training import Position, autocast_dtype, learning_rate, numbers_of_batches, train
from common.adapter import Adapter
from common.base_model import BaseModel
from common.errors import TrainingError
from common.experiment import TrainingSettings
from common.federation import ClientInfo, ModelSpec
from common.start import starting_adapter
from common.tasks import Batch
from common.workspace import Workspace, workspace
from strategies import aggregation_strategy
from tests.tiny import tiny

RATE = 0.01
FIRST = Position(1, 2, "ada")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


def place(folder: Path, *overrides: str) -> Workspace:
    return workspace(tiny(folder, "training.steps=3", f"training.learning_rate={RATE}", *overrides))


class Numbers:
    """Rows of tokens that remember which of them were taken."""

    def __init__(self, count: int = 5, tokens: int = 12) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(2, 2000, (count, tokens), generator=generator)
        self.taken: list[int] = []

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, numbers: Tensor) -> Batch:
        self.taken += numbers.tolist()
        return {"input_ids": self.tokens[numbers], "labels": self.tokens[numbers]}


def start(place: Workspace, strategy: str = "flora") -> Adapter:
    chosen = aggregation_strategy(strategy)
    spec = place.adapted.spec(0)
    return starting_adapter(chosen.dispatch(chosen.init(spec), ClientInfo("ada", 4)), spec)


def trained(place: Workspace, position: Position = FIRST, trains: Any = "ab", given: Adapter | None = None) -> Adapter:
    place.adapted.use_global(Adapter.empty(), "")
    place.adapted.load(given or start(place), 3)
    train(place, Numbers(), position, trains)
    return place.adapted.read()


def settings(**given: Any) -> TrainingSettings:
    return TrainingSettings(learning_rate=1.0, steps=4, **given)


def rates(chosen: TrainingSettings, rounds: int = 2) -> list[float]:
    return [
        learning_rate(chosen, Position(number, rounds, "x"), step)
        for number in range(1, rounds + 1)
        for step in range(chosen.steps)
    ]


def test_a_constant_rate_stays() -> None:
    assert rates(settings()) == [1.0] * 8


def test_a_linear_rate_falls_over_the_whole_run() -> None:
    assert rates(settings(schedule="linear")) == [1 - step / 8 for step in range(8)]


def test_a_cosine_rate_falls_over_the_whole_run() -> None:
    expected = [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates(settings(schedule="cosine")) == pytest.approx(expected)


def test_warm_up_begins_anew_in_every_round() -> None:
    assert rates(settings(warmup_steps=2)) == [0.5, 1.0, 1.0, 1.0] * 2
    falling = rates(settings(schedule="linear", warmup_steps=2))
    assert falling == [0.5, 7 / 8, 6 / 8, 5 / 8, 0.5 * 4 / 8, 3 / 8, 2 / 8, 1 / 8]


def test_a_round_past_the_planned_ones_does_not_climb_again() -> None:
    assert learning_rate(settings(schedule="cosine"), Position(7, 2, "x"), 3) == pytest.approx(0.0)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 20])
def test_every_example_comes_once_per_pass(batch_size: int) -> None:
    batches = numbers_of_batches(7, batch_size, seed=1)
    numbers: list[int] = []
    while len(numbers) < 7 * batch_size:
        batch = next(batches).tolist()
        assert len(batch) == batch_size
        numbers += batch
    passes = [numbers[at : at + 7] for at in range(0, len(numbers), 7)]
    assert len(passes) == batch_size
    assert all(sorted(one) == list(range(7)) for one in passes)


def first_batches(seed: int) -> list[list[int]]:
    return [batch.tolist() for batch in islice(numbers_of_batches(50, 5, seed), 10)]


def test_the_order_follows_from_the_seed() -> None:
    assert first_batches(1) == first_batches(1)
    assert first_batches(1) != first_batches(2)


def test_equal_seeds_give_equal_bits(folder: Path) -> None:
    one = trained(place(folder))
    torch.rand(3)
    trained(place(folder), Position(2, 2, "ben"))  # another client on the same worker in between
    assert trained(place(folder)).sha256() == one.sha256()


@pytest.mark.parametrize(
    ("other", "overrides"),
    [(Position(2, 2, "ada"), ()), (Position(1, 2, "ben"), ()), (Position(1, 2, "ada"), ("seed=1",))],
    ids=["round", "client", "run seed"],
)
def test_other_rounds_clients_and_seeds_see_other_batches(
    folder: Path, other: Position, overrides: tuple[str, ...]
) -> None:
    one, two = Numbers(50), Numbers(50)
    for rows, position, chosen in ((one, Position(1, 2, "ada"), ()), (two, other, overrides)):
        where = place(folder, *chosen)
        where.adapted.load(start(where))
        train(where, rows, position)
    assert one.taken != two.taken


def test_a_worker_serves_two_runs_with_the_seed_of_each(folder: Path) -> None:
    assert workspace(tiny(folder, "seed=1")).adapted is workspace(tiny(folder, "seed=2")).adapted
    assert workspace(tiny(folder, "seed=1")).experiment.seed == 1
    assert workspace(tiny(folder, "seed=2")).experiment.seed == 2


def test_what_is_returned_are_the_losses(folder: Path) -> None:
    where = place(folder)
    where.adapted.load(start(where))
    rows = Numbers(2)
    with torch.no_grad():
        first = float(where.task.row_losses(where.adapted.model, rows.take(torch.tensor([0, 1]))).mean())
    once = place(folder, "training.steps=1")
    once.adapted.load(start(once))
    metrics = train(once, rows, Position(1, 1, "ada"))
    assert metrics == {"train_loss": pytest.approx(first), "last_loss": pytest.approx(first)}
    where.adapted.load(start(where))
    metrics = train(where, rows, Position(1, 1, "ada"))
    assert metrics["last_loss"] < metrics["train_loss"] < first


def assert_close(one: Adapter, two: Adapter, share: float) -> None:
    """Compare two updates relative to how far they are from the start."""
    assert one.layout == two.layout
    assert float((one.flat - two.flat).norm()) <= share * float(one.flat[: one.layout.head_numel].norm())


def test_accumulated_batches_equal_one_bigger_batch(folder: Path) -> None:
    whole = trained(place(folder, "training.batch_size=4"))
    parts = trained(place(folder, "training.batch_size=2", "training.accumulation=2"))
    assert_close(whole, parts, 1e-3)
    assert gradient(place(folder, "training.batch_size=4")) == pytest.approx(
        gradient(place(folder, "training.batch_size=2", "training.accumulation=2")), abs=1e-6
    )


def gradient(where: Workspace) -> list[float]:
    """Return the first step's clipped gradient, caught where the optimizer takes it."""
    found: list[Tensor] = []

    def catch(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        found.extend(p.grad.flatten().clone() for group in optimizer.param_groups for p in group["params"])

    where.adapted.load(start(where), 3)
    hook = register_optimizer_step_pre_hook(catch)
    try:
        train(where, Numbers(), Position(1, 2, "ada"))
    finally:
        hook.remove()
    count = len(found) // where.experiment.training.steps
    return torch.cat(found[:count]).tolist()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_update(folder: Path, dropout: float) -> None:
    option = f"adapter.options.dropout={dropout}"
    plain = trained(place(folder, option))
    saving = trained(place(folder, option, "training.gradient_checkpointing=true"))
    assert_close(plain, saving, 1e-5)


def test_gradients_are_clipped(folder: Path) -> None:
    limit = torch.tensor(gradient(place(folder, "training.max_grad_norm=0.01"))).norm()
    assert float(limit) == pytest.approx(0.01, rel=1e-3)


def test_weight_decay_is_decoupled(folder: Path) -> None:
    given = start(place(folder))
    plain = trained(place(folder, "training.steps=1"))
    decayed = trained(place(folder, "training.steps=1", "training.weight_decay=0.5"))
    shrunk = plain.inner_factors - RATE * 0.5 * given.inner_factors
    torch.testing.assert_close(decayed.inner_factors, shrunk, rtol=1e-5, atol=1e-7)


def test_a_frozen_a_keeps_its_bits(folder: Path) -> None:
    given = start(place(folder), "ffa_lora")
    update = trained(place(folder, "training.weight_decay=0.5"), trains="b", given=given)
    assert torch.equal(update.inner_factors, given.inner_factors)
    assert update.flat[: update.layout.head_numel].any()


def test_dropout_changes_what_is_learnt(folder: Path) -> None:
    assert trained(place(folder, "adapter.options.dropout=0.3")).sha256() != trained(place(folder)).sha256()


def broken(where: Workspace, worth: float = math.nan) -> Adapter:
    """Give the adapter a number no loss survives."""
    given = start(where)
    flat = given.flat.clone()
    flat[: given.layout.head_numel] = worth
    return given.with_flat(flat)


@pytest.mark.parametrize("worth", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_training(folder: Path, worth: float) -> None:
    where = place(folder)
    where.adapted.load(broken(where, worth))
    with pytest.raises(TrainingError, match=r"the loss became nan in step 1; lower training\.learning_rate"):
        train(where, Numbers(), Position(1, 2, "ada"))


def test_after_a_failure_the_next_client_finds_a_clean_worker(folder: Path) -> None:
    honest = trained(place(folder, "adapter.options.dropout=0.3"))
    where = place(folder, "adapter.options.dropout=0.3")
    with pytest.raises(TrainingError):
        trained(where, given=broken(where))
    assert not where.adapted.model.training
    assert all(parameter.grad is None for parameter in where.adapted.model.parameters())
    assert trained(where).sha256() == honest.sha256()


def test_a_client_without_examples_is_told_so(folder: Path) -> None:
    where = place(folder)
    where.adapted.load(start(where))
    with pytest.raises(TrainingError, match="ada has no examples"):
        train(where, Numbers(0), Position(1, 2, "ada"))


def test_torchs_global_generator_is_left_alone(folder: Path) -> None:
    where = place(folder, "adapter.options.dropout=0.3")
    before = torch.random.get_rng_state()
    trained(where)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_autocast_formats() -> None:
    cpu = torch.device("cpu")
    assert autocast_dtype("auto", cpu) == torch.float32
    assert [autocast_dtype(name, cpu) for name in ("fp32", "bf16", "fp16")] == [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]


def test_bf16_training_keeps_fp32_factors(folder: Path) -> None:
    update = trained(place(folder, 'training.precision="bf16"'))
    assert update.flat.dtype == torch.float32
    assert_close(trained(place(folder)), update, 0.5)
    assert update.sha256() != trained(place(folder)).sha256()


def test_an_unmerged_global_adapter_trains_alike(folder: Path) -> None:
    merged, beside = place(folder), place(folder, 'training.global_adapter="unmerged"')
    spec = merged.adapted.spec(0)
    whole = global_adapter(spec)
    updates = []
    for where in (merged, beside):
        where.adapted.use_global(whole, "v")
        where.adapted.load(start(where))
        train(where, Numbers(), Position(1, 1, "ada"))
        updates.append(where.adapted.read())
    assert_close(*updates, 1e-2)
    assert_close(trained(merged), trained(beside), 1e-2)
    assert float((updates[0].flat - trained(merged).flat).norm()) > 0


def global_adapter(spec: ModelSpec) -> Adapter:
    strategy = aggregation_strategy("flora")
    drawn = starting_adapter(strategy.dispatch(strategy.init(spec), ClientInfo("g", 2)), spec)
    return drawn.with_flat(drawn.flat + 0.02)


def test_the_base_is_held_once(folder: Path) -> None:
    base = place(folder).adapted.base
    assert isinstance(base, BaseModel)
    assert place(folder, "adapter.options.dropout=0.1").adapted.base is base
