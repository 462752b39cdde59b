"""The synthetic task: its optimum is where least squares on all rows end, and a federation comes near it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from common.errors import ConfigurationError
from common.experiment import ClientSettings
from common.experiment_file import load_experiment
from common.tasks import Clients, clients_key
from common.tasks.low_rank_regression import LowRankRegression, Pairs
from common.workspace import task_of
from server.export import export
from simulations import simulate
from simulations.run import FinishedRun

NAMES = ("ada", "ben", "cyd")
SHAPES = ((4, 6), (3, 5))


def clients(*pool: str, **settings: Any) -> Clients:
    """Three owners and, if asked for, a pool of some of them."""
    owners = {name: ClientSettings(**settings) for name in NAMES}
    return clients_key(owners | ({"pool": ClientSettings(pool=pool)} if pool else {}))


def task(**options: Any) -> LowRankRegression:
    return LowRankRegression(**{"shapes": SHAPES, "rank": 2, **options})


def pairs(task: LowRankRegression, name: str, *pool: str, held_out: bool = False) -> Pairs:
    data = task.client_data(name, clients(*pool), 7)
    rows = data.held_out if held_out else data.train
    assert isinstance(rows, Pairs)
    return rows


def least_squares(task: LowRankRegression, rows: Pairs) -> nn.Module:
    """Fit each layer to the rows by itself."""
    model = task.load_base("fp32")
    x, y = rows.x.double(), rows.y.double()
    start_in = start_out = 0
    for number, (out, inn) in enumerate(SHAPES):
        part_x, part_y = x[:, start_in : start_in + inn], y[:, start_out : start_out + out]
        fitted = torch.linalg.lstsq(part_x, part_y).solution.T
        model.get_submodule(f"layers.{number}").weight = nn.Parameter(fitted.float())
        start_in, start_out = start_in + inn, start_out + out
    return model


def objective(task: LowRankRegression, model: nn.Module) -> float:
    """Estimate the objective from all training rows."""
    rows = pairs(task, "pool", *NAMES)
    with torch.no_grad():
        return float(task.row_losses(model, rows.take(torch.arange(len(rows)))).mean())


@pytest.mark.parametrize(
    "options", [{}, {"skew": 1.0, "size_ratio": 5.0}, {"skew": 1.0, "covariance_skew": 1.0, "size_ratio": 3.0}], ids=str
)
def test_least_squares_on_all_rows_end_at_the_optimum(options: dict[str, float]) -> None:
    many = task(rows=20_000, **options)
    rows = pairs(many, "pool", *NAMES)
    fitted = many.evaluate(least_squares(many, rows), rows)
    assert fitted["distance"] < 0.03
    assert 0 <= fitted["excess_loss"] < 1e-3


def test_least_squares_on_the_rows_of_one_end_elsewhere() -> None:
    many = task(rows=20_000, skew=1.0)
    rows = pairs(many, "ada", *NAMES)
    assert many.evaluate(least_squares(many, rows), rows)["distance"] > 0.3


def test_the_excess_is_what_the_objective_lies_above_its_smallest_value() -> None:
    many = task(rows=20_000, skew=1.0, covariance_skew=1.0, size_ratio=3.0)
    rows = pairs(many, "pool", *NAMES)
    base, best = many.load_base("fp32"), least_squares(many, rows)
    measured = many.evaluate(base, rows)
    assert measured["excess_loss"] == pytest.approx(objective(many, base) - objective(many, best), rel=0.02)
    assert measured["distance"] == pytest.approx(1)


@pytest.mark.parametrize("skew", [0.0, 2.0])
def test_the_loss_begins_where_the_description_says(skew: float) -> None:
    many = LowRankRegression(rows=2000, skew=skew, noise=0.5)  # larger layers: the two parts hardly ever align
    assert objective(many, many.load_base("fp32")) == pytest.approx(1 + skew**2 + 0.5**2, rel=0.1)


def test_the_update_to_learn_has_the_rank_asked_for() -> None:
    quiet = task(noise=0.0, rows=50)
    fitted, base = least_squares(quiet, pairs(quiet, "ada")), quiet.load_base("fp32")
    for name in ("layers.0.weight", "layers.1.weight"):
        change = (fitted.get_parameter(name) - base.get_parameter(name)).detach()
        values = torch.linalg.svdvals(change)
        assert (values > 1e-3 * values[0]).sum() == 2


def test_rows_are_shared_out_in_geometric_steps() -> None:
    sizes = sorted(len(pairs(task(rows=70, size_ratio=4.0), name)) for name in NAMES)
    assert sizes == [30, 60, 120]
    assert {len(pairs(task(rows=70), name)) for name in NAMES} == {70}
    assert {len(pairs(task(rows=70, size_ratio=4.0), name, held_out=True)) for name in NAMES} == {128}


def test_a_pool_changes_neither_optimum_nor_rows() -> None:
    alone, beside = pairs(task(skew=1.0), "ada"), pairs(task(skew=1.0), "ada", "ada", "ben")
    assert torch.equal(alone.optimum.weight, beside.optimum.weight)
    assert torch.equal(alone.x, beside.x)


def test_base_weights_do_not_depend_on_the_seed_but_the_optimum_does() -> None:
    def optimum(seed: int) -> Tensor:
        rows = task().client_data("ada", clients(), seed).train
        assert isinstance(rows, Pairs)
        return rows.optimum.weight

    assert not torch.equal(optimum(0), optimum(1))
    one, other = (made.load_base("fp32").get_parameter("layers.0.weight") for made in (task(), task(rank=1)))
    assert torch.equal(one, other)


def test_data_nobody_reads_is_told() -> None:
    assert task().check_data(clients(), 0) == []
    (notice,) = task().check_data(clients(data="here"), 0)
    assert "ada, ben, cyd is not read" in notice


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("task.options.rank=17", "rank 17 is above the smallest side of shapes, 16"),
        ("task.options.shapes=[]", "at least 1 item"),
        ("task.options.shapes=[[4, 0]]", "greater than or equal to 1"),
        ("task.options.noise=-1", "greater than or equal to 0"),
    ],
)
def test_wrong_options_are_one_sentence(options: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match="task low_rank_regression: ") as caught:
        task_of(load_experiment("synthetic", [options]))
    assert said in str(caught.value)


def test_there_is_no_4_bit_base() -> None:
    with pytest.raises(ConfigurationError, match="no 4-bit base model"):
        task().load_base("4bit")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return simulate(load_experiment("synthetic"), tmp_path_factory.mktemp("home"))


def test_flora_comes_near_the_optimum(finished: FinishedRun) -> None:
    excess, distance = finished.metrics["held_out_excess_loss"], finished.metrics["held_out_distance"]
    assert distance[0] == pytest.approx(1)
    assert excess[0] > 0.9
    assert excess[-1] < 0.1
    assert distance[-1] < 0.3


def test_strategies_differ(finished: FinishedRun, tmp_path: Path) -> None:
    frozen = simulate(load_experiment("synthetic", ["strategy.name=ffa_lora"]), tmp_path)
    assert frozen.metrics["held_out_excess_loss"][-1] > 5 * finished.metrics["held_out_excess_loss"][-1]


def test_an_exported_adapter_is_what_was_evaluated(finished: FinishedRun, tmp_path: Path) -> None:
    made = task_of(load_experiment("synthetic"))
    owners = clients_key(load_experiment("synthetic").simulated_clients())
    rows = made.client_data(owners[0][0], owners, 0).held_out
    folder = export(finished.run.id, finished.home, tmp_path / "peft")
    loaded = PeftModel.from_pretrained(made.load_base("fp32"), str(folder)).eval()
    distance = finished.metrics["held_out_distance"][-1]
    assert made.evaluate(loaded, rows)["distance"] == pytest.approx(distance, rel=1e-4)
    merged = made.load_base("fp32")
    merged.load_state_dict(
        load_file(export(finished.run.id, finished.home, tmp_path / "merged", "merged") / "model.safetensors")
    )
    assert made.evaluate(merged, rows)["distance"] == pytest.approx(distance, rel=1e-4)
