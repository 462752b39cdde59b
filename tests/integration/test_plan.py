"""The plan made before a run, against what the run then does."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.adapter import Adapter
from common.adapter_file import adapter_bytes
from common.errors import ConfigurationError
from common.lowrank import LowRank
from common.store import RunStore
from server.plan import Plan, make_plan, rank_summary
from server.progress import Progress, listening
from simulations import simulate
from tests.tiny import tiny

HEADERS = 4_000
"""Bytes of manifests and headers per message, at most."""


def test_the_plan_names_clients_and_ranks(tmp_path: Path) -> None:
    plan = make_plan(tiny(tmp_path, "clients.dot.trains=false", "clients.ada.evaluates=false"))
    assert [(c.name, c.rank, c.trains, c.evaluates) for c in plan.clients] == [
        ("ada", 2, True, False),
        ("ben", 4, True, True),
        ("cyd", 2, True, True),
        ("dot", 8, False, True),
    ]
    assert (plan.rounds, plan.cohort_size, plan.layers) == (2, 3, 8)
    assert rank_summary(plan) == "2 × 2, 4"


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("strategy.name=ffa_lora",),
        ("strategy.name=lora_lego",),
        ('federation.wire="fp16"', 'federation.wire_down="bf16"'),
        ('federation.wire="int8"',),
        ('federation.wire="int4"', "strategy.name=ffa_lora"),
        ("clients.ada.evaluates=false", "clients.dot.trains=false"),
        ("evaluation.every=2", "federation.rounds=3"),
    ],
    ids=str,
)
def test_a_run_moves_the_bytes_of_its_plan(tmp_path: Path, options: tuple[str, ...]) -> None:
    experiment = tiny(tmp_path, *options)
    plan = make_plan(experiment)
    run = simulate(experiment, tmp_path)
    messages = 2 * len(plan.clients) * len(run.rounds)
    up, down = sum(row.bytes_up for row in run.rounds), sum(row.bytes_down for row in run.rounds)
    assert plan.bytes_up <= up <= plan.bytes_up + messages * HEADERS
    # The global adapter may come out smaller than the sum of all ranks.
    assert down <= plan.bytes_down + messages * HEADERS
    assert down >= 0.7 * plan.bytes_down
    with RunStore.open(tmp_path, read_only=True) as store:
        rows = store.client_rounds(run.run.id, 1)
    planned = {client.name: client.bytes_up for client in plan.clients}
    for row in rows:
        assert planned[row.client] <= row.bytes_up <= planned[row.client] + HEADERS
        assert row.bytes_down <= plan.largest_download + 2 * HEADERS


def test_a_rank_may_follow_from_the_device(tmp_path: Path) -> None:
    run = simulate(tiny(tmp_path, 'clients.ada.rank="auto"', "adapter.options.rank=3", "federation.rounds=1"), tmp_path)
    with RunStore.open(tmp_path, read_only=True) as store:
        ranks = {row.client: row.rank for row in store.client_rounds(run.run.id, 1)}
    assert ranks == {"ada": 3, "ben": 4, "cyd": 2, "dot": 8}


def test_ranks_above_a_layer_are_clamped_and_told(tmp_path: Path) -> None:
    experiment = tiny(tmp_path, "clients.dot.rank=500", "federation.rounds=1")
    (notice,) = make_plan(experiment).notices
    assert notice == "rank 500 (dot) is above the size of 8 layers and is clamped to 192"
    steps: list[Progress] = []
    with listening(steps.append):
        run = simulate(experiment, tmp_path)
    assert run.run.status == "completed"
    assert [step.text for step in steps if step.kind == "notice"] == [notice]
    (plan,) = [step.data["plan"] for step in steps if step.kind == "planned"]
    assert isinstance(plan, Plan)


def test_everything_that_stands_in_the_way_is_told_at_once(tmp_path: Path) -> None:
    experiment = tiny(
        tmp_path,
        "strategy.options.global_rank=0",
        "task.options.held_out=2",
        "adapter.options.rank=0",
        "training.device=x",
    )
    with pytest.raises(ConfigurationError) as caught:
        make_plan(experiment)
    assert len(caught.value.problems) == 4
    for words in ("global_rank", "held_out", "rank", "training.device"):
        assert any(words in problem for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("layers", "heads", "words"),
    [
        ({"model.layers.0.self_attn.q_proj": (3, 192)}, (), r"of shape \(3, 192\); the model has \(192, 192\)"),
        ({"lm_head": (2048, 192)}, (), "lm_head .*no such target layer"),
        ({}, ("score",), r"has head score \(2,\); the model has not"),
    ],
    ids=["misshapen", "unknown", "head"],
)
def test_an_adapter_of_another_model_is_no_start(
    tmp_path: Path, layers: dict[str, tuple[int, int]], heads: tuple[str, ...], words: str
) -> None:
    import torch

    built = {name: LowRank(torch.ones(out, 1), torch.ones(1, inn)) for name, (out, inn) in layers.items()}
    given = Adapter.pack(built, {name: torch.ones(2) for name in heads})
    path = tmp_path / "given.safetensors"
    path.write_bytes(adapter_bytes(given))
    with pytest.raises(ConfigurationError, match=words):
        make_plan(tiny(tmp_path, f"adapter.options.start_from='{path}'"))
