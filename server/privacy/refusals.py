"""What protecting clients cannot go with, told before round 1."""

from __future__ import annotations

from common.experiment import Experiment
from strategies import AGGREGATION, AggregationStrategy


def client_privacy_refusals(experiment: Experiment, strategy: AggregationStrategy) -> list[str]:
    """List, in sentences, why clients cannot be protected; empty if they can, or are not to be.

    Parameters
    ----------
    experiment : Experiment
        The settings.
    strategy : AggregationStrategy
        Merges what the server may release: a sum.
    """
    privacy = experiment.privacy
    if not privacy.protects_clients:
        return []
    found = []
    if not strategy.capabilities.linear_uplink:
        linear = [name for name in AGGREGATION.names() if AGGREGATION.plugin(name).capabilities.linear_uplink]
        found.append(
            f'strategy {strategy.plugin_name} merges the clients\' updates one by one, but privacy.mode = "client" '
            f"adds noise to their sum alone; use a strategy that needs no more: {', '.join(linear)}; or protect rows "
            'with privacy.mode = "sample"'
        )
    if (noise := privacy.noise_multiplier) is not None:
        from common.privacy.accounting import Mechanism, Spending  # takes more than a second to import

        one = Spending.of(Mechanism(noise, 1.0), 1).epsilon(privacy.delta, privacy.accountant)
        if one > privacy.epsilon:
            found.append(
                f"privacy.noise_multiplier = {noise:g} spends ε = {one:.4g} in a client's first round, more than "
                f"privacy.epsilon = {privacy.epsilon:g}; raise one of them, or leave the noise to be calibrated"
            )
    return found
