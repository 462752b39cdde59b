"""The page of one run: what it says of a live, a finished, a failed, an empty and a hostile run."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save
from streamlit.testing.v1 import AppTest

from common.experiment_file import load_experiment
from common.store import (
    Artefact,
    Client,
    ClientRound,
    Event,
    Metric,
    Round,
    RunLock,
    RunStore,
    Statistic,
    write_artefact,
)
from dashboard.views import run_adapter, run_timeline
from dashboard.views.run_costs import why_no_certificate
from dashboard.views.run_round import sentence
from tests.hostile_store import hostile_store
from tests.pages import Opener

NOW = datetime.now(UTC)
RUN, OTHER = "run-1", "run-2"
SECONDS = {"ada": 2.0, "ben": 9.0, "cyd": 3.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of three rounds: in the newer one ben is slow, and cyd is late in round 2."""
    folder = tmp_path_factory.mktemp("made")
    with RunStore.open(folder, clock=lambda: NOW) as store:
        for name, changes in ((OTHER, ["seed=1"]), (RUN, [])):
            create(store, name, changes)
            store.record_members([Client(name, client, NOW, 4, "why") for client in SECONDS])
            for number in range(3):
                commit(store, name, number)
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(made, tmp_path / "home")


def create(store: RunStore, run: str, changes: list[str] | None = None, text: str = "") -> None:
    experiment = load_experiment("quickstart", ["federation.rounds=4", *(changes or [])])
    store.create_run(
        run,
        name="quickstart",
        task="causal_lm",
        strategy="flora",
        seed=experiment.seed,
        experiment=text or experiment.model_dump_json(),
        rounds_planned=4,
        fingerprint="0123456789abcdef0123",
    )


def commit(store: RunStore, run: str, number: int) -> None:
    late = number == 2
    clients = [
        ClientRound(run, number, name, "late", "no answer in time", 4)
        if late and name == "cyd"
        else ClientRound(run, number, name, "accepted", None, 4, 10, 1_000, 2_000, seconds)
        for name, seconds in SECONDS.items()
    ]
    spans: dict[str, Any] = {
        row.client: [["lost", 0.0, 10.0]] if row.status == "late" else [["train", 0.5, 0.5 + row.seconds]]
        for row in clients
    }
    data = {"clients": spans, "server": [["train", 0.0, 10.0], ["aggregate", 10.0, 10.5]]}
    store.commit_round(
        Round(
            run,
            number,
            NOW,
            "committed",
            cohort=tuple(SECONDS) if number else (),
            bytes_up=1_000_000,
            bytes_down=2_000_000,
            seconds=12.0,
            phases={"train": 10.0},
            error=1e-8,
            exact=True,
        ),
        clients if number else [],
        [
            Metric(run, number, "held_out_loss", 4.0 - number),
            *(Metric(run, number, "held_out_loss", 4.0 - number + i, name) for i, name in enumerate(SECONDS)),
            *([Metric(run, number, "effective_rank", 3.0, "", "q_proj")] if number else []),
        ],
        events=[Event(run, "committed", f"round {number}: **all** replied", NOW, number)],
        statistics=[Statistic(run, number, "timeline", data)] if number else [],
        rounds_done=number,
        best_round=number,
        best_metric=4.0 - number,
    )


@pytest.fixture
def page(home: Path, open_page: Opener) -> Any:
    """Open the page of a run, as the address says."""

    def opened(place: Path = home, **query: str | list[str]) -> AppTest:
        return open_page(place, "run", **{"run": RUN, **query})

    return opened


def texts(app: AppTest) -> str:
    """Return all that is written on a page."""
    kinds = (app.title, app.header, app.markdown, app.caption, app.code, app.error, app.warning, app.info, app.success)
    return "\n".join(str(element.value) for kind in kinds for element in kind)


def numbers(app: AppTest) -> dict[str, str]:
    return {metric.label: metric.value for metric in app.metric}


def test_a_run_that_goes_on(home: Path, page: Any) -> None:
    with RunStore.open(home) as store, RunLock(store.run_folder(RUN)):
        store.begin_round(RUN, 3, tuple(SECONDS))
        store.add_event(RUN, "dispatched", "3 clients train", round=3)
        store.record_client(ClientRound(RUN, 3, "ada", "received", seconds=2.0))
        app = page()
    assert numbers(app) == {
        "State": "Running",
        "Rounds done": "2 of 4",
        "Replies, this round": "1 of 3",
        "Time left": "about 20 s",
        "Last sign of life": "just now",
        "Best loss": "2.0000",
        "Traffic so far": "9.0 MB",
        "Privacy spent": "–",
    }
    (bar,) = app.get("progress")
    assert bar.proto.text == "Round 3 of 4: clients are training: 1 of 3 replied, 2 needed"
    assert bar.proto.value == 50
    assert [alarm.value.partition("  \n")[0].replace("\\", "") for alarm in app.warning] == [
        "Round 2 had 2 of 3 replies and needed 2: with one less it would have failed.",
        "ben is slow: it needs 9.0 s a round, the others 2.5 s. Every round waits.",
    ]


def test_a_run_whose_process_is_gone_says_what_to_type(home: Path, page: Any) -> None:
    app = page()
    assert numbers(app)["State"] == "Interrupted"
    assert "is gone" in app.error[0].value
    assert f"lorafleet resume {RUN} --home {home}" in app.error[0].value


def test_a_failed_run_says_why(home: Path, page: Any) -> None:
    with RunStore.open(home) as store:
        store.set_status(RUN, "failed", "round 3 failed: <b>nobody</b> replied")
    app = page()
    assert numbers(app)["State"] == "Failed"
    assert "\\<b\\>nobody\\<\\/b\\> replied" in app.error[0].value


def test_a_finished_run_says_where_its_adapter_is(home: Path, page: Any) -> None:
    with RunStore.open(home) as store:
        file = write_artefact(store.run_folder(RUN), "adapter-0002.safetensors", save({}))
        store.update_run(RUN, adapter_path=file.path, adapter_sha256=file.sha256)
        store.set_status(RUN, "completed")
    app = page()
    assert str(home / file.path) in [block.value for block in app.code]
    assert f"lorafleet export {RUN} --best --format peft --out adapter --home {home}" in texts(app)
    assert file.sha256[:16] in texts(app)
    assert next(button.proto.label for button in app.get("download_button")) == f"Download ({file.nbytes} B)"


@pytest.mark.parametrize("path", ["runs/run-1/../run-2/adapter.safetensors", "runs/run-1/gone"])
def test_no_file_outside_of_the_run_is_offered(home: Path, page: Any, path: str) -> None:
    """The store refuses such a path; a database that somebody else made may hold it."""
    with closing(sqlite3.connect(home / "lorafleet.db")) as database, database:
        database.execute("UPDATE runs SET adapter_path = ?, adapter_sha256 = 'x' WHERE id = ?", (path, RUN))
    app = page()
    assert [button.proto.label for button in app.get("download_button")] == ["Download the experiment (TOML)"]
    assert ("not on this machine" if path.endswith("gone") else "it is not touched") in texts(app)


def test_a_file_too_large_to_download_is_named(home: Path, page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunStore.open(home) as store:
        file = write_artefact(store.run_folder(RUN), "adapter.safetensors", b"long")
        store.update_run(RUN, adapter_path=file.path, adapter_sha256=file.sha256)
    monkeypatch.setattr(run_adapter, "DOWNLOADED", 3)
    assert "too large to download" in texts(page())


@pytest.mark.parametrize("deadline", ["1" + "0" * 400, "-5", "true"])
def test_a_deadline_that_is_none_is_unknown(home: Path, page: Any, deadline: str) -> None:
    with RunStore.open(home) as store:
        held = json.loads(store.get_run(RUN).experiment)
        held["federation"] |= {"deadline_s": json.loads(deadline), "min_completion": 10**400}
    with closing(sqlite3.connect(home / "lorafleet.db")) as database, database:
        database.execute("UPDATE runs SET experiment = ? WHERE id = ?", (json.dumps(held), RUN))
    app = page()
    assert [error.value for error in app.error if "is gone" not in error.value] == []
    assert "a client has to answer" not in texts(app)


def test_a_part_that_breaks_says_so_and_the_others_stand(
    page: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_run: Any, _row: Any = None) -> None:
        raise OverflowError("*too large*")

    monkeypatch.setattr("dashboard.views.run_round.sentence", broken)
    app = page()
    words = "This part cannot be shown: OverflowError \\*too large\\*; the other parts are not affected."
    assert words in [error.value for error in app.error]
    assert "Run it again" in texts(app)
    assert "OverflowError: *too large*" in caplog.text
    caplog.clear()


def test_a_page_that_breaks_says_so(
    page: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dashboard.views.run.find_run", lambda *_: 1 / 0)
    assert "ZeroDivisionError division by zero" in page().error[0].value
    assert "Traceback" in caplog.text
    caplog.clear()


def test_a_statistic_nested_without_end_is_a_damaged_row(home: Path, page: Any) -> None:
    with closing(sqlite3.connect(home / "lorafleet.db")) as database, database:
        database.execute("UPDATE statistics SET data = ? WHERE run = ?", ("[" * 100_000 + "]" * 100_000, RUN))
    app = page()
    assert ["holds a damaged row" in error.value for error in app.error] == [True, True]  # the head, one round
    assert "Run it again" in texts(app)


@pytest.mark.parametrize("name", ["run", "runs", "compare"])
def test_a_status_nobody_knows_is_shown_as_it_is(home: Path, open_page: Opener, name: str) -> None:
    with closing(sqlite3.connect(home / "lorafleet.db")) as database, database:
        database.execute("PRAGMA ignore_check_constraints = 1")
        database.execute("UPDATE runs SET status = '<b>odd' WHERE id = ?", (RUN,))
    app = open_page(home, name, run=RUN)
    if name == "run":
        assert numbers(app)["State"] == "\\<b\\>odd"
    else:
        assert "<b>odd" in [state for frame in app.dataframe for state in frame.value.get("state", ())]


def test_all_is_well_is_said(home: Path, page: Any) -> None:
    app = page(run=OTHER)
    assert not app.success  # ben is slow there, too
    with RunStore.open(home) as store:
        create(store, "run-3")
        store.commit_round(Round("run-3", 0, NOW, "committed"))
        store.set_status("run-3", "completed")
    assert "All is well" in page(run="run-3").success[0].value


def test_the_address_holds_what_is_looked_at(page: Any) -> None:
    app = page(metric="loss on held-out data", clients=["ben", "cyd"], round="1", kind="rounds", find="deadline")
    assert app.multiselect(key="clients").value == ["ben", "cyd"]
    assert app.selectbox(key="round").value == "1"
    assert "**Round 1:** 3 of 3 clients replied; 1.0 MB up and 2.0 MB down in 12.0 s." in texts(app)
    settings = next(frame.value for frame in app.dataframe if list(frame.value.columns) == ["setting", "value"])
    assert settings["setting"].tolist() == ["federation.deadline_s"]


def test_another_run_is_laid_beside_and_compared(page: Any) -> None:
    app = page()
    (other,) = app.multiselect(key="over").options
    app.multiselect(key="over").select(other).run()
    app.selectbox(key="with").select(other).run()
    assert not app.exception
    chart = json.loads(app.get("vega_lite_chart")[0].proto.spec)
    assert chart["layer"][0]["encoding"]["color"]["scale"]["domain"][-1] == other
    differences = next(frame.value for frame in app.dataframe if "there" in frame.value.columns)
    assert differences.to_dict("list") == {"setting": ["seed"], "here": ["0"], "there": ["1"]}


def test_the_last_round_is_shown_and_who_was_left_out_comes_first(page: Any) -> None:
    app = page()
    assert "**Round 2:** 2 of 3 clients replied, 1 client left out; " in texts(app)
    listing = next(frame.value for frame in app.dataframe if "outcome" in frame.value.columns)
    assert listing["client"].tolist() == ["cyd", "ben", "ada"]
    assert listing["outcome"].tolist() == ["late: No answer within the deadline", "accepted", "accepted"]
    assert listing["reason"].tolist()[0] == "no answer in time"
    assert listing["up"].tolist() == [0.0, 1.0, 1.0]  # kB
    assert "what evaluation takes is in the round's sum only" in texts(app)


def test_the_feed_shows_sentences_letter_for_letter(page: Any) -> None:
    assert "round 2\\: \\*\\*all\\*\\* replied" in texts(page())


def test_the_command_that_reproduces_the_run(home: Path, page: Any) -> None:
    assert f"lorafleet simulate quickstart --set federation.rounds=4 --home {home}" in texts(page())


def test_samples_stand_side_by_side(home: Path, page: Any) -> None:
    with RunStore.open(home) as store:
        create(store, "run-3")
        for number, text in enumerate(["<b>before</b>", "after\n    \x1b[1mall"]):
            made = json.dumps([{"prompt": "def", "text": text}]).encode()
            file = write_artefact(store.run_folder("run-3"), f"rounds/{number}/samples.json", made)
            row = Artefact("run-3", number, "samples", file.path, file.sha256, file.nbytes)
            store.commit_round(Round("run-3", number, NOW, "committed"), artefacts=[row])
    app = page(run="run-3")
    assert [block.value for block in app.code if "▸" in block.value] == [
        "def▸<b>before</b>",
        "def▸after\n    \N{REPLACEMENT CHARACTER}[1mall",
    ]
    samples = home / "runs/run-3/rounds/1/samples.json"
    samples.write_text("[[]]")
    assert "not what it should be" in texts(page(run="run-3"))
    samples.unlink()
    os.mkfifo(samples)
    assert "not what it should be" in texts(page(run="run-3"))


def test_a_run_without_rounds_explains_itself(home: Path, page: Any) -> None:
    with RunStore.open(home) as store:
        create(store, "run-3")
        with RunLock(store.run_folder("run-3")):
            app = page(run="run-3")
    assert app.get("progress")[0].proto.text == "Waiting for clients to join"
    said = texts(app)
    for words in ("Nothing has been measured yet", "No round has ended yet", "nothing to export before"):
        assert words in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["secure_aggregation.enabled=true", "strategy.name=ffa_lora"], "With secure aggregation the server sees no"),
        (["evaluation.certificate=false"], "evaluation.certificate = false"),
        ([], "no round has merged yet, or the run is of an older version"),
    ],
)
def test_a_missing_certificate_is_explained(tmp_path: Path, changes: list[str], words: str) -> None:
    with RunStore.open(tmp_path) as store:
        create(store, RUN, changes)
        assert words in why_no_certificate(store.get_run(RUN))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hostile_store(folder := tmp_path_factory.mktemp("hostile"))
    return folder


@pytest.mark.parametrize("run", ["1-of-texts", "2-of-numbers", "5-of-broken-statistics", "6-of-distant-rounds"])
def test_hostile_runs_are_shown_harmlessly(hostile: Path, page: Any, run: str) -> None:
    app = page(hostile, run=f"hostile-{run}")
    assert not re.findall(r"(?<!\\)<(?:script|img|svg)", texts(app))


def test_spans_of_a_round() -> None:
    spans = {
        "ada": [("train", 0.0, 2.0), ("upload", 2.0, 2.5), ("evaluate", 9.0, 9.5)],
        "the server": [("lost", 0.0, 8.0)],
        "ben": [("train", 0.0, 9.0), ("<b>", 0.0, 1.0)],
    }
    clients = [
        ClientRound(RUN, 1, "ada", "accepted", seconds=2.0),
        ClientRound(RUN, 1, "ben", "accepted", seconds=9.0),
        ClientRound(RUN, 1, "cyd", "accepted", seconds=2.5),
        ClientRound(RUN, 1, "the server", "late", "too slow"),
    ]
    shown = run_timeline.by_end(spans)
    assert shown == ["the server", "ben", "ada"]
    server = run_timeline.server_spans({"server": [["train", 0.0, 9.0], ["aggregate", 9.0, 9.1], ["train", 3.0, 1.0]]})
    rows = run_timeline.bars(spans, server, shown, clients)
    assert list(rows.itertuples(index=False, name=None)) == [
        ("the server", "wait", 0.0, 9.0, "waits for the clients"),
        ("the server", "aggregate", 9.0, 9.1, ""),
        ("the server (a client)", "left out", 0.0, 8.0, "No answer within the deadline: too slow"),
        ("ben", "straggler", 0.0, 9.0, "accepted"),
        ("ada", "train", 0.0, 2.0, "accepted"),
        ("ada", "upload", 2.0, 2.5, "accepted"),
        ("ada", "evaluate", 9.0, 9.5, "accepted"),
    ]
    assert set(rows["phase"]) <= set(run_timeline.COLOURS)


@pytest.mark.parametrize("data", [None, 3, {}, {"clients": 3, "server": "x"}, {"left_out": "why"}])
def test_a_timeline_that_is_none_draws_nothing(data: Any) -> None:
    assert run_timeline.bars({}, run_timeline.server_spans(data), [], []).empty


def test_rounds_in_a_sentence() -> None:
    failed = Round(RUN, 7, NOW, "failed", "1 of *3*", ("a", "b"), bytes_up=-5, seconds=math.nan)
    assert sentence(failed, []) == "**Round 7 failed:** 1 of \\*3\\* (0 B up and 0 B down in an unknown time)."
    first = Round(RUN, 0, NOW - timedelta(hours=1), "committed", bytes_up=1_500, seconds=61.0)
    assert sentence(first, []) == "**Round 0, before training:** 1.5 kB up and 0 B down in 1 min 01 s."


def test_a_store_that_goes_away_leaves_the_last_view(home: Path, page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dashboard.source.FRESH_S", 0)
    app = page(round="1")
    (home / "lorafleet.db").rename(home / "gone")
    app.run()
    assert not app.exception
    assert "**Round 1:** 3 of 3 clients replied" in texts(app)
    assert [warning.value for warning in app.warning if "the store does not answer" in warning.value]
    app.selectbox(key="round").select("2").run()  # never asked before
    assert not app.exception
    assert ["does not exist" in error.value for error in app.error] == [True]
    (home / "gone").rename(home / "lorafleet.db")
    app.run()
    assert "**Round 2:** 2 of 3 clients replied" in texts(app)
