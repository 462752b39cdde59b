"""Budgets over several runs, by the command line: what one run has spent, the next one lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lorafleet
from client.privacy import balance
from client.privacy.ledger import read_ledger
from client.privacy.places import home_ledger
from common.errors import UserError
from common.privacy.accounting import Mechanism

SETTINGS = {
    "clients.client-1.budget.epsilon": 1.6,  # six steps of two runs, each of which would take four
    "clients.client-2.rank": 2,
    "privacy.mode": "sample",
    "privacy.epsilon": 1.4,
    "privacy.noise_multiplier": 2.0,
    "privacy.sample_rate": 0.2,
    "federation.rounds": 2,
    "federation.min_completion": 0.1,
    "training.steps": 2,
}


def call(*arguments: str) -> int:
    code: int = lorafleet.app(args=list(arguments), standalone_mode=False)
    return code


def values(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_an_owners_budget_lasts_over_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(balance, "SECOND_STEPS", 0)  # the second number is for people
    settings = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    home = ["--home", str(tmp_path), "--json"]
    taken = []
    for _ in range(2):
        assert call("simulate", "synthetic", *settings, "--persistent-ledger", *home) == 0
        run = values(capsys)
        taken += [row["client"] for row in run["clients"] if row["status"] == "accepted"]
    assert (taken.count("client-1"), taken.count("client-2")) == (3, 4)
    book = read_ledger(home_ledger(tmp_path, "client-1"))
    data = book.data_sets()[0]
    assert data.spent(book.curves).steps == {Mechanism(2.0, 0.2): 6}

    assert call("privacy", "ledger", "--client", "client-1", *home) == 0
    (ledger,) = values(capsys)["ledgers"]
    listed = ledger["data"][0]
    assert (ledger["all_experiments"], listed["budget"]) == (True, 1.6)
    assert listed["epsilon"] == pytest.approx(data.spent(book.curves).epsilon(1e-5), rel=1e-12)
    assert call("privacy", "ledger", "--run", "last", *home) == 0
    of_last = values(capsys)["ledgers"]
    rows = [row for ledger in of_last for data in ledger["data"] for row in data["rounds"]]
    assert {row["run"] for row in rows} == {run["id"]}

    assert call("simulate", "synthetic", *settings, "--set", "federation.rounds=1", *home) == 0
    alone = values(capsys)["id"]
    with pytest.raises(UserError, match=f"run {alone} began without --persistent-ledger"):
        call("resume", alone, "--persistent-ledger", *home)
