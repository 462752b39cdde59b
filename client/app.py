"""The node's ClientApp: says who it is, trains, evaluates. The work itself is in ``client/work.py``."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from client.node import Node, node_of
from client.secure.steps import give_keys, give_shares, lift_masks
from client.work import evaluate_order, present, train_order
from common.errors import BudgetExhausted, LoRAFleetError
from common.flower import ErrorCode
from common.messages import BUDGET_EXHAUSTED
from common.workspace import cpu_threads

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say who this node is and what its device carries."""
    return _reply(present, message, context)


@app.query("keys")
def keys(message: Message, context: Context) -> Message:
    """Begin a secure sum: give public keys."""
    return _reply(give_keys, message, context)


@app.query("shares")
def shares(message: Message, context: Context) -> Message:
    """Give every other client of a secure sum a share of this one's secrets, sealed."""
    return _reply(give_shares, message, context)


@app.query("unmask")
def unmask(message: Message, context: Context) -> Message:
    """Give what lifts the masks of a secure sum."""
    return _reply(lift_masks, message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round, or return the stored answer to the same order."""
    return _reply(train_order, message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the model on the held-out part."""
    return _reply(evaluate_order, message, context)


def _reply(work: Callable[[Node, RecordDict], RecordDict], message: Message, context: Context) -> Message:
    """Do the work; a deliberate error travels as its one sentence, any other as Flower sends it."""
    try:
        node = node_of(context)
        with cpu_threads(node.experiment.training.threads):
            return Message(work(node, message.content), reply_to=message)
    except BudgetExhausted as error:
        return Message(Error(BUDGET_EXHAUSTED, str(error)), reply_to=message)
    except LoRAFleetError as error:
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=message)
