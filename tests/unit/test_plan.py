"""The plan's bytes against numbers worked out by hand, and against the adapters a real run moves; notices; refusals.

The target layers of the tiny experiments are the eight query and value projections of the built-in base model, each
192 × 192: one rank of one layer is 384 numbers, half of them in ``b``.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, RecordDict

from client.app import app as client_app
from common.adapter import Adapter
from common.adapter_file import adapter_bytes
from common.errors import ConfigurationError, DataError
from common.experiment import Experiment
from common.experiment_file import load_experiment, preset_names
from common.lowrank import Dense, LowRank, Update
from common.text import documents, shares, stdlib
from common.workspace import model_spec
from server.plan import make_plan, rank_summary
from tests.tiny import RANKS, drive, tiny

LAYERS, SIDE = 8, 192
RANK = LAYERS * 2 * SIDE
"""Numbers in one rank of all layers."""

DENSE = LAYERS * SIDE * SIDE
"""Numbers in all layers as matrices."""

EQUAL = dict.fromkeys(RANKS, 4)


def test_the_layers_are_those_the_hand_numbers_are_for(tmp_path: Path) -> None:
    assert list(model_spec(tiny(tmp_path)).layers.values()) == [(SIDE, SIDE)] * LAYERS


BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1 + 2 / 128, "int4": 0.5 + 2 / 128}
"""Of one number; all sizes here are whole blocks of 128."""


@pytest.mark.parametrize(("wire", "size"), BYTES.items())
@pytest.mark.parametrize(
    ("strategy", "per_rank"), [("flora", RANK), ("lora_lego", RANK), ("ffa_lora", RANK // 2), ("fedavg", RANK)]
)
def test_uploads_by_hand(tmp_path: Path, strategy: str, per_rank: int, wire: str, size: float) -> None:
    ranks = EQUAL if strategy == "fedavg" else RANKS
    plan = make_plan(tiny(tmp_path, f"strategy.name={strategy}", f"federation.wire={wire}", ranks=ranks))
    assert {client.name: client.bytes_up for client in plan.clients} == {
        name: rank * per_rank * size for name, rank in ranks.items()
    }
    assert plan.bytes_up == 2 * 16 * per_rank * size
    assert (plan.layers, plan.rounds, plan.cohort_size) == (LAYERS, 2, 4)


def start_and_global(strategy: str, rank: int, merges: int) -> tuple[int, int]:
    """Numbers in what a client of this rank fetches after so many merges of ranks 2, 4, 2 and 8 (or 4, 4, 4 and 4)."""
    if strategy == "flora":
        return 0, merges * 16 * RANK
    if strategy == "fedavg":
        return (4 * RANK if merges else 0), 0
    held = min(rank, 8) if merges else 0
    return held * (RANK // 2 if strategy == "ffa_lora" else RANK), 0


@pytest.mark.parametrize(("wire", "size"), [("fp32", 4), ("fp16", 2)])
@pytest.mark.parametrize("strategy", ["flora", "lora_lego", "ffa_lora", "fedavg"])
def test_downloads_by_hand(tmp_path: Path, strategy: str, wire: str, size: int) -> None:
    """Evaluation after each of rounds 0 to 3 brings start and global adapter, training the start alone."""
    ranks = EQUAL if strategy == "fedavg" else RANKS
    options = (f"strategy.name={strategy}", f"federation.wire_down={wire}", "federation.rounds=3")
    plan = make_plan(tiny(tmp_path, *options, ranks=ranks))
    judged = sum(sum(start_and_global(strategy, 8, done)) for done in range(4))
    trained = sum(start_and_global(strategy, rank, done)[0] for rank in ranks.values() for done in range(3))
    assert plan.bytes_down == size * (4 * judged + trained)
    assert plan.largest_download == size * sum(start_and_global(strategy, 8, 3))
    last = {
        name: sum(start_and_global(strategy, 8, 3)) + start_and_global(strategy, rank, 2)[0]
        for name, rank in ranks.items()
    }
    assert {client.name: client.bytes_down for client in plan.clients} == {name: size * n for name, n in last.items()}


@pytest.mark.parametrize(
    ("options", "up", "down"),
    [
        (("federation.cohort_size=2",), 3 * 2 * 16 // 4, None),
        (("federation.cohort_fraction=0.5",), 3 * 2 * 16 // 4, None),
        (("federation.cohort_size=99",), 3 * 16, None),
        (("clients.dot.trains=false",), 3 * 8, None),
        (("evaluation.on=[]",), 3 * 16, 4 * (16 + 32)),
        (('evaluation.on=["server"]',), 3 * 16, 4 * (16 + 32)),
        (("evaluation.every=2",), 3 * 16, 4 * (32 + 48) + 4 * 16),
        (("evaluation.fraction=0.5",), 3 * 16, None),
        (("clients.ada.evaluates=false",), 3 * 16, 3 * 96 + (16 + 32)),
        (("strategy.options.global_rank=10",), 3 * 16, 4 * 30),
    ],
    ids=str,
)
def test_settings_that_change_the_bytes(tmp_path: Path, options: tuple[str, ...], up: int, down: int | None) -> None:
    """Numbers in ranks of all layers, three rounds of FLoRA; evaluation of all rounds would bring 0 + 16 + 32 + 48."""
    plan = make_plan(tiny(tmp_path, *options, "federation.rounds=3"))
    assert plan.bytes_up == up * RANK * 4
    if down is not None:
        assert plan.bytes_down == down * RANK * 4


def test_a_layer_travels_in_its_smaller_form(tmp_path: Path) -> None:
    plan = make_plan(tiny(tmp_path, "federation.rounds=9"))
    assert 9 * 16 * RANK > DENSE
    assert plan.largest_download == 4 * DENSE


def test_heads_travel_both_ways(tmp_path: Path) -> None:
    bare, heads = (make_plan(tiny(tmp_path, f"adapter.options.head={given}")) for given in ("[]", '["model.norm"]'))
    assert heads.bytes_up - bare.bytes_up == 2 * 4 * SIDE * 4
    assert heads.bytes_down - bare.bytes_down == (2 * 4 + 3 * 4) * SIDE * 4


def test_clients_of_no_rank_take_the_adapters(tmp_path: Path) -> None:
    options = ('clients.ada.rank="auto"', "clients.ben={data = '.'}", "adapter.options.rank=6")
    experiment = tiny(tmp_path, *options[:1], *options[2:])
    table = experiment.model_dump()
    del table["clients"]["ben"]["rank"]
    plan = make_plan(Experiment.parse(table))
    assert {client.name: client.rank for client in plan.clients} == {"ada": 6, "ben": 6, "cyd": 2, "dot": 8}
    assert rank_summary(plan) == "2, 2 × 6, 8"


class Scale:
    """A client app that weighs the adapters of all messages it gets and gives."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.down = self.up = 0

    def __call__(self, message: Message, context: Context) -> Message:
        answer = client_app(message, context)
        with self._lock:
            self.down += adapters(message.content)
            self.up += adapters(answer.content)
        return answer


def adapters(content: RecordDict) -> int:
    """Count the bytes of the adapters in a message: its blobs, without manifests and header."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


@pytest.mark.parametrize(
    "options",
    [
        ("strategy.name=fedavg",),
        ("strategy.name=ffa_lora",),
        ("strategy.name=lora_lego",),
        ("strategy.name=lora_lego", "strategy.options={clusters = 12, seed_per = 'client'}"),
        ("strategy.name=flora",),
        ("strategy.name=flora", "federation.wire=fp16", 'adapter.options.head=["model.norm"]'),
        ("strategy.name=flora", "evaluation.every=2", "clients.ada.evaluates=false"),
    ],
    ids=str,
)
def test_a_run_moves_the_adapters_of_its_plan(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Compared are the blobs of all messages, byte for byte; manifests and headers are no part of a plan."""
    experiment = tiny(tmp_path, *options, ranks=EQUAL if "strategy.name=fedavg" in options else RANKS)
    plan, scale = make_plan(experiment), Scale()
    assert drive(experiment, tmp_path, scale).run.status == "completed"
    assert scale.up == plan.bytes_up
    if "strategy.name=lora_lego" in options:  # slots that are rounding noise are dropped, which no plan can know
        assert 0.9 * plan.bytes_down <= scale.down <= plan.bytes_down
    else:
        assert scale.down == plan.bytes_down


@pytest.mark.parametrize(("form", "numbers"), [("factors", 5 * 2 * SIDE), ("dense", SIDE * SIDE)])
def test_an_adapter_to_start_from_counts(tmp_path: Path, form: str, numbers: int) -> None:
    """One layer of rank 5, or dense, before round 1; FLoRA adds to it."""
    update: Update = LowRank(torch.ones(SIDE, 5), torch.ones(5, SIDE))
    given = Adapter.pack({"model.layers.0.self_attn.q_proj": update if form == "factors" else Dense(update.dense())})
    (tmp_path / "given.safetensors").write_bytes(adapter_bytes(given))
    bare = make_plan(tiny(tmp_path))
    plan = make_plan(tiny(tmp_path, f"adapter.options.start_from='{tmp_path / 'given.safetensors'}'"))
    grown = numbers if form == "factors" else numbers - 2 * 16 * 2 * SIDE
    assert plan.largest_download - bare.largest_download == 4 * grown


def test_ranks_above_a_layer_are_told_and_counted_as_clamped(tmp_path: Path) -> None:
    plan = make_plan(tiny(tmp_path, "clients.ada.rank=193", "clients.dot.rank=193"))
    assert plan.notices == ("rank 193 (ada, dot) is above the size of 8 layers and is clamped to 192",)
    assert {client.name: client.bytes_up for client in plan.clients}["ada"] == 192 * RANK * 4


def test_mixed_ranks_are_refused_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_plan(tiny(tmp_path, "strategy.name=fedavg"))
    assert str(caught.value) == (
        "strategy fedavg needs equal ranks: ben (4), dot (8) differ from rank 2; give them rank 2 or use "
        "a strategy for mixed ranks: fed_sb, fedavg_svd, ffa_lora, flexlora, flora, florist, hetlora, lora_lego, rolora"
    )
    make_plan(tiny(tmp_path, "strategy.name=fedavg", "clients.ben.trains=false", "clients.dot.trains=false"))


def test_what_a_strategy_refuses_is_refused_early(tmp_path: Path) -> None:
    options = ("strategy.name=lora_lego", "strategy.options={clusters = 17, strict = true}")
    with pytest.raises(ConfigurationError, match="wants 17 clusters of 16 units"):
        make_plan(tiny(tmp_path, *options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("strategy.name=fedprox",), "no aggregation strategy named 'fedprox'; there is: fed_sb, fedavg"),
        (("task.name=vision",), "no task named 'vision'; there is: causal_lm"),
        (("adapter.name=dora",), "no adapter method named 'dora'; there is: lora"),
        (("training.device=tpu",), "training.device 'tpu' is no device; use auto, cpu, cuda or cuda:N"),
        (("training.device=cuda:99",), "training.device 'cuda:99': this machine has"),
        (
            ('adapter.options.target_modules=["query"]',),
            "target module 'query' matches no layer; candidates: down_proj",
        ),
        (
            ("task.options.sequence_length=999",),
            "task.options.sequence_length 999 is too long: builtin sees at most 256",
        ),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_plan(tiny(tmp_path, *options))
    assert said in str(caught.value)


def test_a_client_without_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"client cyd: .*nowhere does not exist"):
        make_plan(tiny(tmp_path, "clients.cyd.data=nowhere"))


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_can_be_planned_as_it_is(name: str) -> None:
    """Every client finds its data, the model takes the rows, and nothing is in the way."""
    experiment = load_experiment(name)
    plan = make_plan(experiment)
    assert [client.name for client in plan.clients] == list(experiment.simulated_clients())
    assert all(client.bytes_up > 0 for client in plan.clients if client.trains)
    assert plan.rounds == experiment.federation.rounds
    assert plan.cohort_size == experiment.federation.cohort_size or len(plan.clients)


def test_a_substituted_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    here = stdlib.installed

    def without_email(names: Sequence[str]) -> list[str]:
        return [name for name in here(names) if name != "email"]

    monkeypatch.setattr(documents, "installed", without_email)
    monkeypatch.setattr(stdlib, "installed", without_email)
    shares._partitioned.cache_clear()
    try:
        stand_in = here(stdlib.OWNER_SUBSTITUTES)[0]
        assert f"email is not installed here; {stand_in} takes its place" in make_plan(load_experiment("flora")).notices
    finally:
        shares._partitioned.cache_clear()
