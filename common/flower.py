"""Everything LoRAFleet touches of Flower that is not Flower's public interface.

``tests/contract/test_flower_private.py`` holds each name used here against the installed version, because
Flower's internals move with nearly every release. Nothing else in the repository imports them.
"""

from __future__ import annotations

import logging
import os
import time
from abc import abstractmethod
from collections.abc import Iterable, MutableMapping, Sequence

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "SERVER_NODE_ID",
    "ErrorCode",
    "Run",
    "WaitingGrid",
    "abandon_messages",
    "empty_run",
    "error_name",
    "identify_task",
    "quiet_logger",
    "set_environment_defaults",
    "set_message_id",
    "wait_for_replies",
]

#: The node id Flower gives to the coordinator's side of every run.
SERVER_NODE_ID = 1

#: Seconds between two looks at a deployed SuperLink; each look is an HTTP request.
REMOTE_PULL_INTERVAL = 1.0

_ENVIRONMENT_DEFAULTS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}

_ERROR_NAMES = {value: name.lower() for name, value in vars(ErrorCode).items() if isinstance(value, int)}


class WaitingGrid(Grid):
    """A grid that can block until a reply arrives and can take messages back."""

    @abstractmethod
    def wait(self, message_ids: Iterable[str], timeout: float) -> None:
        """Block until a reply to one of the messages can be pulled, at most `timeout` seconds."""

    @abstractmethod
    def abandon(self, message_ids: Iterable[str]) -> None:
        """Forget messages nobody will ask for again."""


def wait_for_replies(grid: Grid, message_ids: Sequence[str], timeout: float) -> list[Message]:
    """Return the replies that are there, as soon as there is one.

    A message is answered once: take the ids of the replies (``metadata.reply_to_message_id``) out of
    `message_ids` before the next call, or Flower answers them with an error.

    Parameters
    ----------
    grid : Grid
        Any of the three drivers' grids.
    message_ids : sequence of str
        What ``grid.push_messages`` returned, less what was answered already.
    timeout : float, seconds
        How long to wait; 0 only looks.

    Returns
    -------
    list of Message
        Empty when the time was over first. Failures arrive as messages with an error.
    """
    if isinstance(grid, WaitingGrid):
        grid.wait(message_ids, timeout)
        return list(grid.pull_messages(message_ids))
    # Ray's grid lives in our process and says itself how often it wants to be asked.
    interval = getattr(grid, "pull_interval", REMOTE_PULL_INTERVAL)
    end = time.monotonic() + timeout
    while True:
        replies = list(grid.pull_messages(message_ids))
        left = end - time.monotonic()
        if replies or left <= 0:
            return replies
        time.sleep(min(interval, left))


def abandon_messages(grid: Grid, message_ids: Iterable[str]) -> None:
    """Tell the grid that a deadline is over; drivers without means to act on it ignore this."""
    if isinstance(grid, WaitingGrid):
        grid.abandon(message_ids)


def error_name(code: int) -> str:
    """Return Flower's name of an error code in lower case, such as ``node_unavailable``."""
    return _ERROR_NAMES.get(code, f"error_{code}")


def identify_task(run_id: int) -> None:
    """Say which run this process serves; ``Message(...)`` refuses to be built before."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SERVER_NODE_ID
    TaskIdentity.task_id = SERVER_NODE_ID


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message the id that its reply will refer to."""
    message.metadata.__dict__["_message_id"] = message_id


def empty_run(run_id: int) -> Run:
    """Return the record of a run that came without a bundle."""
    return Run.create_empty(run_id=run_id)


def quiet_logger(level: int = logging.WARNING) -> None:
    """Keep Flower's logger from printing its progress between ours."""
    logging.getLogger("flwr").setLevel(level)


def set_environment_defaults(environment: MutableMapping[str, str] = os.environ) -> None:
    """Switch telemetry, update checks and installations at run time off, where nothing else is set.

    Meant for the environment of Flower's processes; Flower reads some of these when it is imported.
    """
    for name, value in _ENVIRONMENT_DEFAULTS.items():
        environment.setdefault(name, value)
