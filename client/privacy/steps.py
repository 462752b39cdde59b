"""The steps of DP-SGD: which rows are drawn, and what becomes of them.

Abadi et al., Deep Learning with Differential Privacy, CCS 2016, arXiv 1607.00133, algorithm 1, with three remedies:
the sum is divided by a fixed number of rows and never by how many were drawn; an empty sample is a step of pure noise,
since whether one was empty is private; rows go through the model a few at a time, but noise is added once per step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from client.privacy.engine import Engine
from common.privacy.accounting import Mechanism
from common.privacy.noise import secret_generator


@dataclass(frozen=True)
class StepPlan:
    """What all steps of a round have in common.

    Parameters
    ----------
    mechanism : Mechanism
        Noise and sample rate.
    clipping_norm : float
        Largest norm of a row's gradient over all trained parameters together.
    steps : int
        Of the round.
    micro_batch : int
        Rows per forward pass.
    test_seed : int, optional
        Draws samples and noise from a seed; the run is then not private.
    """

    mechanism: Mechanism
    clipping_norm: float
    steps: int
    micro_batch: int
    test_seed: int | None = None


def poisson_samples(rows: int, plan: StepPlan, *purpose: str | int) -> Iterator[Tensor]:
    """Yield the numbers of each step's rows: every row independently with the sample rate, maybe none."""
    generator = secret_generator("cpu", plan.test_seed, "samples", *purpose)
    for _ in range(plan.steps):
        drawn = torch.rand(rows, generator=generator, dtype=torch.float64) < plan.mechanism.sample_rate
        yield drawn.nonzero().flatten()


def private_step(engine: Engine, drawn: Tensor, micro_batch: int, losses_of: Callable[[Tensor], Tensor]) -> None:
    """Put a step's noised gradient into every parameter's ``grad``.

    Parameters
    ----------
    engine : Engine
        Clips every row and adds noise.
    drawn : Tensor
        Numbers of the rows; may be empty.
    micro_batch : int
        Rows per forward pass.
    losses_of : callable
        Returns the losses of some rows, shape (rows,); each must depend on its own row only.
    """
    if len(drawn):
        for numbers in drawn.split(micro_batch):
            engine.add(partial(losses_of, numbers), len(numbers))
    engine.noise()
