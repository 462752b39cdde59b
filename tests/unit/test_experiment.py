"""The experiment: bounds of every key, contradictions, files, presets, ``--set``, and the clients of a simulation."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

from common.errors import ConfigurationError, DataError, UnknownNameError
from common.experiment import (
    ClientSettings,
    EvaluationSettings,
    Experiment,
    FederationSettings,
    PluginChoice,
    SimulationSettings,
    TrainingSettings,
    differences,
)
from common.experiment_file import apply_override, carried_experiment, load_experiment, preset_names, read_table

TOML = """
seed = 3
[task]
name = "causal_lm"
[task.options]
source = "builtin:code"
[strategy]
name = "flora"
[strategy.options]
global_rank = 9
[clients.ada]
rank = 2
[clients.ben]
"""


def table(**changes: Any) -> dict[str, Any]:
    return {"task": {"name": "causal_lm"}, "clients": {"ada": {}, "ben": {}}} | changes


def problems(given: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        Experiment.parse(given)
    assert str(caught.value) == "; ".join(caught.value.problems)
    return caught.value.problems


def problem(given: dict[str, Any]) -> str:
    (only,) = problems(given)
    assert "\n" not in only
    return only


SECTIONS: dict[str, type[BaseModel]] = {
    "training": TrainingSettings,
    "federation": FederationSettings,
    "evaluation": EvaluationSettings,
    "simulation": SimulationSettings,
}

STEPS = {"ge": (-1, 0), "gt": (0, 1), "le": (1, 0), "lt": (0, -1)}
"""How far just outside and just inside a bound lie from it."""


def bounded() -> Iterator[tuple[str, str, Any, Any]]:
    """List every numeric key with a bound: its table, its name, a value just outside and one just inside."""
    for section, model in SECTIONS.items():
        for name, field in model.model_fields.items():
            tick = 1 if int in (field.annotation, *get_args(field.annotation)) else 1e-9
            for bound in field.metadata:
                for kind, (outside, inside) in STEPS.items():
                    edge = getattr(bound, kind, None)
                    if edge is not None:
                        yield section, name, edge + outside * tick, edge + inside * tick


BOUNDED = list(bounded())


def test_every_number_has_a_bound() -> None:
    found = {(section, name) for section, name, _, _ in BOUNDED}
    for section, model in SECTIONS.items():
        for name, field in model.model_fields.items():
            kinds = {field.annotation, *get_args(field.annotation)}
            if kinds & {int, float} and get_origin(field.annotation) is not tuple:
                assert (section, name) in found, f"{section}.{name} takes any number"


@pytest.mark.parametrize(("section", "name", "outside", "inside"), BOUNDED, ids=str)
def test_bounds(section: str, name: str, outside: float, inside: float) -> None:
    said = problem(table(**{section: {name: outside}}))
    assert said.startswith(f"experiment: {section}.{name}: Input should be ")
    assert said.endswith(f"(got {outside!r})")
    assert getattr(getattr(Experiment.parse(table(**{section: {name: inside}})), section), name) == inside


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"seed": -1}, "seed: Input should be greater than or equal to 0 (got -1)"),
        ({"seed": 2**63}, "seed: Input should be less than 9223372036854775808"),
        ({"seed": 1.5}, "seed: Input should be a valid integer, got a number with a fractional part (got 1.5)"),
        ({"name": "a/b"}, "name: String should match pattern"),
        ({"name": "x" * 65}, "name: String should match pattern"),
        ({"name": ""}, "name: String should match pattern"),
        ({"task": "causal_lm"}, "task: Input should be a table (got 'causal_lm')"),
        ({"task": {}}, "task.name is missing"),
        ({"adapter": {"name": 3}}, "adapter.name: Input should be a valid string (got 3)"),
        ({"task": {"name": "../x"}}, "task.name: String should match pattern"),
        ({"strategy": {"name": "flora", "options": 3}}, "strategy.options: Input should be a table (got 3)"),
        ({"training": {"steps": "many"}}, "training.steps: Input should be a valid integer"),
        ({"training": {"schedule": "step"}}, "training.schedule: Input should be 'constant', 'cosine' or 'linear'"),
        ({"training": {"gradient_checkpointing": 3}}, "training.gradient_checkpointing: Input should be a valid boo"),
        ({"training": {"learning_rate": math.inf}}, "training.learning_rate: Input should be a finite number"),
        ({"training": {"learning_rate": math.nan}}, "training.learning_rate: Input should be a finite number"),
        (
            {"federation": {"wire": "int3"}},
            "federation.wire: Input should be 'fp32', 'fp16', 'bf16', 'int8' or 'int4' (got 'int3')",
        ),
        ({"federation": {"on_failure": "retry"}}, "federation.on_failure: Input should be 'skip' or 'stop'"),
        ({"evaluation": {"on": "clients"}}, "evaluation.on: Input should be a list (got 'clients')"),
        ({"evaluation": {"on": ["nodes"]}}, "evaluation.on.0: Input should be 'clients' or 'server' (got 'nodes')"),
        ({"simulation": {"driver": "slurm"}}, "simulation.driver: Input should be 'inprocess' or 'ray'"),
        ({"clients": {"ada": 3}}, "clients.ada: Input should be a table (got 3)"),
        ({"clients": {"ada x": {}}}, "clients.ada x: String should match pattern"),
        ({"clients": {"ada": {"rank": 0}}}, "clients.ada.rank: Input should be greater than or equal to 1 or "),
        ({"clients": {"ada": {"rank": "all"}}}, " or Input should be 'auto' (got 'all')"),
        ({"clients": {"ada": {"pool": "ben"}}}, "clients.ada.pool: Input should be a list (got 'ben')"),
    ],
    ids=str,
)
def test_a_wrong_value_is_named_with_what_was_expected(given: dict[str, Any], said: str) -> None:
    assert said in problem(table(**given))


@pytest.mark.parametrize(
    ("given", "path", "model"),
    [
        ({"sed": 1}, "sed", Experiment),
        ({"task": {"name": "causal_lm", "option": {}}}, "task.option", PluginChoice),
        ({"clients": {"ada": {"ranks": 2}}}, "clients.ada.ranks", ClientSettings),
        ({"training": {"step": 2}}, "training.step", TrainingSettings),
        ({"federation": {"round": 2}}, "federation.round", FederationSettings),
        ({"evaluation": {"step": 2}}, "evaluation.step", EvaluationSettings),
        ({"simulation": {"worker": 2}}, "simulation.worker", SimulationSettings),
    ],
)
def test_an_unknown_key_is_answered_with_those_of_its_table(
    given: dict[str, Any], path: str, model: type[BaseModel]
) -> None:
    said = f"experiment: unknown key {path!r}; known are: {', '.join(model.model_fields)}"
    assert problem(table(**given)) == said


def test_everything_wrong_is_told_at_once() -> None:
    given = table(sed=1, training={"steps": 0, "epochs": 2}, clients={"ada": {"rank": 0, "name": "x"}})
    del given["task"]
    found = problems(given)
    assert len(found) == 6
    for part in ("task is missing", "'sed'", "training.steps", "'training.epochs'", "ada.rank", "'clients.ada.name'"):
        assert sum(part in each for each in found) == 1, part


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"training": {"base_precision": "4bit"}},
            'training.base_precision "4bit" cannot be merged into; set training.global_adapter = "unmerged"',
        ),
        (
            {"federation": {"cohort_size": 2, "cohort_fraction": 0.5}},
            "federation.cohort_size and federation.cohort_fraction exclude one another; set one",
        ),
        (
            {"simulation": {"clients": 3}},
            "simulation.clients and the [clients] table exclude one another; use one",
        ),
        ({"clients": {}}, "there are no clients; add a [clients.NAME] table or set simulation.clients"),
        (
            {"simulation": {"ranks": [4]}},
            "simulation.ranks belongs to simulation.clients; give each [clients.NAME] its rank instead",
        ),
        (
            {"simulation": {"clients": 3, "ranks": [4, 0]}, "clients": {}},
            "simulation.ranks holds 0; ranks are at least 1",
        ),
        (
            {"clients": {"ada": {"pool": ["ben", "cyd", "dot"]}, "ben": {}}},
            "a client's pool names unknown clients: cyd, dot",
        ),
        (
            {"clients": {"ada": {"pool": ["ada"]}}},
            "a client's pool names clients that are pools themselves: ada",
        ),
        (
            {"clients": {"ada": {"pool": ["ben"]}, "ben": {"pool": ["cyd"]}, "cyd": {}}},
            "a client's pool names clients that are pools themselves: ben",
        ),
        (
            {"clients": {"ada": {"trains": False}, "ben": {"trains": False}}},
            "no client trains; set trains = true for at least one",
        ),
        (
            {"federation": {"patience": 2}, "evaluation": {"on": []}},
            'federation.patience needs evaluations; set evaluation.on = ["clients"]',
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_contradictions(given: dict[str, Any], said: str) -> None:
    assert problem(table(**given)) == said


@pytest.mark.parametrize(
    "given",
    [
        {"training": {"base_precision": "4bit", "global_adapter": "unmerged"}},
        {"federation": {"cohort_size": 2, "cohort_fraction": 1.0}},
        {"simulation": {"clients": 3, "ranks": [4]}, "clients": {}},
        {"clients": {"ada": {"pool": ["ben"]}, "ben": {"trains": False}}},
        {"federation": {"patience": 2}, "evaluation": {"on": ["server"]}},
    ],
    ids=str,
)
def test_what_is_no_contradiction(given: dict[str, Any]) -> None:
    assert Experiment.parse(table(**given)).contradictions() == []


def test_contradictions_are_told_together() -> None:
    given = table(federation={"cohort_size": 2, "cohort_fraction": 0.5}, simulation={"clients": 3, "ranks": [-1]})
    assert len(problems(given)) == 3


def test_defaults() -> None:
    experiment = Experiment.parse(table())
    assert (experiment.adapter.name, experiment.strategy.name, experiment.seed) == ("lora", "flora", 0)
    assert experiment.training == TrainingSettings()
    with pytest.raises(ValidationError, match="frozen"):
        experiment.seed = 3  # type: ignore[misc]


def test_json_and_back() -> None:
    given = table(
        seed=2**62,
        clients={"ada": {"rank": "auto", "pool": ["ben"]}, "ben": {"rank": 4, "data": "ü/ß"}},
        federation={"cohort_size": 3, "max_update_norm": 0.1},
        evaluation={"on": []},
        strategy={"name": "flora", "options": {"global_energy": 0.1, "more": [1, {"deep": True}]}},
    )
    experiment = Experiment.parse(given)
    assert Experiment.from_json(experiment.model_dump_json()) == experiment
    assert Experiment.parse(experiment.model_dump(mode="json")) == experiment


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "Invalid JSON"), ("[]", "Input should be"), ('{"task": {"name": "x"}, "steps": 3}', "unknown key 'steps'")],
)
def test_other_json_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Experiment.from_json(text)


def test_differences_name_what_changed() -> None:
    old = Experiment.parse(table(strategy={"name": "flora", "options": {"global_rank": 3}}))
    new = Experiment.parse(
        table(
            seed=4,
            strategy={"name": "flora"},
            federation={"cohort_size": 2},
            clients={"ada": {"rank": 2}, "cyd": {}},
        )
    )
    assert differences(old, old) == []
    found = differences(old, new)
    assert found[0] == "clients.ada.rank: None -> 2"
    assert "clients.ben.trains: True -> not set" in found
    assert "clients.cyd.trains: not set -> True" in found
    assert found[-4:] == [
        "federation.cohort_size: None -> 2",
        "seed: 0 -> 4",
        "strategy.options: not set -> {}",
        "strategy.options.global_rank: 3 -> not set",
    ]


def test_named_clients_come_in_the_order_of_their_names() -> None:
    experiment = Experiment.parse(table(clients={"zoe": {"rank": 3}, "Ann": {}, "ann": {}}))
    assert list(experiment.simulated_clients()) == ["Ann", "ann", "zoe"]
    assert experiment.simulated_clients()["zoe"].rank == 3


def test_virtual_clients_sort_by_number_and_take_ranks_in_turn() -> None:
    experiment = Experiment.parse(table(clients={}, simulation={"clients": 11, "ranks": [4, 8, 16]}))
    clients = experiment.simulated_clients()
    assert list(clients) == sorted(clients) == [f"client-{number:02d}" for number in range(1, 12)]
    assert [client.rank for client in clients.values()] == [4, 8, 16] * 3 + [4, 8]


def test_virtual_clients_without_ranks_take_the_adapters() -> None:
    experiment = Experiment.parse(table(clients={}, simulation={"clients": 9}))
    assert experiment.simulated_clients() == {f"client-{number}": ClientSettings() for number in range(1, 10)}


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(TOML)
    experiment = load_experiment(str(tmp_path / "own.toml"), ["clients.ben.rank=5"])
    assert (experiment.seed, experiment.strategy.options) == (3, {"global_rank": 9})
    assert {name: client.rank for name, client in experiment.clients.items()} == {"ada": 2, "ben": 5}


def test_a_file_needs_no_ending(tmp_path: Path) -> None:
    (tmp_path / "experiment").write_text(TOML)
    assert load_experiment(str(tmp_path / "experiment")).seed == 3


def test_a_folder_named_like_a_preset_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_experiment("quickstart").name == "quickstart"


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        (None, DataError, "cannot be read: No such file or directory"),
        (b"caf\xe9 = 1", DataError, "cannot be read: it is not UTF-8 text"),
        (b"seed = 1\nseed = 2\n", ConfigurationError, r"is not TOML: .*at line 2"),
        (b"[task]\nname = causal_lm\n", ConfigurationError, r"is not TOML: .*at line 2, column 8"),
        (b"", ConfigurationError, "task is missing"),
    ],
    ids=["missing", "latin-1", "twice", "unquoted", "empty"],
)
def test_a_file_that_is_none(tmp_path: Path, content: bytes | None, kind: type[Exception], said: str) -> None:
    if content is not None:
        (tmp_path / "own.toml").write_bytes(content)
    with pytest.raises(kind, match=said) as caught:
        load_experiment(str(tmp_path / "own.toml"))
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_experiment(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(DataError, match=r"folder\.toml cannot be read: Is a directory"):
        load_experiment(str(tmp_path / "folder.toml"))


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError) as caught:
        load_experiment("quikstart")
    assert str(caught.value) == (
        f"no preset named 'quikstart'; there is: {', '.join(preset_names())}; or give the path of a .toml file"
    )


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_named_after_themselves_and_complete(name: str) -> None:
    experiment = load_experiment(name)
    assert experiment.name == name
    assert Experiment.from_json(experiment.model_dump_json()) == experiment


def test_flower_carries_an_experiment_as_json_or_by_name() -> None:
    experiment = load_experiment("flora", ["seed=5"])
    assert carried_experiment(f" {experiment.model_dump_json()}") == experiment
    assert carried_experiment("") == load_experiment("quickstart")
    assert carried_experiment("flora") == load_experiment("flora")


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=7", ("seed",), 7),
        ("training.learning_rate = 1e-4", ("training", "learning_rate"), 1e-4),
        ("training.schedule=cosine", ("training", "schedule"), "cosine"),
        ('name="two words"', ("name",), "two words"),
        ("task.options.prompts=['a, b', \"c=d\"]", ("task", "options", "prompts"), ["a, b", "c=d"]),
        ("task.options.source=a=b", ("task", "options", "source"), "a=b"),
        ("clients.cyd.rank=4", ("clients", "cyd"), {"rank": 4}),
        ("clients.ada.trains=false", ("clients", "ada", "trains"), False),
        ("clients.ada={rank = 9, data = 'x'}", ("clients", "ada"), {"rank": 9, "data": "x"}),
        ("simulation.workers=2", ("simulation",), {"workers": 2}),
        ("strategy.options.global_rank=5", ("strategy", "options", "global_rank"), 5),
        ("strategy.name=flora", ("strategy",), {"name": "flora", "options": {"global_rank": 9}}),
        ("strategy.name=fedavg", ("strategy",), {"name": "fedavg"}),
        ("adapter.name=other", ("adapter",), {"name": "other"}),
        ("task.options.text_column=", ("task", "options", "text_column"), ""),
        ("clients.ada.name=x", ("clients", "ada"), {"rank": 2, "name": "x"}),
    ],
)
def test_set_takes_toml_and_plain_text(override: str, path: tuple[str, ...], value: Any) -> None:
    tables = tomllib.loads(TOML)
    apply_override(tables, override)
    found: Any = tables
    for part in path:
        found = found[part]
    assert found == value


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "--set 'seed' is not of the form key.path=value"),
        ("=3", "is not of the form"),
        ("training.=3", "is not of the form"),
        (".seed=3", "is not of the form"),
        ("seed.more=3", "--set 'seed.more=3': seed is a value, not a table"),
        ("task.name.more=3", "name is a value, not a table"),
    ],
)
def test_set_of_another_form_is_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match="--set") as caught:
        apply_override(tomllib.loads(TOML), override)
    assert said in str(caught.value)


def test_options_alone_keep_the_plugin_of_the_default(tmp_path: Path) -> None:
    experiment = Experiment.parse(table(strategy={"options": {"global_rank": 3}}, adapter={"options": {"rank": 2}}))
    assert (experiment.strategy.name, experiment.adapter.name) == ("flora", "lora")


def test_later_settings_win(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(TOML)
    overrides = ["strategy.name=lora_lego", "strategy.options.clusters=3", "seed=1", "seed=2"]
    experiment = load_experiment(str(tmp_path / "own.toml"), overrides)
    assert experiment.seed == 2
    assert (experiment.strategy.name, experiment.strategy.options) == ("lora_lego", {"clusters": 3})


def test_set_cannot_bring_in_a_wrong_key(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(TOML)
    with pytest.raises(ConfigurationError, match=r"unknown key 'training\.epochs'; known are: steps, batch_size"):
        load_experiment(str(tmp_path / "own.toml"), ["training.epochs=3"])


def test_a_table_is_read_unchecked(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("anything = 1")
    assert read_table(str(tmp_path / "own.toml")) == {"anything": 1}
