"""Comparisons without training: cells, references, the maths of the table, reuse of runs, and what is written."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigurationError, DataError, RunError, StoreError
from common.experiment import Experiment
from common.experiment_file import load_experiment
from common.fingerprint import run_fingerprint
from common.store import Metric, Round, RunStatus, RunStore
from common.tasks import clients_key
from common.text.partition import Partition
from common.text.shares import TextSource, client_share
from server.progress import listening
from simulations.comparison import compare as compare_module
from simulations.comparison.cells import Cell, Variation, federated_cells, parse_vary
from simulations.comparison.compare import compare, configuration_hash, run_before
from simulations.comparison.references import centralised, federation, local, reference_cells
from simulations.comparison.rows import (
    Estimate,
)
from simulations.run import load_run

NOW = datetime(2026, 1, 1, tzinfo=UTC)

FOUR = """
name = "quickstart"
task = {name = "causal_lm", options = {source = "builtin:code"}}
clients = {asyncio = {rank = 4}, email = {rank = 8}, idlelib = {rank = 8}, unittest = {rank = 16}}
strategy = {name = "flora"}
training = {steps = 20}
federation = {rounds = 5}
"""


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Return the experiment file that the tests vary."""
    file = tmp_path / "four.toml"
    file.write_text(FOUR)
    return str(file)


# --vary


@pytest.mark.parametrize(
    ("text", "key", "values"),
    [
        ("seed=0,1", "seed", ("0", "1")),
        ("strategy.name=flora, ffa_lora ,lora_lego", "strategy.name", ("flora", "ffa_lora", "lora_lego")),
        ('a.t=["q","v"],["q"]', "a.t", ('["q","v"]', '["q"]')),
        ("""a.s="x,y",'z,"'""", "a.s", ('"x,y"', """'z,"'""")),
        ("a.o={x = [1,2], y = '}'},3", "a.o", ("{x = [1,2], y = '}'}", "3")),
        ("a.s=x=1,y=2", "a.s", ("x=1", "y=2")),
    ],
)
def test_values_are_split_at_outer_commas(text: str, key: str, values: tuple[str, ...]) -> None:
    assert parse_vary([text]) == [Variation(key, values)]


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["seed"], "not of the form"),
        (["=1,2"], "not of the form"),
        (["seed="], "empty value"),
        (["seed=0,,1"], "empty value"),
        (["seed=0,1,0"], "has 0 twice"),
        (["seed=0", "seed=1"], "--vary seed stands twice"),
        (["a.t=[1,2"], "] is missing"),
        (['a.t="x'], '" is missing'),
    ],
)
def test_a_wrong_vary_is_refused(texts: list[str], sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_vary(texts)
    assert sentence in str(caught.value)


# Cells


def test_cells_are_all_combinations_seed_by_seed(source: str) -> None:
    variations = parse_vary(["strategy.name=flora,ffa_lora", "seed=3,4", "training.steps=1,2"])
    cells = federated_cells(source, ["federation.rounds=2"], variations)
    assert [cell.text for cell in cells[:5]] == [
        "strategy.name=flora training.steps=1 seed=3",
        "strategy.name=flora training.steps=2 seed=3",
        "strategy.name=ffa_lora training.steps=1 seed=3",
        "strategy.name=ffa_lora training.steps=2 seed=3",
        "strategy.name=flora training.steps=1 seed=4",
    ]
    assert len(cells) == 8
    assert cells[3].row == "ffa_lora, training.steps=2"
    experiment = cells[3].experiment
    assert experiment is not None
    assert (experiment.seed, experiment.strategy.name, experiment.training.steps) == (3, "ffa_lora", 2)
    assert experiment.federation.rounds == 2
    assert cells[3].settings == {"strategy.name": "ffa_lora", "training.steps": "2"}


@pytest.mark.parametrize(("overrides", "seed"), [([], 0), (["seed=5"], 5), (["seed=5", "seed=6"], 6)])
def test_the_experiments_own_seed_is_the_only_one_unless_varied(overrides: list[str], seed: int, source: str) -> None:
    cells = federated_cells(source, overrides, [])
    assert [(cell.row, cell.seed) for cell in cells] == [("flora", seed)]
    assert cells[0].experiment is not None
    assert cells[0].experiment.seed == seed


def test_options_of_a_varied_plugin_survive_its_name_whatever_the_order(source: str) -> None:
    variations = parse_vary(["strategy.options.clusters=4", "strategy.name=lora_lego"])
    (cell,) = federated_cells(source, [], variations)
    assert cell.experiment is not None
    assert cell.experiment.strategy.options == {"clusters": 4}
    assert cell.row == "strategy.options.clusters=4, lora_lego"


def test_a_cell_that_is_no_experiment_keeps_the_sentence(source: str) -> None:
    cells = federated_cells(source, [], parse_vary(["training.steps=0,1"]))
    assert cells[0].experiment is None
    assert "training.steps" in cells[0].problem
    assert cells[1].experiment is not None


def test_a_missing_source_and_a_wrong_seed_are_errors(source: str) -> None:
    with pytest.raises(DataError):
        federated_cells("missing.toml", [], [])
    with pytest.raises(ConfigurationError, match="seeds are whole numbers, not one, 2"):
        federated_cells(source, [], parse_vary(["seed=one,2"]))


# References


def test_centralised_trains_the_largest_rank_on_all_data_as_long_as_all_together(source: str) -> None:
    made = centralised(load_experiment(source))
    assert made.name == "quickstart-centralised"
    assert made.strategy.name == "fedavg"
    pooled = made.clients["centralised"]
    assert pooled.pool == ("asyncio", "email", "idlelib", "unittest")
    assert (pooled.rank, pooled.trains, pooled.evaluates) == (16, True, False)
    others = [made.clients[name] for name in pooled.pool]
    assert all(not client.trains and client.evaluates for client in others)
    assert made.training.steps == 4 * 20
    assert made.federation.rounds == 5


def test_centralised_counts_the_cohort_and_pools_only_what_trains(source: str) -> None:
    overrides = [
        "federation.cohort_fraction=0.67",
        "clients.unittest.trains=false",
        "federation.max_update_norm=1",
        "adapter={name = 'lora', options = {rank = 32}}",
        "clients.email.rank='auto'",
        "strategy.name=fedavg",
        "strategy.options.nonsense=1",
    ]
    made = centralised(load_experiment(source, overrides))
    assert made.clients["centralised"].pool == ("asyncio", "email", "idlelib")
    assert made.clients["centralised"].rank == 32
    assert made.training.steps == 2 * 20
    assert made.federation.max_update_norm is None
    assert made.federation.cohort_fraction == 1.0
    assert made.strategy.options == {}


def test_virtual_clients_and_taken_names_are_kept_apart(source: str) -> None:
    table = load_experiment(source).model_dump()
    table["clients"] = {"centralised": {"data": "email"}, "asyncio": {}}
    made = centralised(Experiment.parse(table))
    assert made.clients["centralised_"].pool == ("asyncio", "centralised")

    table |= {"clients": {}, "simulation": {"clients": 3, "ranks": (2, 4)}}
    experiment = Experiment.parse(table)
    made = centralised(experiment)
    assert made.simulation.clients == 0
    assert {name: client.rank for name, client in made.clients.items()} == {
        "client-1": 2,
        "client-2": 4,
        "client-3": 2,
        "centralised": 4,
    }
    assert local(experiment, "client-2").clients["client-2"].rank == 4


def test_local_lets_one_owner_train_and_be_judged(source: str) -> None:
    experiment = load_experiment(source, ["federation.cohort_size=2"])
    made = local(experiment, "email")
    assert made.name == "quickstart-local-email"
    assert {name for name, client in made.clients.items() if client.trains} == {"email"}
    assert {name for name, client in made.clients.items() if client.evaluates} == {"email"}
    assert made.clients["email"].rank == 8
    assert (made.training.steps, made.federation.cohort_size) == (20, None)
    long = experiment.model_copy(update={"name": "n" * 60})
    assert local(long, "email").name == "n" * 60 + "-loc"


def test_an_owner_the_federation_does_not_judge_is_not_judged_alone(source: str) -> None:
    experiment = load_experiment(source, ["clients.email.evaluates=false"])
    assert not any(client.evaluates for client in local(experiment, "email").clients.values())


def test_references_suffer_no_simulated_faults(source: str) -> None:
    faults = ["simulation.dropout=0.5", "simulation.offline=0.5", "simulation.stragglers=0.5"]
    cells = reference_cells(source, faults, 7)
    assert [cell.text for cell in cells] == [
        "centralised seed=7",
        "local asyncio seed=7",
        "local email seed=7",
        "local idlelib seed=7",
        "local unittest seed=7",
    ]
    for cell in cells:
        assert cell.experiment is not None
        simulation = cell.experiment.simulation
        assert (simulation.dropout, simulation.offline, simulation.stragglers) == (0, 0, 0)
        assert cell.experiment.seed == 7
    assert len({configuration_hash(cell.experiment) for cell in cells if cell.experiment}) == 5


def test_references_of_an_impossible_experiment_keep_the_sentence(source: str) -> None:
    cells = reference_cells(source, ["training.steps=0"], 1)
    assert [(cell.row, cell.experiment) for cell in cells] == [("centralised", None), ("local", None)]
    assert "training.steps" in cells[0].problem


@pytest.mark.parametrize("kind", ["natural", "iid", "dirichlet", "size"])
def test_references_hold_exactly_the_federations_documents(tmp_path: Path, kind: Any, source: str) -> None:
    lines = [json.dumps({"text": f"text {number}", "who": "abc"[number % 3]}) for number in range(30)]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    texts = TextSource(str(tmp_path / "all.jsonl"), Partition(kind=kind), "text", "who", 0.2)
    table = load_experiment(source).model_dump() | {"clients": {"a": {}, "b": {}, "c": {}}}
    experiment = Experiment.parse(table)

    def shares(made: Experiment, names: str = "abc") -> list[Any]:
        key = clients_key(made.simulated_clients())
        return [client_share(texts, name, key, experiment.seed) for name in names]

    wanted = shares(experiment)
    assert shares(local(experiment, "b")) == wanted
    pooled = centralised(experiment)
    assert shares(pooled) == wanted
    key = clients_key(pooled.simulated_clients())
    together = client_share(texts, "centralised", key, experiment.seed).train
    assert sorted(d.text for d in together) == sorted(d.text for share in wanted for d in share.train)


# Runs that are there already


def _add_run(home: Path, run: str, experiment: Experiment, status: RunStatus, code: str | None = None) -> None:
    with RunStore.open(home) as store:
        store.create_run(
            run,
            name=experiment.name,
            task=experiment.task.name,
            strategy=experiment.strategy.name,
            seed=experiment.seed,
            experiment=experiment.model_dump_json(),
            rounds_planned=experiment.federation.rounds,
            fingerprint=run_fingerprint() if code is None else code,
        )
        store.set_status(run, status)


def test_a_run_is_found_by_its_whole_configuration_and_code(tmp_path: Path, source: str) -> None:
    experiment = load_experiment(source, ["strategy.name=lora_lego", "strategy.options.n_init=2"])
    _add_run(tmp_path, "failed", experiment, "failed")
    _add_run(tmp_path, "other-code", experiment, "completed", code="0123")
    other = load_experiment(source, ["strategy.name=lora_lego", "strategy.options.n_init=3"])
    _add_run(tmp_path, "other-options", other, "completed")
    assert run_before(experiment, tmp_path) is None
    _add_run(tmp_path, "begun", experiment, "running")
    found = run_before(experiment, tmp_path)
    assert found is not None
    assert found.id == "begun"
    _add_run(tmp_path, "done", experiment, "completed")
    _add_run(tmp_path, "begun-again", experiment, "interrupted")
    found = run_before(experiment, tmp_path)
    assert found is not None
    assert found.id == "done"


def test_the_hash_is_of_the_configuration_not_of_its_order(source: str) -> None:
    one = load_experiment(source, ["strategy.options.global_rank=2", "strategy.options.global_energy=0.5"])
    two = load_experiment(source, ["strategy.options.global_energy=0.5", "strategy.options.global_rank=2"])
    assert configuration_hash(one) == configuration_hash(two)
    assert configuration_hash(Experiment.from_json(one.model_dump_json())) == configuration_hash(one)
    assert configuration_hash(one) != configuration_hash(load_experiment(source))


# A whole comparison over runs that are only written down


class Simulator:
    """Stands in for simulate: its losses follow from the experiment, its refusals from a strategy's name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        monkeypatch.setattr(compare_module, "simulate", self)
        monkeypatch.setattr(compare_module, "held_out_examples", lambda experiment: {"asyncio": 3, "email": 1})

    def __call__(self, experiment: Experiment, home: Path) -> Any:
        self.names.append(experiment.name)
        if experiment.strategy.name == "lora_lego":
            raise ConfigurationError("lego is refused")
        if experiment.strategy.name == "ffa_lora" and experiment.seed == 1:
            raise RunError("seed 1 fails")
        run = f"{experiment.name}-{len(self.names)}"
        _add_run(home, run, experiment, "completed")
        loss = {"quickstart-local-asyncio": 2.0, "quickstart-local-email": 6.0}.get(experiment.name, 1.0)
        with RunStore.open(home) as store:
            for number, value in enumerate([9.0, loss + experiment.seed]):
                metric = Metric(run, number, "held_out_loss", value)
                row = Round(run, number, NOW, status="committed", bytes_up=100 * number)
                store.commit_round(row, metrics=[metric])
        return load_run(run, home)


SMALL = ["clients={asyncio = {rank = 4}, email = {rank = 8}}"]


def test_a_comparison_averages_seeds_keeps_sentences_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    simulator = Simulator(monkeypatch)
    vary = ["strategy.name=flora,ffa_lora,lora_lego", "seed=0,1"]
    heard: list[str] = []
    with listening(lambda step: heard.append(step.text)):
        made = compare(source, SMALL, vary, tmp_path / "out")
    assert len(simulator.names) == 6 + 2 * 3
    assert heard[0] == "cell 1 of 12: strategy.name=flora seed=0"
    assert "cell 3 of 12: strategy.name=lora_lego seed=0 refused: lego is refused" in heard
    assert heard[-1] == "cell 12 of 12: local email seed=1"
    assert [(row.label, row.status, row.sentences) for row in made.rows] == [
        ("flora", "completed", ()),
        ("ffa_lora", "partial", ("seed 1 fails",)),
        ("lora_lego", "refused", ("lego is refused",)),
        ("centralised", "completed", ()),
        ("local", "completed", ()),
    ]
    found = {row.label: row.measures for row in made.rows}
    assert found["flora"]["held_out_loss"] == Estimate(1.5, math.sqrt(0.5), 2)
    assert found["flora"]["bytes_up_per_client"].mean == 50
    assert found["ffa_lora"]["held_out_loss"] == Estimate(1.0, None, 1)
    assert found["local"]["held_out_loss"] == Estimate(3.5, math.sqrt(0.5), 2)  # (3 · 2 + 1 · 6) / 4, and 1 more
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "comparison.csv",
        "comparison.json",
        "comparison.md",
        "comparison.png",
        "comparison.svg",
        "home",
    }
    simulator.names.clear()
    again = compare(source, SMALL, vary, tmp_path / "out")
    assert simulator.names == ["quickstart"] * 3  # what was refused or failed is tried again
    assert again.rows == made.rows


def test_the_command_repeats_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    Simulator(monkeypatch)
    made = compare(source, SMALL, ["strategy.name=flora"], tmp_path / "my out", home=tmp_path / "h", references=False)
    assert made.command == (
        f"lorafleet compare {source} --set 'clients={{asyncio = {{rank = 4}}, email = {{rank = 8}}}}' "
        f"--vary strategy.name=flora --out '{tmp_path}/my out' --home {tmp_path}/h --no-references"
    )
    assert [row.label for row in made.rows] == ["flora"]
    assert made.home == tmp_path / "h"
    assert not (tmp_path / "my out" / "home").exists()


def test_an_owner_that_cannot_train_alone_leaves_the_row_without_that_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    simulator = Simulator(monkeypatch)

    def broken(experiment: Experiment, home: Path) -> Any:
        if experiment.name == "quickstart-local-email" and experiment.seed == 0:
            raise RunError("nothing was trained")
        return simulator(experiment, home)

    monkeypatch.setattr(compare_module, "simulate", broken)
    made = compare(source, SMALL, ["seed=0,1"], tmp_path)
    assert [outcome.seed for outcome in made.rows[-1].outcomes] == [1]
    assert made.rows[-1].sentences == ("email: nothing was trained",)


def test_a_comparison_of_which_nothing_can_run_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    simulator = Simulator(monkeypatch)
    with pytest.raises(ConfigurationError, match=r"unknown key 'training\.steeps'"):
        compare(source, [], ["training.steeps=1,2"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigurationError, match=r"^lego is refused$"):
        compare(source, [], ["strategy.name=lora_lego", "seed=0,1"], tmp_path / "out")
    assert simulator.names == ["quickstart", "quickstart"]  # no reference is run for it


def test_a_folder_that_cannot_be_made_is_found_out_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    simulator = Simulator(monkeypatch)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="choose another one with --out"):
        compare(source, [], [], tmp_path / "file" / "out")
    assert simulator.names == []


def test_a_cell_names_itself_by_what_is_varied(source: str) -> None:
    assert Cell("flora", 2).text == "flora seed=2"
    assert Cell("local", 2, owner="email").text == "local email seed=2"
    assert federation(source, [], 3).seed == 3
