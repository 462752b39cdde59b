"""PEFT folders merged into one, outside a federation, with the error against their exact sum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from common.adapter import Adapter
from common.errors import ConfigurationError, StoreError, UserError
from common.lowrank import LowRank
from common.peft_folder import write_peft_folder
from common.seeds import derive_seed
from server.folders import whole_or_nothing
from server.merge_sources import Source, differences, read_source, unequal_ranks
from strategies.certificate import certificate
from strategies.oneshot import ONESHOT, OneShotMerge
from strategies.updates import all_finite

LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6


@dataclass(frozen=True)
class MergedLayer:
    """One layer of a merge: rank, norm, distance from the exact sum relative to that, singular values that matter."""

    layer: str
    rank: int
    norm: float
    error: float
    effective_rank: int


@dataclass(frozen=True)
class Merge:
    """What was merged, and how near it came to the exact sum ``Σ wᵢ sᵢ BᵢAᵢ``.

    Parameters
    ----------
    strategy : str
        Name of the one-shot merge.
    options : mapping
        Its options.
    weights : sequence of float
        Of each adapter, as used.
    norm, error : float
        Of all layers together; the error is relative to the exact sum.
    layers : sequence of MergedLayer
        By name.
    """

    strategy: str
    options: Mapping[str, Any]
    weights: Sequence[float]
    norm: float
    error: float
    layers: Sequence[MergedLayer]


def merge_folders(
    places: Sequence[Path],
    out: Path,
    strategy: str = "stack",
    options: Mapping[str, Any] | None = None,
    weights: Sequence[float] = (),
    seed: int = 0,
) -> Merge:
    """Merge PEFT folders into one that stock PEFT loads; any ranks, alphas and scalings.

    Parameters
    ----------
    places : sequence of Path
        PEFT folders of one base model and the same layers, at least one.
    out : Path
        Folder to write; must be empty or missing.
    strategy : str
        Name of a one-shot merge.
    options : mapping, optional
        Its options.
    weights : sequence of float
        One per folder; none: 1 / number of folders each.
    seed : int
        For merges that draw.

    Raises
    ------
    UserError
        If a folder cannot be read, the folders do not fit together (all differences are listed), an option or a weight
        is wrong, or ``out`` is not empty.
    """
    chosen = ONESHOT.create(strategy, options)
    used = _weights(weights, len(places))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder; give another --out")
    sources = [read_source(place) for place in places]
    unequal = unequal_ranks(sources) if chosen.needs_equal_ranks else ()
    if problems := [*differences(sources), *unequal]:
        raise ConfigurationError(problems)
    try:
        merged = _merged(chosen, sources, used, seed)
        norm, distance, layers = _compared(merged, sources, used)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ConfigurationError(f"{strategy} fails on these adapters ({_line(error)}); try another merge") from None
    if not all_finite(merged.flat):
        raise ConfigurationError(f"{strategy} gives numbers too large to store; give smaller weights")
    try:
        _write(merged, sources[0], out)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{out} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    return Merge(strategy, chosen.model_dump(), used, norm, distance, layers)


def _weights(given: Sequence[float], count: int) -> list[float]:
    if not count:
        raise ConfigurationError("there is no adapter to merge; give at least one PEFT folder")
    if given and len(given) != count:
        raise ConfigurationError(f"{len(given)} weights for {count} adapters; give --weight once for each, or never")
    for weight in given:
        if not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
            raise ConfigurationError(
                f"a weight is {weight}; expected a positive, finite number from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}"
            )
    return list(given) or [1 / count] * count


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _merged(chosen: OneShotMerge, sources: Sequence[Source], weights: Sequence[float], seed: int) -> Adapter:
    """Merge layer by layer; modules that were trained whole are averaged."""
    first = sources[0].adapter
    layers = {
        name: chosen.merge([source.part(name) for source in sources], weights, derive_seed(seed, "merge", name))
        for name in first.layers
    }
    if not any(layer.rank for layer in layers.values()):
        raise ConfigurationError("the adapters add up to nothing; there is nothing to write")
    shares = torch.tensor(weights, dtype=torch.float64) / math.fsum(weights)
    heads: dict[str, Tensor] = {}
    for name in first.extras:
        values = torch.stack([source.adapter.extras[name].double() for source in sources])
        heads[name] = torch.tensordot(shares, values, dims=1).float()
    return Adapter.pack(layers, heads)


def _compared(
    merged: Adapter, sources: Sequence[Source], weights: Sequence[float]
) -> tuple[float, float, list[MergedLayer]]:
    """Measure a merge against the exact sum: norm and error of the whole, and every layer."""
    whole = math.fsum(weights)
    shares = {str(number): weight for number, weight in enumerate(weights)}
    average = Adapter.pack({name: update.scaled(1 / whole) for name, update in merged.layers.items()})
    parts = {name: {str(number): source.part(name) for number, source in enumerate(sources)} for name in merged.layers}
    layers = []
    for name, update in average.layers.items():
        found = certificate(Adapter.pack({name: update}), [(name, parts[name])], shares)
        rank = update.rank if isinstance(update, LowRank) else min(update.shape)
        layers.append(MergedLayer(name, rank, found.norm[name] * whole, found.error, found.effective_rank[name]))
    error = certificate(average, parts.items(), shares).error
    return math.hypot(*(layer.norm for layer in layers)), error, layers


def _write(merged: Adapter, source: Source, out: Path) -> None:
    base: tuple[Any, Any] = (source.config.get("base_model_name_or_path"), source.config.get("revision"))
    with whole_or_nothing(out) as unfinished:
        write_peft_folder(merged, unfinished, _Skeleton(source), base, source.config.get("task_type"))


class _Skeleton(nn.Module):
    """Modules of the adapted layers' kinds and shapes, without weights: all that writing asks of the model."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._found: dict[str, nn.Module] = {}
        for name, update in source.adapter.layers.items():
            out, inn = update.shape
            with torch.device("meta"):
                if len(kernel := source.kernels[name]) == 3:
                    self._found[name] = nn.Conv2d(kernel[0], out, (kernel[1], kernel[2]))
                else:
                    whole = source.config.get("fan_in_fan_out")
                    self._found[name] = Conv1D(out, inn) if whole else nn.Linear(inn, out)

    def get_submodule(self, target: str) -> nn.Module:
        return self._found[target]
