"""Embeddings, and PEFT's adapter of one, whose factors are bare parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch.nn.functional as F
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from torch import Tensor, nn
from torch.autograd import Function

from client.privacy.gradients.linear import linear
from client.privacy.gradients.outer import Outer
from client.privacy.gradients.record import Record
from client.privacy.gradients.rules import Forward, Site, rule


class _Lookup(Function):
    """Rows of a table by number; ``turned``: its columns. Entries of the padding number learn nothing."""

    @staticmethod
    def forward(ctx: Any, record: Record, ids: Tensor, table: Tensor, padding: int | None, turned: bool) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.record, ctx.table, ctx.padding, ctx.turned = record, table, padding, turned
        return F.embedding(ids, table.t() if turned else table)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (ids,), table = ctx.saved_tensors, ctx.table
        places = ids.reshape(len(ids), -1)
        vectors = g.reshape(*places.shape, -1)
        if ctx.padding is not None:
            vectors = vectors.masked_fill((places == ctx.padding).unsqueeze(2), 0)
        left, right = (vectors, places) if ctx.turned else (places, vectors)
        ctx.record.add_outer(table, Outer(left, right, tuple(table.shape)))
        return None, None, None, None, None


def lookup(record: Record, ids: Tensor, table: Tensor, padding: int | None, turned: bool = False) -> Tensor:
    """Look rows of a trainable table up and record their gradients."""
    return _Lookup.apply(record, ids, table, padding, turned)  # type: ignore[no-any-return, no-untyped-call]


def _unfit(module: nn.Embedding) -> str | None:
    if module.max_norm is not None:
        return "an embedding with max_norm rewrites its table while it reads"
    if module.scale_grad_by_freq:
        return "an embedding with scale_grad_by_freq counts over the whole batch"
    return None


@rule(nn.Embedding, refuse=_unfit)
def of_embedding(site: Site) -> Forward:
    """Build an embedding's forward pass."""
    module = site.module
    return lambda input: lookup(site.record, site.checked(input), module.weight, module.padding_idx)


def _factors(module: LoraEmbedding) -> Iterator[nn.Parameter]:
    yield from module.lora_embedding_A.parameters()
    yield from module.lora_embedding_B.parameters()


def _unfit_adapter(module: LoraEmbedding) -> str | None:
    found = [type(variant).__name__ for variant in module.lora_variant.values()]
    if found:
        return f"{found[0]} has no rule for per-row gradients"
    return _unfit(cast(nn.Embedding, module.get_base_layer()))


@rule(LoraEmbedding, parameters=_factors, refuse=_unfit_adapter)
def of_lora_embedding(site: Site) -> Forward:
    """Build the forward pass of PEFT's LoRA on an embedding: ``e + s (columns of A by number)ᵀ Bᵀ``."""
    module = site.module

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module.disable_adapters or module.merged or any(value is not None for value in kwargs.values()):
            return site.original(x, *args, **kwargs)
        result = module.base_layer(site.checked(x), *args)
        dtype, scale = result.dtype, module._get_embed_scale()
        for name in module.active_adapters:
            if name in module.lora_embedding_A:
                added = _adapter(site, name, x) * module.scaling[name]
                result = result + (added if scale is None else added * scale.to(added.dtype))
        return result.to(dtype)

    return forward


def _adapter(site: Site, name: str, ids: Tensor) -> Tensor:
    module, record = site.module, site.record
    a, b = module.lora_embedding_A[name], module.lora_embedding_B[name]
    padding = module.get_base_layer().padding_idx
    found = lookup(record, ids, a, padding, turned=True) if a.requires_grad else F.embedding(ids, a.t(), padding)
    return linear(record, found, b)
