"""Whether a round of training may begin: decided with the ledger, and charged before anything is drawn.

The first order of a run plans it: how much noise its rounds need to keep within the experiment's budget (for the run
alone) and the owner's (for everything ever trained on the data), whichever is stricter. Every order reserves its steps,
which count in full from then on, whatever becomes of the training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from client.node import Node
from client.privacy.balance import Balance
from client.privacy.fingerprint import fingerprint_of
from client.privacy.ledger import Book, Entry, open_ledger
from client.privacy.ledger.entry import curve_bytes
from client.privacy.run_plan import (
    check_plan,
    check_unchanged,
    limits_of,
    planned_run,
    rounds_left_of,
    what_is_asked,
)
from common.errors import BudgetExhausted, NotPrivate
from common.messages import PrivacyReport, TrainOrder
from common.privacy.accounting import Mechanism, curve
from common.tasks import Rows


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
    wanted = what_is_asked(node, order, fingerprint_of(rows))
    with open_ledger(ledger_file) as ledger:
        book = ledger.book
        plan = book.plans.get(order.run)
        drafts = [] if plan else [planned_run(node, wanted, book)]
        plan = plan or drafts[0]
        check_unchanged(node, plan, wanted)
        balance = _balance(node, plan, wanted, book)
        _check_budgets(balance, wanted)
        check_plan(node, plan, wanted, book)
        reserved = ledger.append(*drafts, _reservation(plan, wanted, balance))[-1]
        left = rounds_left_of(node, plan, wanted, book)
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


def _balance(node: Node, plan: Entry, wanted: Entry, book: Book) -> Balance:
    known = book.curves.get(plan.mechanism)
    values = curve(plan.mechanism) if known is None else known
    steps = book.steps_of(wanted.run)
    return Balance(limits_of(node, wanted, book), plan.mechanism, values, steps, wanted.accountant)


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


def _check_budgets(balance: Balance, wanted: Entry) -> None:
    """Refuse what would exceed the experiment's budget or the owner's."""
    limit = balance.exceeded(wanted.steps)
    if limit is None:
        return
    whose = "of this experiment" if limit is balance.under[0] else "the owner's"
    raise BudgetExhausted(
        f"the privacy budget of {wanted.client} is spent: ε {balance.epsilon(limit):.4g} of {limit.epsilon:g} "
        f"({whose}, δ = {limit.delta:g}); a further round needs ε {balance.epsilon(limit, wanted.steps):.4g} in all; "
        f"{balance.steps_left(limit, wanted.steps)} of its {wanted.steps} steps are left"
    )
