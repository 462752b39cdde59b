"""Normalisation layers, whose weight is multiplied entry by entry.

Every row gets a copy of weight and bias of its own, a view; what backward sums up for the copy is the row's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from client.privacy.gradients.record import Record
from client.privacy.gradients.rules import Forward, Site, rule
from common.errors import NotPrivate


class _Copies(Function):
    """A vector as one copy per row, shape (rows, 1, …, size, 1, …)."""

    @staticmethod
    def forward(ctx: Any, record: Record, vector: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.record, ctx.vector = record, vector
        return vector.view(1, *shape).expand(record.rows or 0, *shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, None]:
        if ctx.vector.requires_grad:
            ctx.record.add(ctx.vector, g.reshape(len(g), *ctx.vector.shape))
        return None, None, None


def _copies(site: Site, key: str, before: int = 0, after: int = 0) -> Tensor | None:
    """Return one copy per row of a layer's parameter, with dimensions of one before and after its own."""
    vector = getattr(site.module, key, None)
    if vector is None:
        return None
    return _Copies.apply(site.record, vector, (*[1] * before, *vector.shape, *[1] * after))  # type: ignore[no-any-return, no-untyped-call]


def _scaled(site: Site, normal: Tensor, before: int = 0, after: int = 0) -> Tensor:
    weight, bias = _copies(site, "weight", before, after), _copies(site, "bias", before, after)
    result = normal if weight is None else normal * weight
    return result if bias is None else result + bias


@rule(nn.LayerNorm)
def of_layer_norm(site: Site) -> Forward:
    """Build a layer normalisation's forward pass."""
    module, dims = site.module, len(site.module.normalized_shape)

    def forward(input: Tensor) -> Tensor:
        normal = F.layer_norm(site.checked(input), module.normalized_shape, None, None, module.eps)
        return _scaled(site, normal, before=input.dim() - 1 - dims)

    return forward


@rule(nn.RMSNorm)
def of_rms_norm(site: Site) -> Forward:
    """Build the forward pass of torch's root-mean-square normalisation."""
    module, dims = site.module, len(site.module.normalized_shape)

    def forward(x: Tensor) -> Tensor:
        normal = F.rms_norm(site.checked(x), module.normalized_shape, None, module.eps)
        return _scaled(site, normal, before=x.dim() - 1 - dims)

    return forward


@rule(nn.GroupNorm)
def of_group_norm(site: Site) -> Forward:
    """Build a group normalisation's forward pass."""
    module = site.module

    def forward(input: Tensor) -> Tensor:
        normal = F.group_norm(site.checked(input), module.num_groups, None, None, module.eps)
        return _scaled(site, normal, after=input.dim() - 2)

    return forward


def _not_vectors(module: nn.Module) -> str | None:
    strange = [key for key, parameter in module.named_parameters() if parameter.dim() != 1]
    return f"its {strange[0]} is not a vector, and has no rule for per-row gradients" if strange else None


@rule("RMSNorm", "T5LayerNorm", refuse=_not_vectors)
def of_named_norm(site: Site) -> Forward:
    """Build the forward pass of one of transformers' and diffusers' many RMSNorms: its own, over copies per row.

    Only its class's name is known, so that two rows with different weights are tried first.
    """
    checked = False

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        if len(site.checked(x)) > 1 and not checked:
            _try_two(site, x[:2].detach(), *args, **kwargs)
            checked = True
        copies = {key: _copies(site, key, before=x.dim() - 2) for key in site.module._parameters}
        return _with(site, copies, x, *args, **kwargs)

    return forward


@torch.no_grad()
def _try_two(site: Site, x: Tensor, *args: Any, **kwargs: Any) -> None:
    """Refuse a layer that does not give two rows with weights of their own what it gives each alone."""
    held = {key: parameter for key, parameter in site.module._parameters.items() if parameter is not None}
    once_and_twice = torch.tensor([1.0, 2.0], device=x.device).view(2, *[1] * (x.dim() - 1))
    both = _with(
        site, {key: (vector * once_and_twice).to(vector.dtype) for key, vector in held.items()}, x, *args, **kwargs
    )
    for row in range(2):
        alone = _with(
            site, {key: vector * (row + 1) for key, vector in held.items()}, x[row : row + 1], *args, **kwargs
        )
        if not torch.allclose(both[row : row + 1].float(), alone.float(), rtol=1e-2, atol=1e-6, equal_nan=True):
            raise NotPrivate(f"{site} does not scale its input entry by entry, as its rule expects; leave it frozen")


def _with(site: Site, parameters: dict[str, Tensor | None], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run a layer's own forward pass with other tensors in place of its parameters."""
    held = dict(site.module._parameters)
    try:
        site.module._parameters.update(parameters)
        return site.original(x, *args, **kwargs)
    finally:
        site.module._parameters.update(held)
