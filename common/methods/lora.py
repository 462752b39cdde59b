"""LoRA: two thin factors beside a frozen weight.

``h = W₀ x + s B A x`` with ``s = alpha / r``, or ``alpha / √r`` with rsLoRA.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen: LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv
2106.09685 (equation 3); Kalajdzievski: A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, arXiv 2312.03732.
Departure: without ``alpha`` every client trains at the same scale, whatever its rank.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from peft import LoraConfig
from pydantic import Field
from torch import nn

from common.adapter import Adapter
from common.errors import ConfigurationError
from common.methods import AdapterMethod


class Lora(AdapterMethod):
    """Plain LoRA on linear, Conv1D and convolution layers."""

    exact: ClassVar[Literal["mean", "stack", "dense"]] = "stack"
    path_options: ClassVar[tuple[str, ...]] = ("start_from",)

    rank: int = Field(
        8,
        ge=1,
        description="Rank of clients that name none of their own; above a layer's size it is clamped.",
    )
    alpha: float | None = Field(
        None,
        gt=0,
        description="LoRA's alpha; none: 2 × rank (2 × √rank with rslora), so that all ranks learn at scale 2.",
    )
    rslora: bool = Field(False, description="Scale by alpha / √rank instead of alpha / rank.")
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | Literal["all-linear"] = Field(
        ("q_proj", "v_proj"),
        description='Module names (or their ends) that get an adapter; "all-linear": every linear layer.',
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before A, seeded per round and client.")
    head: tuple[str, ...] = Field((), description="Modules trained whole beside the adapter, such as a classifier.")
    start_from: str | None = Field(
        None, description="PEFT folder, adapter file or run:NAME the federation starts from."
    )

    def config(self, model: nn.Module) -> LoraConfig:
        """Build PEFT's LoraConfig after checking that every target matches a layer."""
        names = [name for name, module in model.named_modules() if _can_adapt(module)]
        targets: list[str] = [self.target_modules] if isinstance(self.target_modules, str) else [*self.target_modules]
        everything = {name for name, _ in model.named_modules()}
        for target in targets:
            if target != "all-linear" and not any(_ends_with(name, target) for name in names):
                raise ConfigurationError(f"target module {target!r} matches no layer; candidates: {_candidates(names)}")
        for head in self.head:
            if not any(_ends_with(name, head) for name in everything):
                raise ConfigurationError(f"head {head!r} matches no module of the base model")
        return LoraConfig(
            r=1,
            lora_alpha=1,
            target_modules="all-linear" if "all-linear" in targets else targets,
            lora_dropout=self.dropout,
            modules_to_save=list(self.head) or None,
        )

    def scaling(self, rank: int) -> float:
        """Return s, the factor of ``B A``."""
        root = math.sqrt(rank) if self.rslora else rank
        return 2.0 if self.alpha is None else self.alpha / root

    def initial(self) -> Adapter | None:
        """Read ``start_from``."""
        if self.start_from is None:
            return None
        from common.peft_folder import read_adapter

        return read_adapter(Path(self.start_from))


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _can_adapt(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d) or type(module).__name__ == "Conv1D"


def _candidates(names: list[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))
