"""What the terminal shows: plans, rounds, who was left out, and progress from here and from a store."""

from __future__ import annotations

import io
import json
import math
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from common.errors import ConfigurationError, RunError, StoreError, UserError
from common.experiment import Experiment
from common.store import ClientRound, Event, Metric, Round, RunLock, RunStore
from common.wording import duration, size
from server.plan import Plan, PlannedClient
from server.progress import Progress, announce
from simulations.terminal import verbs
from simulations.terminal.following import Follower, following
from simulations.terminal.listings import run_view, runs_view
from simulations.terminal.live import LISTED_CLIENTS, ProgressBars, ProgressLines, RoundState
from simulations.terminal.planning import plan_view
from simulations.terminal.quiet import quiet_libraries
from simulations.terminal.session import run_session, watching
from simulations.terminal.summary import json_text, list_summary, run_summary
from simulations.terminal.tables import (
    Output,
    outcome_view,
    print_error,
    print_next,
    troubles,
)

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


def drawn(*views: RenderableType, width: int = 80) -> str:
    """Return what a terminal of this width would show, without colours."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(*views, sep="\n")
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def experiment(clients: int = 2, **tables: Any) -> Experiment:
    names = {f"client-{number}": {} for number in range(clients)}
    return Experiment.parse({"name": "demo", "task": {"name": "causal_lm"}, "clients": names} | tables)


def new_run(store: RunStore, run: str = "20300102-demo-ab", rounds: int = 3) -> str:
    text = experiment().model_dump_json()
    store.create_run(
        run, name="demo", task="causal_lm", strategy="flora", seed=0, experiment=text, rounds_planned=rounds
    )
    return run


def commit(store: RunStore, run: str, number: int, loss: float, status: str = "committed", **values: Any) -> None:
    left_out = values.pop("left_out", {})
    cohort = ("ann", "bob", *left_out) if number else ()
    row = Round(
        run, number, NOW, status=status, cohort=cohort, bytes_up=1_500, bytes_down=2_500_000, seconds=1.25, **values
    )  # type: ignore[arg-type]
    clients = [
        ClientRound(run, number, name, "accepted", rank=4, num_examples=1_234, seconds=2.0) for name in cohort[:2]
    ]
    clients += [ClientRound(run, number, name, kind, reason, rank=8) for name, (kind, reason) in left_out.items()]
    metrics = [Metric(run, number, "held_out_loss", loss), Metric(run, number, "train_loss", 3.5, "ann")]
    events = [Event(run, status, f"round {number}", NOW, number)]
    store.commit_round(row, clients, metrics, (), events, rounds_done=number)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore.open(tmp_path / "home", clock=lambda: NOW)


# ---- numbers and sentences


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_500, "1.5 kB"),
        (2.5e6, "2.5 MB"),
        (4.3e9, "4.3 GB"),
        (2e12, "2.0 TB"),
        (1e300, "over 1000 PB"),
    ],
)
def test_sizes(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.04, "< 0.1 s"),
        (0.05, "0.1 s"),
        (59.9, "59.9 s"),
        (61, "1 min 01 s"),
        (3_599.6, "1 h 00 min"),
        (7_260, "2 h 01 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_json_has_null_for_what_is_no_number_and_is_one_line() -> None:
    text = json_text({"a": [math.nan, 1.5, {"b": math.inf}], "c": (-math.inf, "NaN\n"), 1: True})
    assert json.loads(text) == {"a": [None, 1.5, {"b": None}], "c": [None, "NaN\n"], "1": True}
    assert "\n" not in text


def test_every_problem_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(ConfigurationError(["first [x] " + "long " * 50, "second\nline"]))
    print_error(RunError("third"))
    lines = capsys.readouterr().err.splitlines()
    assert [line[:16] for line in lines] == ["error: first [x]", "error: second li", "error: third"]


# ---- tables


def plan(clients: int) -> Plan:
    planned = tuple(
        PlannedClient(f"client-{number:02d}", 4, number != 1, True, 20, 1_500, 2_500_000) for number in range(clients)
    )
    return Plan(planned, 6, 1, 3, 9_000, 8_000_000, 2_500_000, ("rank [4] is clamped",))


def test_a_plan_shows_clients_ranks_and_bytes() -> None:
    lines = drawn(plan_view(plan(4), experiment(4))).splitlines()
    assert lines[0] == "demo: flora on causal_lm"
    assert lines[2].split() == ["client-00", "4", "yes", "yes", "20", "1.5", "kB", "2.5", "MB"]
    assert lines[3].split() == ["client-01", "4", "no", "yes", "–", "–", "–"]
    assert lines[6] == "1 round, 3 of 3 clients in each; ranks 3 × 4; 6 layers adapted"
    assert lines[7] == "about 9.0 kB up and 8.0 MB down in all, at most 2.5 MB in one download"
    assert lines[8] == "note: rank [4] is clamped"


def test_a_plan_of_many_clients_is_cut() -> None:
    text = drawn(plan_view(plan(1_000), experiment(1_000), notices=False))
    assert "… and 980 more" in text
    assert len(text.splitlines()) == 25
    assert "note" not in text


def test_rounds_are_shown_with_what_went_wrong(store: RunStore) -> None:
    run = new_run(store)
    commit(store, run, 0, math.log(100.0))
    commit(
        store, run, 1, 4.0, error=0.0, exact=True, left_out={"cyd": ("late", "no answer"), "dot": ("late", "no answer")}
    )
    commit(store, run, 2, math.nan, "failed", reason="1 valid reply of 2", error=0.125)
    summary = run_summary(store, run)
    lines = drawn(outcome_view(summary)).splitlines()
    assert lines[0].split() == ["round", "held-out", "worst", "up", "down", "seconds", "error"]
    assert lines[1].split() == ["0", "4.6052", "–", "1.5", "kB", "2.5", "MB", "1.2", "–"]
    assert lines[2].split()[-1] == "exact"
    assert lines[3].split()[0] == "2"
    assert lines[3].split()[-1] == "1.2e-01"
    assert troubles(summary) == [
        "[yellow]round 1:[/] cyd, dot late: no answer",
        "[red]round 2 failed:[/] 1 valid reply of 2",
    ]
    assert json.loads(json_text(summary))["rounds"][2]["metrics"]["held_out_loss"] is None


def test_many_troubles_are_cut(store: RunStore) -> None:
    run = new_run(store)
    commit(store, run, 0, 4.0)
    commit(store, run, 1, 4.0, left_out={f"c{number}": ("failed", f"reason {number}") for number in range(30)})
    shown = troubles(run_summary(store, run))
    assert len(shown) == 21
    assert shown[-1] == "… and 10 more of the kind"
    left_out = {f"c{number}": ("failed", "the same") for number in range(30)}
    commit(store, run, 2, 4.0, left_out=left_out)
    many = run_summary(store, run) | {"rounds": [run_summary(store, run)["rounds"][2]]}
    assert troubles(many) == ["[yellow]round 2:[/] c0, c1, c10, c11, c12 and 25 more failed: the same"]


def test_what_to_type_next_fits_the_status_and_can_be_copied(store: RunStore) -> None:
    run = new_run(store)
    commit(store, run, 0, 5.0)
    console = Console(file=io.StringIO(), width=40)
    print_next(console, run_summary(store, run), "my home")
    assert console.file.getvalue().splitlines()[2:] == [  # type: ignore[attr-defined]
        f"  lorafleet resume {run} --home 'my home'",
        "  lorafleet dashboard --home 'my home'",
        f"  lorafleet runs show {run} --home 'my home'",
    ]
    commit(store, run, 1, 4.0)
    store.set_status(run, "completed")  # ended early, by patience
    console = Console(file=io.StringIO(), width=40)
    print_next(console, run_summary(store, run))
    assert console.file.getvalue().splitlines()[2:] == [  # type: ignore[attr-defined]
        "  lorafleet dashboard",
        f"  lorafleet runs show {run}",
        f"  lorafleet export {run} --format peft --out adapter",
    ]
    store.update_run(run, rounds_planned=1, best_round=1)
    console = Console(file=io.StringIO(), width=40)
    print_next(console, run_summary(store, run))
    assert console.file.getvalue().splitlines()[2:] == [  # type: ignore[attr-defined]
        "  lorafleet dashboard",
        f"  lorafleet runs show {run}",
        f"  lorafleet export {run} --best --format peft --out adapter",
        f"  lorafleet resume {run} --rounds 2",
    ]


def test_a_running_run_that_nobody_writes_is_shown_as_interrupted(store: RunStore) -> None:
    run = new_run(store)
    assert run_summary(store, run)["status"] == "interrupted"
    with RunLock(store.run_folder(run)):
        assert run_summary(store, run)["status"] == "running"
    store.set_status(run, "failed", "for a reason")
    assert [(item["status"], item["reason"]) for item in list_summary(store.home)] == [("failed", "for a reason")]


def test_runs_are_listed_newest_first_and_fit_80_columns(tmp_path: Path) -> None:
    times = iter(NOW + timedelta(minutes=minute) for minute in range(10))
    store = RunStore.open(tmp_path, clock=lambda: next(times))
    for run in ("20260101-101010-quickstart-0001", "20260101-101010-quickstart-0002"):
        new_run(store, run)
    lines = drawn(runs_view(list_summary(tmp_path), now=NOW + timedelta(hours=3))).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["20260101-101010-quickstart-0002", "interrupted", "flora", "0/3", "–", "3", "h"],
        ["20260101-101010-quickstart-0001", "interrupted", "flora", "0/3", "–", "3", "h"],
    ]
    assert "lorafleet simulate" in drawn(runs_view([]))
    assert list_summary(tmp_path / "nowhere") == []


def test_a_run_is_shown_with_its_clients(store: RunStore) -> None:
    run = new_run(store)
    commit(store, run, 0, 5.0)
    commit(store, run, 1, 4.0, left_out={"cyd": ("rejected", "not finite")})
    commit(store, run, 2, 3.0)
    text = drawn(run_view(run_summary(store, run)))
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert rows["ann"] == ["ann", "4", "2", "0", "1,234", "0", "B", "0", "B", "2.0"]
    assert rows["cyd"] == ["cyd", "8", "0", "1", "0", "0", "B", "0", "B", "–"]
    assert "round 1: cyd rejected: not finite" in text


# ---- progress


def steps() -> list[Progress]:
    return [
        Progress("run_started", "run x", data={"run": "x", "driver": "inprocess", "workers": 2}),
        Progress("round_started", "round 1 of 3", 1, data={"clients": ["ann", "bob", "cyd", "dot"], "rounds": 3}),
        Progress("reply", "bob trained in 2.0 s", 1, "bob", {"seconds": 2.0, "train_loss": 3.25}),
        Progress("left_out", "ann is left out: it hangs", 1, "ann", {"status": "late"}),
    ]


def test_the_first_unanswered_clients_are_in_training() -> None:
    state = RoundState()
    shown = []
    for step in steps():
        state.take(step)
        shown.append([(name, kind) for name, kind, _ in state.clients()])
    assert shown == [
        [],
        [("ann", "training"), ("bob", "training"), ("cyd", "waiting"), ("dot", "waiting")],
        [("ann", "training"), ("bob", "done"), ("cyd", "training"), ("dot", "waiting")],
        [("ann", "left out"), ("bob", "done"), ("cyd", "training"), ("dot", "training")],
    ]
    assert state.done["bob"] == "in 2.0 s, train loss 3.2500"
    assert state.left_out["ann"] == "it hangs"


def test_the_phase_goes_from_training_to_evaluating() -> None:
    state, phases = RoundState(), []
    ends = [Progress("reply", "", 1, name, {"seconds": 1.0}) for name in ("cyd", "dot")]
    for step in [
        *steps(),
        *ends,
        Progress("aggregated", "", 1),
        Progress("round_started", "", 0, data={"clients": []}),
    ]:
        state.take(step)
        phases.append(state.phase)
    assert phases[3:] == ["training", "training", "merging, evaluating", "evaluating", "evaluating before training"]


def test_lines_are_written_for_logs() -> None:
    console = Console(file=io.StringIO(), width=30)
    with ProgressLines(console) as listener:
        for step in [
            *steps(),
            Progress("notice", "a package\nis missing"),
            Progress("committed", "", 1, data={"metrics": {"held_out_loss": 4.5}, "rounds": 3}),
            Progress("round_failed", "round 2 failed: no reply", 2),
        ]:
            listener(step)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[:3] == ["run x", "round 1: ann is left out: it hangs", "a package is missing"]
    assert lines[3].startswith("round 1 of 3: 1 of 4 trained, loss 4.5000, < 0.1 s")
    assert lines[4:] == ["round 2 failed: no reply"]


@pytest.mark.parametrize("width", [80, 120])
def test_bars_fit_the_terminal_and_leave_a_line_per_round(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)
    shown: list[str] = []
    with ProgressBars(console) as bars:
        shown.append(drawn(bars._view(), width=width))
        for step in steps():
            bars(step)
        shown.append(drawn(bars._view(), width=width))
        bars(Progress("left_out", f"cyd is left out: {'long ' * 40}", 1, "cyd"))
        shown.append(drawn(bars._view(), width=width))
        bars(Progress("committed", "", 1, data={"metrics": {"held_out_loss": 4.5}, "rounds": 3}))
        shown.append(drawn(bars._view(), width=width))
    assert "reading model and data" in shown[0]
    lines = [line.rstrip() for line in shown[1].splitlines()]
    assert lines[0].startswith("round 1 of 3  ━━━━━━━━━━")
    assert lines[0].partition("training")[1]
    assert lines[1:] == [
        "  ann  left out it hangs",
        "  bob  done in 2.0 s, train loss 3.2500",
        "  cyd  training",
        "  dot  training",
    ]
    assert len(shown[2].splitlines()) == 5
    assert shown[2].splitlines()[3].rstrip().endswith("…")
    assert "starting round 2" in shown[3]
    assert max(len(line) for view in shown for line in view.splitlines()) <= width
    left = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1 of 4 trained, loss 4.5000, < 0.1 s" in left
    assert "round 1: ann is left out: it hangs" in left


def test_a_large_cohort_shows_those_at_work_and_counts_the_rest() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    names = [f"client-{number:03d}" for number in range(500)]
    with ProgressBars(console) as bars:
        bars(Progress("run_started", "run x", data={"run": "x", "driver": "inprocess", "workers": 2}))
        bars(Progress("round_started", "", 1, data={"clients": names, "rounds": 9}))
        for name in names[:450]:
            bars(Progress("reply", "", 1, name, {"seconds": 1.0}))
        lines = drawn(bars._view()).splitlines()
    assert len(lines) == LISTED_CLIENTS + 2
    assert [line.split()[1] for line in lines[-3:-1]] == ["training", "training"]
    assert lines[-1].strip() == "… and 490 more"


def test_a_run_elsewhere_is_told_from_its_store(store: RunStore) -> None:
    run = new_run(store)
    store.add_event(run, "notice", "before")
    heard: list[Progress] = []
    follower = Follower(store, run, heard.append)
    follower.look()
    assert heard == []
    store.begin_round(run, 1, ["ann", "bob", "cyd"])
    store.add_event(run, "round_started", "round 1 of 3", round=1, data={"clients": ["ann", "bob", "cyd"], "rounds": 3})
    store.record_client(ClientRound(run, 1, "bob", "received", seconds=2.0))
    follower.look()
    follower.look()
    store.add_event(run, "left_out", "cyd is left out: it hangs", round=1, client="cyd", data={"status": "late"})
    store.record_client(ClientRound(run, 1, "ann", "received", seconds=1.0))
    store.add_event(run, "aggregated", "2 updates merged", round=1, data={"k": 2, "n": 3})
    commit(store, run, 1, 4.5, left_out={"cyd": ("late", "it hangs")})
    store.add_event(run, "round_started", "round 2 of 3", round=2, data={"clients": ["ann", "bob"], "rounds": 3})
    commit(store, run, 2, 4.0, "failed", reason="no reply")
    follower.look()
    follower.look()
    assert [(step.kind, step.round, step.client) for step in heard] == [
        ("round_started", 1, ""),
        ("reply", 1, "bob"),
        ("left_out", 1, "cyd"),
        ("reply", 1, "ann"),
        ("aggregated", 1, ""),
        ("committed", 1, ""),
        ("round_started", 2, ""),
        ("reply", 2, "ann"),
        ("reply", 2, "bob"),
        ("round_failed", 2, ""),
    ]
    assert heard[0].data["clients"] == ["ann", "bob", "cyd"]
    assert heard[1].data == {"seconds": 2.0}
    assert heard[5].data == {"metrics": {"held_out_loss": 4.5}, "seconds": 1.25}


def test_following_tells_what_came_last_before_it_ends(store: RunStore) -> None:
    run = new_run(store)
    heard: list[Progress] = []
    with following(store.home, run, heard.append):
        store.add_event(run, "notice", "the last word")
    assert [step.text for step in heard] == ["the last word"]


def test_a_store_that_cannot_be_read_stops_the_progress_and_nothing_else(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(self: Follower) -> None:
        raise StoreError("the disk is gone")

    monkeypatch.setattr(Follower, "look", look)
    heard: list[Progress] = []
    with following(store.home, new_run(store), heard.append):
        pass
    assert [step.text for step in heard] == ["progress cannot be shown: the disk is gone"]


# ---- sessions


def begin_in(store: RunStore, driver: str = "inprocess") -> str:
    run = new_run(store)
    announce("planned", "", plan=plan(2), experiment=experiment())
    announce("run_started", f"run {run}", run=run, driver=driver, workers=1)
    commit(store, run, 0, 4.0)
    return run


def test_a_session_shows_plan_lines_and_outcome(store: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_session(lambda: begin_in(store), Output(store.home)) == 0
    shown = capsys.readouterr()
    assert "ranks 4; 6 layers adapted" in shown.out
    assert "interrupted: 0 of 3 rounds" in shown.out
    assert shown.err == "run 20300102-demo-ab\n"


def test_on_a_terminal_everything_is_drawn_there(store: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None, _environ={"TERM": "xterm"})

    def begin() -> None:
        run = begin_in(store)
        announce("round_started", "round 1 of 3", 1, clients=["ann", "bob"], rounds=3)
        announce("notice", f"something [about] {run}")
        announce("round_failed", "round 1 failed: no reply", 1)

    assert run_session(begin, Output(store.home, console=console)) == 0
    text = console.file.getvalue()  # type: ignore[attr-defined]
    parts = [
        "ranks 4; 6 layers",
        "round 1 of 3",
        "note: something [about]",
        "round 1 failed: no reply",
        "held-out",
        "next:",
    ]
    places = [text.find(part) for part in parts]
    assert -1 not in places
    assert tuple(capsys.readouterr()) == ("", "")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RunError("no reply"), 3, "error: no reply"),
        (UserError("no data"), 2, "error: no data"),
        (KeyboardInterrupt(), 130, "interrupted: go on with: lorafleet resume 20300102-demo-ab --home h"),
    ],
)
def test_a_run_that_ends_badly_is_shown_all_the_same(
    store: RunStore, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    def begin() -> None:
        begin_in(store)
        raise error

    assert run_session(begin, Output(store.home, "h", as_json=True)) == code
    shown = capsys.readouterr()
    assert json.loads(shown.out)["rounds"][0]["metrics"] == {"held_out_loss": 4.0}
    assert shown.err.splitlines()[-1] == line


@pytest.mark.parametrize("error", [UserError("no such preset"), KeyboardInterrupt()])
def test_without_a_run_there_is_nothing_to_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    def begin() -> None:
        raise error

    with pytest.raises(type(error)):
        run_session(begin, Output(tmp_path, as_json=True))
    assert capsys.readouterr().out == ""


def test_quiet_says_only_how_it_ended(store: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_session(lambda: begin_in(store), Output(store.home, quiet=True)) == 0
    shown = capsys.readouterr()
    assert "layers adapted" not in shown.out
    assert "held-out" in shown.out
    assert shown.err == ""


def test_a_run_of_other_processes_is_watched_in_its_store(store: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    with watching(Output(store.home, as_json=True)):
        run = begin_in(store, driver="ray")
        store.add_event(run, "notice", "node 7 cannot take part")
    assert "node 7 cannot take part" in capsys.readouterr().err


def test_many_runs_in_a_row_are_watched_one_after_the_other(
    store: RunStore, capsys: pytest.CaptureFixture[str]
) -> None:
    with watching(Output(store.home), whole_rounds=False):
        for number in range(2):
            run = new_run(store, f"run-{number}")
            announce("planned", "", plan=plan(2), experiment=experiment())
            announce("run_started", f"run {run}", run=run, driver="ray", workers=1)
            store.add_event(run, "notice", f"word of {run}")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == ["run run-0", "word of run-0", "run run-1", "word of run-1"]


def test_a_comparison_goes_to_stdout_and_its_progress_to_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Compared:
        def as_dict(self) -> dict[str, Any]:
            return {"rows": [math.nan]}

        def table(self) -> str:
            return "a table"

    def compare(*arguments: object) -> Compared:
        announce("notice", "cell 1 of 1")
        assert arguments == ("quickstart", ["a=1"], ["seed=0,1"], tmp_path, None, False)
        return Compared()

    monkeypatch.setattr("simulations.comparison.compare.compare", compare)
    values = ("quickstart", ["seed=0,1"], ["a=1"], tmp_path, None, False)
    assert verbs.compare(*values, Output(tmp_path / "home", as_json=True)) == 0
    assert tuple(capsys.readouterr()) == ('{"rows": [null]}\n', "cell 1 of 1\n")
    assert verbs.compare(*values, Output(tmp_path / "home")) == 0
    assert "a table\n\ntable, plots and data are in" in capsys.readouterr().out


def test_an_interrupted_comparison_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compare(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("simulations.comparison.compare.compare", compare)
    assert verbs.compare("quickstart", ["seed=0,1"], [], tmp_path, None, True, Output(tmp_path)) == 130
    assert tuple(capsys.readouterr()) == ("", "interrupted: the same command goes on where it stopped\n")


# ---- deleting, and quiet libraries


def test_deleting_needs_an_answer(
    store: RunStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run(store)
    output = Output(store.home)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(UserError, match="nobody is at the keyboard; add --yes"):
        verbs.delete_run("last", False, output)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    with pytest.raises(UserError, match="nothing was deleted"):
        verbs.delete_run("last", False, output)
    assert store.get_run(run)
    monkeypatch.setattr("builtins.input", lambda question: "Yes")
    assert verbs.delete_run("last", False, output) == 0
    assert capsys.readouterr().out == f"deleted: {run}\n"
    assert store.runs() == []
    assert not store.run_folder(run).exists()


def test_libraries_are_quiet_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("warnings.filters", [])
    monkeypatch.setattr("os.environ", {"TRANSFORMERS_VERBOSITY": "info"})
    quiet_libraries()
    assert os.environ == {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "true",
        "TRANSFORMERS_VERBOSITY": "info",
    }
