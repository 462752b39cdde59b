"""Whether a round of training may begin: decided with the ledger, and charged before anything is drawn.

The first order of a run plans it: how much noise its rounds need to keep within the experiment's budget (for the run
alone) and the owner's (for everything ever trained on the data), whichever is stricter. Every order reserves its steps,
which count in full from then on, whatever becomes of the training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from client.node import Node
from client.privacy.balance import Balance, noise_within
from client.privacy.fingerprint import fingerprint_of
from client.privacy.ledger import Book, Entry, open_ledger
from client.privacy.ledger.entry import curve_bytes
from common.errors import BudgetExhausted, ConfigurationError, NotPrivate
from common.experiment import ClientSettings
from common.messages import PrivacyReport, TrainOrder
from common.privacy.accounting import Mechanism, curve
from common.privacy.limits import Limit, limits
from common.tasks import Rows

FIXED = ("sample_rate", "clipping_norm", "steps", "epsilon", "delta", "accountant", "test_seed")
"""What stays the same over a run."""


@dataclass(frozen=True)
class Permit:
    """Leave to train one round: its steps are charged already.

    Parameters
    ----------
    mechanism : Mechanism
        Noise and sample rate of each step.
    clipping_norm : float
        Largest norm of a row's gradient.
    steps : int
        Of the round.
    report : PrivacyReport
        What the server is told.
    reserved : Entry
        The ledger's entry.
    """

    mechanism: Mechanism
    clipping_norm: float
    steps: int
    report: PrivacyReport
    reserved: Entry


def admit(node: Node, order: TrainOrder, rows: Rows) -> Permit:
    """Decide on one round of training, and charge it.

    Parameters
    ----------
    node : Node
        The client.
    order : TrainOrder
        What it is asked to train; asked again, it is charged again.
    rows : Rows
        What it would train on.

    Raises
    ------
    BudgetExhausted
        If a budget or the plan does not allow the round; nothing was charged.
    NotPrivate
        If there is no ledger, or the privacy settings changed within the run.
    LedgerError
        If the ledger is damaged, in use, or cannot be written.
    """
    ledger_file = _checked(node, order)
    wanted = _wanted(node, order, fingerprint_of(rows))
    with open_ledger(ledger_file) as ledger:
        book = ledger.book
        plan = book.plans.get(order.run)
        drafts = [] if plan else [_planned(node, wanted, book)]
        plan = plan or drafts[0]
        _check_unchanged(node, plan, wanted)
        balance = _balance(node, plan, wanted, book)
        _check_budgets(balance, wanted)
        _check_plan(node, plan, wanted, book)
        reserved = ledger.append(*drafts, _reservation(plan, wanted, balance))[-1]
        left = _planned_rounds_left(node, plan, wanted, book)
    report = _report(reserved, replace(balance, steps=balance.steps + wanted.steps), left)
    return Permit(plan.mechanism, wanted.clipping_norm, wanted.steps, report, reserved)


def settle(node: Node, permit: Permit) -> None:
    """Note that the answer to an order was kept; what was charged stays charged.

    Raises
    ------
    LedgerError
        If the ledger is damaged, in use, or cannot be written.
    """
    assert node.ledger is not None, "only a node with a ledger gets a permit"
    with open_ledger(node.ledger) as ledger:
        ledger.append(replace(permit.reserved, kind="done", settles=permit.reserved.sequence, curve=b""))


def _checked(node: Node, order: TrainOrder) -> Path:
    """Return the client's ledger; refuse an order that no plan of the experiment holds."""
    planned = node.experiment.federation.rounds
    if not order.round <= order.rounds == planned:
        raise NotPrivate(
            f"the order is for round {order.round} of {order.rounds}, but the experiment plans {planned}; "
            "no more rounds are trained"
        )
    if node.budget is not None and node.experiment.privacy.test_seed is not None:
        raise NotPrivate(
            "privacy.test_seed draws noise that anyone can repeat, which this node's owner does not allow (budget); "
            "leave it out"
        )
    if node.ledger is None:
        raise NotPrivate("training under privacy needs a ledger, but this client has no folder of its own to keep it")
    return node.ledger


def _wanted(node: Node, order: TrainOrder, fingerprint: str) -> Entry:
    """Write down what an order asks for; how much noise is not known yet."""
    privacy, settings = node.experiment.privacy, _settings(node)
    planned = privacy.participations or (0 if privacy.noise_multiplier else order.rounds)
    return Entry(
        kind="plan",
        client=node.name,
        run=order.run,
        round=order.round,
        attempt=order.attempt,
        label=f"{node.experiment.task.name}:{settings.data or node.name}",
        fingerprint=fingerprint,
        noise_multiplier=0.0,
        sample_rate=settings.sample_rate or privacy.sample_rate,
        clipping_norm=privacy.clipping_norm,
        steps=node.experiment.training.steps,
        rounds=planned,
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        accountant=privacy.accountant,
        budget_epsilon=node.budget.epsilon if node.budget else None,
        budget_delta=node.budget.delta if node.budget else None,
        spent=0.0,
        test_seed=privacy.test_seed,
        curve=b"",
    )


def _planned(node: Node, wanted: Entry, book: Book) -> Entry:
    """Plan a run: with the noise that was asked for, or as much as all its rounds need."""
    noise, steps = node.experiment.privacy.noise_multiplier, wanted.rounds * wanted.steps
    try:
        noise = noise or noise_within(_limits(node, wanted, book), wanted.sample_rate, steps, wanted.accountant)
    except ConfigurationError as error:
        raise BudgetExhausted(f"the privacy budget of {wanted.label} does not reach: {error}") from None
    return replace(wanted, noise_multiplier=noise, curve=curve_bytes(curve(Mechanism(noise, wanted.sample_rate))))


def _balance(node: Node, plan: Entry, wanted: Entry, book: Book) -> Balance:
    known = book.curves.get(plan.mechanism)
    values = curve(plan.mechanism) if known is None else known
    steps = book.steps_of(wanted.run)
    return Balance(_limits(node, wanted, book), plan.mechanism, values, steps, wanted.accountant)


def _reservation(plan: Entry, wanted: Entry, balance: Balance) -> Entry:
    """Write down what counts from now on."""
    return replace(
        wanted,
        kind="reserve",
        noise_multiplier=plan.noise_multiplier,
        rounds=plan.rounds,
        spent=balance.epsilon(balance.under[0], wanted.steps),
        curve=curve_bytes(balance.curve),
    )


def _report(reserved: Entry, balance: Balance, left: int) -> PrivacyReport:
    """Tell the server, in declared public numbers, what the round costs."""
    return PrivacyReport(
        noise_multiplier=reserved.noise_multiplier,
        clipping_norm=reserved.clipping_norm,
        sample_rate=reserved.sample_rate,
        steps=reserved.steps,
        delta=reserved.delta,
        epsilon=reserved.spent,
        second_epsilon=balance.second_epsilon(),
        rounds_left=balance.rounds_left(reserved.steps, left),
    )


def _limits(node: Node, wanted: Entry, book: Book) -> tuple[Limit, ...]:
    """Return the experiment's budget, and the owner's with what other runs have spent on the data."""
    others = book.spent_on(wanted.label, wanted.fingerprint, but=wanted.run)
    return limits(node.experiment.privacy, node.budget, others)


def _check_unchanged(node: Node, plan: Entry, wanted: Entry) -> None:
    noise = node.experiment.privacy.noise_multiplier
    names = [*FIXED, *(["noise_multiplier"] if noise else [])]
    wanted = replace(wanted, noise_multiplier=noise or 0.0)
    before = {name: (getattr(plan, name), getattr(wanted, name)) for name in names}
    changed = [f"{name} was {old}, is {new}" for name, (old, new) in before.items() if old != new]
    if changed:
        raise NotPrivate(
            f"privacy settings changed since round {plan.round} of the run: {', '.join(changed)}; start a new run"
        )


def _check_plan(node: Node, plan: Entry, wanted: Entry, book: Book) -> None:
    """Refuse more rounds, or more steps, than the noise was chosen for."""
    taken = book.rounds_of(wanted.run) | {wanted.round}
    if plan.rounds and len(taken) > plan.rounds:
        raise BudgetExhausted(
            f"the privacy budget of {wanted.label} is spent: this client has taken part in the {plan.rounds} rounds "
            f"that were planned in round {plan.round}; start a new run"
        )
    steps = book.steps_of(wanted.run)
    if not node.experiment.privacy.noise_multiplier and steps + wanted.steps > plan.rounds * plan.steps:
        raise BudgetExhausted(
            f"the privacy budget of {wanted.label} is spent: the noise was chosen for {plan.rounds} rounds of "
            f"{plan.steps} steps, and {steps} steps are spent, interrupted ones among them; start a new run"
        )


def _check_budgets(balance: Balance, wanted: Entry) -> None:
    """Refuse what would exceed the experiment's budget or the owner's."""
    limit = balance.exceeded(wanted.steps)
    if limit is None:
        return
    whose = "of this experiment" if limit is balance.under[0] else "the owner's"
    raise BudgetExhausted(
        f"the privacy budget of {wanted.label} is spent: ε {balance.epsilon(limit):.4g} of {limit.epsilon:g} ({whose}, "
        f"δ = {limit.delta:g}); a further round needs ε {balance.epsilon(limit, wanted.steps):.4g} in all; "
        f"{balance.steps_left(limit, wanted.steps)} of its {wanted.steps} steps are left"
    )


def _planned_rounds_left(node: Node, plan: Entry, wanted: Entry, book: Book) -> int:
    """Return how many more rounds the experiment, the plan and the noise that was chosen for it hold."""
    left = node.experiment.federation.rounds - wanted.round
    if plan.rounds:
        left = min(left, plan.rounds - len(book.rounds_of(plan.run)))
    if not node.experiment.privacy.noise_multiplier:
        left = min(left, (plan.rounds * plan.steps - book.steps_of(plan.run)) // plan.steps)
    return left


def _settings(node: Node) -> ClientSettings:
    return dict(node.clients).get(node.name) or ClientSettings()
