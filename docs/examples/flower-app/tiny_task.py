"""What is trained: a small network made in code, and three owners' rows of one regression."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

RANKS = (2, 4, 8)
ALPHA = 16


class Net(nn.Module):
    """Two linear layers; the base model."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 4)
        for value in self.parameters():
            value.data = torch.randn(value.shape, generator=generator) / value.shape[-1] ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs, shape (batch, 16), to outputs, shape (batch, 4)."""
        return self.second(torch.tanh(self.first(x)))


def make_model(rank: int) -> PeftModel:
    """Attach LoRA of this rank to the base model."""
    model = get_peft_model(Net(), LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=["first", "second"]))
    assert isinstance(model, PeftModel)
    return model


def rows(owner: int) -> tuple[Tensor, Tensor]:
    """Draw an owner's inputs and answers; the owners ask the same question about different inputs."""
    teacher = Net()
    generator = torch.Generator().manual_seed(1)
    for layer in (teacher.first, teacher.second):
        layer.weight.data += torch.randn(layer.weight.shape, generator=generator) / 10
    generator.manual_seed(100 + owner)
    x = torch.randn(64 * (owner + 1), 16, generator=generator) + owner / 4
    with torch.no_grad():
        return x, teacher(x)


def fit(model: nn.Module, x: Tensor, y: Tensor, steps: int = 20) -> float:
    """Train what is trainable; return the last loss."""
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    loss = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    return float(loss.detach())
