"""A scan of the whole repository: nothing that runs data as code, nothing private in tracked files."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ("client", "common", "dashboard", "docs", "server", "simulations", "strategies")

UNPICKLING = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve"}
"""Modules whose loading runs whatever the data say."""

RUNNING = {"eval", "exec", "compile", "__import__", "execfile"}
"""Built-ins that run text."""

LOADING = {
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "torch.package.PackageImporter",
    "torch.save",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "numpy.load",
    "np.load",
    "pandas.read_pickle",
    "os.system",
    "os.popen",
}
"""Calls that unpickle, write pickles, or hand text to a shell."""

GIVEN_AWAY = {"allow_pickle", "shell", "trust_remote_code"}
"""Arguments that, when true, do the same."""

PRIVATE = {
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a folder of somebody's machine": rb"(?<![\w.{}])/(root|work|mnt|srv|Users)/[\w.-]+|/home/(?!of/)\w+/\w+/",
    "the address of a package registry": rb"(?i)https?://[^\s\"'<>]*(pypi|pythonhosted|artifactory|nexus|/simple\b)",
    "a registry option": rb"--(extra-)?index-url|--trusted-host|--find-links",
    "an access token": rb"\b(hf_[A-Za-z0-9]{30}|gh[pousr]_[A-Za-z0-9]{30}|AKIA[0-9A-Z]{16}|xox[abp]-[0-9A-Za-z-]{20})",
}


def sources() -> Iterator[Path]:
    yield ROOT / "lorafleet.py"
    for package in OURS:
        yield from sorted((ROOT / package).rglob("*.py"))


def tracked() -> list[Path]:
    """List what is or would be committed."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    return [path for name in listed.split(b"\0") if name and (path := ROOT / name.decode()).is_file()]


def dotted(node: ast.expr) -> str:
    """Write a chain of names as text; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def faults(text: str) -> list[str]:
    """List what a source file must not do."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.split(".")[0] in UNPICKLING]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] if node.module.split(".")[0] in UNPICKLING else []
            whole = {f"{node.module}.{name.name}" for name in node.names}
            found += sorted(whole & LOADING)
        elif isinstance(node, ast.Attribute) and dotted(node) in LOADING:
            found.append(dotted(node))
        elif isinstance(node, ast.Call):
            found += [dotted(node.func)] if dotted(node.func) in RUNNING else []
            found += [
                word.arg
                for word in node.keywords
                if word.arg in GIVEN_AWAY and not (isinstance(word.value, ast.Constant) and not word.value.value)
            ]
    return found


@pytest.mark.parametrize("path", list(sources()), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_our_code_runs_no_data(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("import pickle", "pickle"),
        ("import os, dill.source", "dill.source"),
        ("from marshal import loads", "marshal"),
        ("from torch import load", "torch.load"),
        ("import torch\nread = torch.load", "torch.load"),
        ("torch.jit.load('x')", "torch.jit.load"),
        ("x = eval('1')", "eval"),
        ("exec(text)", "exec"),
        ("numpy.load(path)", "numpy.load"),
        ("f(path, allow_pickle=True)", "allow_pickle"),
        ("run(text, shell=shell)", "shell"),
        ("from_pretrained(name, trust_remote_code=1)", "trust_remote_code"),
    ],
)
def test_the_scan_of_code_finds(text: str, fault: str) -> None:
    assert faults(text) == [fault]


@pytest.mark.parametrize(
    "text",
    ["model.eval()", "spec.loader.exec_module(module)", "run(x, shell=False)", "re.compile('x')", "torch.loaded(x)"],
)
def test_the_scan_of_code_leaves_alone(text: str) -> None:
    assert faults(text) == []


@pytest.mark.needs("git")
@pytest.mark.parametrize("what", PRIVATE)
def test_nothing_private_is_tracked(what: str) -> None:
    pattern = re.compile(PRIVATE[what])
    found = {
        path.relative_to(ROOT).as_posix(): match[0][:80]
        for path in tracked()
        if path != Path(__file__).resolve() and (match := pattern.search(path.read_bytes()))
    }
    assert found == {}, f"{what} is in tracked files"


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("a private key", b"-----BEGIN RSA " + b"PRIVATE KEY-----"),
        ("a private key", b"-----BEGIN " + b"PRIVATE KEY-----"),
        ("a folder of somebody's machine", b'"path": "/root/models/x"'),
        ("a folder of somebody's machine", b"see /home/ann/data/x.txt"),
        ("a folder of somebody's machine", b"/Users/ann"),
        ("the address of a package registry", b"https://pypi.example.org/simple"),
        ("the address of a package registry", b"index = http://10.0.0.1/simple/"),
        ("a registry option", b"pip install --index-url x"),
        ("an access token", b"token = hf_" + b"a1" * 17),
    ],
)
def test_the_scan_of_files_finds(what: str, text: bytes) -> None:
    assert re.search(PRIVATE[what], text)


@pytest.mark.needs("git")
def test_tracked_files_are_small_and_are_no_pickles() -> None:
    """A pickle begins with its protocol, a zip archive may be torch's."""
    for path in tracked():
        assert path.stat().st_size < 6_000_000, f"{path} is large"
        assert path.suffix not in {".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".pem", ".key"}, path
        assert not path.read_bytes()[:2].startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")), path


@pytest.mark.needs("git")
def test_no_output_of_tools_is_tracked() -> None:
    names = {part for path in tracked() for part in path.relative_to(ROOT).parts}
    assert not names & {"__pycache__", ".venv", "lorafleet-home", ".coverage", "build", "dist", ".hypothesis"}
