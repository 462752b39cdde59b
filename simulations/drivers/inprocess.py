"""The default driver: a Flower grid whose clients run on threads of this process.

The same ``ServerApp`` and ``ClientApp`` objects as on Ray and in a deployment, without ports, processes or
start-up time::

    with InProcessGrid(client_app, [{}] * 4, run_config, workers=2) as grid:
        server_app(grid, Context(grid.run.run_id, 1, {}, RecordDict(), run_config))

The server sees what it would see of a deployment: exceptions and messages whose time to live is over come
back as error messages, and a node works on one message at a time.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Self

from flwr.app import Context, Message, RecordDict, UserConfig, UserConfigValue
from flwr.clientapp import ClientApp

from common.flower import (
    ErrorCode,
    Run,
    WaitingGrid,
    empty_run,
    identify_task,
    quiet_logger,
    wait_for_replies,
)
from simulations.drivers.postbox import Postbox, error_reply

logger = logging.getLogger(__name__)

#: The node at position 0; the others follow. The server itself has a small id.
FIRST_NODE_ID = 1000

RUN_ID = 1

#: Seconds that ``close`` gives to clients that are still at work.
CLOSE_SECONDS = 5.0


class InProcessGrid(WaitingGrid):
    """A grid whose nodes are served by threads of this process.

    Parameters
    ----------
    client_app : ClientApp
        What every node runs; called from several threads at once when `workers` > 1.
    nodes : sequence of mappings
        One per node: what its ``context.node_config`` holds beside ``partition-id`` (the position) and
        ``num-partitions``. Contexts live as long as the grid and are made when a node is first addressed.
    run_config : mapping
        ``context.run_config`` of every node.
    workers : int, at least 1
        Clients at work side by side.

    Notes
    -----
    Contents are handed over, not copied: a client must not alter the records it was sent.
    """

    def __init__(
        self,
        client_app: ClientApp,
        nodes: Sequence[Mapping[str, UserConfigValue]],
        run_config: UserConfig,
        workers: int,
    ) -> None:
        quiet_logger()
        identify_task(RUN_ID)
        self._client_app = client_app
        self._nodes = nodes
        self._run_config = run_config
        self._run = empty_run(RUN_ID)
        self._contexts: dict[int, Context] = {}
        self._postbox = Postbox(on_worker_lost=self._start_worker)
        self._threads: list[threading.Thread] = []
        self._names = (f"client-worker-{number}" for number in itertools.count(1))
        for _ in range(workers):
            self._start_worker()

    def __enter__(self) -> Self:
        """Return the grid; leaving the block closes it."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the grid."""
        self.close()

    @property
    def run(self) -> Run:
        """An empty run record: nothing was bundled."""
        return self._run

    def set_run(self, run: Run) -> None:
        """Replace the run record."""
        self._run = run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Build a message; Flower's newer way is ``Message(...)`` itself."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return all node ids, in the order of the nodes."""
        return list(range(FIRST_NODE_ID, FIRST_NODE_ID + len(self._nodes)))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages, first in first out, and return their ids in the same order.

        Raises
        ------
        ValueError
            A message is for a node that is not there.
        RuntimeError
            The grid is closed.
        """
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return and forget the replies that are there, in the order of the ids."""
        return self._postbox.pull(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push messages and return the replies that arrive in time; the others are abandoned."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        missing = dict.fromkeys(self.push_messages(messages))
        replies: list[Message] = []
        while missing and (left := end - time.monotonic()) > 0:
            arrived = wait_for_replies(self, list(missing), left)
            for reply in arrived:
                del missing[reply.metadata.reply_to_message_id]
            replies += arrived
        self.abandon(missing)
        return replies

    def wait(self, message_ids: Iterable[str], timeout: float) -> None:
        """Block until a reply to one of the messages can be pulled, at most `timeout` seconds."""
        self._postbox.wait(message_ids, timeout)

    def abandon(self, message_ids: Iterable[str]) -> None:
        """Give messages up: queued ones never start, replies are dropped, also later ones.

        A worker that is still busy with one is replaced, so that the run keeps its parallelism; its node
        takes the next message only when that worker is done.
        """
        self._postbox.abandon(message_ids)

    def close(self) -> None:
        """Drop what is queued, interrupt clients still at work and join the workers.

        A thread inside a native library while the interpreter ends would abort the process, so no worker
        may outlive the run; one that does not react in ``CLOSE_SECONDS`` is left behind with a warning.
        """
        self._postbox.close()
        end = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.join(0.05)
            while thread.is_alive() and time.monotonic() < end:
                _interrupt(thread)
                thread.join(0.1)
            if thread.is_alive():
                logger.warning("%s did not stop in %.0f s and is left behind", thread.name, CLOSE_SECONDS)

    def _push(self, message: Message) -> str:
        node_id = message.metadata.dst_node_id
        if not 0 <= node_id - FIRST_NODE_ID < len(self._nodes):
            raise ValueError(f"there is no node {node_id}: {len(self._nodes)} nodes from {FIRST_NODE_ID} on")
        return self._postbox.put(message)

    def _start_worker(self) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=self._work, name=next(self._names), daemon=True)
        thread.start()
        self._threads.append(thread)

    def _work(self) -> None:
        while self._serve():
            pass

    def _serve(self) -> bool:
        # One frame per message: an idle worker keeps no message and no tensors alive.
        message = self._postbox.take()
        return message is not None and self._postbox.give_back(message, self._answer(message))

    def _answer(self, message: Message) -> Message:
        node_id = message.metadata.dst_node_id
        try:
            reply = self._client_app(message, self._context(node_id))
            if not isinstance(reply, Message):
                raise TypeError(f"the ClientApp returned {type(reply).__name__} in place of a Message")
            return reply
        except BaseException as error:  # a client's sys.exit() must not end the worker
            logger.debug("node %d failed", node_id, exc_info=True)
            reason = f"{type(error)}:<'{error}'>"
            return error_reply(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)

    def _context(self, node_id: int) -> Context:
        if node_id not in self._contexts:
            position = node_id - FIRST_NODE_ID
            node_config: UserConfig = {"partition-id": position, "num-partitions": len(self._nodes)}
            node_config.update(self._nodes[position])
            run_config = dict(self._run_config)
            self._contexts[node_id] = Context(RUN_ID, node_id, node_config, RecordDict(), run_config)
        return self._contexts[node_id]


def _interrupt(thread: threading.Thread) -> None:
    """Raise SystemExit in another thread, at its next Python instruction."""
    identifier = ctypes.c_ulong(thread.ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(identifier, ctypes.py_object(SystemExit))
