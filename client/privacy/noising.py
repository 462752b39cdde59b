"""What every engine shares: how much noise, and what an optimizer must hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.errors import NotPrivate


@dataclass(frozen=True)
class Noising:
    """How much a row may count, and how much noise hides it.

    Parameters
    ----------
    noise_multiplier : float
        Standard deviation of the noise over ``clipping_norm``.
    clipping_norm : float
        Largest norm of a row's gradient.
    expected_rows : float
        What the noised sum is divided by.
    generator : Generator
        Of the noise.
    """

    noise_multiplier: float
    clipping_norm: float
    expected_rows: float
    generator: torch.Generator

    def optimizer_settings(self) -> dict[str, object]:
        """Spell it for Opacus's optimizers; their secure mode adds up four Gaussians, and needs no library for that."""
        return {
            "noise_multiplier": self.noise_multiplier,
            "max_grad_norm": self.clipping_norm,
            "expected_batch_size": self.expected_rows,
            "generator": self.generator,
            "secure_mode": True,
        }


def refuse_other_optimizer(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Refuse an optimizer that would move other tensors than those whose gradients are noised.

    Raises
    ------
    NotPrivate
        If it holds other parameters, as after a model was moved or its adapter attached again.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if held != {id(parameter) for parameter in parameters}:
        raise NotPrivate(
            f"the optimizer holds {len(held)} parameters that are not the {len(parameters)} to be trained; build it "
            "after the model is in place"
        )


def row_losses(losses: Callable[[], Tensor], rows: int) -> Tensor:
    """Run a forward pass and return its losses, one for each row.

    Raises
    ------
    NotPrivate
        If there are not as many as rows.
    """
    found = losses()
    if tuple(found.shape) != (rows,):
        raise NotPrivate(
            f"the task's losses have shape {tuple(found.shape)} for {rows} rows; privacy needs one loss per row, shape "
            f"({rows},), that depends on its own row only"
        )
    return found.float()
