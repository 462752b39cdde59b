"""A whole adapter: what is trained, merged, stored and sent.

All tensors of an adapter lie in one flat buffer, and the layers are views of it, so that encoding, hashing,
averaging and screening cost time per byte and not per tensor. The buffer's order is: every output factor
``b`` (or dense matrix) by layer name, every extra (head) by name, every input factor ``a`` by layer name. A
payload without the frozen ``a`` is therefore the buffer's beginning.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from common.errors import ConfigurationError
from common.lowrank import Dense, LowRank, Update

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Where each tensor of an adapter lies in its buffer; small, hashable, sent as JSON.

    Parameters
    ----------
    layers : tuple of (name, out, in, rank)
        Sorted by name; rank -1 marks a dense layer.
    extras : tuple of (name, shape)
        Sorted by name.
    method : str
        The adapter method that trained it.
    """

    layers: tuple[tuple[str, int, int, int], ...] = ()
    extras: tuple[tuple[str, Shape], ...] = ()
    method: str = "lora"

    @cached_property
    def outer_numel(self) -> int:
        """Numbers in all ``b`` and dense matrices."""
        return sum(out * (inn if rank < 0 else rank) for _, out, inn, rank in self.layers)

    @cached_property
    def head_numel(self) -> int:
        """Numbers before the first ``a``: the outer factors and the extras."""
        return self.outer_numel + sum(math.prod(shape) for _, shape in self.extras)

    @cached_property
    def numel(self) -> int:
        """Numbers in the whole buffer."""
        return self.head_numel + sum(rank * inn for _, _, inn, rank in self.layers if rank > 0)

    def to_json(self) -> str:
        """Write the layout as JSON text."""
        return json.dumps({"layers": self.layers, "extras": self.extras, "method": self.method})

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """Read a layout written by anyone, trusting nothing.

        Raises
        ------
        ConfigurationError
            If the text is not a layout: wrong types, negative sizes, unsorted or repeated names.
        """
        try:
            raw = json.loads(text)
            layers = tuple((_name(n), _size(o), _size(i), _size(r, -1)) for n, o, i, r in raw["layers"])
            extras = tuple((_name(n), _shape(shape)) for n, shape in raw["extras"])
            layout = cls(layers, extras, _name(raw["method"]))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            reason = f"{type(error).__name__}: {str(error)[:100]!r}"
            raise ConfigurationError(
                f"the adapter's layout cannot be read ({reason}); expected layers, extras, method"
            ) from None
        for names in ([entry[0] for entry in layers], [entry[0] for entry in extras]):
            if names != sorted(set(names)):
                raise ConfigurationError("the adapter's layout repeats names or does not sort them")
        return layout


def _size(value: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 2**31:
        raise ValueError(f"{value!r} is not a size")
    return value


def _shape(value: Any) -> Shape:
    shape = tuple(_size(size) for size in value)
    if math.prod(max(size, 1) for size in shape) >= 2**63:  # torch counts in 64 bits, past a size of 0 too
        raise ValueError(f"{shape} is not a shape")
    return shape


def _name(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{value!r} is not a name")
    value.encode()  # half a character is a ValueError, too
    return value


@dataclass(frozen=True, eq=False)
class Adapter:
    """Layers by module name and extras by parameter name, over one flat buffer.

    Parameters
    ----------
    flat : Tensor, shape (layout.numel,)
        All numbers, in the order the module describes; never changed in place.
    layout : Layout
        Names and shapes.
    """

    flat: Tensor
    layout: Layout = field(default_factory=Layout)

    def __post_init__(self) -> None:
        if self.flat.shape != (self.layout.numel,):
            raise ConfigurationError(
                f"an adapter buffer of shape {tuple(self.flat.shape)} does not fit its layout of "
                f"{self.layout.numel} numbers"
            )

    @classmethod
    def empty(cls, method: str = "lora") -> Adapter:
        """Build an adapter without layers, which changes nothing."""
        return cls(torch.empty(0), Layout(method=method))

    @classmethod
    def pack(
        cls, layers: Mapping[str, Update], extras: Mapping[str, Tensor] | None = None, method: str = "lora"
    ) -> Adapter:
        """Copy layers and extras into a new flat buffer, sorted by name.

        Parameters
        ----------
        layers : mapping of str to LowRank or Dense
            Updates by module name, all of one dtype.
        extras : mapping of str to Tensor, optional
            Heads, routers, coefficients.
        method : str
            Name of the adapter method.
        """
        named = sorted(layers.items())
        heads = sorted((extras or {}).items())
        layout = Layout(
            tuple((n, *u.shape, u.rank if isinstance(u, LowRank) else -1) for n, u in named),
            tuple((n, tuple(t.shape)) for n, t in heads),
            method,
        )
        parts = [u.b if isinstance(u, LowRank) else u.w for _, u in named]
        parts += [t for _, t in heads] + [u.a for _, u in named if isinstance(u, LowRank)]
        return cls(torch.cat([part.detach().reshape(-1) for part in parts]) if parts else torch.empty(0), layout)

    @property
    def method(self) -> str:
        """Name of the adapter method."""
        return self.layout.method

    @property
    def nbytes(self) -> int:
        """Bytes of the whole buffer."""
        return self.flat.numel() * self.flat.element_size()

    @cached_property
    def layers(self) -> Mapping[str, Update]:
        """Updates by module name: views of the buffer, sorted by name."""
        outer, _ = outer_views(self.flat, self.layout)
        found: dict[str, Update] = {}
        start = self.layout.head_numel
        for name, _out, inn, rank in self.layout.layers:
            if rank < 0:
                found[name] = Dense(outer[name])
            else:
                found[name] = LowRank(outer[name], self.flat[start : start + rank * inn].view(rank, inn))
                start += rank * inn
        return found

    @cached_property
    def extras(self) -> Mapping[str, Tensor]:
        """Extras by name: views of the buffer."""
        return outer_views(self.flat, self.layout)[1]

    @property
    def inner_factors(self) -> Tensor:
        """All ``a`` as one flat view."""
        return self.flat[self.layout.head_numel :]

    def narrowed(self, rank: int) -> Adapter:
        """Keep the first ``rank`` slots of every layer; the adapter itself if no layer has more."""
        if all(held <= rank for *_, held in self.layout.layers):
            return self
        layers = {
            name: LowRank(update.b[:, :rank], update.a[:rank]) if isinstance(update, LowRank) else update
            for name, update in self.layers.items()
        }
        return Adapter.pack(layers, self.extras, self.method)

    def with_flat(self, flat: Tensor) -> Adapter:
        """Keep the layout, replace the numbers."""
        return Adapter(flat, self.layout)

    def sha256(self) -> str:
        """Hash names, shapes, dtype and bytes."""
        head = f"{self.layout.to_json()}{self.flat.dtype}"
        return hashlib.sha256(head.encode() + tensor_bytes(self.flat)).hexdigest()


def outer_views(flat: Tensor, layout: Layout) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a buffer's first ``layout.head_numel`` numbers: ``b`` or the matrix by layer, extras by name."""
    outer: dict[str, Tensor] = {}
    extras: dict[str, Tensor] = {}
    start = 0
    for name, out, inn, rank in layout.layers:
        width = inn if rank < 0 else rank
        outer[name] = flat[start : start + out * width].view(out, width)
        start += out * width
    for name, shape in layout.extras:
        extras[name] = flat[start : start + math.prod(shape)].view(shape)
        start += math.prod(shape)
    return outer, extras


def tensor_bytes(tensor: Tensor) -> bytes:
    """Copy a tensor's memory, row by row, in this machine's byte order (little endian everywhere)."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
