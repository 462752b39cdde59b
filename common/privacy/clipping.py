"""What bounds one client's share in a sum: the norm of its whole update, over all that travels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Clipped(NamedTuple):
    """An update of bounded norm, fp64, and the norm it had."""

    change: Tensor
    norm: float


def clip_change(trained: Tensor, start: Tensor, limit: float) -> Clipped:
    """Return ``u · min(1, limit / ‖u‖)`` of ``u = trained − start``, in fp64: half precision overshoots the limit.

    Parameters
    ----------
    trained, start : Tensor, shape (numbers,)
        What travels, after and before training.
    limit : float
        Largest Euclidean norm over all numbers together.
    """
    change = trained.to("cpu", torch.float64) - start.to("cpu", torch.float64)
    norm = float(torch.linalg.vector_norm(change))
    return Clipped(change if norm <= limit else change * (limit / norm), norm)
