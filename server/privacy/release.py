"""What leaves the server where clients are protected: the sum of their clipped updates, with noise.

``(Σ_k x_k + Σ_k clip(u_k, S) + N(0, (z S)²)) / n``, where ``x_k`` is what client k's training began with, ``u_k`` what
of the numbers that travel it changed, and n how many clients the plan draws. Whoever is missing counts as an update of
zero, so that n is known in advance and one client moves the sum by S at most. The noised sum is formed first; all that
strategies and server optimizers make of it is post-processing. In the manner of McMahan, Ramage, Talwar, Zhang,
Learning Differentially Private Recurrent Language Models, ICLR 2018, arXiv 1710.06963, with equal weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from common.adapter import Adapter
from common.errors import RunError
from common.federation import ClientUpdate, ServerState
from common.privacy.clipping import clip_change
from common.privacy.noise import gaussian, secret_generator
from common.secure.upload import widened
from common.travel import complete, take
from server.cohort import planned_cohort
from server.federation import Federation
from server.orders import Order
from server.privacy.adaptive import clipping_norm, count_noise, next_norm, remembered, update_noise
from server.record import RoundRecord
from strategies.updates import COHORT


@dataclass
class Release:
    """The release of one round, from the updates to the next state.

    Parameters
    ----------
    federation, state : Federation, ServerState
        The run, and what clients train on.
    orders : mapping of str to Order
        One per client of the cohort, by name, whether it answers or not.
    """

    federation: Federation
    state: ServerState
    orders: Mapping[str, Order]
    _unclipped: float = field(default=0.0, init=False)

    @cached_property
    def norm(self) -> float:
        """Return S: what no client's update may exceed."""
        return clipping_norm(self.state, self.federation.experiment.privacy)

    @cached_property
    def clients(self) -> int:
        """Return n, fixed in advance."""
        training = sum(settings.trains for settings in self.federation.clients.values())
        return max(1, planned_cohort(self.federation.experiment, training))

    @cached_property
    def widest(self) -> str:
        """Return the client whose adapter holds all others'."""
        return max(self.orders, key=lambda name: (self.orders[name].dispatch.rank, name))

    def add(self, update: ClientUpdate) -> None:
        """Clip a client's update and add it to the sum, as wide as the widest client's."""
        order = self.orders[update.client]
        clipped = clip_change(self._travels(update.adapter), self._travels(order.start), self.norm)
        self._sum.add_(widened(clipped.change, order.dispatch.sends, order.start.layout, self._wide.layout))
        self._unclipped += 0.5 if clipped.norm <= self.norm else -0.5

    def add_sum(self, numbers: Tensor, wide: Order, clients: Sequence[str]) -> None:
        """Add what a secure sum is of: what travelled of some clients, each clipped by itself.

        Parameters
        ----------
        numbers : Tensor, shape (part_numel(wide.start.layout, part),)
            Sum over the clients.
        wide : Order
            Of the client whose layout the sum has.
        clients : sequence of str
            Whose it is.
        """
        part, layout = wide.dispatch.sends, wide.start.layout
        changes = numbers.double()
        for name in clients:
            start = self.orders[name].start
            changes = changes - widened(self._travels(start), part, start.layout, layout)
        self._sum.add_(widened(changes, part, layout, self._wide.layout))

    def merged(self, record: RoundRecord, accepted: Sequence[str]) -> ServerState:
        """Add noise, let the strategy merge, and charge it to the accepted clients.

        Parameters
        ----------
        record : RoundRecord
            Told what it cost; nothing of any client's update.
        accepted : sequence of str
            Clients whose updates are in the sum.
        """
        experiment, account = self.federation.experiment, self.federation.account
        privacy, noise = experiment.privacy, account.noise
        generator = secret_generator("cpu", privacy.test_seed, "release", record.number)
        extras: Mapping[str, Tensor] = {}
        if privacy.adaptive_clipping:
            of_count = count_noise(self.clients, noise)
            counted = self._unclipped + float(gaussian(torch.empty(1), of_count, generator))
            extras = remembered(next_norm(self.norm, counted / self.clients + 0.5, privacy))
            noise = update_noise(noise, of_count)
        after = self._folded(self._sum + gaussian(self._sum, noise * self.norm, generator))
        account.charge(accepted)
        account.write(record)
        record.measure("clipping_norm", self.norm)
        return replace(after, extras={**after.extras, **extras}) if extras else after

    def _folded(self, changes: Tensor) -> ServerState:
        """Let the strategy take the mean of n starts, one of them moved by the noised sum, and the optimizer step."""
        strategy, state = self.federation.strategy, self.state
        accumulated = strategy.begin(state)
        for update in self._as_updates(changes):
            accumulated = strategy.add(accumulated, update)
        return self.federation.optimizer.step(state, strategy.finish(state, accumulated), strategy)

    def _as_updates(self, changes: Tensor) -> Iterator[ClientUpdate]:
        wide, order = self._wide, self.orders[self.widest]
        numbers = (self._travels(wide).double() + changes).float()
        part, dispatch = order.dispatch.sends, order.dispatch
        start = wide if part in ("a", "b") and dispatch.frozen_a is None else None
        moved = complete(numbers, wide.layout, part, dispatch, start)
        if not bool(moved.flat.isfinite().all()):
            raise RunError("the noised sum is beyond float32; lower privacy.clipping_norm")
        yield ClientUpdate(COHORT, moved, 1.0, self.state.base_version)
        for name in sorted(self.orders.keys() - {self.widest}):
            yield ClientUpdate(name, self.orders[name].start, 1.0, self.state.base_version)
        if (absent := self.clients - len(self.orders)) > 0:
            yield ClientUpdate(COHORT, wide, float(absent), self.state.base_version)

    @cached_property
    def _wide(self) -> Adapter:
        """What the widest client's training begins with."""
        return self.orders[self.widest].start

    @cached_property
    def _sum(self) -> Tensor:
        """The sum so far, in fp64."""
        return torch.zeros(len(self._travels(self._wide)), dtype=torch.float64)

    def _travels(self, adapter: Adapter) -> Tensor:
        """Return the numbers of an adapter that travel; frames and masks are the same for all clients."""
        dispatch = self.orders[self.widest].dispatch
        return take(adapter, dispatch.sends, dispatch)
