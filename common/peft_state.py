"""Adapters as PEFT's state dictionaries: what programs that know PEFT and not LoRAFleet exchange.

A layer is ``base_model.model.<layer>.lora_A.weight`` with ``….lora_B.weight``, a head is
``base_model.model.<parameter>``. One form is our own: a layer that is no longer thin is the matrix
``base_model.model.<layer>.lora_dense.weight``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from common.adapter import Adapter
from common.errors import ConfigurationError
from common.lowrank import Dense, LowRank, Update

PREFIX = "base_model.model."
A, B, DENSE = ".lora_A.weight", ".lora_B.weight", ".lora_dense.weight"


@dataclass(frozen=True)
class LoraScale:
    """The factor of ``B A`` in a PEFT model, at every rank.

    Parameters
    ----------
    alpha : float, optional
        ``lora_alpha``: the factor is ``alpha / r``.
    rslora : bool
        ``use_rslora``: it is ``alpha / √r``.
    fixed : float
        The factor itself where there is no ``alpha``, as of ``lora_alpha = fixed · r``.

    Raises
    ------
    ConfigurationError
        If a number is not positive and finite.
    """

    alpha: float | None = None
    rslora: bool = False
    fixed: float = 1.0

    def __post_init__(self) -> None:
        for number in (self.alpha, self.fixed):
            if number is not None and not 0 < number < math.inf:
                raise ConfigurationError(f"LoRA's scale is {number}; expected a positive, finite number")

    def factor(self, rank: int) -> float:
        """Return the factor of a layer of this rank."""
        if self.alpha is None:
            return self.fixed
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)


def adapter_from_state(tensors: Mapping[str, Tensor], scale: LoraScale) -> Adapter:
    """Build an adapter, its scale in ``b``, from a PEFT state dictionary, trusting nothing but dtypes.

    Raises
    ------
    ConfigurationError
        If it holds anything but plain LoRA and heads, or half a layer.
    """
    layers: dict[str, Update] = {}
    heads: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if name.endswith(A):
            layers[name.removesuffix(A)] = _factors(tensors, key, scale)
        elif name.endswith(DENSE):
            layers[name.removesuffix(DENSE)] = Dense(tensor.float().flatten(1))
        elif name.endswith(B):
            if key.removesuffix(B) + A not in tensors:
                raise ConfigurationError(f"{key} has no {A[1:]} beside it")
        elif "lora_" in name:
            raise ConfigurationError(f"{key} is no factor of plain LoRA")
        else:
            heads[name] = tensor.float()
    return Adapter.pack(layers, heads)


def _factors(tensors: Mapping[str, Tensor], key: str, scale: LoraScale) -> LowRank:
    a, b = tensors[key], tensors.get(key.removesuffix(A) + B)
    if b is None:
        raise ConfigurationError(f"{key} has no {B[1:]} beside it")
    if a.dim() < 2 or b.dim() < 2 or not a.numel() or not b.numel():
        raise ConfigurationError(f"{key} is {tuple(a.shape)}, its {B[1:]} {tuple(b.shape)}; expected (r, in), (out, r)")
    return LowRank(b.float().flatten(1) * scale.factor(len(a)), a.float().flatten(1))


def state_from_adapter(
    adapter: Adapter, scale: LoraScale, kernels: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Tensor]:
    """Build the PEFT state dictionary of an adapter.

    Parameters
    ----------
    adapter : Adapter
        The scale is taken out of ``b`` again.
    scale : LoraScale
        Of the model that is to load it.
    kernels : mapping of str to tuple of int, optional
        Shape of a row of ``lora_A``, for convolutions.
    """
    tensors = {f"{PREFIX}{name}": head.contiguous() for name, head in adapter.extras.items()}
    for name, update in adapter.layers.items():
        if isinstance(update, Dense):
            tensors[f"{PREFIX}{name}{DENSE}"] = update.w.contiguous()
            continue
        row = (kernels or {}).get(name, update.a.shape[1:])
        b = update.b / scale.factor(update.rank)
        tensors[f"{PREFIX}{name}{A}"] = update.a.reshape(update.rank, *row).contiguous()
        tensors[f"{PREFIX}{name}{B}"] = b.reshape(*b.shape, *[1] * (len(row) - 1))
    return tensors


def kernels_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of a row of ``lora_A`` by layer."""
    found = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items() if key.endswith(A)}
    return {name.removesuffix(A): tuple(tensor.shape[1:]) for name, tensor in found.items()}
