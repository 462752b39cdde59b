"""A new experiment file holds every setting, with the defaults the models really have."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from common.errors import UnknownNameError, UserError
from common.experiment import ClientSettings, Experiment
from common.experiment_file import load_experiment, read_table, toml_value
from common.methods.lora import Lora
from common.plugins import PLUGINS_VARIABLE
from common.tasks.causal_lm import CausalLm
from simulations.terminal import verbs
from simulations.terminal.experiment_template import experiment_template
from simulations.terminal.settings_help import settings_of_model
from simulations.terminal.tables import Output
from strategies.sections import SECTIONS

MODELS = {
    "task.options": CausalLm,
    "adapter.options": Lora,
    "clients.another": ClientSettings,
} | {name: Experiment.model_fields[name].annotation for name in ("training", "federation", "evaluation", "simulation")}

OWN_TASK = """
from typing import ClassVar
from pydantic import Field
from common.tasks.causal_lm import CausalLm

class Mine(CausalLm):
    language: str = Field(description="Language of the texts.")
    level: int = Field(3, ge=1, le=9, description="How hard.")
"""


def uncommented(text: str) -> dict[str, Any]:
    """Read the file with every key that has a value switched on, and the example of a client."""
    lines = [re.sub(r"^#(?=\[|\w+ = (?! ))", "", line) for line in text.splitlines()]
    return tomllib.loads("\n".join(lines))


def resolved(experiment: Experiment) -> dict[str, Any]:
    """Return all settings, the plug-ins' defaults filled in."""
    choices = {name: getattr(experiment, name) for name in SECTIONS}
    plugins = {name: SECTIONS[name].create(choice.name, choice.options) for name, choice in choices.items()}
    return experiment.model_dump() | {name: (choices[name].name, plugin) for name, plugin in plugins.items()}


def test_it_is_the_quickstart_and_can_be_run_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(experiment_template("causal_lm"), encoding="utf-8")
    assert resolved(load_experiment(str(file))) == resolved(
        Experiment.parse(read_table("quickstart") | {"name": "causal_lm"})
    )


def test_it_can_be_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(experiment_template("causal_lm"), encoding="utf-8")
    assert verbs.plan(str(file), ["federation.rounds=3"], Output(tmp_path, as_json=True)) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {client["name"] for client in plan["clients"]} == set(tomllib.loads(file.read_text())["clients"])
    assert (plan["name"], plan["task"], plan["rounds"], plan["cohort_size"]) == ("causal_lm", "causal_lm", 3, 4)
    assert verbs.plan(str(file), [], Output(tmp_path)) == 0
    assert "4 of 4 clients in each" in capsys.readouterr().out


def test_what_is_commented_out_are_the_defaults() -> None:
    text = experiment_template("causal_lm")
    everything = uncommented(text)
    another = everything["clients"].pop("another")
    assert len(everything["training"]) > len(tomllib.loads(text).get("training", {}))
    assert resolved(Experiment.parse(everything)) == resolved(Experiment.parse(tomllib.loads(text)))
    assert ClientSettings.model_validate(another) == ClientSettings()


@pytest.mark.parametrize("section", MODELS)
def test_every_setting_is_there_with_its_description(section: str) -> None:
    text = experiment_template("causal_lm")
    part = re.split(r"\n#?\[", text.partition(f"[{section}]\n")[2])[0]
    flat = " ".join(part.replace("\n# ", " ").split())
    for name, field in MODELS[section].model_fields.items():
        assert re.search(rf"^#?{name} =", part, re.MULTILINE), name
        assert field.description in flat, name


def test_a_task_of_the_users_own_is_written_with_what_it_requires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own_task.py").write_text(OWN_TASK)
    monkeypatch.setenv(PLUGINS_VARIABLE, str(tmp_path))
    text = experiment_template("own_task")
    assert "# Language of the texts.\n#language =    # required" in text
    assert "# How hard. At least 1, at most 9.\n#level = 3" in text
    assert tomllib.loads(text)["simulation"] == {"clients": 4}


def test_an_unknown_task_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="no task named 'poetry'; there is: causal_lm"):
        experiment_template("poetry")


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.toml"
    assert verbs.new("causal_lm", file) == 0
    assert file.read_text() == experiment_template("causal_lm")
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="File exists; give another --out"):
        verbs.new("causal_lm", file)
    assert verbs.new("causal_lm", None) == 0
    assert capsys.readouterr().out == file.read_text()


def test_settings_say_what_is_allowed() -> None:
    class Options(BaseModel):
        scheme: Literal["a", "b"] | None = Field(None, description="How.")
        places: tuple[Literal["here", "there"], ...] = Field(("here",), description="Where.")
        rank: int | Literal["auto"] = Field(4, description="Rank.")
        share: float = Field(0.5, gt=0, le=1, description="Share.")
        name: str = Field(description="Name.")

    found = {item.name: (item.default, item.required, item.sentence) for item in settings_of_model(Options)}
    assert found == {
        "scheme": (None, False, 'How. One of "a", "b".'),
        "places": (["here"], False, 'Where. One of "here", "there".'),
        "rank": (4, False, "Rank."),
        "share": (0.5, False, "Share. Above 0, at most 1."),
        "name": (None, True, "Name."),
    }


PLAIN = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner), max_leaves=8)


@given(VALUES)
def test_what_is_written_as_toml_is_read_back(value: Any) -> None:
    assert tomllib.loads(f"x = {toml_value(value)}")["x"] == value


def test_what_toml_cannot_hold_is_not_written() -> None:
    with pytest.raises(ValueError, match="None cannot be written as TOML"):
        toml_value([None])
