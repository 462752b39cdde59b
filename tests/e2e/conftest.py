"""A browser for the tests of a module, and new readers in it; mark those with ``needs("chromium")``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.browser import Visit


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Run one Chromium for all tests of a module."""
    from tests.browser import chromium

    with chromium() as running:
        yield running


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Give a function that opens a page as a new reader; in the end all of them must have kept quiet.

    Its arguments are those of :func:`tests.browser.visit` after the browser.
    """
    from tests import browser as browsing

    with ExitStack() as stack:
        readers: list[Visit] = []

        def enter(*given: object, **more: object) -> Visit:
            readers.append(stack.enter_context(browsing.visit(browser, *given, **more)))  # type: ignore[arg-type]
            return readers[-1]

        yield enter
        for reader in readers:
            reader.check()
