"""Adapters in PEFT's own form: read a folder anyone wrote, write one that stock PEFT loads."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from peft import LoraConfig, PeftType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.adapter import Adapter
from common.adapter_file import read_adapter_file
from common.errors import ConfigurationError, CorruptArtefact, DataError, shortened
from common.layer_patterns import LONGEST, LayerTable
from common.lowrank import LowRank, Update
from common.peft_state import PREFIX, A, B, LoraScale, state_from_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

LARGEST_CONFIG = 1_000_000
"""Bytes; PEFT writes about one thousand, and a line for every layer with a rank of its own."""
LARGEST_ALPHA = 1e6
NAME = re.compile(r"[\w-]+(?:\.[\w-]+)*")
"""A module's weight; a layer's name also becomes a pattern of what we write."""
NUMBERS = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}

NOT_PLAIN = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
"""Settings of PEFT's LoRA that change what the factors mean, or add to them."""

BASE_CHANGING = ("corda", "loftq", "lora_ga", "olora", "pissa")
"""Initialisations that take something out of the base weights; their factors belong to what is left of them."""


def read_adapter(place: Path) -> Adapter:
    """Read an adapter from a PEFT folder or a LoRAFleet adapter file.

    Raises
    ------
    DataError
        If there is no adapter, it cannot be read, or it is no plain LoRA.
    """
    if os.path.isdir(place):  # unlike Path.is_dir, never raises
        return plain_adapter(place, *open_folder(place))
    try:
        if os.path.exists(place):
            _opened(place).close()
        return read_adapter_file(place)
    except (CorruptArtefact, OSError) as error:
        raise DataError(f"{error}; give a PEFT folder or an adapter file of LoRAFleet") from None


def open_folder(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """Read a PEFT folder's configuration and tensors, whatever they mean; only regular files, and no endless ones.

    Raises
    ------
    DataError
        If they cannot be read.
    """
    try:
        with _opened(folder / CONFIG) as file:
            content = file.read(LARGEST_CONFIG + 1)
        if len(content) > LARGEST_CONFIG:
            raise ValueError(f"{CONFIG} is larger than {LARGEST_CONFIG} bytes")
        raw = json.loads(content.decode("utf-8"))
        _opened(folder / WEIGHTS).close()
        tensors = load_file(folder / WEIGHTS)
    except RecursionError:
        raise DataError(f"{folder}: {CONFIG} is nested too deeply; expected what PEFT writes") from None
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise DataError(f"{folder} is no readable PEFT folder ({error}); expected {CONFIG} and {WEIGHTS}") from None
    if not isinstance(raw, dict):
        raise DataError(f"{folder} holds no adapter configuration; only plain LoRA can be taken over")
    return raw, tensors


def _opened(path: Path) -> BinaryIO:
    """Open a regular file; a pipe does not make us wait, a device is not read."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(f"{path} is no regular file")


def plain_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
    """Build the adapter of a PEFT folder from what `open_folder` read.

    Raises
    ------
    DataError
        If it is no plain LoRA, or the configuration does not fit the tensors.
    """
    if reason := _not_plain(config):
        raise DataError(f"{folder} holds {reason}; only plain LoRA can be taken over")
    names = {key: key.removeprefix(PREFIX) for key in sorted(tensors)}
    for key, name in names.items():
        if not NAME.fullmatch(name) or len(name) > LONGEST:
            raise DataError(
                f"{folder}: tensor {shortened(key)} is named as no module's weight; expected names and dots"
            )
        if tensors[key].dtype not in NUMBERS:
            raise DataError(f"{folder}: {name} holds {tensors[key].dtype}; expected plain numbers, such as float32")
    found = [name.removesuffix(A) for name in names.values() if name.endswith(A)]
    scaled = _Scales(folder, config, len(found))
    layers: dict[str, Update] = {layer: scaled.factors(layer, tensors) for layer in found}
    extras: dict[str, Tensor] = {}
    for key, name in names.items():
        if name.endswith(B):
            if layers and name.removesuffix(B) not in layers:
                raise DataError(f"{folder}: layer {name.removesuffix(B)} has lora_B but no lora_A")
        elif "lora_" in name and not name.endswith(A):
            raise DataError(f"{folder}: {name} is not expressible as plain LoRA factors")
        elif "lora_" not in name:
            extras[name] = tensors[key].float()
    if not layers:
        raise DataError(f"{folder} holds no LoRA layer")
    return Adapter.pack(layers, extras)


def _not_plain(config: Mapping[str, Any]) -> str:
    """Say what makes a configuration more than plain LoRA; empty if nothing does."""
    if config.get("peft_type") != "LORA":
        return (
            f"{config['peft_type']} weights"
            if config.get("peft_type") in list(PeftType)
            else "no known kind of weights"
        )
    if config.get("bias", "none") != "none":
        return f"trained biases (bias {shortened(config['bias'])})"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(BASE_CHANGING):
        return f"factors for changed base weights (init_lora_weights {shortened(start)})"
    return next((f"LoRA with {key}" for key in NOT_PLAIN if config.get(key)), "")


class _Scales:
    """The scales and ranks that a configuration gives its layers."""

    def __init__(self, folder: Path, config: Mapping[str, Any], layers: int) -> None:
        self.folder, self.config = folder, config
        try:
            self.alphas = LayerTable("alpha_pattern", config.get("alpha_pattern"), layers)
            self.ranks = LayerTable("rank_pattern", config.get("rank_pattern"), layers)
        except DataError as error:
            raise DataError(f"{folder}: {error}") from None

    def factors(self, layer: str, tensors: Mapping[str, Tensor]) -> LowRank:
        """Return a layer's factors, the scale PEFT applies in ``b``."""
        key = next(key for key in (f"{PREFIX}{layer}{A}", f"{layer}{A}") if key in tensors)
        a, b = tensors[key], tensors.get(f"{PREFIX}{layer}{B}")
        if b is None:
            raise DataError(f"{self.folder}: layer {layer} has lora_A but no lora_B")
        shapes = f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}"
        if min(a.dim(), b.dim()) < 2 or not a.numel() or not b.numel() or b.shape[1] != len(a) or b[0, 0].numel() > 1:
            raise DataError(f"{self.folder}: layer {layer}: {shapes} do not form b (out, r) @ a (r, in)")
        rank = self.ranks.get(layer, self.config.get("r"))
        if type(rank) is not int or rank != len(a):
            raise DataError(
                f"{self.folder}: layer {layer} has rank {shortened(rank)} by {CONFIG}, but its tensors are {shapes}, "
                f"of rank {len(a)}; PEFT cannot load such a folder, give the one that was saved"
            )
        return LowRank(b.float().flatten(1) * self._scale(layer, rank), a.float().flatten(1))

    def _scale(self, layer: str, rank: int) -> float:
        alpha = self.alphas.get(layer, self.config.get("lora_alpha"))
        if not isinstance(alpha, int | float) or not abs(alpha) <= LARGEST_ALPHA:
            raise DataError(
                f"{self.folder}: layer {layer} has lora_alpha {shortened(alpha)}; expected a number, "
                f"at most {LARGEST_ALPHA:g}"
            )
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank


def write_peft_folder(
    adapter: Adapter, folder: Path, model: nn.Module, base: tuple[str, str | None], task_type: str | None
) -> None:
    """Write an adapter as a PEFT folder.

    Ranks may differ by layer; the scale is 1 everywhere and rsLoRA is off, so the factors are the update itself. A
    dense layer becomes the exact product of its singular vectors.

    Parameters
    ----------
    adapter : Adapter
        What the base model needs.
    folder : Path
        Made if missing.
    model : nn.Module
        The base model's architecture, possibly without weights: tells convolutions' kernel shapes.
    base : (str, str or None)
        Name or folder of the base model, and its revision.
    task_type : str or None
        PEFT's name of the task, such as ``CAUSAL_LM``.
    """
    factors = {
        name: update if isinstance(update, LowRank) else update.low_rank() for name, update in adapter.layers.items()
    }
    factors = {name: update for name, update in factors.items() if update.rank}
    if not factors:
        raise ConfigurationError("the adapter changes nothing yet; export a round after training")
    ranks = {f"^{name}": update.rank for name, update in factors.items()}  # without ^ a name also means its ends
    modules = {name: model.get_submodule(name) for name in factors}
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        target_modules=sorted(factors),
        modules_to_save=sorted({name.rpartition(".")[0] for name in adapter.extras}) or None,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in modules.values()),
        base_model_name_or_path=base[0],
        revision=base[1],
        task_type=task_type,
        inference_mode=True,
    )
    kernels = {name: tuple(m.weight.shape[1:]) for name, m in modules.items() if isinstance(m, nn.Conv2d)}
    state = state_from_adapter(Adapter.pack(factors, adapter.extras), LoraScale(), kernels)
    tensors = {name: value.clone() for name, value in state.items()}  # a file's tensors share no memory
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
