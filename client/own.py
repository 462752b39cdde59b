"""The part of the model that stays with its client: factors ``b`` and heads (FedSA-LoRA, arXiv 2410.01463)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from client.memory import remember
from common.adapter import Adapter, Layout, outer_views
from common.errors import TrainingError
from common.lowrank import LowRank, Update
from strategies.updates import all_finite

OWN = "own"
"""Kind of the memory."""

HEAD = "head."


def keep_own(folder: Path, number: int, trained: Adapter) -> None:
    """Keep what stays of round ``number``: all ``b`` as one flat tensor, and the heads by name.

    Raises
    ------
    TrainingError
        If a number is not finite: the client would never train again.
    """
    layout = trained.layout
    if not all_finite(trained.flat[: layout.head_numel]):
        raise TrainingError("what was learned is not finite and is not kept; lower training.learning_rate")
    heads = {HEAD + name: value for name, value in trained.extras.items()}
    remember(folder, OWN, number, {"b": trained.flat[: layout.outer_numel], **heads})


def with_own(adapter: Adapter, own: Mapping[str, Tensor] | None) -> Adapter:
    """Put the client's own ``b`` and heads into an adapter; what it has kept of another rank does not count."""
    layout = adapter.layout
    if own is None or own["b"].shape != (layout.outer_numel,):
        return adapter
    outer, _ = outer_views(own["b"], Layout(layout.layers))
    layers: dict[str, Update] = {
        name: LowRank(outer[name], part.a) for name, part in adapter.layers.items() if isinstance(part, LowRank)
    }
    heads = {name.removeprefix(HEAD): value for name, value in own.items() if name.startswith(HEAD)}
    return Adapter.pack(layers, heads, layout.method)
