"""The weighted mean of adapters as one running sum: memory does not grow with the clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.adapter import Adapter, Layout, outer_views
from common.errors import ConfigurationError, RejectedUpdate
from common.federation import ClientUpdate
from strategies.updates import NO_UPDATE


@dataclass
class WeightedSum:
    """``Σ nᵢ xᵢ`` and ``Σ nᵢ`` over adapter buffers; fp32 sums even of fp16 replies.

    Parameters
    ----------
    nested : bool
        Sum ``b`` and heads only and let ranks differ: a narrower ``b`` counts as padded with zero columns,
        which is exact where the clients' ``a`` are the first rows of one shared factor. Otherwise all layouts
        must be equal.
    total : Tensor, optional
        The sum: the whole buffer of ``layout``, or its first ``head_numel`` numbers if nested.
    layout : Layout, optional
        Names and shapes of the sum, at the largest rank seen.
    weight : float
        ``Σ nᵢ`` over all clients, padded or not.
    """

    nested: bool = False
    total: Tensor | None = None
    layout: Layout | None = None
    weight: float = 0.0

    def add(self, update: ClientUpdate) -> WeightedSum:
        """Add one update in place of the running sum.

        Raises
        ------
        RejectedUpdate
            If the update's layout does not fit the ones before it; the sum is then unchanged.
        """
        layout = update.adapter.layout
        numbers = update.adapter.flat[: layout.head_numel] if self.nested else update.adapter.flat
        if self.total is None or self.layout is None:
            wide = torch.promote_types(numbers.dtype, torch.float32)
            self.total, self.layout = torch.zeros_like(numbers, dtype=wide), layout
        if layout == self.layout:
            self.total.add_(numbers, alpha=update.num_examples)
        else:
            joint = joint_layout(self.layout, layout) if self.nested else None
            if joint is None:
                raise RejectedUpdate(
                    f"client {update.client} sent other layers, ranks or heads than the clients before it; all must be "
                    "equal"
                )
            self._widen(joint)
            _add_nested(self.total, self.layout, numbers, layout, update.num_examples)
        self.weight += update.num_examples
        return self

    def hold(self, layout: Layout) -> None:
        """Widen a nested sum to the ranks of a layout, if it holds anything; what is new is zero."""
        if self.layout is not None and (joint := joint_layout(self.layout, layout)) is not None:
            self._widen(joint)

    def mean(self, inner: Tensor | None = None) -> Adapter:
        """Divide by the total weight, in place, which closes the sum.

        A nested sum is completed by the flat ``inner`` factors.
        """
        if self.total is None or self.layout is None:
            raise ConfigurationError(NO_UPDATE)
        mean, self.total = self.total.div_(self.weight), None
        return Adapter(mean if inner is None else torch.cat([mean, inner.to(mean.dtype)]), self.layout)

    def _widen(self, joint: Layout) -> None:
        assert self.total is not None and self.layout is not None
        if joint != self.layout:
            wider = self.total.new_zeros(joint.head_numel)
            _add_nested(wider, joint, self.total, self.layout, 1.0)
            self.total, self.layout = wider, joint


def joint_layout(x: Layout, y: Layout) -> Layout | None:
    """Return the layout that holds both, each layer at its larger rank; None if they do not fit."""
    layers = {name: (out, inn, rank) for name, out, inn, rank in x.layers}
    for name, out, inn, rank in y.layers:
        held = layers.setdefault(name, (out, inn, rank))
        if held[:2] != (out, inn) or min(held[2], rank) < 0:
            return None
        layers[name] = (out, inn, max(held[2], rank))
    if (x.extras, x.method) != (y.extras, y.method):
        return None
    return Layout(tuple((name, *size) for name, size in sorted(layers.items())), x.extras, x.method)


def _add_nested(total: Tensor, wide: Layout, numbers: Tensor, layout: Layout, weight: float) -> None:
    for targets, sources in zip(outer_views(total, wide), outer_views(numbers, layout), strict=True):
        for name, source in sources.items():
            target = targets[name]
            if target.shape != source.shape:
                target = target[:, : source.shape[1]]
            target.add_(source, alpha=weight)


def mean_extras(updates: Sequence[ClientUpdate], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Return ``Σ wᵢ xᵢ`` of the heads, by name; all clients hold the same ones."""
    total: dict[str, Tensor] = {}
    for update in updates:
        for name, value in update.adapter.extras.items():
            wide = torch.promote_types(value.dtype, torch.float32)
            part = value.to(wide) * weights[update.client]
            total[name] = total[name] + part if name in total else part
    return total
