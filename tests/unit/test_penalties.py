"""What is added to the loss of local training: values, gradients, and that nothing else changes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from client.penalties import proximal, tail_norms
from client.training import Position, train
from common.adapter import Adapter
from common.federation import ClientInfo
from common.lowrank import LowRank
from common.start import starting_adapter
from common.tasks import Batch
from common.workspace import Workspace, workspace
from strategies import aggregation_strategy
from tests.tiny import tiny


def test_the_proximal_term_is_half_the_squared_distance() -> None:
    now = [torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([[1.0]], requires_grad=True)]
    then = [torch.tensor([0.0, 0.0]), torch.tensor([[3.0]])]
    value = proximal(now, then, 0.5)
    assert value.item() == 0.25 * (25 + 4)
    value.backward()
    assert now[0].grad is not None
    assert now[1].grad is not None
    assert (now[0].grad.tolist(), now[1].grad.tolist()) == ([1.5, 2.0], [[-1.0]])


def test_the_proximal_term_is_summed_in_float32() -> None:
    assert proximal([torch.full((9,), 100.0).half()], [torch.zeros(9).half()], 2.0).item() == 90_000


@pytest.mark.parametrize(
    ("rank", "share", "kept"), [(4, 0.5, 2), (4, 0.99, 3), (4, 1.0, 3), (5, 0.5, 2), (3, 0.1, 0), (1, 0.9, 0)]
)
def test_the_tail_begins_after_the_free_share(rank: int, share: float, kept: int) -> None:
    b, a = torch.arange(1.0, 2 * rank + 1).view(2, rank), torch.ones(rank, 3)
    wanted = math.sqrt(float(b[:, kept:].square().sum())) * math.sqrt(3 * (rank - kept))
    assert tail_norms([(b, a), (b, a)], share, 0.1).item() == pytest.approx(0.2 * wanted)


def test_the_tail_of_zeros_has_no_gradient_and_no_nan() -> None:
    b, a = torch.zeros(2, 4, requires_grad=True), torch.ones(4, 3, requires_grad=True)
    tail_norms([(b, a)], 0.5, 1.0).backward()
    assert b.grad is not None
    assert a.grad is not None
    assert not b.grad.any()
    assert not a.grad.any()


# ---- in training


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("penalties")


class Numbers:
    """A few rows of tokens."""

    def __init__(self) -> None:
        self.tokens = torch.randint(2, 2000, (4, 12), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, numbers: Tensor) -> Batch:
        return {"input_ids": self.tokens[numbers], "labels": self.tokens[numbers]}


def place(folder: Path, *overrides: str) -> Workspace:
    return workspace(tiny(folder, "training.learning_rate=0.01", "training.max_grad_norm=1e9", *overrides))


def start(where: Workspace) -> Adapter:
    """Draw a start whose b is not zero."""
    strategy, spec = aggregation_strategy("fedavg"), where.adapted.spec(0)
    given = starting_adapter(strategy.dispatch(strategy.init(spec), ClientInfo("ada", 4)), spec)
    noise = torch.randn(given.flat.shape, generator=torch.Generator().manual_seed(2))
    return given.with_flat(given.flat + 0.01 * noise)


def gradients(where: Workspace, **options: Any) -> tuple[list[list[Tensor]], dict[str, float], Adapter]:
    """Train, and return every step's gradients as the optimizer takes them, the metrics and the adapter."""
    found: list[list[Tensor]] = []

    def catch(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        found.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    where.adapted.use_global(Adapter.empty(), "")
    where.adapted.load(start(where), 3)
    hook = register_optimizer_step_pre_hook(catch)
    try:
        metrics = train(where, Numbers(), Position(1, 2, "ada"), **options)
    finally:
        hook.remove()
    return found, metrics, where.adapted.read()


def test_fedprox_pulls_back_by_the_distance_from_the_start(folder: Path) -> None:
    """Nothing in the first step; in the second by μ (θ₁ − θ₀), in the adapter's own parameters."""
    steps = ("training.steps=2", 'adapter.options.head=["model.norm"]')
    plain, without, _ = gradients(place(folder, *steps))
    pulled, metrics, _ = gradients(place(folder, *steps, "training.proximal_mu=3.0"))
    _, _, after_one = gradients(place(folder, "training.steps=1", 'adapter.options.head=["model.norm"]'))
    assert all(torch.equal(one, other) for one, other in zip(plain[0], pulled[0], strict=True))
    assert metrics == without  # the loss reported is the data's

    where = place(folder, *steps)
    before: dict[int, Tensor] = {}
    for adapter in (start(where), after_one):
        where.adapted.load(adapter, 3)
        parameters = [p.detach().clone() for p in where.adapted.train_only("ab")]
        before[len(before)] = torch.cat([p.flatten() for p in parameters])
    pull = torch.cat([(one - other).flatten() for one, other in zip(pulled[1], plain[1], strict=True)])
    torch.testing.assert_close(pull, 3.0 * (before[1] - before[0]), rtol=1e-3, atol=1e-5)
    assert float(pull.norm()) > 0.01


def test_the_more_mu_the_nearer_the_client_stays(folder: Path) -> None:
    distances = []
    for mu in (0.0, 10.0, 1000.0):
        where = place(folder, "training.steps=6", f"training.proximal_mu={mu}")
        _, _, trained = gradients(where)
        distances.append(float((trained.flat - start(where).flat).norm()))
    assert distances == sorted(distances, reverse=True)
    assert distances[2] < 0.5 * distances[0]


def test_the_tail_is_penalised_at_its_true_scale(folder: Path) -> None:
    """First step, of every layer: the gradients of λ ‖b[:, k:]‖ ‖a[k:]‖ with every scale in b."""
    where = place(folder, "training.steps=1")
    plain, without, _ = gradients(where)
    shrunk, metrics, _ = gradients(where, tail=(0.5, 0.25))
    assert metrics == without
    pull = [one - other for one, other in zip(shrunk[0], plain[0], strict=True)]
    given = start(where)
    for number, (name, part) in enumerate(given.layers.items()):
        assert isinstance(part, LowRank)
        scaling = where.adapted.layers[name].scaling["default"]
        assert scaling == 2.0
        b, a = part.b[:, 2:], part.a[2:]
        pull_a, pull_b = pull[2 * number], pull[2 * number + 1]
        torch.testing.assert_close(pull_a[2:], 0.25 * b.norm() * a / a.norm(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(pull_b[:, 2:], 0.25 * scaling * a.norm() * b / b.norm(), rtol=1e-3, atol=1e-4)
        assert not pull_a[:2].any()
        assert not pull_b[:, :2].any()


def test_without_penalties_no_bit_changes(folder: Path) -> None:
    plain = gradients(place(folder, "training.steps=2"))[2]
    none = gradients(place(folder, "training.steps=2", "training.proximal_mu=0.0"), tail=None)[2]
    assert none.sha256() == plain.sha256()
