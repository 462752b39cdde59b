"""The plan of a run in a client's ledger: what its first order asked for, and what later ones may not go beyond."""

from __future__ import annotations

from dataclasses import replace

from client.node import Node
from client.privacy.balance import noise_within
from client.privacy.ledger import Book, Entry
from client.privacy.ledger.entry import curve_bytes
from common.errors import BudgetExhausted, ConfigurationError, NotPrivate
from common.experiment import ClientSettings, Experiment
from common.messages import TrainOrder
from common.privacy.accounting import Mechanism, curve
from common.privacy.limits import Limit, limits

FIXED = ("sample_rate", "clipping_norm", "steps", "epsilon", "delta", "accountant", "test_seed")
"""What stays the same over a run."""


def label_of(experiment: Experiment, client: str) -> str:
    """Name a simulated client's data: what is spent on one label adds up, whatever rows are cut from them."""
    settings = experiment.simulated_clients().get(client) or ClientSettings()
    return f"{experiment.task.name}:{settings.data or client}"


def what_is_asked(node: Node, order: TrainOrder, fingerprint: str) -> Entry:
    """Write down what an order asks for; how much noise is not known yet."""
    privacy, settings = node.experiment.privacy, _settings(node)
    return Entry(
        kind="plan",
        client=node.name,
        run=order.run,
        round=order.round,
        attempt=order.attempt,
        label=node.data_set or label_of(node.experiment, node.name),
        fingerprint=fingerprint,
        noise_multiplier=0.0,
        sample_rate=settings.sample_rate or privacy.sample_rate,
        clipping_norm=privacy.clipping_norm,
        steps=node.experiment.training.steps,
        rounds=privacy.participations or (0 if privacy.noise_multiplier else order.rounds),
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        accountant=privacy.accountant,
        budget_epsilon=node.budget.epsilon if node.budget else None,
        budget_delta=node.budget.delta if node.budget else None,
        spent=0.0,
        test_seed=privacy.test_seed,
        curve=b"",
    )


def planned_run(node: Node, wanted: Entry, book: Book) -> Entry:
    """Plan a run: with the noise that was asked for, or as much as all its rounds need.

    Raises
    ------
    BudgetExhausted
        If no noise keeps what is left of the budgets.
    """
    noise, steps = node.experiment.privacy.noise_multiplier, wanted.rounds * wanted.steps
    try:
        noise = noise or noise_within(limits_of(node, wanted, book), wanted.sample_rate, steps, wanted.accountant)
    except ConfigurationError as error:
        raise BudgetExhausted(f"the privacy budget of {wanted.client} does not reach: {error}") from None
    return replace(wanted, noise_multiplier=noise, curve=curve_bytes(curve(Mechanism(noise, wanted.sample_rate))))


def limits_of(node: Node, wanted: Entry, book: Book) -> tuple[Limit, ...]:
    """Return the experiment's budget, and the owner's with what other runs have spent on the data."""
    others = book.spent_on(wanted.label, wanted.fingerprint, but=wanted.run)
    return limits(node.experiment.privacy, node.budget, others)


def check_unchanged(node: Node, plan: Entry, wanted: Entry) -> None:
    """Refuse other settings than those the run was planned with.

    Raises
    ------
    NotPrivate
        Naming each of them.
    """
    noise = node.experiment.privacy.noise_multiplier
    names = [*FIXED, *(["noise_multiplier"] if noise else [])]
    wanted = replace(wanted, noise_multiplier=noise or 0.0)
    before = {name: (getattr(plan, name), getattr(wanted, name)) for name in names}
    changed = [f"{name} was {old}, is {new}" for name, (old, new) in before.items() if old != new]
    if changed:
        raise NotPrivate(
            f"privacy settings changed since round {plan.round} of the run: {', '.join(changed)}; start a new run"
        )


def check_plan(node: Node, plan: Entry, wanted: Entry, book: Book) -> None:
    """Refuse more rounds, or more steps, than the noise was chosen for.

    Raises
    ------
    BudgetExhausted
        Naming the plan.
    """
    taken = book.rounds_of(wanted.run) | {wanted.round}
    if plan.rounds and len(taken) > plan.rounds:
        raise BudgetExhausted(
            f"the privacy budget of {wanted.client} is spent: this client has taken part in the {plan.rounds} rounds "
            f"that were planned in round {plan.round}; start a new run"
        )
    steps = book.steps_of(wanted.run)
    if not node.experiment.privacy.noise_multiplier and steps + wanted.steps > plan.rounds * plan.steps:
        raise BudgetExhausted(
            f"the privacy budget of {wanted.client} is spent: the noise was chosen for {plan.rounds} rounds of "
            f"{plan.steps} steps, and {steps} steps are spent, interrupted ones among them; start a new run"
        )


def rounds_left_of(node: Node, plan: Entry, wanted: Entry, book: Book) -> int:
    """Return how many more rounds the experiment, the plan and the noise that was chosen for it hold."""
    left = node.experiment.federation.rounds - wanted.round
    if plan.rounds:
        left = min(left, plan.rounds - len(book.rounds_of(plan.run)))
    if not node.experiment.privacy.noise_multiplier:
        left = min(left, (plan.rounds * plan.steps - book.steps_of(plan.run)) // plan.steps)
    return left


def _settings(node: Node) -> ClientSettings:
    return dict(node.clients).get(node.name) or ClientSettings()
