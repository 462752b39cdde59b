"""Pages as a reader opens them, without a browser, and caches that forget between tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from dashboard import pieces
from tests.pages import APP, Opener


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Keep nothing that was asked in another test, see every change at once, and let no part of a page fail unseen."""
    monkeypatch.setattr("dashboard.source.FRESH_S", 0)
    monkeypatch.delenv("LORAFLEET_DATABASE_URL", raising=False)
    st.cache_data.clear()
    st.cache_resource.clear()
    yield
    st.cache_data.clear()
    st.cache_resource.clear()
    assert [record.exc_text for record in caplog.get_records("call") if record.name == pieces.__name__] == []


@pytest.fixture
def open_page(monkeypatch: pytest.MonkeyPatch) -> Opener:
    """Return what opens a page over a home, ``open_page(home, "run", run="r1")``, as that address would."""

    def opened(home: Path, name: str, **query: str | list[str]) -> AppTest:
        monkeypatch.setenv("LORAFLEET_HOME", str(home))
        app = AppTest.from_file(str(APP), default_timeout=30)
        for key, value in {"page": name, **query}.items():
            app.query_params[key] = value
        app.run()
        assert [error.value for error in app.exception] == []
        return app

    return opened
