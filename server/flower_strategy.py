"""Our strategies inside other people's Flower apps.

::

    strategy = FlowerStrategy(aggregation_strategy("flora"), lora_alpha=16)
    result = strategy.start(grid, initial_arrays=ArrayRecord(get_peft_model_state_dict(model)), num_rounds=3)

Clients answer with ``ArrayRecord(get_peft_model_state_dict(model))`` and a MetricRecord with ``num-examples``. Their
ranks may differ and need not be known: what a client is sent has the rank of its last reply, before that the one of
``initial_arrays``. Two ArrayRecords go down: ``arrays``, the factors to start from, and ``global``, what is merged
into the base model; ``client.flower_peft.load_start`` puts both into a PEFT model. Strategies that merge nothing into
the base, such as ``fedavg``, send no ``global`` and need no more of a client than stock FedAvg does.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterable, Sequence
from functools import partial

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from common.adapter import Adapter
from common.errors import ConfigurationError, LoRAFleetError, RejectedUpdate
from common.federation import ClientInfo, ModelSpec, ServerState
from common.peft_state import LoraScale
from common.seeds import derive_seed
from server.flower_replies import Limits, Trained, mean_metrics, read_evaluation, read_replies, read_trained
from server.flower_run import FlowerRun, begin_run, client_name
from strategies import AGGREGATION, AggregationStrategy
from strategies.updates import all_finite

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5


class FlowerStrategy(Strategy):
    """A stock Flower strategy that merges LoRA factors with one of our aggregation strategies.

    Parameters
    ----------
    strategy : AggregationStrategy
        How replies are merged; must train plain ``a`` and ``b``.
    lora_alpha : float, optional
        ``lora_alpha`` of the clients' LoraConfig, whatever their rank. A client may name its own instead, as metric
        ``lora-alpha`` (with ``use-rslora`` 0 or 1).
    use_rslora : bool
        ``use_rslora`` of their LoraConfig.
    scaling : float, optional
        Instead of ``lora_alpha``: the factor of ``B A`` at every rank, as of ``lora_alpha = scaling · r``. The metric
        is ``lora-scaling``.
    seed : int
        Draws cohorts and fresh factors.
    fraction_train, fraction_evaluate : float in [0, 1]
        Share of the online nodes that take part.
    min_available_nodes : int
        Nodes to wait for, at most ``join_timeout_s`` seconds.
    min_completion : float in [0, 1]
        Share of the asked nodes whose valid replies a merge needs, at least one; otherwise the round changes nothing.
    max_num_examples : float
        Replies that claim more are left out.
    max_update_norm : float, optional
        Replies whose factors and heads have a larger norm are left out.

    Raises
    ------
    ConfigurationError
        If the strategy needs clients that can do more, or the scale is given twice.

    Notes
    -----
    What ``start`` returns as arrays, and ``evaluate_fn`` is given, is the whole change of the base model under PEFT's
    names and at its own rank, scaled as the constructor says; `adapter` is the same with the scale folded in.
    """

    def __init__(
        self,
        strategy: AggregationStrategy,
        *,
        lora_alpha: float | None = None,
        use_rslora: bool = False,
        scaling: float | None = None,
        seed: int = 0,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_available_nodes: int = 2,
        min_completion: float = 0.5,
        max_num_examples: float = 10_000_000,
        max_update_norm: float | None = None,
        join_timeout_s: float = 300.0,
    ) -> None:
        if reason := obstacle(strategy):
            raise ConfigurationError(
                f"FlowerStrategy cannot serve {strategy.plugin_name}: {reason}; use {', '.join(served())}, or run "
                "LoRAFleet's own server and clients"
            )
        if lora_alpha is not None and scaling is not None:
            raise ConfigurationError("lora_alpha and scaling exclude one another; give one")
        self.strategy, self.seed = strategy, seed
        self.scale: LoraScale | None = None
        if lora_alpha is not None or scaling is not None:
            self.scale = LoraScale(lora_alpha, use_rslora, 1.0 if scaling is None else scaling)
        self.fractions = {MessageType.TRAIN: fraction_train, MessageType.EVALUATE: fraction_evaluate}
        self.min_available_nodes, self.join_timeout_s = min_available_nodes, join_timeout_s
        self.min_completion = min_completion
        self.max_num_examples, self.max_update_norm = max_num_examples, max_update_norm
        self._run: FlowerRun | None = None

    @property
    def adapter(self) -> Adapter:
        """What the base model needs to become the merged model; see ``common.peft_folder.write_peft_folder``.

        Raises
        ------
        ConfigurationError
            If no round began yet.
        """
        return self._begun().whole

    def summary(self) -> None:
        """Log what replies are merged with."""
        logger.info("aggregation strategy %s %s", self.strategy.plugin_name, self.strategy.model_dump_json())
        logger.info("share of the nodes %s, of at least %d", self.fractions, self.min_available_nodes)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send each node of the cohort its start and what is merged.

        Raises
        ------
        ConfigurationError
            If the arrays are no LoRA, or somebody else changed them since the last round.
        """
        if self._run is None or server_round == 1:
            self._run = begin_run(self.strategy, arrays, self.scale, self.seed)
        run = self._run
        if arrays is not run.arrays and arrays.object_id != run.arrays.object_id:
            raise ConfigurationError("the merged arrays were changed; no other strategy may wrap FlowerStrategy")
        nodes = self._sample(grid, MessageType.TRAIN, server_round)
        run.asked = set(nodes)
        return [run.train_order(node, server_round, config) for node in nodes]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge what is valid; None, and everything as before, where too little is."""
        run = self._begun()
        limits = Limits(self.max_num_examples, self.max_update_norm, run.common_ranks)

        def read(message: Message) -> Trained:
            name = client_name(message.metadata.src_node_id)
            return read_trained(message, name, run.state, self.scale, limits)

        valid = read_replies(replies, run.asked, read)
        for node, trained in valid.items():
            run.remember(node, trained.update.adapter, trained.scale)
        merged = self._merge(run, server_round, list(valid.values()))
        if merged is None:
            return None, None
        metrics = mean_metrics([(trained.metrics, trained.update.num_examples) for trained in valid.values()])
        return run.commit(merged), MetricRecord({**metrics, **merged.metrics})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the merged model to the nodes that judge it."""
        run = self._begun()
        nodes = self._sample(grid, MessageType.EVALUATE, server_round)
        run.asked = set(nodes)
        return [run.evaluate_order(node, server_round, config) for node in nodes]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Average the valid replies' metrics, weighted by examples."""
        limit = self.max_num_examples
        valid = read_replies(replies, self._begun().asked, partial(read_evaluation, max_num_examples=limit))
        return MetricRecord({**mean_metrics(list(valid.values()))}) if valid else None

    def _begun(self) -> FlowerRun:
        if self._run is None:
            raise ConfigurationError("FlowerStrategy has not begun; call start, or configure_train first")
        return self._run

    def _merge(self, run: FlowerRun, server_round: int, valid: Sequence[Trained]) -> ServerState | None:
        """Merge valid updates; None if they are too few, or what comes of them cannot be used."""
        accumulated, count = self.strategy.begin(run.state), 0
        for trained in valid:
            try:
                accumulated = self.strategy.add(accumulated, trained.update)
                count += 1
            except RejectedUpdate as error:
                logger.warning("a reply is left out: %s", error)
        reason = f"{count} of {len(run.asked)} replies are valid"
        if count and count >= self.min_completion * len(run.asked):
            try:
                state = self.strategy.finish(run.state, accumulated)
                if all_finite(state.start.flat) and all_finite(state.global_adapter.flat):
                    return state
                reason = "the merge is beyond float32"
            except LoRAFleetError as error:
                reason = str(error)
        logger.warning("round %d changes nothing: %s", server_round, reason)
        return None

    def _sample(self, grid: Grid, kind: str, server_round: int) -> list[int]:
        """Draw a phase's nodes; wait for enough of them, then go on with those there are."""
        share, wanted = self.fractions[kind], self.min_available_nodes
        if not share:
            return []
        end = time.monotonic() + self.join_timeout_s
        while len(online := sorted(grid.get_node_ids())) < wanted and time.monotonic() < end:
            time.sleep(LOOK_EVERY_S)
        if len(online) < wanted:
            logger.warning("round %d goes on with %d nodes, %d were wanted", server_round, len(online), wanted)
        size = min(len(online), max(1, round(share * len(online))))
        return sorted(random.Random(derive_seed(self.seed, kind, server_round)).sample(online, size))


def obstacle(strategy: AggregationStrategy) -> str:
    """Say what a strategy needs that a client with plain PEFT cannot do; empty if nothing."""
    if strategy.capabilities.client_memory:
        return "its clients must keep factors of their own"
    probe = ModelSpec({"layer": (4, 4)}, 0)
    order = strategy.dispatch(strategy.init(probe), ClientInfo("probe", 2))
    if strategy.capabilities.shared_frozen_factor or order.frozen_a is not None:
        return "its clients must hold a frozen factor drawn from a seed"
    if order.tail is not None:
        return "its clients must penalise some of their rank slots"
    parts = {part for number in (1, 2, 3) for part in strategy.travels(number)} | {order.sends, order.receives}
    return "" if parts == {"ab"} else f"its clients must train and send {', '.join(sorted(parts - {'ab'}))} alone"


def served() -> list[str]:
    """List the strategies a plain PEFT client can work with, at their default options."""
    return [name for name in AGGREGATION.names() if not obstacle(AGGREGATION.create(name))]
