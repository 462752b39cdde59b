"""Opacus's own three ways to per-row gradients, for comparison: hooks, functorch, and ghost clipping."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn

from client.privacy.gradients.attach import refuse_coupled, refuse_others
from client.privacy.noising import Noising, refuse_other_optimizer, row_losses
from common.errors import NotPrivate

Mode = Literal["hooks", "functorch", "ghost"]

ON_MODULES = ("activations", "max_batch_len", "ft_compute_sample_grad", "autograd_grad_sample_hooks")
ON_PARAMETERS = ("grad_sample", "summed_grad", "_forward_counter", "_current_grad_sample", "_norm_sample")
"""What Opacus puts there, and in part leaves there."""


class HooksEngine:
    """Every row's gradient is kept, by hooks on layers or by functorch."""

    def __init__(self, optimizer: DPOptimizer, mode: Mode) -> None:
        self._optimizer, self._mode = optimizer, mode

    def add(self, losses: Callable[[], Tensor], rows: int) -> None:
        """Run one pass and add every row's clipped gradient to the step's sum."""
        found = row_losses(losses, rows)
        with _explained(self._mode), torch.autocast(found.device.type, enabled=False):
            found.sum().backward()
            _silence([parameter.grad_sample for parameter in self._optimizer.params], rows)
            self._optimizer.signal_skip_step(True)
            self._optimizer.pre_step()
            self._optimizer.zero_grad(set_to_none=True)

    def noise(self) -> None:
        """Put (sum + noise) / expected rows into every ``grad``."""
        for parameter in self._optimizer.params:
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
        self._optimizer.signal_skip_step(False)
        self._optimizer.pre_step()
        for parameter in self._optimizer.params:
            parameter.grad_sample = parameter.summed_grad = None


class GhostEngine:
    """Norms without gradients, then a second backward pass over weighted losses."""

    def __init__(self, hooks: GradSampleHooksFastGradientClipping, optimizer: DPOptimizerFastGradientClipping) -> None:
        self._hooks, self._optimizer = hooks, optimizer

    def add(self, losses: Callable[[], Tensor], rows: int) -> None:
        """Run one forward and two backward passes and add every row's clipped gradient to the step's sum."""
        found = row_losses(losses, rows)
        with _explained("ghost"), torch.autocast(found.device.type, enabled=False):
            DPTensorFastGradientClipping(self._hooks, self._optimizer, found, "sum").backward()
            if not all(bool(torch.isfinite(parameter.grad).all()) for parameter in self._optimizer.params):
                raise NotPrivate("a row's gradient is not finite, which ghost clipping cannot leave out")
            self._optimizer.signal_skip_step(True)
            self._optimizer.pre_step()
            self._optimizer.zero_grad(set_to_none=True)

    def noise(self) -> None:
        """Put (sum + noise) / expected rows into every ``grad``."""
        for parameter in self._optimizer.params:
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.signal_skip_step(False)
        self._optimizer.pre_step()
        for parameter in self._optimizer.params:
            parameter.summed_grad = None


@contextmanager
def opacus_engine(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    noising: Noising,
    mode: Mode,
) -> Iterator[HooksEngine | GhostEngine]:
    """Open one of Opacus's engines; see :func:`client.privacy.engine.open_engine`."""
    refuse_other_optimizer(optimizer, parameters)
    refuse_coupled(model)
    refuse_others(model, parameters)
    settings = noising.optimizer_settings()
    try:
        with _explained(mode):
            engine: HooksEngine | GhostEngine
            if mode == "ghost":
                ghost = GradSampleHooksFastGradientClipping(
                    model, loss_reduction="sum", max_grad_norm=noising.clipping_norm
                )
                engine = GhostEngine(ghost, DPOptimizerFastGradientClipping(optimizer, **settings))
            else:
                GradSampleHooks(model, loss_reduction="sum", force_functorch=mode == "functorch")
                engine = HooksEngine(DPOptimizer(optimizer, **settings), mode)
        yield engine
    finally:
        _detach(model)


def _detach(model: nn.Module) -> None:
    """Take everything of Opacus's away: hooks, kept activations, attributes of parameters."""
    for hook in model.__dict__.get("autograd_grad_sample_hooks", ()):
        hook.remove()
    for held, keys in ((model.modules(), ON_MODULES), (model.parameters(), ON_PARAMETERS)):
        for thing in held:
            for key in keys:
                thing.__dict__.pop(key, None)


def _silence(gradients: Sequence[Tensor | None], rows: int) -> None:
    """Set rows whose gradient is not finite to zero; what is missing Opacus reports itself."""
    known = [gradient for gradient in gradients if gradient is not None and len(gradient) == rows]
    if known:
        bad = ~torch.isfinite(torch.stack([gradient.flatten(1).norm(dim=1) for gradient in known])).all(dim=0)
        for gradient in known:
            gradient[bad] = 0


@contextmanager
def _explained(mode: Mode) -> Iterator[None]:
    """Turn Opacus's errors into one line that says what to do, and be silent on what is so by design."""
    try:
        with warnings.catch_warnings():
            # The first adapted layer's input needs no gradient.
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotPrivate(
            f'Opacus\'s engine "{mode}" cannot find the per-row gradients: {reason}; set privacy.gradients to "own"'
        ) from error
