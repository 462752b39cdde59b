"""The pages as a web application: what every answer carries, and how an address that names a page is answered."""

from __future__ import annotations

import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

import streamlit as st
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# The views are imported when the server starts, and not when its first reader waits for them.
from dashboard import views  # noqa: F401
from dashboard.pages import PAGE, PATHS

NICENESS = 10
"""How far the pages stand back where a run trains on the same machine."""
HEADERS = (
    (b"x-frame-options", b"DENY"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
)


class Doorway:
    """Sends whoever asks for a page's address to the front door, which leads there, and adds headers.

    Streamlit's own script would look for its server below the page's path first, and fill the browser's console with
    errors.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        page = scope["path"].removeprefix("/").removesuffix("/")
        if scope["method"] == "GET" and page in PATHS:
            query = scope["query_string"].decode("utf-8", "replace")
            given = [pair for pair in parse_qsl(query, keep_blank_values=True) if pair[0] != PAGE]
            place = ("../?" if scope["path"].endswith("/") else "./?") + urlencode([(PAGE, page), *given])
            headers = [(b"location", place.encode()), (b"content-length", b"0"), *HEADERS]
            await send({"type": "http.response.start", "status": 307, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
            await send(message)

        await self.app(scope, receive, with_headers)


@asynccontextmanager
async def settled(_app: st.App) -> AsyncIterator[None]:
    """Make room for those who train on this machine, and spare readers what takes a server's time.

    Streamlit collects garbage after every script; what is imported by now never becomes any, and looking through it
    each time took longer than most pages.
    """
    os.nice(NICENESS)
    gc.collect()
    gc.freeze()
    yield


app = st.App(Path(__file__).with_name("app.py"), lifespan=settled, middleware=[Middleware(Doorway)])
