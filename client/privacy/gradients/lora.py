"""A LoRA branch in one node: ``y + s x Aᵀ Bᵀ``, with the narrow products laid out the way they run fastest.

``h = s A xᵀ`` and ``u = s Bᵀ gᵀ`` are kept rank first: a product with a few columns is several times slower than the
same one with a few rows. That wins back more than the per-row gradients cost.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd import Function

from client.privacy.gradients.outer import Outer
from client.privacy.gradients.record import Record
from client.privacy.gradients.rules import Forward, Site, rule


class _Branch(Function):
    """``y + s x Aᵀ Bᵀ`` (and ``+ s b``); ordinary gradients of A, B and b are never formed."""

    @staticmethod
    def forward(
        ctx: Any, record: Record, y: Tensor, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        flat, out = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        h = (a @ flat.to(a.dtype).t()).mul_(scale)
        ctx.save_for_backward(x if a.requires_grad else None, h if b.requires_grad else None)
        ctx.record, ctx.a, ctx.b, ctx.bias, ctx.scale = record, a, b, bias, scale
        ctx.dtypes = y.dtype, x.dtype, h.dtype
        added = torch.addmm(out.to(h.dtype), h.t(), b.to(h.dtype).t())
        if bias is not None:
            added += bias.to(added.dtype) * scale
        return added.view(y.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (x, h), a, b, bias = ctx.saved_tensors, ctx.a, ctx.b, ctx.bias
        of_y, of_x, inner = ctx.dtypes
        record, rows, positions = ctx.record, len(g), g.reshape(len(g), -1, g.shape[-1])
        if b.requires_grad:
            record.add_outer(b, Outer(positions, _by_row(h, rows), tuple(b.shape)))
        if bias is not None and bias.requires_grad:
            record.add(bias, positions.float().sum(dim=1) * ctx.scale)
        back = None
        if a.requires_grad or ctx.needs_input_grad[2]:
            u = (b.to(inner) * ctx.scale).t() @ positions.to(inner).flatten(0, 1).t()
            if a.requires_grad:
                record.add_outer(a, Outer(_by_row(u, rows), x.reshape(rows, -1, x.shape[-1]), tuple(a.shape)))
            if ctx.needs_input_grad[2]:
                back = (u.t() @ a.to(inner)).view(*g.shape[:-1], -1).to(of_x)
        return None, g.to(of_y) if ctx.needs_input_grad[1] else None, back, None, None, None, None


def _by_row(narrow: Tensor, rows: int) -> Tensor:
    """View (rank, rows · positions) as (rows, positions, rank)."""
    return narrow.view(len(narrow), rows, -1).permute(1, 2, 0)


def branch(record: Record, y: Tensor, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Add a LoRA branch of ``x`` to ``y``, and record its rows' gradients."""
    return _Branch.apply(record, y, x, a, b, bias, scale)  # type: ignore[no-any-return, no-untyped-call]


def _variant(module: LoraLinear) -> str | None:
    found = [type(variant).__name__ for variant in module.lora_variant.values()]
    return f"{found[0]} has no rule for per-row gradients" if found else None


@rule(LoraLinear, parameters=lambda module: (), refuse=_variant)
def of_lora(site: Site) -> Forward:
    """Build the forward pass of PEFT's LoRA layer; whatever is not plain LoRA takes PEFT's own way."""
    module, record = site.module, site.record

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module.disable_adapters or module.merged or any(value is not None for value in kwargs.values()):
            return site.original(x, *args, **kwargs)
        result = module.base_layer(site.checked(x), *args)
        dtype = result.dtype
        for name in module.active_adapters:
            if name not in module.lora_A:
                continue
            a, b, drop = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
            if not isinstance(drop, nn.Identity):
                x = x.to(a.weight.dtype)
            if type(a) is nn.Linear and type(b) is nn.Linear:
                result = branch(record, result, drop(x), a.weight, b.weight, b.bias, module.scaling[name])
            else:
                result = result + b(a(drop(x.to(a.weight.dtype)))) * module.scaling[name]
        return result.to(dtype)

    return forward
