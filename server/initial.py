"""The state before round 1."""

from __future__ import annotations

from dataclasses import replace

from common.adapter import Adapter
from common.errors import ConfigurationError
from common.experiment import Experiment
from common.federation import ModelSpec, ServerState
from common.workspace import method_of
from strategies import AggregationStrategy


def initial_state(experiment: Experiment, strategy: AggregationStrategy, spec: ModelSpec) -> ServerState:
    """Build the state before round 1; an adapter to start from becomes the global adapter.

    Raises
    ------
    ConfigurationError
        If that adapter does not fit the base model.
    """
    state, given = strategy.init(spec), given_adapter(experiment, strategy, spec)
    if given is None:
        return state
    return replace(
        state,
        start=Adapter.pack(state.start.layers, {**state.start.extras, **given.extras}, spec.method),
        global_adapter=Adapter.pack(given.layers, method=spec.method),
    )


def given_adapter(experiment: Experiment, strategy: AggregationStrategy, spec: ModelSpec) -> Adapter | None:
    """Read the adapter to start from, if there is one.

    Raises
    ------
    ConfigurationError
        If it does not fit the base model or the strategy.
    """
    given = method_of(experiment).initial()
    if given is None:
        return None
    for name, update in given.layers.items():
        if spec.layers.get(name) != update.shape:
            raise ConfigurationError(
                f"the adapter to start from has layer {name} of shape {update.shape}; the model has "
                f"{spec.layers.get(name, 'no such target layer')}"
            )
    if given.extras and strategy.capabilities.client_memory:
        raise ConfigurationError(
            f"the adapter to start from has heads, which strategy {strategy.plugin_name} never sends: they are its "
            "clients' own; start from one without heads or use another strategy"
        )
    for name, head in given.extras.items():
        if name not in spec.heads or spec.heads[name].shape != head.shape:
            raise ConfigurationError(
                f"the adapter to start from has head {name} {tuple(head.shape)}; the model has not"
            )
    return given
