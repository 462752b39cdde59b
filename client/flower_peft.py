"""For clients of somebody's own Flower app: what ``server.flower_strategy`` sent, put into a PEFT model.

::

    @app.train()
    def train(message, context):
        load_start(model, message)
        ...                                                 # train as before
        arrays = ArrayRecord(get_peft_model_state_dict(model))
        metrics = MetricRecord({"num-examples": len(rows)})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
"""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from torch import nn

from common.adapted_model import ADAPTER, lora_layers, trained_heads
from common.base_model import add_update
from common.errors import ConfigurationError
from common.lowrank import LowRank
from common.peft_state import LoraScale, adapter_from_state

_PRISTINE = "_lorafleet_pristine"


def load_start(model: nn.Module, message: Message) -> None:
    """Put a message's merged part into the base weights and its start into the adapter, for training or evaluation.

    Ranks may differ: slots the model lacks are cut, further ones of its own begin with ``B`` = 0.

    Parameters
    ----------
    model : PeftModel
        With plain LoRA; may be used for one message after another, and for several clients in turn.
    message : Message
        As it came from the server.

    Raises
    ------
    ConfigurationError
        If the server's model has other layers or heads.
    """
    content = message.content
    load_merged(model, content.array_records.get("global"))
    sent = adapter_from_state(
        content.array_records["arrays"].to_torch_state_dict(), _scale(content.config_records["config"])
    )
    layers, heads = lora_layers(model), trained_heads(model)
    if set(layers) != set(sent.layers) or set(heads) != set(sent.extras):
        raise ConfigurationError("the server's initial_arrays are of a model with other target layers or heads")
    with torch.no_grad():
        for name, layer in layers.items():
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            start = sent.layers[name]
            assert isinstance(start, LowRank)
            held = min(start.rank, len(a))
            a[:held] = start.a[:held].reshape(a[:held].shape).to(a)
            b.zero_()
            b[:, :held] = (start.b[:, :held] / layer.scaling[ADAPTER]).reshape(b[:, :held].shape).to(b)
        for name, head in heads.items():
            head.copy_(sent.extras[name])


def load_merged(model: nn.Module, arrays: ArrayRecord | None, scale: LoraScale | None = None) -> None:
    """Rebuild the target layers' weights: the pristine ones plus what is merged.

    Parameters
    ----------
    model : PeftModel
        Its base weights must be plain numbers, not 4-bit codes.
    arrays : ArrayRecord, optional
        The merged update; None puts the pristine weights back.
    scale : LoraScale, optional
        At which it is written: none for what clients are sent; that of the server for what ``start`` returns.
    """
    merged = adapter_from_state(arrays.to_torch_state_dict(), scale or LoraScale()).layers if arrays else {}
    for name, layer in lora_layers(model).items():
        base = layer.get_base_layer()
        if not hasattr(base, _PRISTINE):
            setattr(base, _PRISTINE, base.weight.data)
        base.weight.data = getattr(base, _PRISTINE)
        if name in merged:
            base.weight.data = add_update(base, merged[name].dense())


def _scale(config: ConfigRecord) -> LoraScale:
    """Read the scale the arrays are written at."""
    alpha, fixed = config.get("lora-alpha"), config.get("lora-scaling")
    if isinstance(alpha, float):
        return LoraScale(alpha, bool(config.get("use-rslora")))
    if not isinstance(fixed, float):
        raise ConfigurationError("the message does not say how its LoRA is scaled; it is not of a FlowerStrategy")
    return LoraScale(fixed=fixed)
