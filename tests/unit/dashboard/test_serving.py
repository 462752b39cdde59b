"""The door of the dashboard: where addresses lead, what every answer carries, and who is let in."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urljoin, urlsplit

import pytest
from streamlit.testing.v1 import AppTest

from common.store import RunStore
from dashboard import LOGIN_VARIABLE
from dashboard.pages import PAGE, PATHS, TITLES
from dashboard.serving import HEADERS, Doorway
from tests.pages import APP

AUTH = {
    "redirect_uri": "http://localhost:8501/oauth2callback",
    "cookie_secret": "0123456789abcdef0123456789abcdef",
    "client_id": "x",
    "client_secret": "y",
    "server_metadata_url": "https://login.invalid/.well-known/openid-configuration",
}


class Answer(Exception):
    """Who is behind the door was asked."""


def ask(path: str, query: bytes = b"", method: str = "GET", kind: str = "http") -> list[MutableMapping[str, Any]]:
    """Ask the door; behind it everything is answered with 200 and one header."""
    sent: list[MutableMapping[str, Any]] = []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": f"{kind}.response.start", "status": 200, "headers": [(b"x-own", b"1")]})
        await send({"type": f"{kind}.response.body", "body": b"behind"})

    async def receive() -> MutableMapping[str, Any]:
        raise AssertionError("nothing is read")

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {"type": kind, "method": method, "path": path, "query_string": query}
    asyncio.run(Doorway(behind)(scope, receive, send))
    return sent


def location(path: str, query: bytes = b"") -> str:
    """Return the address a browser goes on to."""
    start, body = ask(path, query)
    assert start["status"] == 307
    assert body["body"] == b""
    headers = dict(start["headers"])
    assert headers[b"content-length"] == b"0"
    return urljoin(f"http://host:8501{path}", headers[b"location"].decode())


@pytest.mark.parametrize("page", sorted(PATHS))
@pytest.mark.parametrize("end", ["", "/"])
def test_a_page_is_reached_through_the_front_door(page: str, end: str) -> None:
    assert location(f"/{page}{end}") == f"http://host:8501/?page={page}"


def test_parameters_are_kept() -> None:
    query = b"run=a%20b%26c&clients=ada&clients=b%C3%A9n&empty=&x=%0d%0aSet-Cookie:%20a=b"
    found = urlsplit(location("/clients", query))
    kept = parse_qsl(found.query, keep_blank_values=True)
    assert kept == [(PAGE, "clients"), *parse_qsl(query.decode(), keep_blank_values=True)]
    assert "\r" not in found.query
    assert dict(kept)["clients"] == "bén"


def test_the_path_names_the_page_and_nothing_else_does() -> None:
    assert location("/run", b"page=compare&run=x") == "http://host:8501/?page=run&run=x"


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "//run",
        "//evil.example/run",
        "//evil.example/..//run/",
        "/\\evil.example/run",
        "/run//",
        "/run/x",
        "/Run",
        "/_stcore/health",
        "run%2f",
        "",
    ],
)
def test_everything_else_is_handed_on(path: str) -> None:
    start, body = ask(path)
    assert (start["status"], body["body"]) == (200, b"behind")
    assert start["headers"] == [(b"x-own", b"1"), *HEADERS]


@pytest.mark.parametrize("method", ["POST", "HEAD", "PUT"])
def test_only_who_wants_to_see_is_led(method: str) -> None:
    assert ask("/run", method=method)[0]["status"] == 200


def test_every_answer_forbids_frames_and_guesses() -> None:
    for answer in (ask("/run"), ask("/anything")):
        headers = dict(answer[0]["headers"])
        assert headers[b"x-frame-options"] == b"DENY"
        assert headers[b"x-content-type-options"] == b"nosniff"
        assert headers[b"referrer-policy"] == b"same-origin"


def test_websockets_pass() -> None:
    assert ask("/run", kind="websocket")[0]["headers"] == [(b"x-own", b"1")]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("LORAFLEET_DATABASE_URL", LOGIN_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("LORAFLEET_HOME", str(tmp_path / "home"))
    with RunStore.open(tmp_path / "home") as store:
        store.create_run(
            "r1", name="n", task="t", strategy="s", seed=0, experiment="{}", rounds_planned=1, fingerprint=""
        )
    return tmp_path / "home"


def shown(app: AppTest) -> str:
    app.query_params["page"] = "layers"
    app.run()
    assert not app.exception
    parts = [*app.title, *app.markdown, *app.caption, *app.error, *app.info]
    return "\n".join(str(part.value) for part in parts)


def opened() -> AppTest:
    return AppTest.from_file(str(APP), default_timeout=30)


def test_nobody_needs_to_sign_in_where_no_login_is_configured(home: Path) -> None:
    app = opened()
    assert "Ranks and layers" in shown(app)
    assert [button.label for button in app.button if "Sign" in button.label] == []


def test_no_run_is_shown_before_sign_in(home: Path) -> None:
    app = opened()
    app.secrets["auth"] = AUTH
    assert "Sign in to see" in shown(app)
    assert [button.label for button in app.button] == ["Sign in"]
    assert not app.selectbox
    assert not app.sidebar.children


def test_who_signed_in_sees_the_runs_and_may_leave(home: Path) -> None:
    app = opened()
    app.secrets["auth"] = AUTH
    app.user["is_logged_in"] = True
    assert "Ranks and layers" in shown(app)
    assert "Sign out" in [button.label for button in app.sidebar.button]


@pytest.mark.parametrize("said", [False, "yes", 1, None])
def test_only_a_clear_yes_counts(home: Path, said: Any) -> None:
    app = opened()
    app.secrets["auth"] = AUTH
    app.user["is_logged_in"] = said
    assert "Sign in to see" in shown(app)


@pytest.mark.parametrize("broken", [3, {}, {**AUTH, "cookie_secret": ""}])
def test_a_login_that_was_broken_since_lets_nobody_in(home: Path, broken: Any) -> None:
    app = opened()
    app.secrets["auth"] = broken
    app.user["is_logged_in"] = True
    assert "Nobody can sign in" in shown(app)
    assert not app.button
    assert not app.selectbox


def test_each_provider_is_offered(home: Path) -> None:
    app = opened()
    own = {key: AUTH[key] for key in ("redirect_uri", "cookie_secret")}
    provider = {key: value for key, value in AUTH.items() if key not in own}
    app.secrets["auth"] = {**own, "one": provider, "t*o": provider}
    shown(app)
    assert [button.label for button in app.button] == ["Sign in with one", r"Sign in with t\*o"]


def test_a_login_whose_file_is_gone_lets_nobody_in(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOGIN_VARIABLE, "1")
    app = opened()
    app.user["is_logged_in"] = True
    assert "Nobody can sign in" in shown(app)
    assert not app.button
    assert not app.selectbox


def test_every_page_has_a_path_that_addresses_take() -> None:
    assert {name for name in TITLES if name.isascii() and name.isalpha() and name.islower()} == PATHS
