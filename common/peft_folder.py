"""Adapters in PEFT's own form: read a folder anyone wrote, write one that stock PEFT loads."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.adapter import Adapter
from common.adapter_file import read_adapter_file
from common.errors import ConfigurationError, CorruptArtefact, DataError
from common.lowrank import LowRank, Update

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."

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
        return _read_folder(place)
    try:
        return read_adapter_file(place)
    except CorruptArtefact as error:
        raise DataError(f"{error}; give a PEFT folder or an adapter file of LoRAFleet") from None


def _read_folder(folder: Path) -> Adapter:
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{folder} is no readable PEFT folder ({error}); expected {CONFIG} and {WEIGHTS}") from None
    if reason := _not_plain(raw):
        raise DataError(f"{folder} holds {reason}; only plain LoRA can be taken over")
    layers: dict[str, Update] = {}
    extras: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            b = tensors.get(f"{PREFIX}{layer}.lora_B.weight")
            if b is None:
                raise DataError(f"{folder}: layer {layer} has lora_A but no lora_B")
            a, b = tensor.float().flatten(1), b.float().flatten(1)
            layers[layer] = LowRank(b * layer_scaling(raw, layer, len(a)), a)
        elif "lora_" in name and not name.endswith(".lora_B.weight"):
            raise DataError(f"{folder}: {name} is not expressible as plain LoRA factors")
        elif "lora_" not in name:
            extras[name] = tensor.float()
    if not layers:
        raise DataError(f"{folder} holds no LoRA layer")
    return Adapter.pack(layers, extras)


def _not_plain(config: object) -> str:
    """Say what makes a configuration more than plain LoRA; empty if nothing does."""
    if not isinstance(config, dict):
        return "no adapter configuration"
    if config.get("peft_type") != "LORA":
        return f"{config.get('peft_type')} weights"
    if config.get("bias", "none") != "none":
        return f"trained biases (bias {config['bias']!r})"
    if str(config.get("init_lora_weights")).startswith(BASE_CHANGING):
        return f"factors for changed base weights (init_lora_weights {config['init_lora_weights']!r})"
    return next((f"LoRA with {key}" for key in NOT_PLAIN if config.get(key)), "")


def layer_scaling(config: Mapping[str, object], layer: str, rank: int) -> float:
    """Return the factor PEFT applies to one layer, from a configuration's alpha, patterns and rsLoRA flag."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise DataError(f"alpha_pattern is {patterns!r}; expected a table of layers")
    try:
        alpha = patterns.get(get_pattern_key(list(patterns), layer), config.get("lora_alpha"))
    except re.error as error:
        raise DataError(f"alpha_pattern has a key that is no regular expression: {error}") from None
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise DataError(f"layer {layer} has lora_alpha {alpha!r}; expected a number")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


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
    tensors: dict[str, Tensor] = {PREFIX + name: value.contiguous() for name, value in adapter.extras.items()}
    for name, update in factors.items():
        module = modules[name]
        kernel = module.weight.shape[1:] if isinstance(module, nn.Conv2d) else update.shape[1:]
        a = update.a.reshape(update.rank, *kernel)
        b = update.b.reshape(*update.b.shape, *[1] * (a.dim() - 2))
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.contiguous().clone()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.contiguous().clone()
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
