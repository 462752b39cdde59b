"""A LoRA output factor of which only a square core learns: ``b = frame @ core``."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class CoredFactor(nn.Module):
    """Takes the place of PEFT's ``lora_B`` while a core is trained.

    Parameters
    ----------
    frame : nn.Module
        ``lora_B`` itself, a linear layer or a 1 × 1 convolution, holding the frozen orthonormal columns.
    core : nn.Module
        Of the same kind, (rank, rank).
    """

    def __init__(self, frame: nn.Module, core: nn.Module) -> None:
        super().__init__()
        self.frame, self.core = frame, core

    @property
    def weight(self) -> Tensor:
        """Return ``frame @ core`` in the frame's own shape, as PEFT reads it."""
        frame, core = self.frame.weight, self.core.weight
        assert isinstance(frame, Tensor)
        assert isinstance(core, Tensor)
        return (frame.flatten(1) @ core.flatten(1)).reshape(frame.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the core, then the frame."""
        return self.frame(self.core(x))  # type: ignore[no-any-return]


def cored(factor: nn.Module, frame: Tensor) -> CoredFactor:
    """Split a trained factor into a frame with orthonormal columns and its core.

    Parameters
    ----------
    factor : nn.Module
        ``lora_B``, whose weight lies in the frame's columns; it holds the frame afterwards.
    frame : Tensor, shape (out, rank)
        Orthonormal columns.
    """
    weight = factor.weight
    assert isinstance(weight, Tensor)
    held = weight.detach()
    columns = frame.to(held)
    core = copy.deepcopy(factor)
    core.weight = nn.Parameter((columns.T @ held.flatten(1)).reshape(-1, *held.shape[1:]))
    with torch.no_grad():
        weight.data = columns.reshape(held.shape).clone()
    return CoredFactor(factor, core)
