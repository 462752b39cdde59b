"""Two-dimensional convolutions: a linear layer over patches."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.grad import conv2d_input

from client.privacy.gradients.outer import Outer
from client.privacy.gradients.record import Record
from client.privacy.gradients.rules import Forward, Site, rule


class _Conv(Function):
    """``y = W ∗ x + b``; backward unfolds the input into one patch per position."""

    @staticmethod
    def forward(
        ctx: Any, record: Record, x: Tensor, weight: Tensor, bias: Tensor | None, settings: dict[str, Any]
    ) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None)
        ctx.record, ctx.weight, ctx.bias, ctx.settings = record, weight, bias, settings
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return F.conv2d(x, weight, bias, **settings)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (x,), weight, bias, settings = ctx.saved_tensors, ctx.weight, ctx.bias, ctx.settings
        left = g.flatten(2).transpose(1, 2)
        if weight.requires_grad:
            patches = _patches(x, weight, settings).transpose(1, 2)
            ctx.record.add_outer(weight, Outer(left, patches, (weight.shape[0], weight[0].numel())))
        if bias is not None and bias.requires_grad:
            ctx.record.add(bias, left.float().sum(dim=1))
        if not ctx.needs_input_grad[1]:
            return None, None, None, None, None
        return None, conv2d_input(ctx.shape, weight.to(g.dtype), g, **settings).to(ctx.dtype), None, None, None


def _patches(x: Tensor, weight: Tensor, settings: dict[str, Any]) -> Tensor:
    """Return what each output position sees, shape (rows, in · kernel, positions)."""
    kernel = weight.shape[2:]
    if kernel == (1, 1) and settings["padding"] == (0, 0):
        down, right = settings["stride"]
        return x[:, :, ::down, ::right].flatten(2)
    return F.unfold(x, kernel, **settings)


def _unfit(module: nn.Conv2d) -> str | None:
    if module.groups != 1:
        return f"per-row gradients of a convolution in {module.groups} groups have no rule"
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return f"per-row gradients of a convolution with {module.padding_mode} padding {module.padding!r} have no rule"
    return None


@rule(nn.Conv2d, refuse=_unfit)
def of_conv2d(site: Site) -> Forward:
    """Build a convolution's forward pass."""
    module = site.module
    settings = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}

    def forward(input: Tensor) -> Tensor:
        return _Conv.apply(site.record, site.checked(input), module.weight, module.bias, settings)  # type: ignore[no-any-return, no-untyped-call]

    return forward
