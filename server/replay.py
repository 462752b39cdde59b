"""What another strategy would have made of a past run's replies: merged again, round by round, without training.

Each round stands for itself: its replies were trained on what the run had sent, and the model that is judged is the
run's own before that round with the round's other merge on top, without a server optimizer's step. What follows from a
choice over many rounds, only a run of its own can tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.adapter import Adapter
from common.adapter_file import read_state
from common.errors import ClientError, ConfigurationError, UserError
from common.experiment import Experiment
from common.federation import ClientInfo, ClientUpdate, ModelSpec, ServerState
from common.flower import identify_task
from common.lowrank import Update, add
from common.messages import TrainAnswer, read_header
from common.parcel_file import read_parcel
from common.store import ClientRound, Round, Run, RunStore, verify
from common.tasks import clients_key
from common.workspace import cpu_threads, model_spec, workspace
from server.cohort import evaluation_cohort
from server.orders import Order, OrderBook
from server.screening import screen
from strategies import AGGREGATION, AggregationStrategy, aggregation_strategy
from strategies.certificate import certificate
from strategies.merging import merge_gathered, robust_refusals
from strategies.optimizers import OPTIMIZERS
from strategies.robust import ROBUST, RobustRule
from strategies.updates import parts_by_layer


@dataclass(frozen=True)
class ReplayedRound:
    """One round, merged again.

    Parameters
    ----------
    number, replies : int
        Round, and replies that were merged.
    error : float or None
        Relative to the exact average; None where there is none to compare with.
    was_error, was_loss : float or None
        Of the run itself.
    effective_rank : float or None
        Mean over layers.
    loss : float or None
        Held-out loss after this merge, mean weighted by examples; None if it was not asked for or no client evaluates.
    discarded_energy : float or None
        Where the strategy says so.
    reason : str
        Why the round could not be merged; empty if it could.
    trust : mapping of str to float
        What a robust rule left of each client's weight.
    """

    number: int
    replies: int
    error: float | None = None
    was_error: float | None = None
    effective_rank: float | None = None
    loss: float | None = None
    was_loss: float | None = None
    discarded_energy: float | None = None
    reason: str = ""
    trust: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Past:
    """A past run, opened."""

    store: RunStore
    run: Run
    experiment: Experiment
    spec: ModelSpec

    def state(self, number: int) -> ServerState:
        row = self.store.round(self.run.id, number)
        assert row is not None
        assert row.state_path is not None
        assert row.state_sha256 is not None
        path = self.store.artefact_file(self.run.id, row.state_path)
        verify(path, row.state_sha256)
        return read_state(path, self.spec)

    def updates(self, number: int, state: ServerState) -> tuple[list[ClientUpdate], dict[str, Adapter]]:
        """Read the accepted replies of a round, and what each client's training began with."""
        choice = self.experiment.strategy
        own = aggregation_strategy(choice.name, **choice.options)
        book = OrderBook(self.run.id, self.experiment, own, state)
        updates, starts = [], {}
        for row in self.store.client_rounds(self.run.id, number):
            if row.status == "accepted" and row.artefact_path and row.artefact_sha256:
                order = book.train(number, 1, ClientInfo(row.client, row.rank or 1), 0)
                updates.append(self._update(row, order, state))
                starts[row.client] = order.start
        return updates, starts

    def _update(self, row: ClientRound, order: Order, state: ServerState) -> ClientUpdate:
        assert row.artefact_path is not None
        assert row.artefact_sha256 is not None
        path = self.store.artefact_file(self.run.id, row.artefact_path)
        verify(path, row.artefact_sha256)
        parcel, header, _ = read_parcel(path)
        answer = read_header(TrainAnswer, header)
        return screen(order, answer, {"update": parcel}, state, self.experiment.federation)


def own_choices(name: str, home: Path, strategy: str) -> dict[str, Any]:
    """Return the tables a replay begins with: the run's robust rule, and its options where the strategy is its own."""
    with RunStore.open(home, read_only=True) as store:
        experiment = Experiment.from_json(store.get_run(name).experiment)
    same = experiment.strategy.name == strategy
    return {
        "strategy": {"name": strategy, "options": dict(experiment.strategy.options) if same else {}},
        "robust": experiment.robust.model_dump(),
    }


def replay(
    name: str, home: Path, strategy: AggregationStrategy, rule: RobustRule | None = None, evaluate: bool = True
) -> Iterator[ReplayedRound]:
    """Merge the kept replies of a run again, with another strategy.

    Parameters
    ----------
    name : str
        Id of the run, its beginning, or ``last``.
    home : Path
        Folder of the store.
    strategy : AggregationStrategy
        What merges.
    rule : RobustRule, optional
        What judges the replies before; a cap on weights stays as the run had it.
    evaluate : bool
        Also measure the held-out loss of the clients after each merge; needs their data on this machine.

    Yields
    ------
    ReplayedRound
        Round by round; the same ones every time.

    Raises
    ------
    UserError
        If the run kept no replies, or they are not whole.
    """
    rule = rule or ROBUST.create("none")
    identify_task(1)  # orders are built to read the replies, though nobody gets them
    with RunStore.open(home, read_only=True) as store:
        run = store.get_run(name)
        experiment = Experiment.from_json(run.experiment)
        if experiment.secure_aggregation.enabled:
            raise UserError(f"the replies of run {run.id} are masked; nobody can merge them in another way")
        if AGGREGATION.plugin(experiment.strategy.name).capabilities.client_memory:
            raise UserError(
                f"the replies of run {run.id} are not whole: under strategy {experiment.strategy.name} every client "
                "keeps factors of its own; there is nothing else to make of them"
            )
        past = _Past(store, run, experiment, model_spec(experiment))
        rounds = [row for row in store.rounds(run.id) if row.round and row.status == "committed"]
        kept = {artefact.round for artefact in store.artefacts(run.id, "reply")}
        if not kept:
            raise UserError(f"run {run.id} kept no replies; start one with --set federation.keep_replies=true")
        for row in rounds:
            if row.round in kept:
                yield _replayed(past, row, strategy, rule, evaluate)


def _replayed(
    past: _Past, row: Round, strategy: AggregationStrategy, rule: RobustRule, evaluate: bool
) -> ReplayedRound:
    before = past.state(row.round - 1)
    updates, starts = past.updates(row.round, before)
    losses = past.store.metrics(past.run.id, "held_out_loss", client="")
    was = next((metric.value for metric in losses if metric.round == row.round), None)
    known = ReplayedRound(row.round, len(updates), was_error=row.error, was_loss=was)
    cap = past.experiment.federation.max_weight_share
    if refusals := _refusals(strategy, rule, updates, cap):
        return replace(known, reason="; ".join(refusals))
    with cpu_threads(past.experiment.training.threads):
        try:
            after, judgement = merge_gathered(strategy, rule, OPTIMIZERS.create("none"), before, updates, starts, cap)
        except (ClientError, ConfigurationError) as error:
            return replace(known, reason=str(error))
        if after.merged is None:
            return replace(known, reason=f"{strategy.plugin_name} makes no one model of the replies")
        weights = {update.client: update.num_examples for update in judgement.updates}
        measured = certificate(after.merged, parts_by_layer(judgement.updates).items(), weights)
        ranks = list(measured.effective_rank.values())
        return replace(
            known,
            error=measured.error,
            effective_rank=sum(ranks) / len(ranks) if ranks else 0.0,
            loss=_loss(past, before, after) if evaluate else None,
            discarded_energy=after.metrics.get("discarded_energy"),
            trust=judgement.trust,
        )


def _refusals(
    strategy: AggregationStrategy, rule: RobustRule, updates: Sequence[ClientUpdate], cap: float | None
) -> list[str]:
    """List why these replies cannot be merged so; empty if they can."""
    ranks = {update.client: _rank(update) for update in updates}
    mixed = [] if strategy.capabilities.mixed_ranks else strategy.refusals(ranks)
    return [*mixed, *robust_refusals(rule, strategy, ranks, len(updates), cap)]


def _rank(update: ClientUpdate) -> int:
    return max((rank for *_, rank in update.adapter.layout.layers), default=0)


def _loss(past: _Past, before: ServerState, after: ServerState) -> float | None:
    """Return the clients' held-out loss of the run's model before the round with this merge on top."""
    assert after.merged is not None
    layers: dict[str, Update] = dict(before.global_adapter.layers)
    for name, update in after.merged.layers.items():
        layers[name] = add(layers[name], update) if name in layers else update
    place = workspace(past.experiment)
    whole = Adapter.pack(layers, method=past.spec.method)
    place.adapted.use_global(whole, whole.sha256())
    place.adapted.load(Adapter.pack({}, after.start.extras, past.spec.method))
    known = past.experiment.simulated_clients()
    total = weight = 0.0
    clients = clients_key(known)
    for name in evaluation_cohort(past.experiment, known, known):
        rows = place.task.client_data(name, clients, past.experiment.seed).held_out
        total += place.task.evaluate(place.adapted.model, rows)["loss"] * len(rows)
        weight += len(rows)
    return total / weight if weight else None
