"""What an owner's file says, and which ledger and budget a node has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from client.node import Node, node_of
from client.owner import Owner, read_owner
from common.errors import ConfigurationError
from common.privacy.settings import Budget
from tests.tiny import synthetic


def written(folder: Path, text: str) -> Path:
    path = folder / "client.toml"
    path.write_text(text)
    return path


def test_an_owner_limits_what_the_data_are_used_for(tmp_path: Path) -> None:
    path = written(tmp_path, 'name = "ada"\n[budget]\nepsilon = 4\ndelta = 1e-6\n')
    assert read_owner(path) == Owner(name="ada", budget=Budget(epsilon=4.0, delta=1e-6))
    assert read_owner(written(tmp_path, "")) == Owner()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("budgt = 3", r"unknown key 'budgt'; known are: name, budget"),
        ("[budget]\nepsilon = 4\nsigma = 1", r"unknown key 'budget.sigma'; known are: epsilon, delta"),
        ("[budget]\ndelta = 1e-5", r"budget.epsilon is missing"),
        ("[budget]\nepsilon = 0", r"budget.epsilon: Input should be greater than 0"),
        ("[budget]\nepsilon = -1\ndelta = 2", r"budget.epsilon: .* greater than 0.*; .*budget.delta: .* less than 1"),
        ("[budget]\nepsilon = inf", r"budget.epsilon: Input should be a finite number"),
        ('name = "../ada"', "name: String should match pattern"),
        ("name = ", "is not TOML"),
        ("\udc80", "cannot be read: it is not UTF-8 text"),
    ],
)
def test_an_owners_mistake_is_named(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "client.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigurationError, match=told) as caught:
        read_owner(path)
    assert all(str(path) in problem for problem in caught.value.problems)


def test_a_missing_owners_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nobody.toml cannot be read: No such file"):
        read_owner(tmp_path / "nobody.toml")


def node(home: Path, *overrides: str, **config: Any) -> Node:
    private = synthetic("privacy.mode=sample", *overrides)
    run = {"experiment": private.model_dump_json(), "run-id": "r", "home": str(home)}
    return node_of(Context(1, 1, {"partition-id": 0} | config, RecordDict(), run))


def test_a_simulated_ledger_counts_one_run_unless_told_otherwise(tmp_path: Path) -> None:
    found = node(tmp_path, "clients.client-1.budget.epsilon=3")
    assert found.ledger == tmp_path / "runs" / "r" / "clients" / "client-1" / "privacy.db"
    assert found.budget == Budget(epsilon=3.0)
    kept = node(tmp_path, "simulation.persistent_ledger=true")
    assert kept.ledger == tmp_path / "privacy" / "client-1" / "ledger.db"
    assert kept.budget is None


def test_an_owners_file_beats_what_the_experiment_says(tmp_path: Path) -> None:
    path = written(tmp_path, 'name = "client-2"\n[budget]\nepsilon = 1\n')
    for persistent in ("true", "false"):
        told = (f"simulation.persistent_ledger={persistent}", "clients.client-2.budget.epsilon=99")
        found = node(tmp_path / "home", *told, owner=str(path))
        assert (found.name, found.budget, found.ledger) == ("client-2", Budget(epsilon=1.0), tmp_path / "ledger.db")
