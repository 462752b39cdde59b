"""The evaluation phase: clients judge the model on their held-out parts, the server on public data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from flwr.app import Message

from common.errors import ClientError
from common.federation import ServerState
from common.messages import EvaluateAnswer
from common.tasks import Task
from common.wire import message_bytes, read_message, seal, unseal
from common.workspace import cpu_threads, task_of, workspace
from server.cohort import evaluation_cohort
from server.exchange import exchange
from server.federation import Federation
from server.orders import Order
from server.progress import announce
from server.record import RoundRecord
from server.timeline import Told


def evaluation_phase(
    federation: Federation,
    state: ServerState,
    record: RoundRecord,
    online: dict[str, int],
    meanwhile: Callable[[], None],
) -> None:
    """Evaluate a state on clients and server; ``meanwhile`` runs while the clients are busy."""
    names = evaluation_cohort(federation.experiment, federation.clients, sorted(online))
    book = federation.order_book(state)
    orders = [book.evaluate(record.number, name, online[name]) for name in names]
    record.bytes_down += sum(message_bytes(order.message.content) for order in orders)
    judged = Judgements(
        record, task_of(federation.experiment), federation.experiment.federation.max_num_examples, federation.holdings
    )

    def work_here() -> None:
        meanwhile()
        if "server" in federation.experiment.evaluation.on:
            evaluate_here(federation, state, record)

    deadline = federation.experiment.federation.deadline_s
    record.timeline.ask(names)
    exchange(federation.grid, orders, deadline, judged.take, judged.leave_out, work_here)
    judged.summarise()
    announce("evaluated", f"{len(judged.answers)} clients evaluated", record.number)


@dataclass
class Judgements:
    """The clients' evaluations of one round as they come in."""

    record: RoundRecord
    task: Task
    max_num_examples: int
    holdings: dict[str, tuple[str, ...]]
    answers: dict[str, EvaluateAnswer] = field(default_factory=dict)

    def take(self, order: Order, message: Message) -> None:
        """Take an evaluation that just arrived."""
        received = self.record.timeline.now()
        self.record.bytes_up += message_bytes(message.content)
        try:
            answer, _ = read_message(message.content, EvaluateAnswer)
            if answer.client != order.client or answer.round != self.record.number:
                raise ClientError("it answers another order")
            if not 0 < answer.num_examples <= self.max_num_examples:
                raise ClientError(f"it claims {answer.num_examples} examples, at most {self.max_num_examples} count")
            if not all(math.isfinite(answer.metrics.get(name, math.nan)) for name in {"loss", *answer.metrics}):
                raise ClientError("its loss is missing, or a metric is not a finite number")
        except ClientError as error:
            self.leave_out(order, "rejected", str(error))
            return
        self.answers[order.client] = answer
        self.record.timeline.answered(order.client, "evaluate", Told(answer.began, answer.seconds), received)
        self.holdings[order.client] = answer.holds

    def leave_out(self, order: Order, status: str, reason: str) -> None:
        """Go on without a client's evaluation."""
        self.holdings.pop(order.client, None)
        self.record.timeline.lose(order.client)
        text = f"{order.client} did not evaluate: {reason}"
        announce("notice", text, self.record.number, order.client, status=status)

    def summarise(self) -> None:
        """Write each client's numbers, their mean weighted by examples, the worst client and the spread."""
        answers = [self.answers[name] for name in sorted(self.answers)]
        for answer in answers:
            for key, value in sorted(answer.metrics.items()):
                self.record.measure(f"held_out_{key}", value, answer.client)
        if not answers:
            return
        total = sum(answer.num_examples for answer in answers)
        means = {
            key: sum(answer.metrics[key] * answer.num_examples for answer in answers) / total
            for key in sorted(set.intersection(*(set(answer.metrics) for answer in answers)))
        }
        for key, mean in (means | self.task.summary(means)).items():
            self.record.measure(f"held_out_{key}", mean)
        losses = [answer.metrics["loss"] for answer in answers]
        self.record.measure("worst_client_loss", max(losses))
        self.record.measure("client_loss_spread", max(losses) - min(losses))


def evaluate_here(federation: Federation, state: ServerState, record: RoundRecord) -> None:
    """Evaluate on the task's public data in this process; let the model show samples at the start and the end."""
    experiment = federation.experiment
    place = workspace(experiment)
    with cpu_threads(experiment.training.threads):
        parcel = seal(state.global_adapter, experiment.federation.wire_down)  # what clients see, under the same key
        place.adapted.use_global(unseal(parcel), parcel.sha256)
        place.adapted.load(state.start)
        rows = place.task.public_data()
        if rows is not None:
            for key, value in sorted(place.task.evaluate(place.adapted.model, rows).items()):
                record.measure(f"unseen_{key}", value)
        if record.number in (0, experiment.federation.rounds):
            record.samples = json.dumps(
                [asdict(sample) for sample in place.task.samples(place.adapted.model)], indent=1
            )
