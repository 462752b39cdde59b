"""The list of plug-ins shows what there is, and a broken file of the user's beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import ConfigurationError
from common.plugins import PLUGINS_VARIABLE
from simulations.terminal import verbs
from simulations.terminal.plugin_list import listed_plugins
from simulations.terminal.tables import Output
from strategies.aggregation.lora_lego import LoraLego
from strategies.robust import ROBUST

BUILT_IN = {file.stem for file in (Path(__file__).parents[2] / "strategies" / "aggregation").glob("[!_]*.py")}

OWN = """
from pydantic import Field
from strategies.aggregation.fedavg import FedAvg

class Cautious(FedAvg):
    \"\"\"Half a step towards the mean.\"\"\"

    share: float = Field(0.5, gt=0, le=1, description="How far.")
"""


@pytest.fixture
def own_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "aggregation"
    folder.mkdir()
    (folder / "cautious.py").write_text(OWN)
    (folder / "torn.py").write_text("class Torn(")
    (folder / "flora.py").write_text(OWN)
    monkeypatch.setenv(PLUGINS_VARIABLE, str(tmp_path))
    return folder


def test_the_built_in_ones_have_capabilities_and_options() -> None:
    found = {family: {item.name: item.as_dict() for item in items} for family, items in listed_plugins().items()}
    assert {family: set(items) for family, items in found.items()} == {
        "aggregation": BUILT_IN,
        "robust": set(ROBUST.names()),
        "optimizers": {"fedadam", "fedavgm", "fedyogi", "none"},
        "oneshot": {"average", "dare", "lora_lego", "stack", "svd", "ties"},
        "methods": {"lora"},
        "tasks": {"causal_lm", "low_rank_regression"},
    }
    assert {"median", "krum", "none"} < set(ROBUST.names())
    lego = found["aggregation"]["lora_lego"]
    assert lego["source"] == "built-in"
    assert lego["capabilities"] == LoraLego.capabilities.as_dict()
    assert set(lego["options"]) == set(LoraLego.model_fields)
    assert lego["options"]["mode"] == {
        "default": "adapter",
        "required": False,
        "allowed": 'one of "adapter", "merge"',
        "description": LoraLego.model_fields["mode"].description,
    }
    assert found["methods"]["lora"]["capabilities"] == {"exact": "stack"}


def test_broken_files_are_listed_with_their_error(own_plugins: Path) -> None:
    found = {item.name: item for item in listed_plugins()["aggregation"]}
    assert set(found) == {"cautious", *BUILT_IN, "torn"}
    assert found["cautious"].source == str(own_plugins / "cautious.py")
    assert found["cautious"].summary == "Half a step towards the mean."
    assert [option.name for option in found["cautious"].options] == ["share"]
    assert found["torn"].error.startswith(f"{own_plugins / 'torn.py'} cannot be imported: SyntaxError")
    assert "rename the file" in found["flora"].error
    assert not found["fedavg"].error
    assert found["torn"].as_dict()["error"] == found["torn"].error
    assert "error" not in found["fedavg"].as_dict()


def test_the_verb_shows_them_to_people_and_scripts(own_plugins: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verbs.plugins(Output(Path(), as_json=True)) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {item["name"] for item in shown["aggregation"]} > {"torn", "cautious"}
    assert verbs.plugins(Output(Path())) == 0
    text = capsys.readouterr().out
    assert "aggregation strategies" in text
    assert "How far. Above 0, at most 1." in text
    assert "SyntaxError" in text


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLUGINS_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(ConfigurationError, match="--plugins expects one with your own plug-ins"):
        listed_plugins()
