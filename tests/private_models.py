"""Tiny models of every kind that per-row gradients must be right for, and the slow way that is obviously right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

Batch = Mapping[str, Tensor]

ROWS = 4
TOKENS = 7
VOCAB = 40
ENCODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
DECODER = ENCODER | {"max_position_embeddings": 16, "pad_token_id": 0}


@dataclass
class Case:
    """A model, a batch of rows, and the losses of some of them."""

    model: nn.Module
    batch: Batch
    losses: Callable[[nn.Module, Batch], Tensor]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def rows(self) -> int:
        return len(next(iter(self.batch.values())))

    def all_losses(self) -> Tensor:
        return self.losses(self.model, self.batch)

    def one_at_a_time(self) -> list[list[Tensor]]:
        """Return each row's gradients: every row alone through the model, by autograd."""
        found = []
        for row in range(self.rows):
            alone = {key: tensor[row : row + 1] for key, tensor in self.batch.items()}
            loss = self.losses(self.model, alone).sum()
            grads = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
            found.append([grad.float() for grad in grads])
        return found


def norms_of(gradients: list[list[Tensor]]) -> Tensor:
    """Norm of each row over all parameters."""
    return torch.stack([torch.cat([grad.flatten() for grad in row]).double().norm() for row in gradients]).float()


def clipped_sums_of(gradients: list[list[Tensor]], clipping_norm: float) -> list[Tensor]:
    """Clip each row and add up, in fp64."""
    factors = [min(1.0, clipping_norm / (float(norm) + 1e-6)) for norm in norms_of(gradients)]
    columns = zip(*gradients, strict=True)
    return [sum(f * grad.double() for f, grad in zip(factors, column, strict=True)).float() for column in columns]


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    """Attach a LoRA of rank 3 whose b is not zero, and train mode."""
    peft_model = get_peft_model(model, LoraConfig(**({"r": 3, "lora_alpha": 6} | options)))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:
            nn.init.normal_(parameter, std=0.2)
    return peft_model.train()


def freeze(model: nn.Module, part: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.requires_grad_(False)
    return model


def thaw(model: nn.Module, part: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.requires_grad_(True)
    return model


def texts(padded: bool = False, labels: int | None = None) -> dict[str, Tensor]:
    """Draw token rows; padded: rows of unequal length."""
    ids = torch.randint(2, VOCAB, (ROWS, TOKENS))
    mask = torch.ones_like(ids)
    if padded:
        for row in range(ROWS):
            mask[row, TOKENS - row :] = 0
    batch = {"input_ids": ids * mask + (1 - mask), "attention_mask": mask}
    if labels is not None:
        batch["labels"] = torch.randint(labels, (ROWS,))
    return batch


def next_tokens(model: nn.Module, batch: Batch) -> Tensor:
    """Mean loss of each row's own tokens."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
    found = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none")
    return found.view(targets.shape).sum(1) / (targets != -100).sum(1).clamp(min=1)


def labels(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of each row's label."""
    inputs = {key: tensor for key, tensor in batch.items() if key != "labels"}
    return F.cross_entropy(model(**inputs).logits.float(), batch["labels"], reduction="none")


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**(DECODER | options)))


def causal(model: nn.Module, padded: bool = False) -> Case:
    return Case(model, texts(padded), next_tokens)


def llama_lora(**options: Any) -> Case:
    return causal(adapted(llama(), **({"target_modules": "all-linear"} | options)))


def gpt2() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0
    )
    model = adapted(GPT2LMHeadModel(config), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    # Conv1D layers themselves learn as well, beside the adapter.
    return causal(thaw(model, "h.1.mlp.c_fc.weight"))


def classifier(kind: str) -> Case:
    import transformers as t

    config = {"bert": t.BertConfig, "roberta": t.RobertaConfig}[kind](
        **ENCODER, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    made = {"bert": t.BertForSequenceClassification, "roberta": t.RobertaForSequenceClassification}[kind](config)
    model = adapted(made, target_modules=["query", "dense"], modules_to_save=["classifier"], exclude_modules=["pooler"])
    return Case(model, texts(padded=kind == "bert", labels=3), labels)


def vit() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    model = adapted(ViTForImageClassification(config), target_modules="all-linear", modules_to_save=["classifier"])
    model = thaw(model, "layernorm_before")
    batch = {"pixel_values": torch.randn(ROWS, 3, 8, 8), "labels": torch.randint(3, (ROWS,))}
    return Case(model, batch, labels)


def unet(*targets: str, rows: int = ROWS, size: int = 8, channels: tuple[int, int] = (8, 16), rank: int = 3) -> Case:
    """A small diffusers UNet: attention adapted, and with more targets convolutions."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=size,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    adapter = adapted(model, r=rank, target_modules=["to_q", "to_v", "to_out.0", *targets])
    batch = {
        "sample": torch.randn(rows, 2, size, size),
        "timestep": torch.randint(1000, (rows,)),
        "encoder_hidden_states": torch.randn(rows, 3, 8),
        "noise": torch.randn(rows, 2, size, size),
    }
    return Case(adapter, batch, _denoise)


def _denoise(model: nn.Module, batch: Batch) -> Tensor:
    inputs = {key: tensor for key, tensor in batch.items() if key != "noise"}
    return (model(**inputs).sample - batch["noise"]).square().flatten(1).mean(1)
