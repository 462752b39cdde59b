"""The command line as people use it: the installed program, in a folder of its own."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from common.experiment_file import toml_value
from common.store import RunStore
from tests.tiny import tiny_table

pytestmark = pytest.mark.e2e

PROGRAM = [str(Path(sysconfig.get_path("scripts")) / "lorafleet")]
MODULE = [sys.executable, "-m", "lorafleet"]
SHORT = ["--set", "training.steps=1", "--set", "federation.rounds=1", "--set", "task.options.eval_rows=2"]
PATIENCE_S = 120

LISTING_MODULES = """
import sys, lorafleet
try:
    lorafleet.main()
finally:
    print(*sys.modules)
"""


@dataclass(frozen=True)
class Ended:
    """What a program that ended left behind."""

    code: int
    out: str
    err: str

    @property
    def values(self) -> Any:
        """The JSON object on stdout, which nothing else is on."""
        return json.loads(self.out)


def call(folder: Path, *arguments: str, program: list[str] = PROGRAM) -> Ended:
    command = [*program, *arguments]
    ended = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=PATIENCE_S
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an experiment file whose texts are named relative to it."""
    folder = tmp_path_factory.mktemp("cli")
    table = tiny_table(folder)
    for client in table["clients"].values():
        client["data"] = str(Path(client["data"]).relative_to(folder))
    lines = [f"{key} = {toml_value(value)}" for key, value in table.items()]
    (folder / "tiny.toml").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def done(place: Path) -> Ended:
    """A run of two rounds, in the default home."""
    return call(place, "simulate", "tiny.toml", "--json")


# ---- answers that need no run


def test_help_needs_none_of_the_heavy_libraries(tmp_path: Path) -> None:
    ended = call(tmp_path, "-c", LISTING_MODULES, "simulate", "--help", program=[sys.executable])
    assert ended.code == 0
    assert "--driver" in ended.out
    loaded = {name.partition(".")[0] for name in ended.out.split()}
    assert loaded.isdisjoint({"torch", "transformers", "flwr", "sqlalchemy", "pydantic", "rich"})


def test_it_tells_its_version_and_is_a_module_too(tmp_path: Path) -> None:
    shown = call(tmp_path, "--version")
    assert (shown.code, shown.err) == (0, "")
    assert re.fullmatch(r"lorafleet \d+\.\d+\.\d+\n", shown.out)
    assert call(tmp_path, "--version", program=MODULE) == shown


def test_every_verb_explains_itself(tmp_path: Path) -> None:
    listed = call(tmp_path, "--help").out.partition("Commands:")[2]
    verbs = re.findall(r"^  (\w+) ", listed, re.MULTILINE)
    assert verbs == [
        "new",
        "plan",
        "simulate",
        "resume",
        "compare",
        "export",
        "replay",
        "merge",
        "plugins",
        "doctor",
        "dashboard",
        "runs",
        "database",
        "privacy",
    ]
    assert "..." not in listed


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["simulate"], "error: Missing argument 'SOURCE'; see lorafleet simulate --help"),
        (["simulate", "quickstart", "--driver", "cart"], "error: Invalid value for '--driver'"),
        (["fly"], "error: No such command 'fly'"),
        (["simulate", "quickstrt"], "error: no preset named 'quickstrt'; there is: "),
        (["simulate", "no.toml"], "error: experiment file no.toml cannot be read: No such file or directory"),
        (["simulate", "quickstart", "--set", "rounds"], "error: --set 'rounds' is not of the form key.path=value"),
        (["resume", "last", "--set", "seed=1"], "error: --set belongs to --experiment"),
        (["export", "last", "--best", "--round", "1", "--out", "x"], "error: --round and --best exclude one another"),
        (["runs", "show", "last", "--home", "nowhere"], "error: the database "),
        (["runs", "add", "nowhere"], "error: nowhere does not exist; expected what `lorafleet runs pack` has written"),
        (["database", "backup", "--out", "x", "--database-url", "mysql://u:secret@h/d"], "error: the database URL"),
    ],
)
def test_a_users_mistake_is_one_line_and_ends_with_2(tmp_path: Path, arguments: list[str], error: str) -> None:
    ended = call(tmp_path, *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(error)
    assert ended.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_all_mistakes_of_an_experiment_are_told_at_once(tmp_path: Path) -> None:
    ended = call(tmp_path, "simulate", "quickstart", "--set", "training.stps=3", "--set", "federation.rounds=x")
    assert ended.code == 2
    assert [line.partition(": ")[0] for line in ended.err.splitlines()] == ["error", "error"]
    assert "training.stps" in ended.err
    assert "federation.rounds" in ended.err


def test_a_home_without_runs_has_an_empty_list(tmp_path: Path) -> None:
    assert call(tmp_path, "runs", "list", "--json").values == {"runs": []}
    assert list(tmp_path.iterdir()) == []


# ---- a run and what can be done with it


def test_a_run_is_one_object_for_a_script(place: Path, done: Ended) -> None:
    assert done.code == 0
    run = done.values
    assert (run["status"], run["home"]) == ("completed", str(place / "lorafleet-home"))
    assert Path(run["adapter"]).is_file()
    assert [row["round"] for row in run["rounds"]] == [0, 1, 2]
    for row in run["rounds"]:
        assert {"metrics", "bytes_up", "bytes_down", "seconds", "error", "epsilon"} <= set(row)
        assert {"held_out_loss", "worst_client_loss"} <= set(row["metrics"])
    assert run["rounds"][2]["metrics"]["held_out_loss"] < run["rounds"][0]["metrics"]["held_out_loss"]
    states = {row["round"]: row for row in run["artifacts"] if row["kind"] == "state"}
    assert set(states) == {0, 1, 2}
    assert all(Path(row["path"]).is_file() and len(row["sha256"]) == 64 for row in states.values())


def test_progress_without_a_terminal_is_a_line_per_round_on_stderr(done: Ended) -> None:
    lines = done.err.splitlines()
    assert lines[0] == f"run {done.values['id']}"
    assert [re.sub(r"\d+\.\d+", "#", line) for line in lines[1:]] == [
        "round 0 of 2: before training, loss #, # s",
        "round 1 of 2: 4 of 4 trained, loss #, # s",
        "round 2 of 2: 4 of 4 trained, loss #, # s",
    ]


def test_runs_are_listed_shown_and_deleted(place: Path, done: Ended) -> None:
    run = done.values["id"]
    listed = call(place, "runs", "list", "--json").values["runs"]
    assert (listed[-1]["id"], listed[-1]["status"]) == (run, "completed")
    shown = call(place, "runs", "show", run[:-2], "--json").values
    assert shown == done.values
    text = call(place, "runs", "show", run)
    assert text.code == 0
    assert f"lorafleet export {run} --best --format peft --out adapter\n" in text.out
    assert "ada" in re.split(r"\n *|  +", text.out)


def test_a_finished_run_is_extended_and_exported(place: Path, done: Ended) -> None:
    run = done.values["id"]
    longer = call(place, "resume", run, "--rounds", "3", "--json").values
    assert [row["round"] for row in longer["rounds"]] == [0, 1, 2, 3]
    assert longer["rounds"][:3] == done.values["rounds"]
    assert longer["sha256"] != done.values["sha256"]
    exported = call(place, "export", run, "--best", "--format", "peft", "--out", "out", "--json").values
    assert exported == {"path": str(place / "out"), "format": "peft"}
    assert {path.name for path in (place / "out").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_a_run_is_packed_and_added_elsewhere(place: Path, done: Ended) -> None:
    run, before = done.values["id"], call(place, "runs", "show", done.values["id"], "--json").values
    made = call(place, "runs", "pack", run, "--out", "run.zip", "--json").values
    assert (made["id"], made["path"], made["notices"]) == (run, str(place / "run.zip"), [])
    again = call(place, "runs", "pack", run, "--out", "run.zip")
    assert (again.code, again.err) == (2, "error: run.zip exists already and is not overwritten; give another --out\n")
    added = call(place, "runs", "add", "run.zip", "--home", "other")
    assert added.code == 0
    assert added.out.startswith(f"added: {run}, completed, ")
    assert f"lorafleet runs show {run} --home other\n" in added.out
    after = call(place, "runs", "show", run, "--home", "other", "--json").values
    assert after["rounds"] == before["rounds"]
    assert Path(after["adapter"]).read_bytes() == Path(before["adapter"]).read_bytes()
    twin = call(place, "runs", "add", "run.zip", "--as", "twin", "--json").values
    assert (twin["id"], twin["was"]) == ("twin", run)
    assert call(place, "runs", "delete", "twin", "--yes").code == 0


def test_the_database_is_backed_up_and_of_this_version(place: Path, done: Ended) -> None:
    made = call(place, "database", "backup", "--out", "copy.db", "--json").values
    assert made["runs"] >= 1
    assert str(place / "lorafleet-home" / "runs") in made["notices"][0]
    with RunStore.open(place / "lorafleet-home", f"sqlite:///{place}/copy.db", read_only=True) as store:
        assert done.values["id"] in [run.id for run in store.runs()]
    told = call(place, "database", "upgrade", "--json").values
    assert (told["from"], told["changed"], told["backup"]) == (told["to"], False, None)
    told = call(place, "database", "upgrade", "--database-url", "sqlite:///copy.db")
    assert told.out.startswith("nothing to do: the database copy.db is of this version")


@pytest.mark.long  # the same in one process: tests/integration/test_merge.py
def test_exported_adapters_are_merged(place: Path, done: Ended) -> None:
    run = done.values["id"]
    for number in ("1", "2"):
        assert call(place, "export", run, "--round", number, "--out", f"round-{number}").code == 0
    two = ["merge", "round-1", "round-2", "--weight", "0.25", "--weight", "0.75"]
    made = call(place, *two, "--strategy", "svd", "--rank", "2", "--out", "merged", "--json").values
    assert (made["path"], made["strategy"], made["weights"]) == (str(place / "merged"), "svd", [0.25, 0.75])
    assert made["options"] == {"rank": 2}
    assert {row["rank"] for row in made["layers"]} == {2}
    assert 0 < made["error"] < 1
    shown = call(place, *two, "--strategy", "lora_lego", "--rank", "40", "--set", "scale=paper", "--out", "lego")
    assert shown.code == 0
    assert shown.out.startswith("lora_lego of 0.25 × round-1 + 0.75 × round-2\n")
    assert [line.split()[:2] for line in shown.out.splitlines() if line.startswith("all layers")] == [["all", "layers"]]
    assert shown.out.endswith("\nwritten: lego\n")
    again = call(place, *two, "--out", "lego")
    assert (again.code, again.err) == (2, "error: lego is not an empty folder; give another --out\n")


def test_a_run_that_fails_ends_with_3_and_is_shown(place: Path) -> None:
    home = ["--home", "failed"]
    ended = call(place, "simulate", "tiny.toml", *home, "--set", "federation.max_update_norm=1e-9", "--json")
    assert ended.code == 3
    assert ended.values["status"] == "failed"
    assert {row["status"] for row in ended.values["clients"]} == {"rejected"}
    assert ended.err.splitlines()[-1] == f"error: {ended.values['reason']}"
    shown = call(place, "runs", "show", "last", *home)
    assert "ada rejected: the update's norm" in " ".join(shown.out.split())
    assert call(place, "runs", "delete", "last", *home).code == 2
    assert call(place, "runs", "delete", "last", *home, "--yes", "--json").values == {"deleted": ended.values["id"]}
    assert call(place, "runs", "list", *home, "--json").values == {"runs": []}


def test_ctrl_c_leaves_a_run_that_resume_continues(place: Path, done: Ended) -> None:
    home = place / "interrupted"
    command = [*PROGRAM, "simulate", "tiny.toml", "--json", "--home", home, "--set", "federation.rounds=50"]
    with subprocess.Popen(
        command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts
    ) as process:
        next(line for line in lines_of(process) if line.startswith("round 1 of 50"))
        with RunStore.open(home, read_only=True) as store:
            (run,) = store.runs()
            assert [event.kind for event in store.events(run.id) if event.round == 0] == ["round_started", "committed"]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    left = json.loads(out)
    assert left["status"] == "interrupted"
    assert 1 <= left["rounds_done"] < 50
    assert err.splitlines()[-1] == f"interrupted: go on with: lorafleet resume {run.id} --home {home}"
    resumed = call(place, "resume", "last", "--home", str(home), "--rounds", str(left["rounds_done"] + 1), "--json")
    assert resumed.code == 0
    assert resumed.values["status"] == "completed"
    assert [row["round"] for row in resumed.values["rounds"]] == list(range(left["rounds_done"] + 2))
    assert resumed.values["rounds"][: len(left["rounds"])] == left["rounds"]


def hear_interrupts() -> None:
    """Undo what a shell does to programs it starts in the background: they, and what they start, ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def lines_of(process: subprocess.Popen[str]) -> Iterator[str]:
    """Read what a program says on stderr, until it ends."""
    assert process.stderr is not None
    return iter(process.stderr.readline, "")


# ---- a file of one's own


def test_a_new_file_is_simulated_as_it_is(tmp_path: Path) -> None:
    text = call(tmp_path, "new", "causal_lm").out
    (tmp_path / "mine.toml").write_text(text)
    run = call(tmp_path, "simulate", "mine.toml", *SHORT, "--quiet", "--json")
    assert (run.code, run.err) == (0, "")
    assert run.values["status"] == "completed"
    assert {client["client"] for client in run.values["clients"]} == set(tomllib.loads(text)["clients"])
