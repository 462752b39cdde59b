"""What our strategies remember between the calls of a stock Flower strategy, and what they send to a node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from common.adapter import Adapter
from common.adapter_file import whole_adapter
from common.errors import ConfigurationError, RejectedUpdate
from common.federation import ClientInfo, ModelSpec, ServerState
from common.lowrank import LowRank, Update
from common.peft_state import LoraScale, adapter_from_state, kernels_of, state_from_adapter
from common.start import starting_adapter
from server.flower_replies import ALPHA, RSLORA, SCALING, read_tensors
from strategies import AggregationStrategy
from strategies.updates import all_finite

ARRAYS, CONFIG, GLOBAL = "arrays", "config", "global"
"""Names of the records that go down."""


@dataclass(frozen=True, eq=False)
class NodeModel(ModelSpec):
    """The model as one node adapts it.

    Parameters
    ----------
    ranks : mapping of str to int
        Of each layer.
    scale : LoraScale
        Of its LoRA.
    """

    ranks: Mapping[str, int] = field(default_factory=dict)
    scale: LoraScale = field(default_factory=LoraScale)

    def layer_rank(self, layer: str, rank: int) -> int:
        """Return the layer's own rank: PEFT does not clamp it."""
        return self.ranks[layer]

    def holds(self, adapter: Adapter) -> bool:
        """Tell whether an adapter fits without a cut."""
        return all(0 <= rank <= self.ranks[name] for name, _, _, rank in adapter.layout.layers)


@dataclass(eq=False)
class FlowerRun:
    """One run of a strategy under Flower.

    Parameters
    ----------
    strategy : AggregationStrategy
        How replies are merged.
    state : ServerState
        Its whole memory.
    arrays : ArrayRecord
        What Flower was given last.
    scale : LoraScale
        At which `arrays` are written.
    model : NodeModel
        What holds for nodes that have not replied yet.
    kernels : mapping of str to tuple of int
        Shape of a row of ``lora_A``, by layer.
    nodes : dict of int to NodeModel
        What the last replies showed.
    asked : set of int
        Nodes of the phase that is under way.
    """

    strategy: AggregationStrategy
    state: ServerState
    arrays: ArrayRecord
    scale: LoraScale
    model: NodeModel
    kernels: Mapping[str, tuple[int, ...]]
    nodes: dict[int, NodeModel] = field(default_factory=dict)
    asked: set[int] = field(default_factory=set)
    _encoded: dict[int, ArrayRecord] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.whole = whole_adapter(self.state)

    @property
    def common_ranks(self) -> Mapping[str, int] | None:
        """The ranks every client must have, by layer; None if they may differ."""
        return None if self.strategy.capabilities.mixed_ranks else self.model.ranks

    def remember(self, node: int, adapter: Adapter, scale: LoraScale) -> None:
        """Note what a node's reply shows of its model."""
        ranks = {name: rank for name, _, _, rank in adapter.layout.layers}
        self.nodes[node] = replace(self.model, ranks=ranks, scale=scale)

    def commit(self, state: ServerState) -> ArrayRecord:
        """Take the next state over and write the whole model it makes."""
        self.state, self.whole = state, whole_adapter(state)
        self._encoded.clear()
        self.arrays = _record(self.whole, self.scale, self.kernels)
        return self.arrays

    def train_order(self, node: int, server_round: int, config: ConfigRecord) -> Message:
        """Tell a node where to start training."""
        return self._message(node, MessageType.TRAIN, server_round, config, None, self.state.global_adapter)

    def evaluate_order(self, node: int, server_round: int, config: ConfigRecord) -> Message:
        """Send a node the merged model; what its rank would cut goes into the base model as well."""
        start = self.state.start
        known = node in self.nodes or self.common_ranks is not None or not start.layers
        if known and self._model(node).holds(start):
            return self._message(node, MessageType.EVALUATE, server_round, config, start, self.state.global_adapter)
        heads = Adapter.pack({}, start.extras, start.method)
        return self._message(node, MessageType.EVALUATE, server_round, config, heads, self.whole)

    def _model(self, node: int) -> NodeModel:
        return self.nodes.get(node, self.model)

    def _message(
        self, node: int, kind: str, server_round: int, config: ConfigRecord, start: Adapter | None, merged: Adapter
    ) -> Message:
        model = self._model(node)
        dispatch = self.strategy.dispatch(self.state, ClientInfo(client_name(node), max(model.ranks.values())))
        begun = starting_adapter(dispatch if start is None else replace(dispatch, start=start), model)
        settings = {**config, "server-round": server_round, **_described(model.scale)}
        content = RecordDict({ARRAYS: _record(begun, model.scale, self.kernels), CONFIG: ConfigRecord(settings)})
        if merged.layers:
            content[GLOBAL] = self._merged_record(merged)
        return Message(content, node, kind)

    def _merged_record(self, merged: Adapter) -> ArrayRecord:
        """Encode what goes into the base model, once for all nodes."""
        if id(merged) not in self._encoded:
            self._encoded[id(merged)] = _record(merged, LoraScale(), self.kernels)
        return self._encoded[id(merged)]


def begin_run(strategy: AggregationStrategy, arrays: ArrayRecord, scale: LoraScale | None, seed: int) -> FlowerRun:
    """Learn the model from the user's initial arrays.

    Factors that change nothing yet are where the first round starts. What an adapter has learned before is part of the
    start where all ranks are equal, and of the global adapter where not every client could hold it.

    Raises
    ------
    ConfigurationError
        If the arrays are not those of a LoRA model, or change it by an unknown factor.
    """
    try:
        tensors = read_tensors(arrays)
        given = adapter_from_state(tensors, scale or LoraScale())
    except RejectedUpdate as error:
        raise ConfigurationError(f"initial_arrays: {error}") from None
    if not given.layers or not all_finite(given.flat):
        raise ConfigurationError("initial_arrays hold no finite LoRA; give get_peft_model_state_dict(model)")
    learned: dict[str, Update] = {name: update for name, update in given.layers.items() if update.norm()}
    if learned and scale is None:
        raise ConfigurationError("initial_arrays change the model already; tell FlowerStrategy their lora_alpha")
    shapes = {name: update.shape for name, update in given.layers.items()}
    ranks = {name: max(rank, 1) for name, _, _, rank in given.layout.layers}
    model = NodeModel(shapes, seed, given.extras, ranks=ranks, scale=scale or LoraScale())
    state = strategy.init(ModelSpec(shapes, seed, given.extras))
    if strategy.capabilities.mixed_ranks:
        thin = {name: update for name, update in given.layers.items() if isinstance(update, LowRank)}
        fresh = {name: LowRank(torch.zeros_like(update.b), update.a) for name, update in thin.items()}
        state = replace(state, start=Adapter.pack(fresh, given.extras), global_adapter=Adapter.pack(learned))
    else:
        state = replace(state, start=given)
    return FlowerRun(strategy, state, arrays, scale or LoraScale(), model, kernels_of(tensors))


def client_name(node: int) -> str:
    """Name a node so that names sort as ids do."""
    return f"{node:020d}"


def _record(adapter: Adapter, scale: LoraScale, kernels: Mapping[str, tuple[int, ...]]) -> ArrayRecord:
    return ArrayRecord(state_from_adapter(adapter, scale, kernels))


def _described(scale: LoraScale) -> dict[str, float | bool]:
    """Tell a client at which scale the arrays it is sent are written."""
    return {SCALING: float(scale.fixed)} if scale.alpha is None else {ALPHA: float(scale.alpha), RSLORA: scale.rslora}
