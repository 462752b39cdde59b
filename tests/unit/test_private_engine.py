"""A step of DP-SGD: clipped sums, noise once, micro-batches, empty samples, and models that are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast, get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import chi2
from torch import Tensor, nn

from client.privacy.engine import Engine, Gradients, open_engine
from client.privacy.gradients import outer
from client.privacy.gradients.attach import per_sample
from common.errors import NotPrivate
from common.sparse_branch import SparseBranch
from tests import private_models as models
from tests.private_models import Case

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ENGINES = get_args(Gradients)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def plain_losses(model: nn.Module, batch: models.Batch) -> Tensor:
    found: Tensor = model(batch["x"]).square().flatten(1).sum(1)
    return found


def small(rows: int = 6) -> Case:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return Case(model, {"x": torch.randn(rows, 3)}, plain_losses)


@contextmanager
def opened(
    case: Case,
    gradients: Gradients = "own",
    noise: float = 0.0,
    clip: float = 1.0,
    expected: float = 1.0,
    seed: int = 1,
) -> Iterator[Engine]:
    optimizer = torch.optim.SGD(case.parameters, lr=1.0)
    generator = torch.Generator().manual_seed(seed)
    with open_engine(
        case.model,
        case.parameters,
        optimizer,
        gradients=gradients,
        noise_multiplier=noise,
        clipping_norm=clip,
        expected_rows=expected,
        generator=generator,
    ) as engine:
        yield engine


def add(engine: Engine, case: Case, start: int = 0, stop: int | None = None) -> None:
    some = {key: tensor[start:stop] for key, tensor in case.batch.items()}
    engine.add(lambda: case.losses(case.model, some), len(next(iter(some.values()))))


def gradient(case: Case) -> Tensor:
    """Return the gradients as one vector, and clear them as a step does."""
    parts = []
    for parameter in case.parameters:
        assert parameter.grad is not None
        parts.append(parameter.grad.flatten())
        parameter.grad = None
    return torch.cat(parts)


def flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("gradients", ENGINES)
def test_every_engine_gives_the_clipped_mean_in_any_micro_batches(gradients: Gradients) -> None:
    case = models.llama_lora(target_modules=["q_proj", "down_proj"])
    one_at_a_time = case.one_at_a_time()
    clip = float(models.norms_of(one_at_a_time).median())
    expected = flat(models.clipped_sums_of(one_at_a_time, clip)) / 5
    with opened(case, gradients, clip=clip, expected=5) as engine:
        for cuts in ([0, 4], [0, 1, 2, 3, 4], [0, 3, 4]):
            for start, stop in pairwise(cuts):
                add(engine, case, start, stop)
            engine.noise()
            torch.testing.assert_close(gradient(case), expected, rtol=0, atol=1e-5 * float(expected.norm()))


@pytest.mark.parametrize("gradients", ENGINES)
def test_without_noise_and_with_a_huge_norm_a_step_is_the_ordinary_one(gradients: Gradients) -> None:
    case = small()
    plain = flat(list(torch.autograd.grad(case.all_losses().mean(), case.parameters)))
    with opened(case, gradients, clip=1e6, expected=case.rows) as engine:
        add(engine, case)
        engine.noise()
    torch.testing.assert_close(gradient(case), plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gradients", ENGINES)
def test_an_empty_step_is_pure_noise_of_the_right_size(gradients: Gradients) -> None:
    noise, clip, expected = 1.5, 0.7, 8.0
    case = Case(nn.Linear(250, 200), {"x": torch.zeros(2, 250)}, plain_losses)
    with opened(case, gradients, noise, clip, expected) as engine:
        engine.noise()
        first = gradient(case)
        add(engine, case)  # inputs of zero: only the bias has a gradient
        engine.noise()
        second = gradient(case)[: 250 * 200]
    std = noise * clip / expected
    for drawn in (first, second):
        ratio, freedom = drawn.double().square().sum() / std**2, drawn.numel()
        assert chi2.ppf(1e-6, freedom) < ratio < chi2.ppf(1 - 1e-6, freedom)
        assert abs(drawn.mean()) < 5 * std / freedom**0.5
    correlation = float(torch.corrcoef(torch.stack([first[: len(second)], second]))[0, 1])
    assert abs(correlation) < 5 / len(second) ** 0.5


def test_noise_does_not_depend_on_the_rows_or_on_how_they_are_cut() -> None:
    case, found = small(), []
    for cuts in ([0, 6], [0, 1, 2, 3, 4, 5, 6], [0, 2, 6]):
        with opened(case, noise=1.0) as engine:
            for start, stop in pairwise(cuts):
                add(engine, case, start, stop)
            engine.noise()
        found.append(gradient(case))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-6)


def test_parameters_in_bf16_are_noised_in_fp32_and_rounded_afterwards() -> None:
    case = Case(nn.Linear(100, 100, bias=False).bfloat16(), {"x": torch.zeros(1, 100)}, plain_losses)
    exact = Case(nn.Linear(100, 100, bias=False), case.batch, plain_losses)
    drawn = []
    for some in (case, exact):
        with opened(some, noise=1.0) as engine:
            engine.noise()
        drawn.append(gradient(some))
    assert torch.equal(drawn[0], drawn[1].bfloat16())


@pytest.mark.parametrize("gradients", ENGINES)
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_on_the_model(gradients: Gradients, fails: bool) -> None:
    case = models.llama_lora(target_modules=["q_proj"])
    modules = {name: dict(module.__dict__) for name, module in case.model.named_modules()}
    hooks = [len(module._forward_hooks) + len(module._backward_hooks) for module in case.model.modules()]
    names = list(case.model.state_dict())
    try:
        with opened(case, gradients) as engine:
            add(engine, case)
            if fails:
                raise KeyError("in the middle")
            engine.noise()
    except KeyError:
        assert fails
    for name, module in case.model.named_modules():
        assert {key: id(value) for key, value in module.__dict__.items() if key != "_is_full_backward_hook"} == {
            key: id(value) for key, value in modules[name].items() if key != "_is_full_backward_hook"
        }
    assert [len(module._forward_hooks) + len(module._backward_hooks) for module in case.model.modules()] == hooks
    assert all(not parameter.__dict__ for parameter in case.model.parameters())
    assert list(case.model.state_dict()) == names
    with opened(case, "own") as engine:  # and a second one can be opened
        add(engine, case)


def test_a_second_engine_at_the_same_time_is_refused() -> None:
    case = small()
    with opened(case), pytest.raises(NotPrivate, match="another engine"), opened(case):
        pass
    assert all("forward" not in module.__dict__ for module in case.model.modules())


def test_frozen_factors_do_not_move() -> None:
    case = models.causal(models.freeze(models.llama_lora().model, "lora_A"))
    frozen = {name: p.clone() for name, p in case.model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(case.parameters, lr=0.1)
    before = [parameter.clone() for parameter in case.parameters]
    settings: dict[str, Any] = {"noise_multiplier": 1.0, "clipping_norm": 1.0, "expected_rows": 4}
    with open_engine(case.model, case.parameters, optimizer, generator=torch.Generator(), **settings) as engine:
        add(engine, case)
        engine.noise()
    optimizer.step()
    assert all(torch.equal(p, frozen[name]) for name, p in case.model.named_parameters() if name in frozen)
    assert all(p.grad is None for name, p in case.model.named_parameters() if name in frozen)
    assert not any(torch.equal(p, old) for p, old in zip(case.parameters, before, strict=True))


def test_a_factor_that_is_thawed_in_between_is_caught() -> None:
    case = models.causal(models.freeze(models.llama_lora().model, "lora_A"))
    with opened(case) as engine:
        add(engine, case)
        cast(Any, case.model).set_adapter("default")
        with pytest.raises(NotPrivate, match="set_adapter"):
            add(engine, case)


# Models whose rows cannot be told apart are refused by name.


class Weighted(nn.Module):
    """A layer nobody has a rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Flattening(nn.Module):
    """Rows become tokens inside, as in a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.expert(x.flatten(0, 1))
        return found.view(x.shape)


class Past(nn.Module):
    """A layer's weight is used without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x) + x @ self.inner.weight
        return found


class Mean(nn.Module):
    """Its class is named like a norm, but its weight is not multiplied entry by entry."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.mean()


def dora() -> nn.Module:
    return get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(target_modules=["0"], use_dora=True))


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "unknown layer": (lambda: nn.Sequential(Weighted()), ("0 (Weighted)", "weight", "no rule")),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(5).requires_grad_(False)),
        ("1 (BatchNorm1d)", "rows"),
    ),
    "dora": (dora, ("0 (Linear)", "DoraLinearVariant")),
    "split weight": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))),
        ("0.parametrizations.weight (ParametrizationList)", "original0", "no rule"),
    ),
    "groups": (lambda: nn.Sequential(nn.Conv2d(2, 2, 1, groups=2)), ("0 (Conv2d)", "2 groups")),
    "padding": (lambda: nn.Sequential(nn.Conv2d(2, 2, 3, padding="same")), ("0 (Conv2d)", "same")),
    "renormalised": (lambda: nn.Sequential(nn.Embedding(3, 3, max_norm=1.0)), ("0 (Embedding)", "max_norm")),
    "frequency": (lambda: nn.Sequential(nn.Embedding(3, 3, scale_grad_by_freq=True)), ("0 (Embedding)", "batch")),
    "experts": (lambda: nn.Sequential(Flattening()), ("0.expert (Linear)", "(20, 3) for 4 rows")),
    "past": (lambda: nn.Sequential(Past()), ("0.inner.weight", "otherwise")),
    "another norm": (lambda: nn.Sequential(type("OddRMSNorm", (Mean,), {})()), ("0 (OddRMSNorm)", "entry by entry")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    build, words = REFUSED[name]
    case = Case(build(), {"x": torch.randn(4, 5, 3)}, plain_losses)
    with pytest.raises(NotPrivate) as refused, opened(case) as engine:
        add(engine, case)
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert "\n" not in str(refused.value)
    assert all("forward" not in module.__dict__ for module in case.model.modules())


def test_parameters_must_be_those_that_learn() -> None:
    case = small()
    model, (first, *others) = case.model, case.parameters
    optimizer = torch.optim.SGD(others, lr=1.0)
    settings: dict[str, Any] = {"noise_multiplier": 1.0, "clipping_norm": 1.0, "expected_rows": 1}
    settings["generator"] = torch.Generator()
    with pytest.raises(NotPrivate, match=r"0\.weight is trainable"), open_engine(model, others, optimizer, **settings):
        pass
    with pytest.raises(NotPrivate, match="optimizer"), open_engine(model, [first, *others], optimizer, **settings):
        pass
    first.requires_grad_(False)
    optimizer = torch.optim.SGD([first, *others], lr=1.0)
    with pytest.raises(NotPrivate, match="frozen"), open_engine(model, [first, *others], optimizer, **settings):
        pass


def test_entries_of_a_matrix_belong_to_no_module() -> None:
    layer = nn.Linear(3, 3).requires_grad_(False)
    branch = SparseBranch(layer, torch.zeros(3, 3), torch.tensor([1, 5]))
    case = Case(nn.Sequential(layer), {"x": torch.randn(4, 3)}, plain_losses)
    with pytest.raises(NotPrivate, match=r"parameter 1 of 1.*no module"), per_sample(case.model, [branch.values]):
        pass


@pytest.mark.parametrize("gradients", ENGINES)
def test_losses_must_be_one_per_row(gradients: Gradients) -> None:
    case = small()
    with opened(case, gradients) as engine, pytest.raises(NotPrivate, match=r"shape \(\) for 6 rows"):
        engine.add(lambda: case.all_losses().mean(), 6)


def test_opacus_engines_explain_what_they_cannot_do() -> None:
    case = models.llama_lora(target_modules=["embed_tokens", "v_proj"])
    for gradients in ("hooks", "functorch", "ghost"):
        with pytest.raises(NotPrivate, match='gradients to "own"'), opened(case, cast(Gradients, gradients)) as engine:
            add(engine, case)


@pytest.mark.parametrize("gradients", ["own", "hooks", "functorch"])
def test_one_broken_row_spoils_nothing(gradients: Gradients) -> None:
    case = small()
    rest = Case(case.model, {"x": case.batch["x"][1:]}, plain_losses)
    case.batch["x"][0] = torch.inf  # type: ignore[index]
    found = []
    for some in (case, rest):
        with opened(some, gradients) as engine:
            add(engine, some)
            engine.noise()
        found.append(gradient(some))
    assert torch.isfinite(found[0]).all()
    torch.testing.assert_close(*found)


# Faults that a test must see.


def test_a_wrong_rule_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = models.llama_lora(target_modules=["q_proj"])
    one_at_a_time = case.one_at_a_time()
    clip = float(models.norms_of(one_at_a_time).median())
    expected = flat(models.clipped_sums_of(one_at_a_time, clip))
    right = outer.Outer.dense

    def twice(self: outer.Outer) -> Tensor:
        return 2 * right(self)

    def rows_of_b_swapped(self: outer.Outer) -> Tensor:
        return right(self).flip(0) if self.shape[0] > self.shape[1] else right(self)

    for wrong in (twice, rows_of_b_swapped):
        monkeypatch.setattr(outer.Outer, "dense", wrong)
        with opened(case, clip=clip) as engine:
            add(engine, case)
            engine.noise()
        assert not torch.allclose(gradient(case), expected, rtol=0, atol=1e-4 * float(expected.norm()))
