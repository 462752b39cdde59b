"""Training a core between frames, or a few entries of a matrix: what moves, by which gradient, what the next finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.adapted_model import AdaptedModel
from common.adapter import Adapter
from common.federation import Dispatch
from common.lowrank import Dense, LowRank, Update
from common.start import starting_adapter
from common.travel import places
from tests.unit.test_adapted_model import (
    BUILDS,
    PIXELS,
    TOKENS,
    adapted,
    llama,
    logits,
    picture,
    random_adapter,
    with_update,
)

RANK = 3
FRAMES = 4
DENSITY = 0.05
SEED = 11

Built = tuple[Callable[[], nn.Module], tuple[str, ...], Tensor]


@pytest.fixture(params=BUILDS.values(), ids=BUILDS)
def built(request: pytest.FixtureRequest) -> Built:
    found: Built = request.param
    return found


def core_dispatch(model: AdaptedModel, rank: int = RANK) -> Dispatch:
    """Frames of rank 4 and a start between their first columns and rows."""
    numbers = torch.Generator().manual_seed(1)
    frames: dict[str, Update] = {}
    start: dict[str, Update] = {}
    for name, (out, inn) in model.spec(0).layers.items():
        b = torch.linalg.qr(torch.randn(out, FRAMES, generator=numbers)).Q
        a = torch.linalg.qr(torch.randn(inn, FRAMES, generator=numbers)).Q.T.contiguous()
        frames[name] = LowRank(b, a)
        start[name] = LowRank(b[:, :rank] @ (0.3 * torch.randn(rank, rank, generator=numbers)), a[:rank])
    return Dispatch(Adapter.pack(start), rank, SEED, trains="core", frames=Adapter.pack(frames))


def sparse_dispatch(model: AdaptedModel) -> Dispatch:
    """A matrix per layer that is zero outside the mask."""
    numbers, layers = torch.Generator().manual_seed(2), {}
    for name, (out, inn) in model.spec(0).layers.items():
        matrix = torch.zeros(out * inn)
        chosen = places(SEED, name, out * inn, DENSITY)
        matrix[chosen] = 0.1 * torch.randn(len(chosen), generator=numbers)
        layers[name] = Dense(matrix.view(out, inn))
    return Dispatch(Adapter.pack(layers), RANK, SEED, trains="sparse", density=DENSITY)


MAKE = {"core": core_dispatch, "sparse": sparse_dispatch}


def begun(built: Built, kind: str, **options: Any) -> tuple[AdaptedModel, Dispatch, Adapter]:
    build, targets, _ = built
    model = adapted(build, target_modules=targets, **options)
    dispatch = MAKE[kind](model)
    start = starting_adapter(dispatch, model.spec(0))
    model.load(start, 0, dispatch)
    return model, dispatch, start


def loss(model: nn.Module, inputs: Tensor) -> Tensor:
    found = model(inputs)
    result: Tensor = (found if isinstance(found, Tensor) else found.logits).square().mean()
    return result


def step(model: AdaptedModel, kind: Any, inputs: Tensor, size: float = 1.0) -> list[nn.Parameter]:
    """One step of plain gradient descent."""
    learn = model.train_only(kind)
    loss(model.model, inputs).backward()
    with torch.no_grad():
        for parameter in learn:
            assert parameter.grad is not None
            parameter -= size * parameter.grad
    for parameter in learn:
        parameter.grad = None
    return learn


def dense_gradients(built: Built, start: Adapter) -> dict[str, Tensor]:
    """The gradient of every target layer's whole weight, shape (out, in), at base + start, by a plain model."""
    build, _, inputs = built
    plain = with_update(build, start)
    loss(plain, inputs).backward()
    found = {}
    for name in start.layers:
        module = plain.get_submodule(name)
        gradient = module.weight.grad
        assert isinstance(gradient, Tensor)
        found[name] = gradient.T if type(module).__name__ == "Conv1D" else gradient.flatten(1)
    return found


@pytest.mark.parametrize("kind", MAKE)
def test_the_model_is_base_plus_start(built: Built, kind: str) -> None:
    model, _, start = begun(built, kind)
    build, _, inputs = built
    torch.testing.assert_close(
        logits(model.model, inputs), logits(with_update(build, start), inputs), rtol=1e-4, atol=1e-5
    )
    assert float((logits(model.model, inputs) - logits(build(), inputs)).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "unmerged"])
def test_a_global_adapter_stays_below_it(built: Built, kind: str, merge: bool) -> None:
    build, targets, inputs = built
    model = adapted(build, merge, target_modules=targets)
    whole = random_adapter(model, 2, seed=5)
    model.use_global(whole, "one")
    dispatch = MAKE[kind](model)
    start = starting_adapter(dispatch, model.spec(0))
    model.load(start, 0, dispatch)
    expected = logits(with_update(build, whole, start), inputs)
    torch.testing.assert_close(logits(model.model, inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MAKE)
def test_what_is_loaded_is_read(built: Built, kind: str) -> None:
    model, _, start = begun(built, kind)
    found = model.read()
    assert found.layout == start.layout
    torch.testing.assert_close(found.flat, start.flat, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.inner_factors, start.inner_factors)
    if kind == "sparse":
        assert torch.equal(found.flat, start.flat)


def test_a_core_moves_by_the_projected_gradient(built: Built) -> None:
    """``∂L/∂R = bᵀ G aᵀ`` for the whole weight's gradient G; with scale s in b, the parameter's own is s times it."""
    model, dispatch, start = begun(built, "core", alpha=float(RANK))
    step(model, "core", built[2])
    assert dispatch.frames is not None
    for name, gradient in dense_gradients(built, start).items():
        frame, before, after = (adapter.layers[name] for adapter in (dispatch.frames, start, model.read()))
        assert isinstance(frame, LowRank)
        assert isinstance(before, LowRank)
        assert isinstance(after, LowRank)
        b, a = frame.b[:, :RANK], frame.a[:RANK]
        core = b.T @ before.b - b.T @ gradient @ a.T
        torch.testing.assert_close(after.b, b @ core, rtol=1e-3, atol=1e-5)
        assert torch.equal(after.a, before.a)
        outside = after.b - b @ (b.T @ after.b)
        assert float(outside.norm()) < 1e-5 * float(after.b.norm())
        assert not torch.equal(after.b, before.b)


def test_entries_move_by_the_whole_weights_gradient_and_others_keep_their_bits(built: Built) -> None:
    model, dispatch, start = begun(built, "sparse")
    step(model, "sparse", built[2])
    for name, gradient in dense_gradients(built, start).items():
        before, after = (adapter.layers[name].dense().flatten() for adapter in (start, model.read()))
        mask = torch.zeros(len(before), dtype=torch.bool)
        mask[places(SEED, name, len(before), DENSITY)] = True
        assert torch.equal(after[~mask], torch.zeros(int((~mask).sum())))
        torch.testing.assert_close(after[mask], before[mask] - gradient.flatten()[mask], rtol=1e-4, atol=1e-6)
        assert not torch.equal(after[mask], before[mask])
    assert dispatch.density == DENSITY


@pytest.mark.parametrize("kind", MAKE)
def test_nothing_else_learns(built: Built, kind: Any) -> None:
    model, dispatch, _ = begun(built, kind)
    learn = model.train_only(kind)
    every = [parameter for parameter in model.peft_model.parameters() if parameter.requires_grad]
    entries = [len(places(SEED, n, o * i, DENSITY)) for n, (o, i) in model.spec(0).layers.items()]
    expected = entries if kind == "sparse" else [RANK * RANK] * len(model.layers)
    assert [parameter.numel() for parameter in learn] == expected
    assert {id(parameter) for parameter in every} <= {id(parameter) for parameter in learn}
    assert dispatch.trains == kind


@pytest.mark.parametrize("kind", MAKE)
def test_the_next_client_of_the_worker_finds_nothing_of_it(built: Built, kind: Any) -> None:
    model, _, _ = begun(built, kind)
    _, _, inputs = built
    step(model, kind, inputs)
    fresh = adapted(built[0], target_modules=built[1])
    ordinary = random_adapter(model, 5, seed=8)
    for each in (model, fresh):
        each.load(ordinary)
    assert torch.equal(logits(model.model, inputs), logits(fresh.model, inputs))
    assert [p.shape for p in model.train_only("ab")] == [p.shape for p in fresh.train_only("ab")]
    for each in (model, fresh):
        step(each, "ab", inputs, 0.1)
    assert torch.equal(model.read().flat, fresh.read().flat)
    model.load(Adapter.empty())
    fresh.load(Adapter.empty())
    assert torch.equal(logits(model.model, inputs), logits(fresh.model, inputs))


def test_one_kind_after_the_other_on_one_worker() -> None:
    """Core, entries, core of another rank: each as on a model of its own."""
    model = adapted(llama)
    for make, rank in ((core_dispatch, 3), (sparse_dispatch, 0), (core_dispatch, 2), (sparse_dispatch, 0)):
        dispatch = core_dispatch(model, rank) if make is core_dispatch else sparse_dispatch(model)
        start = starting_adapter(dispatch, model.spec(0))
        own = adapted(llama)
        for each in (model, own):
            each.load(start, 0, dispatch)
            step(each, dispatch.trains, TOKENS, 0.5)
        assert torch.equal(model.read().flat, own.read().flat)


def test_dropout_falls_on_the_core_as_on_any_factor() -> None:
    model, dispatch, start = begun((llama, ("q_proj", "v_proj"), TOKENS), "core", dropout=0.5)
    model.model.train()
    model.begin_pass(1)
    one = loss(model.model, TOKENS)
    model.begin_pass(2)
    two = loss(model.model, TOKENS)
    model.begin_pass(1)
    assert one.item() == loss(model.model, TOKENS).item()
    assert one.item() != two.item()
    model.model.eval()
    model.load(start, 0, dispatch)
    torch.testing.assert_close(logits(model.model), logits(with_update(llama, start)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [7.0, 5.0])
def test_a_factor_that_does_not_learn_keeps_its_bits_at_any_scale(alpha: float) -> None:
    """Divided by the scale and multiplied again it would not, and the server would refuse the update."""
    model = adapted(alpha=alpha, rslora=True)
    given = random_adapter(model, 3)
    model.load(given)
    assert torch.equal(model.read().flat, given.flat)
    step(model, "a", TOKENS, 0.1)
    after = model.read()
    outer = given.layout.outer_numel
    assert torch.equal(after.flat[:outer], given.flat[:outer])
    assert not torch.equal(after.flat[outer:], given.flat[outer:])
    step(model, "b", TOKENS, 0.1)
    assert torch.equal(model.read().inner_factors, after.inner_factors)
    assert not torch.equal(model.read().flat[:outer], after.flat[:outer])


def test_a_strided_padded_convolution_takes_a_matrix_beside_it() -> None:
    model = adapted(picture, target_modules=("conv",))
    given = random_adapter(model, 1, dense=True)
    model.load(given)
    torch.testing.assert_close(
        logits(model.model, PIXELS), logits(with_update(picture, given), PIXELS), rtol=1e-4, atol=1e-5
    )
