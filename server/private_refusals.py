"""What privacy cannot go with, told before round 1, and what weakens it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.experiment import Experiment
from common.tasks import Task
from common.wording import counted, named
from server.traffic import sent_parts
from strategies import AggregationStrategy

if TYPE_CHECKING:
    from server.private_plan import PrivatePlan


def row_refusals(experiment: Experiment, strategy: AggregationStrategy, task: Task) -> list[str]:
    """List, in sentences, why single rows cannot be protected; empty if they can, or are not to be."""
    if not experiment.privacy.protects_rows:
        return []
    found = []
    if coupled := task.couples_rows:
        found.append(f'privacy.mode = "sample" protects single rows: {coupled}')
    if "sparse" in sent_parts(strategy, experiment.federation.rounds):
        found.append(
            f"strategy {strategy.plugin_name} trains single entries of the matrices at first, for which no gradient "
            'per row is found; under privacy.mode = "sample" use another one, such as ffa_lora'
        )
    return found


def privacy_notices(experiment: Experiment, plan: PrivatePlan, task: Task) -> list[str]:
    """Say what weakens a promise, or training under it, without making it wrong."""
    found = []
    if not plan.private:
        found.append("NOT PRIVATE: privacy.test_seed draws noise and samples from a seed that anybody can repeat")
    if experiment.evaluation.on == ("server",) and task.public_data() is None:
        instead = (
            "this task's rows are nobody's, so clients may: set evaluation.on = [\"clients\"]"
            if task.synthetic
            else "clients do not tell of theirs"
        )
        found.append(f"nobody measures the model: the server has no public data, and {instead}")
    found += [f"{name} will refuse, and the run goes on without it: {why}" for name, why in plan.refusing.items()]
    planned = experiment.federation.rounds
    if plan.lasts is not None and plan.lasts < min(planned, experiment.privacy.participations or planned):
        short = [client.name for client in plan.clients if len(client.epsilons) == plan.lasts]
        found.append(
            f"with privacy.noise_multiplier = {plan.noise_multiplier:g} the budget of {named(short)} lasts "
            f"{counted(plan.lasts, 'round')} of {planned}"
        )
    return found + (_of_rows(experiment, plan) if experiment.privacy.protects_rows else [])


def _of_rows(experiment: Experiment, plan: PrivatePlan) -> list[str]:
    found, settings = [], experiment.simulated_clients()
    if large := [client for client in plan.clients if client.rows and plan.delta >= 1 / client.rows]:
        most, who = max(client.rows or 0 for client in large), named([client.name for client in large])
        found.append(
            f"δ = {plan.delta:g} would be kept by giving away one row in {1 / plan.delta:,.0f} as it is, and there are "
            f"{most:,} rows at {who}; set privacy.delta well below {1 / most:.1g}"
        )
    if few := [client.name for client in plan.clients if client.expected_rows < 1]:
        found.append(
            f"a step of {named(few)} takes less than one row on average: most of its steps are noise alone; raise its "
            "sample_rate"
        )
    training = {client.name for client in plan.clients}
    if twice := sorted({name for pool in training for name in settings[pool].pool} & training):
        found.append(
            f"the rows of {named(twice)} are trained on twice, also by a pool that holds them: what a row spends is "
            "the sum of both"
        )
    return found
