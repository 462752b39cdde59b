"""Plug-ins found by file name, and a user's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from common.errors import ConfigurationError, UnknownNameError
from common.plugins import PLUGINS_VARIABLE, Family
from strategies import AGGREGATION, AggregationStrategy, aggregation_strategy
from strategies.aggregation.flora import FLoRA

BUILT_IN = sorted(file.stem for file in (Path(__file__).parents[2] / "strategies" / "aggregation").glob("[!_]*.py"))

OWN = '''
from __future__ import annotations
from typing import ClassVar
from pydantic import Field
from strategies.aggregation import AggregationStrategy, Capabilities
from strategies.aggregation.fedavg import FedAvg

class Own(FedAvg):
    """A strategy of the user's."""
    capabilities: ClassVar[Capabilities] = Capabilities(mixed_ranks=False, linear_uplink=True)
    momentum: float = Field(0.5, ge=0, lt=1, description="How much of the last mean to keep.")
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder of aggregation strategies, in effect for one test."""
    (tmp_path / "aggregation").mkdir()
    monkeypatch.setenv(PLUGINS_VARIABLE, str(tmp_path))
    modules = set(sys.modules)
    yield tmp_path / "aggregation"
    for name in set(sys.modules) - modules:
        if name.startswith("strategies.aggregation.own"):
            del sys.modules[name]


def test_the_built_in_strategies_are_found() -> None:
    assert AGGREGATION.names() == BUILT_IN
    assert AGGREGATION.source("flora") == "built-in"
    assert AGGREGATION.plugin("flora") is FLoRA
    assert aggregation_strategy("flora", global_rank=3) == FLoRA(global_rank=3)
    assert aggregation_strategy("flora").plugin_name == "flora"


def test_a_file_of_the_users_is_a_plugin(folder: Path) -> None:
    (folder / "own_mean.py").write_text(OWN)
    assert AGGREGATION.names() == sorted([*BUILT_IN, "own_mean"])
    assert AGGREGATION.source("own_mean") == str((folder / "own_mean.py").resolve())
    own = aggregation_strategy("own_mean", momentum=0.25)
    assert isinstance(own, AggregationStrategy)
    assert (own.plugin_name, own.model_dump()) == ("own_mean", {"momentum": 0.25})
    assert AGGREGATION.plugin("own_mean") is AGGREGATION.plugin("own_mean")


def test_files_with_a_leading_underscore_are_not_plugins(folder: Path) -> None:
    (folder / "_shared.py").write_text("raise RuntimeError")
    assert AGGREGATION.names() == BUILT_IN


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="no aggregation strategy named 'fedsgd'; there is: fed_sb, fedavg, "):
        aggregation_strategy("fedsgd")


def test_all_wrong_options_are_told_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        aggregation_strategy("flora", global_rank=0, rank=3, global_energy="much")
    assert len(caught.value.problems) == 3
    told = "\n".join(caught.value.problems)
    assert "aggregation strategy flora: unknown key 'rank'; known are: global_rank, global_energy" in told
    assert "global_rank: Input should be greater than or equal to 1 (got 0)" in told
    assert "global_energy" in told


def test_options_cannot_be_changed() -> None:
    strategy = FLoRA()
    with pytest.raises(ValidationError, match="frozen"):
        strategy.global_rank = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        pytest.param("own_two", OWN + "class Other(Own):\n    pass\n", "exactly one", id="two classes"),
        pytest.param("own_none", "x = 1\n", "exactly one", id="no class"),
        pytest.param("own_broken", "def (:\n", "cannot be imported: SyntaxError", id="syntax"),
        pytest.param("own_raises", "1 / 0\n", "cannot be imported: ZeroDivisionError", id="raises"),
        pytest.param("flora", OWN, "has the name of the built-in", id="name taken"),
    ],
)
def test_a_bad_file_is_told_by_its_path(name: str, source: str, reason: str, folder: Path) -> None:
    file = folder / f"{name}.py"
    file.write_text(source)
    with pytest.raises(ConfigurationError, match=reason) as caught:
        AGGREGATION.plugin(name)
    assert str(file.resolve()) in str(caught.value)
    assert sys.modules.get("strategies.aggregation.own_broken") is None


def test_a_missing_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLUGINS_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(ConfigurationError, match=r"there is no folder .*nowhere"):
        AGGREGATION.names()


def test_a_folder_without_this_family_adds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLUGINS_VARIABLE, str(tmp_path))
    assert "flora" in AGGREGATION.names()


def test_a_family_is_a_package() -> None:
    family: Family[AggregationStrategy] = Family(
        "strategies.aggregation",
        AggregationStrategy,  # type: ignore[type-abstract]
        "thing",
    )
    with pytest.raises(UnknownNameError, match="no thing named"):
        family.create("nothing")
