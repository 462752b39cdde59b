"""What `lorafleet privacy ledger` lists."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from client.privacy.ledger import Entry, open_ledger
from client.privacy.ledger.entry import curve_bytes
from client.privacy.places import home_ledger, run_ledger
from common.errors import UnknownNameError
from common.privacy.accounting import Mechanism, Spending, curve
from simulations.terminal.ledger_tables import show_ledgers
from simulations.terminal.ledgers import ledger_values
from simulations.terminal.tables import Output

SPENT = [Spending.of(Mechanism(2.0, 0.1), steps).epsilon(1e-5) for steps in (8, 16, 24)]


def reservation(run: str = "r1", number: int = 1) -> Entry:
    return Entry(
        kind="reserve", client="ada", run=run, round=number, attempt=1, label="causal_lm:[ada]/texts",
        fingerprint="0123456789abcdef", noise_multiplier=2.0, sample_rate=0.1, clipping_norm=1.0, steps=8, rounds=10,
        delta=1e-5, epsilon=4.0, accountant="rdp", budget_epsilon=3.0, budget_delta=1e-5, spent=SPENT[number - 1],
        test_seed=None, curve=curve_bytes(curve(Mechanism(2.0, 0.1))),
    )  # fmt: skip


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Ada's ledger of all experiments, with two runs, and ben's of one run, drawn from a seed."""
    with open_ledger(home_ledger(tmp_path, "ada")) as ledger:
        first, *_ = ledger.append(reservation(), reservation(number=2), reservation("r2"))
        ledger.append(replace(first, kind="done", settles=1, curve=b""))
    with open_ledger(run_ledger(tmp_path, "r1", "ben")) as ledger:
        ledger.append(replace(reservation(), client="ben", label="causal_lm:ben", test_seed=1, budget_epsilon=None))
    return tmp_path


def shown(home: Path, run: str | None = None, client: str | None = None, as_json: bool = False) -> tuple[int, str]:
    text = io.StringIO()
    output = Output(home, as_json=as_json, console=Console(file=text, width=100, highlight=False))
    return show_ledgers(run, client, output), text.getvalue()


def test_every_round_is_listed_with_its_cost(home: Path) -> None:
    ada, ben = ledger_values(home)
    assert (ada["client"], ada["all_experiments"], ada["error"]) == ("ada", True, None)
    (data,) = ada["data"]
    assert (data["label"], data["budget"], data["delta"]) == ("causal_lm:[ada]/texts", 3.0, 1e-5)
    assert data["epsilon"] == pytest.approx(SPENT[2], rel=1e-12)
    rows = [(row["run"], row["round"], row["state"], row["run_epsilon"], row["data_epsilon"]) for row in data["rounds"]]
    assert rows == [
        ("r1", 1, "done", SPENT[0], SPENT[0]),
        ("r1", 2, "reserved", SPENT[1], SPENT[1]),
        ("r2", 1, "reserved", SPENT[0], pytest.approx(SPENT[2], rel=1e-12)),
    ]
    assert (ben["all_experiments"], ben["data"][0]["private"]) == (False, False)
    json.dumps([ada, ben])


def test_a_list_can_be_of_one_run_or_client(home: Path) -> None:
    (ada,) = ledger_values(home, run="r2")
    assert [row["run"] for row in ada["data"][0]["rounds"]] == ["r2"]
    assert ada["data"][0]["epsilon"] == pytest.approx(SPENT[2], rel=1e-12)  # of the data, whoever spent it
    assert [one["client"] for one in ledger_values(home, client="ben")] == ["ben"]
    with pytest.raises(UnknownNameError, match="no run in the privacy ledgers named 'r3'; there is: r1, r2"):
        ledger_values(home, run="r3")
    with pytest.raises(UnknownNameError, match="no client with a privacy ledger named 'cyd'; there is: ada, ben"):
        ledger_values(home, client="cyd")


def test_the_tables_say_what_is_counted(home: Path) -> None:
    code, text = shown(home)
    assert code == 0
    for told in ("counts all experiments of this home", "simulated budget: counts this run only", "NOT PRIVATE"):
        assert told in text
    assert "causal_lm:[ada]/texts" in text
    assert f"{SPENT[2]:.3f}" in text
    assert "9f9f5111f7b2 " in text


def test_a_damaged_ledger_is_an_error_that_hides_no_other(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home_ledger(home, "ada").unlink()
    code, text = shown(home)
    assert code == 2
    assert "causal_lm:ben" in text
    assert "the file is gone, 4 entries must be there" in " ".join(capsys.readouterr().err.split())
    assert shown(home, run="r1")[0] == 2
    assert shown(home, client="ben")[0] == 0
    assert shown(home, as_json=True)[0] == 2
    ada, ben = json.loads(capsys.readouterr().out)["ledgers"]
    assert ada["data"] == []
    assert "the file is gone" in ada["error"]
    assert ben["error"] is None


def test_a_home_without_ledgers_says_how_to_begin(tmp_path: Path) -> None:
    code, text = shown(tmp_path / "nowhere")
    assert code == 0
    assert "no privacy ledgers here" in text
