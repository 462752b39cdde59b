"""Linear layers, of any number of dimensions, and transformers' Conv1D, whose weight is transposed."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from transformers.pytorch_utils import Conv1D

from client.privacy.gradients.outer import Outer
from client.privacy.gradients.record import Record
from client.privacy.gradients.rules import Forward, Site, rule


class _Linear(Function):
    """``y = x Wᵀ + b``; the weight's ordinary gradient is never formed."""

    @staticmethod
    def forward(ctx: Any, record: Record, x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None)
        ctx.record, ctx.weight, ctx.bias, ctx.turned, ctx.dtype = record, weight, bias, turned, x.dtype
        return F.linear(x, weight.t() if turned else weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (x,), weight, bias = ctx.saved_tensors, ctx.weight, ctx.bias
        positions = g.reshape(len(g), -1, g.shape[-1])
        if weight.requires_grad:
            left, right = positions, x.reshape(len(x), -1, x.shape[-1])
            if ctx.turned:
                left, right = right, left
            ctx.record.add_outer(weight, Outer(left, right, tuple(weight.shape)))
        if bias is not None and bias.requires_grad:
            ctx.record.add(bias, positions.float().sum(dim=1))
        if not ctx.needs_input_grad[1]:
            return None, None, None, None, None
        used = weight.t() if ctx.turned else weight
        return None, (g @ used.to(g.dtype)).to(ctx.dtype), None, None, None


def linear(record: Record, x: Tensor, weight: Tensor, bias: Tensor | None = None, turned: bool = False) -> Tensor:
    """Apply a linear layer and record its rows' gradients; ``turned``: the weight is (in, out)."""
    return _Linear.apply(record, x, weight, bias, turned)  # type: ignore[no-any-return, no-untyped-call]


@rule(nn.Linear)
def of_linear(site: Site) -> Forward:
    """Build a linear layer's forward pass."""
    module = site.module
    return lambda input: linear(site.record, site.checked(input), module.weight, module.bias)


@rule(Conv1D)
def of_conv1d(site: Site) -> Forward:
    """Build the forward pass of transformers' Conv1D."""
    module = site.module
    return lambda x: linear(site.record, site.checked(x), module.weight, module.bias, turned=True)
