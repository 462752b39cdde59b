"""The part of the model that stays with its client: factors ``b`` and heads (FedSA-LoRA, arXiv 2410.01463)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from common.adapter import Adapter, outer_views
from common.lowrank import LowRank, Update

OWN = "own"
"""Kind of the memory."""

HEAD = "head."


def own_part(adapter: Adapter) -> dict[str, Tensor]:
    """Return what stays: all ``b`` as one flat tensor, and the heads by name."""
    heads = {HEAD + name: value for name, value in adapter.extras.items()}
    return {"b": adapter.flat[: adapter.layout.outer_numel], **heads}


def with_own(adapter: Adapter, own: Mapping[str, Tensor] | None) -> Adapter:
    """Put the client's own ``b`` and heads into an adapter; what it has kept of another rank does not count."""
    layout = adapter.layout
    if own is None or own["b"].shape != (layout.outer_numel,):
        return adapter
    outer, _ = outer_views(own["b"], layout)
    layers: dict[str, Update] = {
        name: LowRank(outer[name], part.a) for name, part in adapter.layers.items() if isinstance(part, LowRank)
    }
    heads = {name.removeprefix(HEAD): value for name, value in own.items() if name.startswith(HEAD)}
    return Adapter.pack(layers, heads, layout.method)
