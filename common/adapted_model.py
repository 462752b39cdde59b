"""A model with one adapter attached whose factors can be switched between clients in well under a millisecond."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from common.adapter import Adapter
from common.base_model import BaseModel, attach, layer_shape
from common.core_factor import CoredFactor, cored
from common.errors import ConfigurationError
from common.federation import Dispatch, ModelSpec, TrainedFactors
from common.lowrank import Dense, LowRank, Update
from common.methods import AdapterMethod
from common.seeds import derive_seed
from common.sparse_branch import SparseBranch, beside
from common.travel import places

ADAPTER = "default"
"""PEFT's name of the one adapter that is attached."""

PREFIX = "base_model.model."


class SeededDropout(nn.Module):
    """Dropout whose mask follows from its seed alone.

    Workers side by side stay deterministic, and a pass that gradient checkpointing computes again drops the same
    entries again.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability, self.seed = probability, 0

    def forward(self, x: Tensor) -> Tensor:
        """Zero entries of ``x`` with the given probability and rescale the rest, in training only."""
        if not self.training:
            return x
        generator = torch.Generator().manual_seed(self.seed)
        keep = torch.rand(x.shape, generator=generator) >= self.probability
        return x * keep.to(x.device) / (1 - self.probability)


class AdaptedModel:
    """A worker's model: shared base weights, one adapter.

    Parameters
    ----------
    base : BaseModel
        The process's base model.
    method : AdapterMethod
        How the adapter is attached and scaled.
    device : torch.device or str
        Where to train.
    merge_global : bool
        True: the global adapter goes into a copy of the target layers; False: it runs beside them.
    """

    def __init__(
        self,
        base: BaseModel,
        method: AdapterMethod,
        device: torch.device | str = "cpu",
        merge_global: bool = True,
    ) -> None:
        model = base.worker_copy()
        self.base, self.method, self.merge_global = base, method, merge_global
        self.peft_model = attach(model, method.config(model)).to(device)
        self.layers, self.heads = lora_layers(self.peft_model), trained_heads(self.peft_model)
        self._initial_heads = {name: head.detach().clone() for name, head in self.heads.items()}
        self._global_version, self._seed = "", 0
        self._hooks: list[Any] = []
        self._scalings: dict[str, float] = {}
        self._given: dict[str, Tensor] = {}
        self._branches: dict[str, SparseBranch] = {}
        for layer in self.layers.values():
            self._prepare(layer)

    def _prepare(self, layer: Any) -> None:
        if self.method_dropout > 0:
            layer.lora_dropout[ADAPTER] = SeededDropout(self.method_dropout)
        if self.merge_global:
            base_layer = layer.get_base_layer()
            base_layer.weight = nn.Parameter(base_layer.weight.data, requires_grad=False)

    @property
    def method_dropout(self) -> float:
        """Dropout probability before A."""
        return float(getattr(self.method, "dropout", 0.0))

    @property
    def model(self) -> nn.Module:
        """The model to call."""
        return self.peft_model

    def spec(self, seed: int) -> ModelSpec:
        """Describe the target layers and heads to a strategy."""
        return spec_of(self.layers, self._initial_heads, seed, self.method.plugin_name)

    def holds(self, version: str) -> bool:
        """Tell whether the model is on this version of the global adapter."""
        return version == self._global_version

    def use_global(self, adapter: Adapter, version: str) -> None:
        """Put the model on a version (hash) of the global adapter."""
        self.check(adapter)
        if self.merge_global:
            self._merge(self.base.merged(adapter, version))
        else:
            self._run_beside(adapter.layers)
        self._global_version = version

    def _merge(self, weights: Mapping[str, Tensor]) -> None:
        for name, layer in self.layers.items():
            parameter = layer.get_base_layer().weight
            parameter.data = weights.get(name, self.base.weight(name)).to(parameter.device)

    def _run_beside(self, updates: Mapping[str, Update]) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = [
            self.layers[name].get_base_layer().register_forward_hook(partial(_add_beside, update))
            for name, update in updates.items()
        ]

    def check(self, adapter: Adapter) -> None:
        """Refuse an adapter whose layers are not this model's.

        Raises
        ------
        ConfigurationError
            Naming the first layer that is unknown or of another shape.
        """
        for name, update in adapter.layers.items():
            layer = self.layers.get(name)
            if layer is None:
                raise ConfigurationError(f"the adapter has a layer {name} that this model does not adapt")
            if update.shape != (shape := layer_shape(layer.get_base_layer())):
                raise ConfigurationError(f"the adapter's layer {name} is {update.shape}; the model's is {shape}")

    def load(self, adapter: Adapter, seed: int = 0, dispatch: Dispatch | None = None) -> None:
        """Take over an adapter's factors and heads; layers it lacks change nothing, heads it lacks are the base's.

        Parameters
        ----------
        adapter : Adapter
            Its scale is in ``b``, and goes back to the method's own here; a dense layer runs beside its base layer.
        seed : int
            Seeds the adapter's dropout.
        dispatch : Dispatch, optional
            For training: names the frames of a core, or the entries of a matrix, that are to learn.
        """
        self.check(adapter)
        self._close()
        for name, layer in self.layers.items():
            update = adapter.layers.get(name)
            if isinstance(update, Dense):
                learn = None
                if dispatch is not None and dispatch.density is not None:
                    learn = places(dispatch.seed, name, update.w.numel(), dispatch.density)
                self._branches[name] = SparseBranch(layer.get_base_layer(), update.w, learn)
                update = None
            if update is None or not update.rank:
                update = _nothing(layer)
            self._scalings[name], self._given[name] = self.method.scaling(update.rank), update.b
            _set_factors(layer, update, self._scalings[name])
            if dispatch is not None and dispatch.trains == "core" and dispatch.frames is not None:
                frame = dispatch.frames.layers[name]
                assert isinstance(frame, LowRank)
                layer.lora_B[ADAPTER] = cored(layer.lora_B[ADAPTER], frame.b[:, : update.rank])
        for name, head in self.heads.items():
            head.data = adapter.extras.get(name, self._initial_heads[name]).to(head.device, head.dtype).clone()
        self._seed = seed
        self.begin_pass(0)

    def _close(self) -> None:
        """Take away what the client before trained beside the factors."""
        for branch in self._branches.values():
            branch.remove()
        self._branches = {}
        for layer in self.layers.values():
            if isinstance(factor := layer.lora_B[ADAPTER], CoredFactor):
                layer.lora_B[ADAPTER] = factor.frame

    def begin_pass(self, number: int) -> None:
        """Seed the dropout of one forward and backward pass, each layer's for itself."""
        for name, layer in self.layers.items():
            if isinstance(dropout := layer.lora_dropout[ADAPTER], SeededDropout):
                dropout.seed = derive_seed(self._seed, "dropout", name, number)

    def read(self) -> Adapter:
        """Return the factors as they are now, every scale in ``b``, on the CPU in fp32."""
        layers: dict[str, Update] = {}
        for name, layer in self.layers.items():
            if name in self._branches:
                layers[name] = Dense(self._branches[name].matrix().detach().float().cpu())
                continue
            layers[name] = LowRank(self._outer(name), layer.lora_A[ADAPTER].weight.detach().float().cpu().flatten(1))
        heads = {name: head.detach().float().cpu() for name, head in self.heads.items()}
        return Adapter.pack(layers, heads, self.method.plugin_name)

    def _outer(self, name: str) -> Tensor:
        """Return a layer's ``b``; one that did not learn keeps its bits, whatever the scale was divided out by."""
        given, scaling = self._given[name], self._scalings[name]
        b: Tensor = self.layers[name].lora_B[ADAPTER].weight.detach().flatten(1)
        same = torch.equal(b, _unscaled(given, scaling, b))
        return given.float().cpu() if same else b.float().cpu() * scaling

    def train_only(self, factors: TrainedFactors) -> list[nn.Parameter]:
        """Let the named factors and the heads learn, freeze all else, and return what learns.

        A core or the entries of a matrix must have been named when the start was loaded.
        """
        for parameter in self.peft_model.parameters():
            parameter.requires_grad_(False)
        chosen = list(self.heads.values())
        chosen += [branch.values for branch in self._branches.values()]
        for layer in self.layers.values():
            if isinstance(factor := layer.lora_B[ADAPTER], CoredFactor):
                core = factor.core.weight
                assert isinstance(core, nn.Parameter)
                chosen.append(core)
            for letter, holder in (("a", layer.lora_A), ("b", layer.lora_B)):
                if factors in ("ab", letter):
                    chosen.append(holder[ADAPTER].weight)
        for parameter in chosen:
            parameter.requires_grad_(True)
        return chosen


def lora_layers(peft_model: nn.Module) -> dict[str, Any]:
    """List the layers PEFT adapted, by the base model's own module names, sorted."""
    found = {
        name.removeprefix(PREFIX): module
        for name, module in peft_model.named_modules()
        if isinstance(module, LoraLayer)
    }
    return dict(sorted(found.items()))


def trained_heads(peft_model: nn.Module) -> dict[str, nn.Parameter]:
    """List the parameters trained whole, by the base model's own parameter names, sorted."""
    found = {
        f"{name.removeprefix(PREFIX)}.{key}": parameter
        for name, module in peft_model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        for key, parameter in module.modules_to_save[ADAPTER].named_parameters()
    }
    return dict(sorted(found.items()))


def spec_of(layers: Mapping[str, Any], heads: Mapping[str, Tensor], seed: int, method: str) -> ModelSpec:
    """Describe adapted layers and heads to a strategy."""
    shapes = {name: layer_shape(layer.get_base_layer()) for name, layer in layers.items()}
    return ModelSpec(shapes, seed, {name: head.detach().float().cpu().clone() for name, head in heads.items()}, method)


def _nothing(layer: Any) -> LowRank:
    # One slot of zeros: a convolution cannot have none.
    out, inn = layer_shape(layer.get_base_layer())
    return LowRank(torch.zeros(out, 1), torch.zeros(1, inn))


def _set_factors(layer: Any, update: LowRank, scaling: float) -> None:
    # Assigning .data keeps the Parameter objects (and what an optimizer or DP engine hooked to them) and works at any
    # rank; PEFT's own config does not notice, which is why export writes a config of its own.
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    a.data = update.a.to(a.device, a.dtype).reshape(update.rank, *a.shape[1:]).clone()
    b.data = _unscaled(update.b, scaling, b).reshape(b.shape[0], update.rank, *b.shape[2:])
    layer.r[ADAPTER], layer.scaling[ADAPTER] = update.rank, scaling


def _unscaled(b: Tensor, scaling: float, like: Tensor) -> Tensor:
    return (b / scaling).to(like.device, like.dtype)


def _add_beside(update: Update, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    (x,) = inputs
    if isinstance(update, LowRank) and not isinstance(module, nn.Conv2d):
        extra = x.float() @ update.a.to(x.device).T @ update.b.to(x.device).T
    else:
        extra = beside(update.dense(), module, x)
    return output + extra.to(output.dtype)
