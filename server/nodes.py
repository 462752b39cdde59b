"""Which nodes are online, and which client each one is."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from common.errors import ClientError, RunError
from common.fingerprint import code_fingerprint
from common.flower import wait_for_replies
from common.messages import Presence, Query
from common.wire import read_message, write_message
from server.exchange import readable
from server.progress import announce

LOOK_EVERY_S = 0.5
ANSWER_WITHIN_S = 300.0
"""A node that starts up (Ray's first actors, a large model) may take minutes to say who it is."""


@dataclass
class Nodes:
    """The nodes of a grid by client name; asks each node once who it is.

    Parameters
    ----------
    grid : Grid
        Flower's grid, of any driver.
    run : str
        Id of the run, for the query.
    """

    grid: Grid
    run: str
    presences: dict[int, Presence] = field(default_factory=dict)
    silent: dict[int, str] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)

    def online(self) -> dict[str, int]:
        """Return node ids by client name; nodes that are new are asked, and count once they have answered."""
        ids = set(self.grid.get_node_ids())
        self._ask(ids - set(self.presences) - set(self.silent) - set(self.asked.values()))
        self._listen(0)
        found: dict[str, int] = {}
        for node in sorted(ids & set(self.presences)):
            found.setdefault(self.presences[node].client, node)
        return found

    def presence(self, client: str) -> Presence | None:
        """Return what a client first told of itself: a node that comes back does not change its rank."""
        return next((presence for presence in self.presences.values() if presence.client == client), None)

    def wait_for(self, wanted: Collection[str], at_least: int, timeout: float) -> dict[str, int]:
        """Wait until all wanted clients are online, or the timeout; then ``at_least`` must be.

        Raises
        ------
        RunError
            If fewer are online.
        """
        end = time.monotonic() + timeout
        while True:
            online = self.online()
            ready = len(online) >= at_least and set(wanted) <= set(online)
            refused = len(online) + len(self.silent) >= max(len(wanted), 1)
            left = end - time.monotonic()
            if ready or refused or left <= 0:
                break
            self._listen(min(LOOK_EVERY_S, left))
        if len(online) < at_least:
            raise RunError(
                f"{len(online)} clients joined, at least {at_least} are needed; "
                + (self._refusals() or "start more nodes or raise federation.join_timeout_s")
            )
        return online

    def _refusals(self) -> str:
        reasons = sorted(set(self.silent.values()))
        return f"{len(self.silent)} could not: {'; '.join(reasons[:3])}" if reasons else ""

    def _ask(self, new: Collection[int]) -> None:
        content = write_message(Query(run=self.run, fingerprint=code_fingerprint()))
        messages = [Message(content, node, MessageType.QUERY, ttl=ANSWER_WITHIN_S) for node in sorted(new)]
        self.asked |= dict(zip(self.grid.push_messages(messages), sorted(new), strict=True)) if messages else {}

    def _listen(self, timeout: float) -> None:
        """Take the answers that are there, waiting for the first one at most ``timeout`` seconds."""
        if not self.asked:
            time.sleep(timeout)
            return
        for reply in wait_for_replies(self.grid, list(self.asked), timeout):
            self._note(reply, self.asked.pop(reply.metadata.reply_to_message_id))

    def _note(self, reply: Message, node: int) -> None:
        try:
            if reply.has_error():
                raise ClientError(readable(reply.error.code, reply.error.reason))
            self.presences[node], _ = read_message(reply.content, Presence)
        except ClientError as error:
            self.silent[node] = str(error)
            announce("notice", f"node {node} cannot take part: {error}")
