"""Past runs merged again: the run's own numbers by its own strategy, others' by theirs, and what cannot be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lorafleet
from common.errors import UserError
from common.store import RunStore
from server.replay import ReplayedRound, own_choices, replay
from simulations.run import FinishedRun
from strategies import AGGREGATION, aggregation_strategy
from strategies.robust import ROBUST
from tests.tiny import drive, synthetic

EQUAL = (4,) * 4
KEPT = "federation.keep_replies=true"
PERSONAL = [name for name in AGGREGATION.names() if AGGREGATION.plugin(name).capabilities.client_memory]
SOME = ("fedavg", "flora", "rolora", "fed_sb", "slora")
"""A mean, a stack, turns, cores and matrices: the kinds of replies there are."""

SHARED = [name for name in AGGREGATION.names() if name not in PERSONAL]


def past(home: Path, name: str, *options: str, ranks: tuple[int, ...] = EQUAL) -> FinishedRun:
    return drive(synthetic(f"strategy.name={name}", KEPT, *options, ranks=ranks), home)


def again(
    run: FinishedRun, name: str, rule: str = "none", evaluate: bool = False, **options: Any
) -> list[ReplayedRound]:
    strategy = aggregation_strategy(name, **options)
    return list(replay(run.run.id, run.home, strategy, ROBUST.create(rule), evaluate))


@pytest.fixture(scope="module")
def flora(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return past(tmp_path_factory.mktemp("flora"), "flora", ranks=(2, 4, 4, 8))


@pytest.fixture(scope="module")
def fedavg(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return past(tmp_path_factory.mktemp("fedavg"), "fedavg")


@pytest.mark.parametrize("name", SHARED)
def test_the_same_strategy_comes_to_the_runs_own_numbers(tmp_path: Path, name: str) -> None:
    run = past(tmp_path, name)
    rounds = again(run, name, evaluate=True)
    assert [each.number for each in rounds] == [1, 2, 3, 4]
    for each, row in zip(rounds, run.rounds[1:], strict=True):
        assert (each.replies, each.reason, each.was_error) == (4, "", row.error)
        assert each.error == pytest.approx(row.error, rel=1e-9, abs=1e-12)
        assert each.was_loss == run.metrics["held_out_loss"][each.number]
        assert each.loss == pytest.approx(each.was_loss, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        ('federation.wire="int8"', 'federation.wire_down="bf16"'),
        ('robust.name="norm_bounding"', "simulation.attackers=1"),
        ("federation.max_weight_share=0.3",),
        ("simulation.dropout=0.3", "seed=2"),
        ("federation.download_rank=2",),
        ('federation.weighting="equal"', "evaluation.every=2"),
    ],
    ids=str,
)
def test_all_else_is_as_the_run_had_it(tmp_path: Path, options: tuple[str, ...]) -> None:
    run = past(tmp_path, "lora_lego", "strategy.options.clusters=3", *options)
    chosen = own_choices(run.run.id, tmp_path, "lora_lego")
    assert chosen["strategy"]["options"] == {"clusters": 3}
    rounds = again(run, "lora_lego", chosen["robust"]["name"], **chosen["strategy"]["options"])
    committed = [row for row in run.rounds[1:] if row.status == "committed"]
    assert [each.number for each in rounds] == [row.round for row in committed]
    for each, row in zip(rounds, committed, strict=True):
        assert each.error == pytest.approx(row.error, rel=1e-6)
        assert each.reason == ""


def test_a_replay_is_deterministic_and_changes_nothing(flora: FinishedRun) -> None:
    files = {path: path.stat().st_mtime_ns for path in flora.home.rglob("*") if path.is_file()}
    for name in ("lora_lego", "flexlora", "florist"):
        assert again(flora, name, evaluate=True) == again(flora, name, evaluate=True)
    artefacts = {path for path in files if "runs" in path.parts}
    assert {path: path.stat().st_mtime_ns for path in artefacts} == {path: files[path] for path in artefacts}


def test_an_exact_strategy_is_exact_on_others_replies(fedavg: FinishedRun) -> None:
    for name in ("flora", "fedex_lora"):
        for each in again(fedavg, name):
            assert each.error is not None
            assert each.error < 1e-6
            assert each.was_error is not None
            assert each.was_error > 1e-4


def test_a_replay_takes_options_and_rules(flora: FinishedRun) -> None:
    capped, *later = again(flora, "flora", global_rank=2)
    assert capped.discarded_energy is not None
    assert capped.error == pytest.approx(capped.discarded_energy**0.5, rel=1e-4)
    assert all(each.discarded_energy == 0 for each in later)  # on the run's own global adapter, a matrix by then
    judged = again(flora, "flora", "krum", evaluate=True)
    assert all(sum(each.trust.values()) == pytest.approx(1) for each in judged)
    assert all(len(each.trust) == 4 for each in judged)


@pytest.mark.parametrize(
    "run_of", [name if name in SOME else pytest.param(name, marks=pytest.mark.long) for name in SHARED]
)
def test_every_strategy_merges_or_says_why_not(tmp_path: Path, run_of: str) -> None:
    run = past(tmp_path, run_of, "federation.rounds=3")
    for name in AGGREGATION.names():
        for each in again(run, name):
            assert (each.error is None) == bool(each.reason)


@pytest.mark.parametrize(
    ("name", "rule", "said"),
    [
        ("fedavg", "none", r"strategy fedavg needs equal ranks: client-1 \(2\), client-4 \(8\) differ from rank 4"),
        ("ffa_lora", "none", "client client-1, layer layers.0: frozen factor differs"),
        (
            "flora",
            "median",
            "robust rule median works on the numbers themselves, which strategy flora does not average",
        ),
        ("fedsa_lora", "none", "strategy fedsa_lora needs equal ranks"),
    ],
)
def test_a_strategy_that_cannot_says_so(flora: FinishedRun, name: str, rule: str, said: str) -> None:
    rounds = again(flora, name, rule)
    assert all(re.match(said, each.reason) for each in rounds)
    assert all(each.error is None and each.loss is None for each in rounds)


def test_nobody_evaluates_where_nobody_did(tmp_path: Path) -> None:
    run = past(tmp_path, "flora", "evaluation.on=[]", "federation.rounds=1")
    (each,) = again(run, "flora", evaluate=True)
    assert (each.loss, each.was_loss) == (None, None)
    assert each.error is not None


def test_a_run_without_kept_replies_has_nothing_to_merge(tmp_path: Path) -> None:
    run = drive(synthetic("federation.rounds=1"), tmp_path)
    with pytest.raises(UserError, match=r"kept no replies; start one with --set federation\.keep_replies=true"):
        again(run, "flora")


def test_replies_without_b_are_refused(tmp_path: Path) -> None:
    run = past(tmp_path, PERSONAL[0], "federation.rounds=1")
    with pytest.raises(UserError, match="are not whole: under strategy fedsa_lora every client keeps factors"):
        again(run, "flora")


def test_a_masked_run_is_refused(tmp_path: Path) -> None:
    masked = ("strategy.name=fedavg", "federation.rounds=1", "secure_aggregation.enabled=true")
    run = drive(synthetic(*masked, ranks=EQUAL), tmp_path)
    with pytest.raises(UserError, match=r"the replies of run .* are masked; nobody can merge them in another way"):
        again(run, "fedavg")


def test_a_damaged_reply_is_found(tmp_path: Path) -> None:
    run = past(tmp_path, "flora", "federation.rounds=1")
    with RunStore.open(tmp_path, read_only=True) as store:
        row = store.client_rounds(run.run.id, 1)[0]
        assert row.artefact_path is not None
        path = store.artefact_file(run.run.id, row.artefact_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError.__mro__[1], match="sha256"):
        again(run, "flora")


class TestCommandLine:
    def told(self, run: FinishedRun, *given: str) -> tuple[int, str, BaseException | None]:
        command = ["replay", run.run.id, "--home", str(run.home), *given]
        result = CliRunner().invoke(lorafleet.app, command)
        return result.exit_code, result.stdout, result.exception

    def test_it_prints_both_merges(self, flora: FinishedRun) -> None:
        code, out, _ = self.told(flora, "--strategy", "flexlora", "--set", "strategy.options.server_rank=2", "--json")
        assert code == 0
        found = json.loads(out.splitlines()[-1])
        assert (found["run"], found["strategy"], found["robust"]) == (flora.run.id, "flexlora", "none")
        assert [row["number"] for row in found["rounds"]] == [1, 2, 3, 4]
        assert all(row["effective_rank"] <= 2 for row in found["rounds"])
        assert all(row["loss"] != row["was_loss"] for row in found["rounds"])

    def test_it_shows_a_table(self, flora: FinishedRun) -> None:
        code, out, _ = self.told(flora, "--strategy", "lora_lego", "--no-evaluate")
        assert code == 0
        assert "merged by lora_lego" in out

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            (("--strategy", "fedavg"), "fedavg can merge no round of that run: strategy fedavg needs equal ranks"),
            (("--strategy", "fedprox"), "no aggregation strategy named 'fedprox'"),
            (("--strategy", "flora", "--set", "seed=3"), r"--set seed=3: a replay takes strategy\.options\.KEY"),
            (("--strategy", "flora", "--set", "strategy.options.rank=0"), "unknown key 'rank'"),
        ],
        ids=str,
    )
    def test_what_cannot_be_is_told_once(self, flora: FinishedRun, given: tuple[str, ...], said: str) -> None:
        code, out, error = self.told(flora, *given)
        assert code != 0
        assert not out
        with pytest.raises(type(error), match=said):  # type: ignore[arg-type]
            raise error  # type: ignore[misc]
