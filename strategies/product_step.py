"""A server optimizer's step on the model itself, layer by layer, without building a matrix for factors.

``U = (global + start) after − before`` is the change of the model, refactored from the factors side by side. The
momentum m is an update like it; v is one number per layer, the mean square of U's entries (as NovoGrad does, Ginsburg
et al., arXiv 1905.11286), since the squares of a product's entries would need the matrix. ``step − U`` goes to the
global adapter: the model moves by exactly the step, whatever the start adapter looks like. A layer that did not move
stays where it is, and so does what is remembered of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from common.adapter import Adapter
from common.federation import ServerState
from common.lowrank import Dense, LowRank, Update, add
from strategies.global_adapter import grow
from strategies.server_rule import MOMENTUM, SQUARE, Rule


def product_step(
    before: ServerState, after: ServerState, rule: Rule, cap: int | None = None
) -> tuple[Adapter, dict[str, Tensor]]:
    """Return the global adapter after the step, and what the optimizer remembers.

    Parameters
    ----------
    before, after : ServerState
        Before and after the strategy merged a round.
    rule : Rule
        The optimizer.
    cap : int, optional
        Largest rank of the global adapter per layer.
    """
    whole = max((min(shape) for shape in after.spec.layers.values()), default=1)  # refactors, cuts nothing
    steps = {
        name: _step(update, name, before.extras, rule) for name, update in _moved(before, after, whole).layers.items()
    }
    further = {name: step.further for name, step in steps.items() if step.further is not None}
    total = after.global_adapter
    if further:
        total, _ = grow(total, Adapter.pack(further, method=total.method), cap or whole)
    momentum: dict[str, Update] = {name: step.momentum for name, step in steps.items()} if rule.decay else {}
    refactored, _ = grow(Adapter.empty(), Adapter.pack(momentum), whole)
    memory = {
        name: value
        for name, value in before.extras.items()
        if name.startswith((f"{MOMENTUM}.", f"{SQUARE}/")) and name.partition("/")[2] not in steps
    }
    for name, step in steps.items():
        memory |= {} if step.square is None else {f"{SQUARE}/{name}": step.square}
        memory |= _tensors(name, refactored.layers.get(name))
    return total, memory


@dataclass(frozen=True, eq=False)
class _Step:
    """One layer's step: what the model must move beyond the merge, and the new m and v."""

    further: Update | None
    momentum: Update
    square: Tensor | None


def _step(update: Update, name: str, extras: Mapping[str, Tensor], rule: Rule) -> _Step:
    """Work out the step of a layer that moved by ``update``."""
    scale, square = rule.learning_rate, None
    if rule.second is not None:
        found = torch.tensor([update.norm() ** 2 / math.prod(update.shape)], dtype=torch.float64)
        square = rule.second(extras.get(f"{SQUARE}/{name}", torch.full_like(found, rule.tau**2)), found)
        scale = float(rule.scale(square))
    old = _momentum(name, extras) if rule.decay else None
    momentum = update.scaled(rule.gain)
    further = update.scaled(scale * rule.gain - 1) if scale * rule.gain != 1 else None
    if old is not None:
        momentum = add(old.scaled(rule.decay), momentum)
        kept = old.scaled(scale * rule.decay)
        further = kept if further is None else add(kept, further)
    return _Step(further, momentum, square)


def _moved(before: ServerState, after: ServerState, whole: int) -> Adapter:
    """Return by how much a round moved the model, refactored; layers that did not move are left out."""
    moved: dict[str, Update] = {}
    for old, new in ((before.global_adapter, after.global_adapter), (before.start, after.start)):
        for name in sorted(old.layers.keys() | new.layers.keys()):
            part = _difference(new.layers.get(name), old.layers.get(name))
            moved[name] = add(moved[name], part) if name in moved else part
    refactored, _ = grow(Adapter.empty(), Adapter.pack(moved), whole)
    return Adapter.pack({name: part for name, part in refactored.layers.items() if bool(part.norm())})


def _difference(after: Update | None, before: Update | None) -> Update:
    """Return ``after − before``; slots put beside those that were there are the difference themselves, to the bit."""
    if before is None:
        assert after is not None
        return after
    if after is None:
        return before.scaled(-1.0)
    if isinstance(after, LowRank) and isinstance(before, LowRank):
        b, a = after.b[:, : before.rank], after.a[: before.rank]
        if torch.equal(b, before.b) and torch.equal(a, before.a):
            return LowRank(after.b[:, before.rank :], after.a[before.rank :])
    return add(after, before.scaled(-1.0))


def _tensors(name: str, momentum: Update | None) -> dict[str, Tensor]:
    """Name a layer's momentum, each tensor with memory of its own, as files want it."""
    if momentum is None:
        return {}
    letters = {"b": momentum.b, "a": momentum.a} if isinstance(momentum, LowRank) else {"w": momentum.w}
    return {f"{MOMENTUM}.{letter}/{name}": tensor.clone() for letter, tensor in letters.items()}


def _momentum(name: str, extras: Mapping[str, Tensor]) -> Update | None:
    """Find a layer's momentum."""
    if (dense := extras.get(f"{MOMENTUM}.w/{name}")) is not None:
        return Dense(dense)
    b, a = extras.get(f"{MOMENTUM}.b/{name}"), extras.get(f"{MOMENTUM}.a/{name}")
    return None if b is None or a is None else LowRank(b, a)
