"""Adapter methods: how an adapter is attached to a model, trained, and folded to plain LoRA.

Each module of this package is one method, named after its file. Methods attach themselves through PEFT and may then
rewire its sub-modules; everything that switches factors between clients is shared, in ``common/adapted_model.py``.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

from peft import PeftConfig
from torch import nn

from common.adapter import Adapter
from common.plugins import Family, Plugin


class AdapterMethod(Plugin):
    """Base of the adapter methods.

    ``exact`` tells how trained adapters average exactly: ``mean`` of what travels, ``stack`` of the folded factors,
    ``dense`` mean of the layers' updates.
    """

    exact: ClassVar[Literal["mean", "stack", "dense"]]

    rank: int

    @abstractmethod
    def config(self, model: nn.Module) -> PeftConfig:
        """Build PEFT's configuration that attaches the adapter to this model.

        Raises
        ------
        ConfigurationError
            If a target module matches nothing; the message lists candidates.
        """

    @abstractmethod
    def scaling(self, rank: int) -> float:
        """Return the factor s of ``ΔW = s B A`` a client of this rank trains with."""

    @abstractmethod
    def initial(self) -> Adapter | None:
        """Return the adapter the federation starts from, if the options name one."""


METHODS: Family[AdapterMethod] = Family(
    "common.methods",
    AdapterMethod,  # type: ignore[type-abstract]
    "adapter method",
)
