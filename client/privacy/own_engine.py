"""Per-row gradients in one backward pass; Opacus's optimizer adds the noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from torch import Tensor, nn

from client.privacy.gradients.attach import per_sample
from client.privacy.gradients.record import Record
from client.privacy.noising import Noising, refuse_other_optimizer, row_losses
from common.errors import NotPrivate
from common.privacy.noise import gaussian

AT_A_TIME = 1 << 16
"""Numbers noised together: few calls for many small tensors, and what a call works on stays in the cache."""


class RecordedOptimizer(DPOptimizerFastGradientClipping):  # type: ignore[misc]
    """Opacus's optimizer for gradients that come clipped and added up; here from a record."""

    record: Record

    def accumulate(self) -> None:
        """Clip and add up what was recorded since the last time; nothing recorded adds nothing."""
        sums: Sequence[Tensor | None] = [None] * len(self.record.parameters)
        if self.record.rows is not None:
            with torch.no_grad():  # what is kept of the forward pass has a graph of its own
                sums = self.record.clipped_sums(self.max_grad_norm)
        parameters: Sequence[Any] = self.record.parameters
        for parameter, added in zip(parameters, sums, strict=True):
            if parameter.summed_grad is None:
                parameter.summed_grad = (
                    torch.zeros(parameter.shape, device=parameter.device) if added is None else added
                )
            elif added is not None:
                parameter.summed_grad += added

    def add_noise(self) -> None:
        """Add noise to the sums, in fp32 whatever the parameters' number format is; rounding comes afterwards."""
        parameters: Sequence[Any] = self.record.parameters
        sums = torch.cat([parameter.summed_grad.flatten() for parameter in parameters])
        for part in sums.split(AT_A_TIME):
            part += gaussian(part, self.noise_multiplier * self.max_grad_norm, self.generator)
        noised = sums.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, noised, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)


class OwnEngine:
    """Records, clips and adds up; see :class:`client.privacy.engine.Engine`."""

    def __init__(self, record: Record, optimizer: RecordedOptimizer, names: Sequence[str]) -> None:
        self._record, self._optimizer, self._names = record, optimizer, names

    def add(self, losses: Callable[[], Tensor], rows: int) -> None:
        """Run one pass and add every row's clipped gradient to the step's sum."""
        record = self._record
        for parameter in record.parameters:
            parameter.grad = None
        record.rows = rows
        try:
            found = row_losses(losses, rows)
            with torch.autocast(found.device.type, enabled=False):
                found.sum().backward()
                self._refuse_ordinary()
                self._optimizer.accumulate()
        finally:
            record.clear()

    def noise(self) -> None:
        """Put (sum + noise) / expected rows into every ``grad``."""
        self._optimizer.pre_step()
        for parameter in self._record.parameters:
            parameter.summed_grad = None  # type: ignore[attr-defined]

    def _refuse_ordinary(self) -> None:
        """Refuse a gradient that came past the rules: a layer's weight was used otherwise than by calling it."""
        for name, parameter in zip(self._names, self._record.parameters, strict=True):
            if parameter.grad is not None:
                parameter.grad = None
                raise NotPrivate(
                    f"{name} is used otherwise than by its layer's forward pass, so that its per-row gradients are not "
                    "complete; freeze it or use another adapter method"
                )


@contextmanager
def own_engine(
    model: nn.Module, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, noising: Noising
) -> Iterator[OwnEngine]:
    """Open our own engine; see :func:`client.privacy.engine.open_engine`."""
    refuse_other_optimizer(optimizer, parameters)
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    with per_sample(model, parameters) as record:
        names = [known[id(parameter)] for parameter in parameters]
        private = RecordedOptimizer(optimizer, **noising.optimizer_settings())
        private.record = record
        try:
            yield OwnEngine(record, private, names)
        finally:
            for parameter in parameters:
                parameter.__dict__.pop("summed_grad", None)
