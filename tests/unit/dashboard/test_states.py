"""What the frame says where there is no page to show: each state with what to type."""

from __future__ import annotations

from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import create_engine

from common.store import RunStore
from common.store.engine import DATABASE_FILE
from common.store.schema import alembic_config
from dashboard.commands import PROGRAM_VARIABLE, typed
from tests.pages import Opener


def test_a_home_without_a_store_says_how_to_begin(tmp_path: Path, open_page: Opener) -> None:
    page = open_page(tmp_path / "nowhere", "run")
    assert [title.value for title in page.title] == ["No runs yet"]
    assert [code.value for code in page.code] == [f"lorafleet simulate quickstart --home {tmp_path / 'nowhere'}"]
    assert not (tmp_path / "nowhere").exists()


def test_an_empty_store_says_the_same(tmp_path: Path, open_page: Opener) -> None:
    RunStore.open(tmp_path).close()
    assert [title.value for title in open_page(tmp_path, "run").title] == ["No runs yet"]


def test_an_older_store_names_the_command_for_this_home(tmp_path: Path, open_page: Opener) -> None:
    with create_engine(f"sqlite:///{tmp_path / DATABASE_FILE}").connect() as connection:
        command.upgrade(alembic_config(connection), "0001")
        connection.commit()
    page = open_page(tmp_path, "run")
    assert [title.value for title in page.title] == ["The store is of an older version"]
    assert [code.value for code in page.code] == [f"lorafleet database upgrade --home {tmp_path}"]


def test_what_is_no_store_is_named(tmp_path: Path, open_page: Opener) -> None:
    (tmp_path / DATABASE_FILE).write_text("something else altogether, longer than a header " * 30)
    page = open_page(tmp_path, "run")
    assert [title.value for title in page.title] == ["The store cannot be read"]
    assert "restore a backup" in page.error[0].value


def test_commands_call_the_program_as_the_reader_did(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(PROGRAM_VARIABLE, ".venv/bin/lorafleet")
    monkeypatch.chdir(tmp_path)
    assert typed(tmp_path / "lorafleet-home", "resume", "a b") == ".venv/bin/lorafleet resume 'a b'"
