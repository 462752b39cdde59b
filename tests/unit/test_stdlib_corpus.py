"""The built-in corpus: who owns what, what stands in for a missing package, what the base model may read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from common.errors import DataError
from common.text import stdlib
from common.text.stdlib import (
    OWNER_SUBSTITUTES,
    OWNERS,
    UNSEEN,
    UNSEEN_SUBSTITUTES,
    code_documents,
    prose_documents,
    resolve_owners,
    resolve_unseen,
)

EVERYTHING = OWNERS + OWNER_SUBSTITUTES + UNSEEN + UNSEEN_SUBSTITUTES


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a tiny standard library in place of the real one: everything but idlelib and tkinter."""
    for package in EVERYTHING:
        if package not in ("idlelib", "tkinter"):
            (tmp_path / package).mkdir()
            (tmp_path / package / "__init__.py").write_text(f"name = {package!r}\n")
    monkeypatch.setattr(stdlib, "library", lambda: tmp_path)
    return tmp_path


def test_no_package_plays_two_parts() -> None:
    assert len(set(EVERYTHING)) == len(EVERYTHING)


def test_installed_owners_stand_for_themselves(library: Path) -> None:
    assert resolve_owners(["email", "asyncio"]) == ({"email": "email", "asyncio": "asyncio"}, [])


def test_missing_owner_is_replaced_by_the_next_substitute_installed(library: Path) -> None:
    actual, notices = resolve_owners(OWNERS)
    assert actual == {
        "asyncio": "asyncio",
        "email": "email",
        "idlelib": "multiprocessing",
        "unittest": "unittest",
    }
    assert notices == ["idlelib is not installed here; multiprocessing takes its place"]


def test_a_substitute_someone_wants_or_has_got_is_not_given_again(library: Path) -> None:
    actual, _ = resolve_owners(["idlelib", "multiprocessing", "tkinter"])
    assert actual == {"idlelib": "http", "multiprocessing": "multiprocessing", "tkinter": "urllib"}


def test_missing_owner_without_substitute_left_is_refused(library: Path) -> None:
    with pytest.raises(DataError, match="idlelib is not installed here and no substitute is left"):
        resolve_owners(["idlelib", *OWNER_SUBSTITUTES[1:]])


def test_misspelt_owner_is_refused_and_not_replaced(library: Path) -> None:
    with pytest.raises(DataError, match="'asynco' is no package of Python's library; choose from: asyncio, "):
        resolve_owners(["asynco"])


def test_missing_unseen_package_is_replaced_by_one_no_owner_can_get(library: Path) -> None:
    (library / "json" / "__init__.py").unlink()
    actual, notices = resolve_unseen()
    assert actual == {"xml": "xml", "json": "importlib", "logging": "logging"}
    assert notices == ["json is not installed here; importlib takes its place"]


def test_code_is_read_without_tests_and_in_order_of_path(library: Path) -> None:
    email = library / "email"
    for path in ("tests/test_b.py", "mime/part.py", "a.py"):
        (email / path).parent.mkdir(exist_ok=True)
        (email / path).write_text("x = 1\n")
    (email / "latin.py").write_bytes(b"# coding: latin-1\nname = '\xe9'\n")
    (email / "blank.py").write_text("\n")
    documents = code_documents("email")
    assert [document.id for document in documents] == [
        "email/__init__.py",
        "email/a.py",
        "email/latin.py",
        "email/mime/part.py",
    ]
    assert {document.key for document in documents} == {"email"}
    assert documents[2].text.endswith("name = 'é'\n")


def test_code_of_a_missing_package_is_refused(library: Path) -> None:
    with pytest.raises(DataError, match="'idlelib' is not part of this Python's library"):
        code_documents("idlelib")


def test_prose_is_long_docstrings_of_public_modules_each_once(library: Path) -> None:
    long = "A sentence that is long enough to count as prose, " * 2 + "and then ends."
    (library / "argparse.py").write_text(f'"""{long}"""\ndef short():\n    """Too short."""\n')
    (library / "textwrap.py").write_text(f'"""{long}"""\n')
    (library / "xmlrpc").mkdir()
    for secret in ("xmlrpc/client.py", "_json.py", "email/message.py", "site-packages.py", "test.py"):
        (library / secret).write_text(f'"""Secret. {long}"""\n')
    modules = [document for document in prose_documents() if not document.id.startswith("topics/")]
    assert [(document.id, document.text) for document in modules] == [("argparse.py", long)]


def test_prose_of_this_interpreter_holds_nothing_of_owners_or_unseen() -> None:
    documents = prose_documents()
    assert sum(len(document.text) for document in documents) > 1_000_000
    assert {document.key.lstrip("_") for document in documents}.isdisjoint(EVERYTHING)
    assert {document.key for document in documents} <= sys.stdlib_module_names | {"topics"}
    assert any(document.id == "topics/assert" for document in documents)
    assert len({document.id for document in documents}) == len(documents)
