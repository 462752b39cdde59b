"""The base model: loaded once per process, shared by everybody who trains or evaluates in it.

Its weights are never added to. Workers get a model of their own whose parameters are the shared ones; for a global
adapter that is merged, the target layers point to a copy rebuilt from the pristine weights, once per version.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from common.adapter import Adapter
from common.errors import ConfigurationError


class BaseModel:
    """A pristine base model and its merged copies.

    Parameters
    ----------
    load : callable
        Loads the model; called once.
    """

    def __init__(self, load: Callable[[], nn.Module]) -> None:
        self._pristine = load().requires_grad_(False).eval()
        self._merged: tuple[str, dict[str, Tensor]] = ("", {})
        self._lock = threading.Lock()

    def worker_copy(self) -> nn.Module:
        """Build a model of a worker's own; its parameters are the shared tensors themselves."""
        shared = [*self._pristine.parameters(), *self._pristine.buffers()]
        return copy.deepcopy(self._pristine, {id(tensor): tensor for tensor in shared})

    def weight(self, layer: str) -> Tensor:
        """Return a layer's pristine weight, in the module's own layout."""
        weight = self._pristine.get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        return weight

    def merged(self, global_adapter: Adapter, version: str) -> Mapping[str, Tensor]:
        """Return the target layers' weights with the global adapter added, built once per version.

        Parameters
        ----------
        global_adapter : Adapter
            Sum of all merged rounds.
        version : str
            Hash that identifies it.
        """
        with self._lock:
            if self._merged[0] != version:
                weights = {
                    name: add_update(self._pristine.get_submodule(name), update.dense())
                    for name, update in global_adapter.layers.items()
                }
                self._merged = (version, weights)
            return self._merged[1]


def add_update(module: nn.Module, update: Tensor) -> Tensor:
    """Return a module's weight plus an update of shape (out, in), in fp32 and the module's own layout.

    Conv1D keeps its weight as (in, out); a convolution's kernel is flattened into ``in``.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    update = update.T if type(module).__name__ == "Conv1D" else update
    if update.numel() != weight.numel():
        raise ConfigurationError(
            f"an update of shape {tuple(update.shape)} does not fit a weight of {tuple(weight.shape)}; "
            "the adapter belongs to another base model"
        )
    return (weight.float() + update.to(weight.device).reshape(weight.shape)).to(weight.dtype)


def layer_shape(module: nn.Module) -> tuple[int, int]:
    """Return a target layer's shape (out, in) as an update sees it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if type(module).__name__ == "Conv1D":
        return weight.shape[1], weight.shape[0]
    return weight.shape[0], weight[0].numel()


_lock = threading.RLock()
_models: dict[str, BaseModel] = {}


def base_model(key: str, load: Callable[[], nn.Module]) -> BaseModel:
    """Return the process's base model for ``key``, loading it at the first call.

    Loading is not thread-safe in transformers, so one thread loads at a time; only the last model is kept.
    """
    with _lock:
        if key not in _models:
            _models.clear()
            _models[key] = BaseModel(load)
        return _models[key]


def attach(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Attach an adapter with PEFT, one thread at a time and without touching torch's global generator."""
    with _lock, torch.random.fork_rng(devices=[]):
        peft_model = get_peft_model(model, config)
    assert isinstance(peft_model, PeftModel)
    return peft_model


def four_bit() -> Any:
    """Build transformers' settings of a base model held in 4 bits.

    Raises
    ------
    ConfigurationError
        If bitsandbytes or a GPU is missing.
    """
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None or not torch.cuda.is_available():
        raise ConfigurationError(
            'training.base_precision "4bit" needs the bitsandbytes package and a GPU; install it or use "bf16"'
        )
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
