"""What a step of DP-SGD does to gradients: clip every row's, add them up, add noise once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from client.privacy.noising import Noising
from client.privacy.opacus_engines import opacus_engine
from client.privacy.own_engine import own_engine

Gradients = Literal["own", "hooks", "functorch", "ghost"]


class Engine(Protocol):
    """Clips and noises the gradients of the parameters it was opened for."""

    def add(self, losses: Callable[[], Tensor], rows: int) -> None:
        """Run one forward and backward pass and add every row's clipped gradient to the step's sum.

        Parameters
        ----------
        losses : callable
            Runs the forward pass and returns each row's loss, shape (rows,).
        rows : int
            How many rows the pass holds.
        """

    def noise(self) -> None:
        """End a step: put (sum + noise) / expected rows into every ``grad``; without any row it is noise alone."""


def open_engine(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    gradients: Gradients = "own",
    noise_multiplier: float,
    clipping_norm: float,
    expected_rows: float,
    generator: torch.Generator,
) -> AbstractContextManager[Engine]:
    """Open an engine for one round; when it closes, nothing is left on the model.

    Parameters
    ----------
    model : nn.Module
        In training mode; its trainable parameters are exactly ``parameters``.
    parameters : sequence of Parameter
        What is trained, and what ``optimizer`` holds.
    optimizer : Optimizer
        The inner one. The caller steps it after ``noise``, and sets its gradients to none.
    gradients : {"own", "hooks", "functorch", "ghost"}
        How per-row gradients are found: in one backward pass of our own, or by Opacus.
    noise_multiplier : float
        Standard deviation of the noise over ``clipping_norm``.
    clipping_norm : float
        No row's gradient over all parameters together counts for more.
    expected_rows : float
        What the noised sum is divided by: a public constant.
    generator : Generator
        Of the noise, on the parameters' device.

    Raises
    ------
    NotPrivate
        On entering, if the model's rows cannot be told apart; names the module.
    """
    noising = Noising(noise_multiplier, clipping_norm, expected_rows, generator)
    if gradients == "own":
        return own_engine(model, parameters, optimizer, noising)
    return opacus_engine(model, parameters, optimizer, noising, gradients)
