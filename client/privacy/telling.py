"""What a node tells of its rows, and what it does not, whatever it is asked."""

from __future__ import annotations

from typing import Any

from client.node import Node
from client.privacy.account import Permit
from common.errors import NotPrivate
from common.messages import TrainAnswer
from common.privacy.settings import PrivacySettings
from common.tasks import Task


def only_public(answer: TrainAnswer, privacy: PrivacySettings, permit: Permit | None) -> TrainAnswer:
    """Leave out of an answer what is computed from private rows: metrics, their number, and under DP-SGD times, too."""
    told: dict[str, Any] = {} if privacy.mode == "none" else {"metrics": {}}
    if privacy.hides_counts:
        told["num_examples"] = 1.0
    if permit is not None:  # a step takes as long as it has rows
        told |= {"began": 0.0, "ready": 0.0, "seconds": 0.0, "privacy": permit.report}
    return answer.model_copy(update=told)


def check_owner(node: Node) -> None:
    """Refuse to train without noise on data whose owner has set a budget.

    Raises
    ------
    NotPrivate
        If there is one.
    """
    if node.budget is not None:
        raise NotPrivate(
            f"this node's owner allows training only within ε = {node.budget.epsilon:g}, with privacy.mode = "
            f'"sample"; the experiment\'s is "{node.experiment.privacy.mode}"'
        )


def check_telling(node: Node, task: Task) -> None:
    """Refuse to measure on rows that are protected: the server would be told.

    Raises
    ------
    NotPrivate
        Under privacy or an owner's budget, unless the rows are nobody's.
    """
    protected = node.experiment.privacy.mode != "none" or node.budget is not None
    if protected and not task.synthetic:
        raise NotPrivate("what is measured on this client's own data is not told under privacy; evaluate on the server")
