"""A round's updates: what each must be before a strategy may merge it, and how they look layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from common.errors import ConfigurationError, RejectedUpdate
from common.federation import ClientUpdate, ServerState
from common.lowrank import Dense, LowRank, Update

COHORT = "cohort"
"""Name of the one update that stands for all clients."""

NO_UPDATE = "a round without any update cannot be merged"


def check_update(update: ClientUpdate, state: ServerState) -> None:
    """Refuse an update that does not fit the model, is not finite or was trained on another base.

    Raises
    ------
    RejectedUpdate
        Naming client, layer, what was found and what was expected.
    """
    spec, who = state.spec, f"client {update.client}"
    if not 0 < update.num_examples < math.inf:
        raise RejectedUpdate(f"{who} weighs {update.num_examples}; expected a positive, finite weight")
    if update.base_version != state.base_version:
        raise RejectedUpdate(
            f"{who} trained on base version {update.base_version}, not on {state.base_version}; "
            "it must fetch the current one"
        )
    if update.adapter.method != spec.method:
        raise RejectedUpdate(f"{who} trained the method {update.adapter.method!r}; this run trains {spec.method!r}")
    for layer, out, inn, rank in update.adapter.layout.layers:
        dense = isinstance(state.start.layers.get(layer), Dense)
        _check_layer(f"{who}, layer {layer}", (out, inn), rank, spec.layers.get(layer), dense)
    _check_heads(update, state)
    if not all_finite(update.adapter.flat):
        raise RejectedUpdate(f"{who}, {_first_not_finite(update)}: NaN or infinity; it cannot be averaged")


def all_finite(numbers: Tensor) -> bool:
    """Tell whether no number is NaN or infinite; one pass over the memory, without a mask as large as it."""
    return not numbers.numel() or all(math.isfinite(float(bound)) for bound in torch.aminmax(numbers))


def low_rank_layers(update: ClientUpdate) -> dict[str, LowRank]:
    """Return the layers of an update, all of which must be factors.

    Raises
    ------
    RejectedUpdate
        If a layer is dense.
    """
    found = {}
    for layer, part in update.adapter.layers.items():
        if not isinstance(part, LowRank):
            raise RejectedUpdate(f"client {update.client}, layer {layer}: {_DENSE}")
        found[layer] = part
    return found


def parts_by_layer(updates: Sequence[ClientUpdate]) -> dict[str, dict[str, Update]]:
    """Return each client's part of each layer, factors or matrix: layers sorted, clients in the order given."""
    found: dict[str, dict[str, Update]] = {}
    for update in updates:
        for layer, part in update.adapter.layers.items():
            found.setdefault(layer, {})[update.client] = part
    return dict(sorted(found.items()))


def by_layer(updates: Sequence[ClientUpdate]) -> dict[str, dict[str, LowRank]]:
    """Return each client's factors of each layer: layers sorted, clients in the order given."""
    found: dict[str, dict[str, LowRank]] = {}
    for update in updates:
        for layer, part in low_rank_layers(update).items():
            found.setdefault(layer, {})[update.client] = part
    return dict(sorted(found.items()))


def shares(updates: Sequence[ClientUpdate]) -> dict[str, float]:
    """Return ``wᵢ = nᵢ / Σ n`` by client, over all clients of the round.

    Raises
    ------
    ConfigurationError
        If there is no update.
    """
    if not updates:
        raise ConfigurationError(NO_UPDATE)
    total = math.fsum(update.num_examples for update in updates)
    return {update.client: update.num_examples / total for update in updates}


_DENSE = "a dense matrix; expected factors b and a"


def _check_layer(where: str, sent: tuple[int, int], rank: int, shape: tuple[int, int] | None, dense: bool) -> None:
    if shape is None:
        raise RejectedUpdate(f"{where}: no such target layer in this run's model")
    if rank < 0 and not dense:
        raise RejectedUpdate(f"{where}: {_DENSE}")
    if sent != tuple(shape):
        raise RejectedUpdate(f"{where}: shape {sent}; the model's layer is {tuple(shape)} (out, in)")


def _check_heads(update: ClientUpdate, state: ServerState) -> None:
    given = dict(update.adapter.layout.extras)
    wanted = {name: tuple(value.shape) for name, value in state.spec.heads.items()}
    for name in sorted(given.keys() | wanted.keys()):
        if given.get(name) != wanted.get(name):
            raise RejectedUpdate(
                f"client {update.client}, head {name}: shape {given.get(name)}; expected {wanted.get(name)}"
            )


def _first_not_finite(update: ClientUpdate) -> str:
    for layer, part in low_rank_layers(update).items():
        if not (part.b.isfinite().all() and part.a.isfinite().all()):
            return f"layer {layer}"
    return f"head {next(name for name, value in update.adapter.extras.items() if not value.isfinite().all())}"
