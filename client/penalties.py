"""What is added to the loss of local training: pure functions of parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def proximal(parameters: Sequence[Tensor], start: Sequence[Tensor], mu: float) -> Tensor:
    """Return ``μ/2 ‖θ − θ_start‖²``, which keeps a client near the model it was given.

    Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: Federated Optimization in Heterogeneous Networks (FedProx), MLSys 2020,
    arXiv 1812.06127, equation 2.

    Parameters
    ----------
    parameters, start : sequence of Tensor
        All that learns, now and as the round began.
    mu : float
        μ, at least 0.
    """
    distances = [(now - then).float().square().sum() for now, then in zip(parameters, start, strict=True)]
    return mu / 2 * torch.stack(distances).sum()


def tail_norms(factors: Iterable[tuple[Tensor, Tensor]], share: float, strength: float) -> Tensor:
    """Return ``λ Σ ‖b[:, k:]‖ ‖a[k:]‖`` over layers, ``k = min(rank − 1, ⌊γ rank⌋)``: empties the last rank slots.

    Cho, Liu, Xu, Fahrezi, Joshi: Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models (HetLoRA),
    EMNLP 2024, arXiv 2401.06432, the regulariser of its rank self-pruning.

    Parameters
    ----------
    factors : iterable of (b, a)
        Of each layer: (out, rank), every scale in it, and (rank, in).
    share, strength : float
        γ, the share of the slots that is free, and λ.
    """
    norms = []
    for b, a in factors:
        kept = min(a.shape[0] - 1, math.floor(share * a.shape[0]))
        norms.append(torch.linalg.vector_norm(b[:, kept:].float()) * torch.linalg.vector_norm(a[kept:].float()))
    return strength * torch.stack(norms).sum()
