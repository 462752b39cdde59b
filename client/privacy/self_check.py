"""Checks that training would keep its promise, on the model and the data that it is about to use.

Rules for per-row gradients, losses and models come from many hands. So before a worker first trains under privacy, the
engine's own sums are compared with plain autograd, one row at a time; and every round is watched for parameters that
learn without noise, or that never learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

from client.privacy.engine import Gradients, open_engine
from client.privacy.gradients.attach import refuse_others
from common.adapted_model import SeededDropout
from common.errors import NotPrivate

Losses = Callable[[Mapping[str, Tensor]], Tensor]

EXACT, COARSE = 1e-4, 3e-2
"""Relative errors that rounding explains, where everything is fp32 and where something is not."""

PERTURBATION = 0.02
"""What is added to trained numbers meanwhile: where a factor is zero, the other one's gradient is, too."""

DROPOUTS = frozenset(
    {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}
)


def check_trainable(model: nn.Module, intended: Sequence[nn.Parameter]) -> None:
    """Make sure that exactly the intended parameters learn; PEFT makes others trainable when adapters are switched.

    Raises
    ------
    NotPrivate
        If another parameter requires a gradient, or one of these is not the model's own; names it.
    """
    refuse_others(model, intended)


def check_moved(before: Sequence[Tensor], parameters: Sequence[nn.Parameter], model: nn.Module) -> None:
    """Make sure that a noised step has moved every trained tensor, and that all are still the model's.

    Parameters
    ----------
    before : sequence of Tensor
        Copies of the parameters, from before the step.
    parameters : sequence of Parameter
        What is trained.
    model : nn.Module
        Whose parameters they are.

    Raises
    ------
    NotPrivate
        If one has not changed, noise and all; names it.
    """
    refuse_others(model, parameters)
    names = _names(model)
    for was, parameter in zip(before, parameters, strict=True):
        if torch.equal(was, parameter.detach()):
            raise NotPrivate(
                f"{names[id(parameter)]} did not move in a step with noise, so that what is accounted for is not what "
                "trains; build optimizer and engine after the model is in place, and choose a learning rate above 0"
            )


def check_gradients(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    row_losses: Losses,
    batch: Mapping[str, Tensor],
    *,
    gradients: Gradients = "own",
    tolerance: float | None = None,
) -> None:
    """Compare what the engine adds up with plain autograd, one row at a time; afterwards all is as before.

    It is made before anything is charged, and the server sees how it ends: the rows must be made up.

    The rows' losses must not change with their neighbours. The engine's sum of unclipped gradients must be that of
    autograd, and so must the sum of gradients that are all clipped to half of the smallest: that is right only if every
    row's gradient and norm are its own. Dropout is off meanwhile, and trained numbers are perturbed.

    Parameters
    ----------
    model : nn.Module
        Its trainable parameters are exactly ``parameters``.
    parameters : sequence of Parameter
        What is to be trained.
    row_losses : callable
        Runs the forward pass of a batch and returns each row's loss, shape (rows,).
    batch : mapping of str to Tensor
        Made-up rows, at least two; unlike rows tell more.
    gradients : {"own", "hooks", "functorch", "ghost"}
        The engine that will train.
    tolerance : float, optional
        Largest relative error; by default 1e-4, or 3e-2 where weights or losses are not fp32.

    Raises
    ------
    NotPrivate
        Naming the parameter whose gradient differs, or saying that rows depend on one another.
    """
    refuse_others(model, parameters)
    rows = len(next(iter(batch.values())))
    with _as_it_was(model, parameters), _without_dropout(model):
        single = [_alone(row_losses, parameters, _row(batch, number)) for number in range(rows)]
        together = row_losses(batch)
        if tolerance is None:
            tolerance = EXACT if _all_fp32(model, together) else COARSE
        _compare_losses(together.detach().float(), torch.stack([loss for loss, _ in single]), tolerance)
        norms = [float(torch.stack([part.norm() for part in parts]).norm()) for _, parts in single]
        if not all(map(math.isfinite, norms)):
            raise NotPrivate("the gradients of made-up rows are not finite at the adapter that was sent; start anew")
        half = min((norm for norm in norms if norm > 0), default=1.0) / 2
        for clipping_norm in (max(1.0, *norms) * 1e3, half):
            expected = _clipped_sum([parts for _, parts in single], norms, clipping_norm)
            found = _engine_sum(model, parameters, lambda: row_losses(batch), rows, clipping_norm, gradients)
            _compare_gradients(model, parameters, found, expected, tolerance)


def _row(batch: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    return {key: value[number : number + 1] for key, value in batch.items()}


def _alone(
    row_losses: Losses, parameters: Sequence[nn.Parameter], row: Mapping[str, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return a row's loss and gradients by plain autograd; like the engine, count one that is not finite as zero."""
    loss = row_losses(row).float().sum()
    found: Sequence[Tensor | None] = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    finite = all(bool(torch.isfinite(part).all()) for part in found if part is not None)
    pairs = zip(found, parameters, strict=True)
    return loss.detach(), [g.float() if g is not None and finite else torch.zeros_like(p).float() for g, p in pairs]


def _clipped_sum(rows: Sequence[Sequence[Tensor]], norms: Sequence[float], clipping_norm: float) -> list[Tensor]:
    factors = [min(1.0, clipping_norm / (norm + 1e-6)) for norm in norms]
    weighted = [[factor * part for part in parts] for factor, parts in zip(factors, rows, strict=True)]
    return [torch.stack(parts).sum(dim=0) for parts in zip(*weighted, strict=True)]


def _engine_sum(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    losses: Callable[[], Tensor],
    rows: int,
    clipping_norm: float,
    gradients: Gradients,
) -> list[Tensor]:
    """Run one step of the engine without noise."""
    engine = open_engine(
        model,
        parameters,
        torch.optim.SGD(parameters),
        gradients=gradients,
        noise_multiplier=0.0,
        clipping_norm=clipping_norm,
        expected_rows=1,
        generator=torch.Generator(parameters[0].device),
    )
    with engine as running:
        running.add(losses, rows)
        running.noise()
        return [torch.zeros_like(p).float() if p.grad is None else p.grad.float() for p in parameters]


def _compare_losses(together: Tensor, alone: Tensor, tolerance: float) -> None:
    if together.shape != alone.shape:
        raise NotPrivate(
            f"the task's losses have shape {tuple(together.shape)} for {len(alone)} rows; privacy needs one per row"
        )
    apart = (together - alone.to(together.device)).abs() > tolerance * (alone.abs() + together.abs() + 1e-6)
    if apart.any():
        raise NotPrivate(
            "a row's loss depends on the other rows of its batch; every row's loss must be a function of that row, "
            "divided by nothing that others change, in a model that joins no rows"
        )


def _compare_gradients(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    found: Sequence[Tensor],
    expected: Sequence[Tensor],
    tolerance: float,
) -> None:
    names, whole = _names(model), float(torch.stack([part.norm() for part in expected]).norm())
    for parameter, got, want in zip(parameters, found, expected, strict=True):
        error, size = float((got - want).norm()), float(want.norm())
        if not error <= tolerance * (size + 1e-2 * whole):
            raise NotPrivate(
                f"the per-row gradients of {names[id(parameter)]} are not what autograd finds one row at a time; "
                "freeze it, use another adapter method, or report the layer's rule"
            )


def _names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _all_fp32(model: nn.Module, losses: Tensor) -> bool:
    floats = [tensor for tensor in (losses, *model.parameters()) if tensor.is_floating_point()]
    return all(tensor.dtype in (torch.float32, torch.float64) for tensor in floats)


@contextmanager
def _as_it_was(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Perturb the trained numbers for a while, and put back numbers, gradients and modes, bit for bit."""
    numbers = [parameter.detach().clone() for parameter in parameters]
    kept = [parameter.grad for parameter in parameters]
    modes = {module: module.training for module in model.modules()}
    generator = torch.Generator().manual_seed(0)
    try:
        for parameter in parameters:
            noise = PERTURBATION * torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise.to(parameter.device, parameter.dtype))
            parameter.grad = None
        model.train()
        yield
    finally:
        for parameter, was, gradient in zip(parameters, numbers, kept, strict=True):
            parameter.data.copy_(was)
            parameter.grad = gradient
        for module, training in modes.items():
            module.training = training


class _NoDropout(BaseTorchFunctionMode):
    """Runs dropout functions as in evaluation: many models call them without a module that could be switched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return what was given in place of dropping, and let attention drop nothing."""
        kwargs = dict(kwargs or {})
        if func in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention and kwargs.get("dropout_p"):
            kwargs["dropout_p"] = 0.0
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and nothing else: layers that couple rows do it in training only."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, SeededDropout | nn.modules.dropout._DropoutNd):
                module.eval()
        stack.enter_context(_NoDropout())
        yield
