"""Readers of a live page without a browser: they speak Streamlit's protocol, ask as a page does, and draw nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.asyncio.client import ClientConnection, connect

SUBPROTOCOL = "streamlit"


class Viewer:
    """One session with a run's page.

    Parameters
    ----------
    url : str
        Of the dashboard.
    run : str
        Id of the run to watch.

    Attributes
    ----------
    taken : list of float, seconds
        From each refresh's being asked for to its last element's being there.
    """

    def __init__(self, url: str, run: str) -> None:
        self.url, self.taken = url, list[float]()
        self._query, self._page, self._fragment, self._every = f"page=run&run={run}", "", "", 2.0

    async def watch(self, until: Callable[[], bool]) -> None:
        """Open the page, then refresh it as often as it wants, until told otherwise."""
        address = self.url.replace("http", "ws", 1) + "/_stcore/stream"
        async with connect(address, subprotocols=[SUBPROTOCOL], origin=self.url, max_size=None) as socket:  # type: ignore[list-item,arg-type]
            await self._ask(socket)
            while not until():
                began = time.perf_counter()
                await self._ask(socket)
                self.taken.append(time.perf_counter() - began)
                await asyncio.sleep(max(0.0, self._every - self.taken[-1]))

    async def _ask(self, socket: ClientConnection) -> None:
        """Ask for the page, or for its live part once that is known, and take what comes."""
        message = BackMsg()
        state = message.rerun_script
        state.query_string, state.page_script_hash, state.fragment_id = self._query, self._page, self._fragment
        state.is_auto_rerun = bool(self._fragment)
        await socket.send(message.SerializeToString())
        while not self._is_last(ForwardMsg.FromString(await socket.recv(decode=False))):
            pass

    def _is_last(self, message: ForwardMsg) -> bool:
        """Note what a browser would; tell whether the page is as new as it gets."""
        match message.WhichOneof("type"):
            case "new_session":
                self._page = message.new_session.page_script_hash
            case "page_info_changed":
                self._query = message.page_info_changed.query_string
            case "auto_rerun":
                self._fragment, self._every = message.auto_rerun.fragment_id, message.auto_rerun.interval
            case "script_finished":
                return message.script_finished != ForwardMsg.FINISHED_EARLY_FOR_RERUN
        return False


def watched(url: str, run: str, viewers: int, until: Callable[[], bool]) -> list[float]:
    """Let several watch at once, and return how long all their refreshes took, in seconds."""
    watching = [Viewer(url, run) for _ in range(viewers)]

    async def watch() -> None:
        await asyncio.gather(*(viewer.watch(until) for viewer in watching))

    asyncio.run(watch())
    return [seconds for viewer in watching for seconds in viewer.taken]
