"""A matrix beside a layer's frozen weight, a few entries of which learn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SparseBranch:
    """``h += U x`` beside a base layer, ``U`` of shape (out, in).

    Parameters
    ----------
    base_layer : nn.Module
        Linear, Conv1D or convolution.
    matrix : Tensor, shape (out, in)
        Where ``U`` starts.
    places : Tensor, optional
        Flat numbers of the entries that learn; without them nothing does.
    """

    def __init__(self, base_layer: nn.Module, matrix: Tensor, places: Tensor | None) -> None:
        weight = base_layer.weight
        assert isinstance(weight, Tensor)
        self._shape = matrix.shape
        self._flat = matrix.detach().to(weight.device, torch.float32).reshape(-1).clone()
        chosen = torch.empty(0, dtype=torch.long) if places is None else places
        self._places = chosen.to(weight.device)
        self.values = nn.Parameter(self._flat[self._places].clone())
        self._hook = base_layer.register_forward_hook(self._add)

    def matrix(self) -> Tensor:
        """Return ``U`` as it is now, shape (out, in)."""
        flat = self._flat.index_copy(0, self._places, self.values) if len(self._places) else self._flat
        return flat.view(self._shape)

    def remove(self) -> None:
        """Take the branch away."""
        self._hook.remove()

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + beside(self.matrix(), module, inputs[0]).to(output.dtype)


def beside(matrix: Tensor, module: nn.Module, x: Tensor) -> Tensor:
    """Apply a matrix of shape (out, in) to a layer's input as the layer applies its weight, in fp32."""
    x = x.float()
    if not isinstance(module, nn.Conv2d):
        return F.linear(x, matrix.to(x.device))
    weight = module.weight
    kernel = matrix.to(x.device).reshape(weight.shape)
    return F.conv2d(x, kernel, None, module.stride, module.padding, module.dilation, module.groups)
