"""The corpus every machine has: the standard library of the running interpreter.

Packages play the teams of a company: each owner keeps the code of one package private, a few others are the
public evaluation set, and documentation of everything else is what the demo's base model was trained on.
The text differs between Python versions, and some distributions leave packages out.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.errors import DataError
from common.text import Document

OWNERS = ("asyncio", "email", "idlelib", "unittest")
OWNER_SUBSTITUTES = ("tkinter", "multiprocessing", "http", "urllib")
UNSEEN = ("xml", "json", "logging")
UNSEEN_SUBSTITUTES = ("importlib", "wsgiref")

_SHORTEST_DOCSTRING = 80  # characters; shorter ones are signatures in words, not prose
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


def library() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def installed(packages: Sequence[str]) -> list[str]:
    """Return those of ``packages`` whose source is installed, in the order given."""
    return [name for name in packages if (library() / name / "__init__.py").is_file()]


def resolve_owners(wanted: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Find the package each wanted owner stands for on this machine.

    Parameters
    ----------
    wanted : sequence of str
        Names of standard-library packages.

    Returns
    -------
    actual : dict of str to str
        Wanted name to the installed package: itself, or the next of ``OWNER_SUBSTITUTES``.
    notices : list of str
        One sentence for each package that another stands in for.

    Raises
    ------
    DataError
        If a name is no module of any standard library, or no substitute is left.
    """
    return _resolve(wanted, OWNER_SUBSTITUTES)


def resolve_unseen(wanted: Sequence[str] = UNSEEN) -> tuple[dict[str, str], list[str]]:
    """Find the packages of the public evaluation set, as `resolve_owners` does for owners."""
    return _resolve(wanted, UNSEEN_SUBSTITUTES)


def code_documents(package: str) -> list[Document]:
    """Read the source files of one package, without its tests, ordered by path.

    Raises
    ------
    DataError
        If the package is not installed.
    """
    if not installed([package]):
        raise DataError(f"package {package!r} is not part of this Python's library; choose from: {_choices()}")
    return [
        Document(path.relative_to(library()).as_posix(), package, text)
        for path in _sources(library() / package)
        if (text := _read_source(path)).strip()
    ]


def prose_documents() -> list[Document]:
    """Collect English prose: the language reference's topics and long docstrings, each text once.

    Owners, the unseen packages, all their substitutes and modules named after them (``xmlrpc``) are left out,
    so that a model trained on this has seen nothing of what the clients own or are judged by.
    """
    from pydoc_data.topics import topics

    documents = [Document(f"topics/{name}", "topics", text) for name, text in sorted(topics.items())]
    seen: set[str] = set()
    for module in _public_modules():
        for path in _sources(module):
            fresh = [text for text in _docstrings(path) if text not in seen]
            seen.update(fresh)
            if fresh:
                name = path.relative_to(library()).as_posix()
                documents.append(Document(name, module.stem, "\n\n".join(fresh)))
    return documents


def _resolve(wanted: Sequence[str], substitutes: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    unknown = [name for name in wanted if name not in sys.stdlib_module_names]
    if unknown:
        raise DataError(f"{unknown[0]!r} is no package of Python's library; choose from: {_choices()}")
    spare = iter(name for name in installed(substitutes) if name not in wanted)
    present = set(installed(wanted))
    actual, notices = {}, []
    for name in wanted:
        if name in present:
            actual[name] = name
            continue
        stand_in = next(spare, None)
        if stand_in is None:
            raise DataError(f"{name} is not installed here and no substitute is left; choose from: {_choices()}")
        actual[name] = stand_in
        notices.append(f"{name} is not installed here; {stand_in} takes its place")
    return actual, notices


def _choices() -> str:
    return ", ".join(installed(OWNERS + OWNER_SUBSTITUTES))


def _public_modules() -> Iterator[Path]:
    """Top-level modules and packages that no owner and no evaluation has a part in."""
    private = OWNERS + OWNER_SUBSTITUTES + UNSEEN + UNSEEN_SUBSTITUTES
    for path in sorted(library().iterdir()):
        if path.stem in sys.stdlib_module_names and not path.stem.lstrip("_").startswith(private):
            yield path


def _sources(module: Path) -> list[Path]:
    """Source files of a package or of a single module; tests excluded."""
    files = sorted(module.rglob("*.py")) if module.is_dir() else [module] if module.suffix == ".py" else []
    return [path for path in files if _TEST_FOLDERS.isdisjoint(path.relative_to(library()).parts)]


def _read_source(path: Path) -> str:
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _docstrings(path: Path) -> list[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse(_read_source(path))
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return [text for text in found if text and len(text) > _SHORTEST_DOCSTRING]
