"""The command and the file that give a run's experiment again really do."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path

import pytest

from common.experiment import Experiment
from common.experiment_file import load_experiment, preset_names
from dashboard.commands import typed
from dashboard.findings.reproduce import Recipe, recipe
from tests.tiny import tiny

CHANGED = {
    "nothing": [],
    "numbers": ["seed=7", "training.learning_rate=1e-5", "federation.cohort_fraction=0.5"],
    "another strategy": ["strategy.name=flexlora", "strategy.options.rank=4"],
    "text": ['task.options.prompts=["it\'s \\"quoted\\"", "$HOME `x` \\\\ é"]', 'name="3"'],
    "text like numbers": ['task.options.source="true"', 'task.options.public="1e3"'],
}


def found(experiment: Experiment) -> Recipe:
    made = recipe(experiment.model_dump_json())
    assert made is not None
    return made


def read_again(words: tuple[str, ...]) -> Experiment:
    """Read a command as a shell and the command line do."""
    verb, preset, *rest = shlex.split(shlex.join(words))
    assert verb == "simulate"
    assert rest[::2] == ["--set"] * (len(rest) // 2)
    return load_experiment(preset, rest[1::2])


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_is_found_by_its_name(preset: str) -> None:
    assert found(load_experiment(preset)).words == ("simulate", preset)


@pytest.mark.parametrize("changes", CHANGED.values(), ids=CHANGED)
def test_settings_are_added_to_a_preset(changes: list[str]) -> None:
    experiment = load_experiment("quickstart", changes)
    made = found(experiment)
    assert 2 <= len(made.words) <= 2 + 2 * len(changes)
    assert read_again(made.words) == experiment
    assert Experiment.parse(tomllib.loads(made.toml)) == experiment


def test_what_no_preset_gives_is_a_file(tmp_path: Path) -> None:
    many = {f"client.{i}": 2 for i in range(20)}
    experiment = tiny(tmp_path, ranks={**many, "0": 4})
    made = found(experiment)
    assert made.words == ()
    (file := tmp_path / "again.toml").write_text(made.toml)
    assert load_experiment(str(file)) == experiment


def test_what_a_preset_has_and_the_run_has_not_cannot_be_set() -> None:
    """The preset thousand has a cohort of ten; a run of its settings without one is not to be had from it."""
    whole = load_experiment("thousand")
    experiment = whole.model_copy(update={"federation": whole.federation.model_copy(update={"cohort_size": None})})
    made = found(experiment)
    assert made.words == () or read_again(made.words) == experiment
    assert Experiment.parse(tomllib.loads(made.toml)) == experiment


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"task": 3}', "[" * 5_000, "x" * 500_000], ids=range(6))
def test_what_is_no_experiment_has_no_recipe(text: str) -> None:
    assert recipe(text) is None


def test_a_command_names_the_home_unless_it_is_the_usual_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert typed(tmp_path / "lorafleet-home", "resume", "run-1") == "lorafleet resume run-1"
    assert typed(Path("/a b/home"), "resume", "run-1") == "lorafleet resume run-1 --home '/a b/home'"
