"""PEFT folders that are to be merged: read, and compared with each other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import TaskType

from common.adapter import Adapter
from common.errors import DataError, shortened
from common.lowrank import LowRank
from common.peft_folder import CONFIG, WEIGHTS, open_folder, plain_adapter
from common.peft_state import A, B, kernels_of
from strategies.updates import all_finite

LISTED = 5
LARGEST = 1e6
"""Of a factor's numbers; larger ones have no use, and their products would leave float32."""

SAME = {
    "base_model_name_or_path": "base model",
    "revision": "revision of the base model",
    "task_type": "task type",
    "fan_in_fan_out": "fan_in_fan_out",
}
"""Settings that must be the same, and what people call them."""


@dataclass(frozen=True, eq=False)
class Source:
    """A PEFT folder.

    Parameters
    ----------
    place : Path
        The folder.
    adapter : Adapter
        Its factors, every scale in ``b``, and modules that were trained whole.
    kernels : mapping of str to tuple of int
        Shape of a row of ``lora_A`` by layer: of a convolution the whole kernel.
    config : mapping
        PEFT's configuration.
    """

    place: Path
    adapter: Adapter
    kernels: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]

    def part(self, layer: str) -> LowRank:
        """Return a layer's factors."""
        found = self.adapter.layers[layer]
        assert isinstance(found, LowRank)
        return found


def read_source(place: Path) -> Source:
    """Read a PEFT folder.

    Raises
    ------
    DataError
        If it is none, holds more than plain LoRA and whole modules, or numbers that are not finite.
    """
    if not os.path.isdir(place):  # unlike Path.is_dir, never raises
        raise DataError(f"{place} is no folder; expected a PEFT folder with {CONFIG} and {WEIGHTS}")
    config, tensors = open_folder(place)
    adapter = plain_adapter(place, config, tensors)
    _check_settings(place, config)
    if not all_finite(adapter.flat):
        raise DataError(f"{place} holds NaN or infinity; such an adapter cannot be merged")
    factors = [tensor for key, tensor in tensors.items() if key.endswith((A, B))]
    if (largest := max(float(tensor.float().abs().max()) for tensor in factors)) > LARGEST:
        raise DataError(f"{place} holds {largest:.3g}; expected numbers up to {LARGEST:g}; train it again")
    kernels = kernels_of(tensors)
    if odd := next((name for name, row in kernels.items() if len(row) not in (1, 3)), None):
        raise DataError(f"{place}: layer {odd} is neither linear nor a 2-D convolution; it cannot be merged")
    return Source(place, adapter, kernels, config)


def _check_settings(place: Path, config: Mapping[str, Any]) -> None:
    for key in SAME:
        value, wanted = config.get(key), bool if key == "fan_in_fan_out" else str
        if not isinstance(value, wanted | None):
            raise DataError(f"{place}: {key} is {shortened(value)}; expected a {wanted.__name__} or null")
    if config.get("task_type") not in {None, *TaskType}:
        known = ", ".join(TaskType)
        raise DataError(f"{place}: task_type is {shortened(config['task_type'])}; expected null or one of {known}")


def differences(sources: Sequence[Source]) -> Iterator[str]:
    """Say why folders do not fit together: in what each differs from the first."""
    first, *others = sources
    for source in others:
        for key, what in SAME.items():
            mine, theirs = _setting(source, key), _setting(first, key)
            if mine != theirs:
                yield f"{source.place}: {what} {shortened(mine)} differs from {shortened(theirs)} of {first.place}"
        yield from _other_names("layers", source, first, source.adapter.layers, first.adapter.layers)
        yield from _other_names("whole modules", source, first, source.adapter.extras, first.adapter.extras)
        sizes, wanted = _sizes(source), _sizes(first)
        for name in sorted(sizes.keys() & wanted.keys()):
            if sizes[name] != wanted[name]:
                yield f"{source.place}: {name} is {sizes[name]}, in {first.place} {wanted[name]}"


def unequal_ranks(sources: Sequence[Source]) -> Iterator[str]:
    """Say which layers of which folders have other ranks than the first one's."""
    first, *others = sources
    for source in others:
        shared = source.adapter.layers.keys() & first.adapter.layers.keys()
        unequal = sorted(name for name in shared if source.part(name).rank != first.part(name).rank)
        if unequal:
            yield (
                f"{source.place}: other ranks than in {first.place}: {_listed(unequal)}; "
                "a mean of factors needs equal ones, use svd, stack or lora_lego"
            )


def _setting(source: Source, key: str) -> object:
    """Return a setting; a base model's folder as itself, however it was named; what is empty is not set."""
    value = source.config.get(key) or None
    if key == "base_model_name_or_path" and isinstance(value, str) and os.path.isdir(value):
        return os.path.realpath(value)
    return value


def _other_names(
    what: str, source: Source, first: Source, mine: Mapping[str, object], theirs: Mapping[str, object]
) -> Iterator[str]:
    if lacking := sorted(theirs.keys() - mine.keys()):
        yield f"{source.place} lacks {what} of {first.place}: {_listed(lacking)}"
    if more := sorted(mine.keys() - theirs.keys()):
        yield f"{source.place} has {what} that {first.place} lacks: {_listed(more)}"


def _sizes(source: Source) -> dict[str, tuple[int, ...]]:
    layers = {name: (update.shape[0], *source.kernels[name]) for name, update in source.adapter.layers.items()}
    return layers | {name: tuple(value.shape) for name, value in source.adapter.extras.items()}


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
