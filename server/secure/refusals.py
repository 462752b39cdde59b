"""What secure aggregation cannot go with, told before round 1."""

from __future__ import annotations

from common.experiment import Experiment
from strategies import AGGREGATION, AggregationStrategy


def secure_refusals(experiment: Experiment, strategy: AggregationStrategy, cohort: int) -> list[str]:
    """List, in sentences, why uploads cannot be masked; empty if they can, or are not to be.

    Parameters
    ----------
    experiment : Experiment
        The settings.
    strategy : AggregationStrategy
        Merges what the server learns: a sum.
    cohort : int
        Clients trained in a round.
    """
    secure, federation = experiment.secure_aggregation, experiment.federation
    if not secure.enabled:
        return []
    found = []
    if not strategy.capabilities.linear_uplink:
        linear = [name for name in AGGREGATION.names() if AGGREGATION.plugin(name).capabilities.linear_uplink]
        found.append(
            f"strategy {strategy.plugin_name} merges the clients' updates one by one, but secure aggregation shows the "
            f"server only their sum; use a strategy that needs no more: {', '.join(linear)}"
        )
    if experiment.robust.name != "none":
        found.append(
            f"robust rule {experiment.robust.name} compares the clients' updates, which secure aggregation hides; "
            'set robust.name = "none" or secure_aggregation.enabled = false'
        )
    if federation.wire != "fp32":
        found.append(
            f"masked uploads are 64-bit whole numbers, so federation.wire {federation.wire!r} cannot be; "
            'set federation.wire = "fp32"'
        )
    for name in ("max_weight_share", "max_update_norm"):
        if getattr(federation, name) is not None:
            found.append(
                f"federation.{name} looks at each client's reply, which secure aggregation hides; leave it out"
            )
    if federation.keep_replies:
        found.append(
            "federation.keep_replies would keep nothing: masked replies are of no use; set federation.keep_replies = "
            "false"
        )
    if cohort < secure.min_cohort:
        found.append(
            f"{cohort} clients train in a round, a secure sum must hold {secure.min_cohort}; train more clients or "
            "lower secure_aggregation.min_cohort"
        )
    return found
