"""A server optimizer's step on the start adapter, number by number.

A number that did not change was not trained (a frozen factor): it keeps its bits, and what is remembered of it. Slots
that were not there before, all of them in the first round, are taken as merged and begin with an empty memory. Where a
core travels between frozen frames, v is one number per layer, so that the step stays between the frames.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from common.adapter import Adapter, Layout, outer_views
from common.lowrank import Dense, LowRank
from strategies.server_rule import MOMENTUM, SQUARE, Rule


def coordinate_step(
    before: Adapter, after: Adapter, extras: Mapping[str, Tensor], rule: Rule, by_layer: bool = False
) -> tuple[Adapter, dict[str, Tensor]]:
    """Return the adapter after the step, and what the optimizer remembers, in its layout.

    Parameters
    ----------
    before, after : Adapter
        Before and after the strategy merged a round.
    extras : mapping of str to Tensor
        What is remembered of ``before``'s numbers.
    rule : Rule
        The optimizer.
    by_layer : bool
        Keep one v per layer.
    """
    delta = after.flat - _placed(before, after.flat, after.layout)
    moved = delta != 0
    m = _held(extras.get(MOMENTUM), before.layout, torch.zeros_like(delta), after.layout)
    m = torch.where(moved, rule.decay * m + rule.gain * delta, m)
    memory = {MOMENTUM: m} if rule.decay else {}
    v = torch.full_like(delta, rule.tau**2)
    if rule.second is not None:
        v = _held(extras.get(SQUARE), before.layout, v, after.layout)
        v = torch.where(moved, rule.second(v, _squares(delta, after.layout, by_layer)), v)
        memory[SQUARE] = v
    step = rule.scale(v) * m
    flat = torch.where(moved & (step != delta), after.flat + (step - delta), after.flat)
    return after.with_flat(flat), memory if len(delta) else {}


def _held(memory: Tensor | None, layout: Layout, empty: Tensor, wanted: Layout) -> Tensor:
    """Return what is remembered of each number of the wanted layout."""
    if memory is None or len(memory) != layout.numel:
        return empty
    return _placed(Adapter(memory, layout), empty, wanted)


def _placed(held: Adapter, around: Tensor, layout: Layout) -> Tensor:
    """Return numbers in another layout, slot by slot; ``around`` fills what is not among them."""
    if held.layout == layout:
        return held.flat
    placed = Adapter(around.clone(), layout)
    for name, part in placed.layers.items():
        known = held.layers.get(name)
        if isinstance(part, LowRank) and isinstance(known, LowRank):
            rank = min(part.rank, known.rank)
            part.b[:, :rank] = known.b[:, :rank]
            part.a[:rank] = known.a[:rank]
        elif isinstance(part, Dense) and isinstance(known, Dense):
            part.w[:] = known.w
    for name, value in placed.extras.items():
        if name in held.extras:
            value[...] = held.extras[name]
    return placed.flat


def _squares(delta: Tensor, layout: Layout, by_layer: bool) -> Tensor:
    """Square every number; by layer, those of a ``b = frame @ core`` become the mean square of the core."""
    squares = delta.square()
    if by_layer:
        for matrix in outer_views(squares, layout)[0].values():
            matrix.fill_(float(matrix.sum()) / max(matrix.shape[1], 1) ** 2)  # ‖frame @ core‖ = ‖core‖
    return squares
