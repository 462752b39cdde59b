"""Starting the dashboard: who may look from where, which port, and what other users of the machine can see of it."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from dashboard import LOGIN_VARIABLE, launch

SECRET = "postgresql://fleet:hunter2@db/runs"
OF_ALL = '[auth]\nredirect_uri = "r"\ncookie_secret = "c"\n'
OF_PROVIDER = 'client_id = "x"\nclient_secret = "y"\nserver_metadata_url = "z"\n'
AUTH = OF_ALL + OF_PROVIDER


class Became(Exception):
    """The process would have become another."""


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without any settings, in an empty folder."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    for variable in ("LORAFLEET_DATABASE_URL", "LORAFLEET_HOME", LOGIN_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


@pytest.fixture
def became(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], dict[str, str]]]:
    """What the process would have become."""
    found: list[tuple[str, list[str], dict[str, str]]] = []

    def become(*given: Any) -> None:
        found.append(given)
        raise Became

    monkeypatch.setattr(os, "execve", become)
    return found


@pytest.fixture
def authlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take Authlib to be installed."""
    monkeypatch.setattr(launch, "find_spec", lambda name: object())


def secrets(folder: Path, text: str) -> Path:
    (folder / ".streamlit").mkdir()
    file = folder / ".streamlit" / "secrets.toml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1", "127.8.8.8", "::1"])
def test_this_machine_needs_no_login(address: str) -> None:
    assert launch.is_local(address)
    assert launch.check_login(address) is False


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0", "::", "", "192.168.1.7", "example.com", "localhost.example.com", "*"],  # noqa: S104
)
def test_the_network_does(address: str, nobody: Path, authlib: None) -> None:
    assert not launch.is_local(address)
    with pytest.raises(UserError, match=r"configure a login first .*docs/dashboard.md"):
        launch.check_login(address)
    secrets(nobody / "home", AUTH)
    assert launch.check_login(address) is True


@pytest.mark.parametrize("place", ["home", "here"])
def test_a_login_is_found_where_streamlit_looks(nobody: Path, authlib: None, place: str) -> None:
    assert launch.check_login("localhost") is False
    file = secrets(nobody / place, "[other]\n")
    assert launch.check_login("localhost") is False
    file.write_text(AUTH)
    assert launch.check_login("localhost") is True


@pytest.mark.parametrize("content", [b"[auth", b"\xff\xfe"])
def test_secrets_that_cannot_be_read_are_no_reason_to_open_the_door(nobody: Path, content: bytes) -> None:
    secrets(nobody / "here", "").write_bytes(content)
    with pytest.raises(UserError, match=r"secrets.toml cannot be read .*mend it"):
        launch.check_login("localhost")


def test_a_login_that_cannot_work_is_told_at_once(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = secrets(nobody / "home", AUTH)
    monkeypatch.setattr(launch, "find_spec", lambda name: None if name == "authlib" else object())
    with pytest.raises(UserError, match=rf"login of {file} needs Authlib; pip install"):
        launch.check_login("localhost")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("auth = 3\n", r"auth must be a section \[auth\] with redirect_uri, .* server_metadata_url"),
        ("[auth]\n", r"\[auth\] lacks redirect_uri, cookie_secret, client_id, client_secret, server_metadata_url"),
        (OF_ALL + 'client_id = " "\nclient_secret = 1\nserver_metadata_url = "z"\n', "lacks client_id, client_secret"),
        (OF_ALL + '[auth.one]\nclient_id = "x"\n', r"in .*toml \[auth.one\] lacks client_secret, server_metadata_url"),
        (OF_ALL + '[auth.client_kwargs]\nprompt = "login"\n', r"\[auth\] lacks client_id"),
        ("[auth]\n[auth.one]\n" + OF_PROVIDER, r"\[auth\] lacks redirect_uri, cookie_secret; see docs"),
        (OF_ALL + "[auth.one_two]\n" + OF_PROVIDER, r"\[auth.one_two\] has an underscore in its name"),
    ],
)
def test_a_login_that_lacks_something_is_refused(nobody: Path, authlib: None, text: str, wrong: str) -> None:
    file = secrets(nobody / "home", text)
    with pytest.raises(UserError, match=wrong) as refused:
        launch.check_login("localhost")
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", [AUTH, OF_ALL + "[auth.one]\n" + OF_PROVIDER, AUTH + "[auth.one]\n" + OF_PROVIDER])
def test_a_login_may_have_named_providers(nobody: Path, authlib: None, text: str) -> None:
    secrets(nobody / "home", text)
    assert launch.check_login("0.0.0.0") is True  # noqa: S104


def test_without_streamlit_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lorafleet\[dashboard\]'"):
        launch.serve(tmp_path, None, 0, "localhost", False)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_port_is_free_or_refused(taken: int) -> None:
    assert launch.free_port("127.0.0.1", 0) > 0
    with pytest.raises(UserError, match=rf"port {taken} .*choose another with --port"):
        launch.free_port("127.0.0.1", taken)


@pytest.mark.parametrize("address", ["203.0.113.1", "x" * 64 + ".y"])
def test_an_address_of_others_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="cannot listen at"):
        launch.free_port(address, 0)


def test_it_becomes_streamlit_and_shows_no_secret(
    nobody: Path, became: list[tuple[str, list[str], dict[str, str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Became):
        launch.serve(Path("runs-here"), SECRET, 0, "localhost", False)
    ((program, command, environment),) = became
    assert program == command[0] == sys.executable
    assert command[1:5] == ["-m", "streamlit", "run", str(launch.APP)]
    said = capsys.readouterr().out
    assert said.startswith("dashboard of the database given: http://localhost:")
    assert "hunter2" not in " ".join(command) + said
    assert environment["LORAFLEET_DATABASE_URL"] == SECRET
    assert environment["LORAFLEET_HOME"] == str(nobody / "here" / "runs-here")
    assert environment[LOGIN_VARIABLE] == ""
    assert "--server.address=localhost" in command
    assert "--server.headless=true" in command
    assert not any(part.endswith("port=0") for part in command)


def test_it_says_where_the_database_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.announced(Path("runs"), None) == "runs"
    monkeypatch.setenv("LORAFLEET_DATABASE_URL", SECRET)
    assert launch.announced(Path("runs"), None) == "the database of LORAFLEET_DATABASE_URL"
    assert launch.announced(Path("runs"), "sqlite:///x.db") == "the database given"


@pytest.mark.parametrize("given", [True, False])
def test_an_address_of_a_database_that_cannot_be_read_is_refused(
    nobody: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    url = "mysql://u:hunter2@h/d"
    if not given:
        monkeypatch.setenv("LORAFLEET_DATABASE_URL", url)
    with pytest.raises(UserError, match="of no kind known here") as refused:
        launch.serve(nobody, url if given else None, 0, "localhost", False)
    assert "hunter2" not in str(refused.value)


def test_what_must_be_signed_in_to_stays_so(
    nobody: Path, became: list[tuple[str, list[str], dict[str, str]]], authlib: None
) -> None:
    secrets(nobody / "home", AUTH)
    with pytest.raises(Became):
        launch.serve(nobody, None, 0, "127.0.0.1", True)
    assert became[0][2][LOGIN_VARIABLE] == "1"
    assert "--server.headless=false" in became[0][1]


def test_it_names_an_address_a_browser_takes(
    nobody: Path, became: list[tuple[str, list[str], dict[str, str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        launch.free_port("::1", 0)
    except UserError:
        pytest.skip("IPv6 is not there")
    with pytest.raises(Became):
        launch.serve(nobody, None, 0, "::1", False)
    assert "http://[::1]:" in capsys.readouterr().out


def test_this_code_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert launch.python_path() == f"{launch.ROOT}{os.pathsep}/elsewhere"
    monkeypatch.delenv("PYTHONPATH")
    assert launch.python_path() == str(launch.ROOT)
