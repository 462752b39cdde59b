"""Our strategies as a stock Flower strategy: exact merges of PEFT factors, and clients that send anything."""

from __future__ import annotations

import copy
import io
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from client.flower_peft import load_merged, load_start
from common.errors import ConfigurationError
from common.flower import identify_task
from common.peft_state import LoraScale
from server.flower_strategy import FlowerStrategy, served
from strategies import aggregation_strategy

RANKS = {11: 2, 12: 4, 13: 8}
WEIGHTS = {11: 10.0, 12: 30.0, 13: 20.0}
ALPHA = 16.0
LAYERS = ("first", "second")


class Net(nn.Module):
    """Two linear layers, a convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 9)
        self.kernel, self.score = nn.Conv2d(1, 2, 3), nn.Linear(9, 2)
        generator = torch.Generator().manual_seed(5)
        for value in self.parameters():
            value.data = torch.randn(value.shape, generator=generator) / 4

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.tanh(self.first(x)))
        return cast(Tensor, self.score(x + self.kernel(x.view(-1, 1, 3, 3)).mean()))


def peft_model(rank: int, targets: Sequence[str] = LAYERS, **config: Any) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(rank)
        config = {"lora_alpha": ALPHA, "target_modules": list(targets), "r": rank, **config}
        return cast(PeftModel, get_peft_model(Net(), LoraConfig(**config)))


def randomise(model: PeftModel, seed: int) -> PeftModel:
    """Stand in for training: draw what learns."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.parameters():
        if value.requires_grad:
            value.data = torch.randn(value.shape, generator=generator) / 8
    return model


def update_of(model: PeftModel, layer: str) -> Tensor:
    """Return PEFT's own idea of what the adapter adds to a layer, in float64."""
    module = copy.deepcopy(model.get_submodule(f"base_model.model.{layer}")).double()
    return cast(Tensor, cast(Any, module).get_delta_weight("default")).detach()


@dataclass(frozen=True)
class Nodes:
    """As much of a grid as a strategy needs: who is online."""

    nodes: Sequence[int]

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)


@pytest.fixture(autouse=True)
def _task() -> None:
    identify_task(1)


class Bench:
    """A strategy and clients of unequal ranks, driven by hand."""

    def __init__(self, name: str = "flora", initial: PeftModel | None = None, **settings: Any) -> None:
        if not {"lora_alpha", "scaling", "unknown"} & set(settings):
            settings["lora_alpha"] = ALPHA
        settings.pop("unknown", None)
        self.strategy = FlowerStrategy(aggregation_strategy(name), join_timeout_s=0, **settings)
        self.arrays = ArrayRecord(get_peft_model_state_dict(initial or peft_model(4)))
        self.round = 0

    def orders(self, nodes: Sequence[int] = tuple(RANKS), kind: str = MessageType.TRAIN) -> list[Message]:
        train = kind == MessageType.TRAIN
        self.round += train
        configure = self.strategy.configure_train if train else self.strategy.configure_evaluate
        return list(configure(self.round, self.arrays, ConfigRecord({"lr": 0.1}), cast(Grid, Nodes(nodes))))

    def merge(self, replies: Sequence[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, metrics = self.strategy.aggregate_train(self.round, replies)
        self.arrays = arrays or self.arrays
        return arrays, metrics

    def go(self, models: Mapping[int, PeftModel]) -> None:
        """Do a whole round in which clients answer with these models."""
        self.merge([answer(order, models[order.metadata.dst_node_id]) for order in self.orders(sorted(models))])

    @property
    def merged(self) -> dict[str, Tensor]:
        return {name: update.dense().double() for name, update in self.strategy.adapter.layers.items()}


def answer(order: Message, model: PeftModel, **metrics: float) -> Message:
    numbers = {"num-examples": WEIGHTS.get(order.metadata.dst_node_id, 10.0), "train-loss": 1.0}
    numbers |= {name.replace("_", "-"): value for name, value in metrics.items()}
    content = {"arrays": ArrayRecord(get_peft_model_state_dict(model)), "metrics": MetricRecord({**numbers})}
    return Message(RecordDict({**content}), reply_to=order)


def cohort(seed: int = 0, **config: Any) -> dict[int, PeftModel]:
    return {node: randomise(peft_model(rank, **config), seed + node) for node, rank in RANKS.items()}


def exact(models: Mapping[int, PeftModel], layer: str = "first") -> Tensor:
    total = sum(WEIGHTS[node] for node in models)
    return torch.stack([update_of(model, layer) * WEIGHTS[node] / total for node, model in models.items()]).sum(dim=0)


def close(one: Tensor, other: Tensor) -> bool:
    return float(torch.linalg.vector_norm(one - other)) <= 1e-6 * float(torch.linalg.vector_norm(other))


@pytest.mark.parametrize("rslora", [False, True])
def test_mixed_ranks_merge_to_the_exact_average_of_what_peft_adds(rslora: bool) -> None:
    bench, models = Bench(use_rslora=rslora), cohort(use_rslora=rslora)
    bench.go(models)
    for layer in LAYERS:
        assert close(bench.merged[layer], exact(models, layer))


def test_rounds_add_up() -> None:
    bench, one, other = Bench(), cohort(), cohort(seed=50)
    bench.go(one)
    bench.go(other)
    assert close(bench.merged["first"], exact(one) + exact(other))


def test_every_rank_may_have_an_alpha_of_its_own() -> None:
    bench = Bench(scaling=2.0)
    models = {n: randomise(peft_model(r, lora_alpha=2 * r), n) for n, r in RANKS.items()}
    bench.go(models)
    assert close(bench.merged["first"], exact(models))


def test_a_client_that_states_its_scale_is_believed(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(unknown=True)
    models = {node: randomise(peft_model(4, lora_alpha=node, use_rslora=node == 12), node) for node in RANKS}
    orders = bench.orders()
    said = [{"lora_alpha": 11.0}, {"lora_alpha": 12.0, "use_rslora": 1}, {"lora_scaling": 13 / 4}]
    bench.merge([answer(order, models[order.metadata.dst_node_id], **s) for order, s in zip(orders, said, strict=True)])
    assert close(bench.merged["first"], exact(models))
    assert not caplog.records


def test_an_unknown_scale_is_never_guessed(caplog: pytest.LogCaptureFixture) -> None:
    bench, models = Bench(unknown=True), cohort()
    assert bench.merge([answer(order, models[order.metadata.dst_node_id]) for order in bench.orders()]) == (None, None)
    assert "does not say its lora-alpha" in caplog.text


def test_the_order_of_replies_changes_no_bit() -> None:
    models = cohort()
    results = []
    for turn in (1, -1):
        bench = Bench()
        replies = [answer(order, models[order.metadata.dst_node_id]) for order in bench.orders()]
        arrays, metrics = bench.merge(replies[::turn])
        assert arrays is not None
        results.append((arrays.object_id, metrics))
    assert results[0] == results[1]


def test_metrics_are_averaged_by_examples() -> None:
    bench, models = Bench(), cohort()
    losses = {11: 1.0, 12: 2.0, 13: 5.0}
    replies = [
        answer(o, models[n], train_loss=losses[n], other=math.nan if n == 12 else 1.0)
        for o in bench.orders()
        if (n := o.metadata.dst_node_id)
    ]
    _, metrics = bench.merge(replies)
    assert metrics == {"train-loss": pytest.approx((10 * 1 + 30 * 2 + 20 * 5) / 60)}


# ---- what goes down


def outputs(model: PeftModel) -> Tensor:
    with torch.no_grad():
        return cast(Tensor, model(torch.linspace(-1, 1, 24).view(2, 12)))


def expected_outputs(bench: Bench) -> Tensor:
    """Compute what base model and merged adapter give, by hand."""
    net = Net()
    for name, update in bench.merged.items():
        weight = cast(Tensor, net.get_submodule(name).weight)
        weight.data += update.float().view_as(weight)
    for name, head in bench.strategy.adapter.extras.items():
        net.get_parameter(name).data = head
    with torch.no_grad():
        return cast(Tensor, net(torch.linspace(-1, 1, 24).view(2, 12)))


@pytest.mark.parametrize("name", served())
@pytest.mark.parametrize("kind", [MessageType.TRAIN, MessageType.EVALUATE])
def test_a_client_holds_the_merged_model(name: str, kind: str) -> None:
    """Whatever a strategy keeps where; training may begin with less where a rank is too small for all of it."""
    mixed = aggregation_strategy(name).capabilities.mixed_ranks
    extra: dict[str, Any] = {"targets": (*LAYERS, "kernel"), "modules_to_save": ["score"]}
    ranks = RANKS if mixed else dict.fromkeys(RANKS, 4)
    bench = Bench(name, peft_model(4, **extra))
    for seed in (0, 50):
        bench.go({node: randomise(peft_model(rank, **extra), seed + node) for node, rank in ranks.items()})
    newcomer = {14: 2 if mixed else 4}
    for order in bench.orders([*RANKS, 14], kind):
        rank = (ranks | newcomer)[order.metadata.dst_node_id]
        if kind == MessageType.TRAIN and rank < 8 and mixed and bench.strategy._begun().state.start.layers:
            continue
        model = peft_model(rank, **extra)
        load_start(model, order)
        torch.testing.assert_close(outputs(model), expected_outputs(bench), rtol=1e-4, atol=1e-5)


def test_an_order_has_the_rank_of_the_last_reply_and_the_settings_of_the_user() -> None:
    bench = Bench()
    first = {order.metadata.dst_node_id: order.content for order in bench.orders()}
    assert {first[node]["arrays"]["base_model.model.first.lora_A.weight"].shape[0] for node in RANKS} == {4}
    assert all("global" not in content for content in first.values())
    bench = Bench()
    bench.go(cohort())
    for order in bench.orders():
        node, content = order.metadata.dst_node_id, order.content
        state = content.array_records["arrays"].to_torch_state_dict()
        set_peft_model_state_dict(peft_model(RANKS[node]), dict(state))  # a stock client's way
        assert dict(content["config"]) == {"lr": 0.1, "server-round": 2, "lora-alpha": ALPHA, "use-rslora": False}
        assert "global" in content


def test_the_readme_names_the_strategies_that_need_no_global_part() -> None:
    """Those whose merge leaves the base as it is: a client that loads nothing but ``arrays`` can train with them."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "examples" / "flower-app" / "README.md").read_text()
    named = text.partition("send no `global`: ")[2].partition(";")[0]
    without = []
    for name in served():
        bench = Bench(name)
        bench.go({node: randomise(peft_model(4), node) for node in RANKS})
        without += [] if any("global" in order.content for order in bench.orders()) else [name]
    assert re.findall(r"`(\w+)`", named) == without


def test_the_first_round_starts_from_the_users_own_factors() -> None:
    initial = peft_model(4)
    (order,) = Bench(initial=initial).orders([12])
    sent = order.content.array_records["arrays"].to_torch_state_dict()
    assert all(torch.equal(value, get_peft_model_state_dict(initial)[key]) for key, value in sent.items())


@pytest.mark.parametrize("name", ["flora", "fedavg"])
def test_what_the_initial_arrays_have_learned_is_kept(name: str) -> None:
    initial = randomise(peft_model(4), 3)
    before = update_of(randomise(peft_model(4), 3), "first")
    bench = Bench(name, initial)
    (order,) = bench.orders([12])
    assert ("global" in order.content) == (name == "flora")
    assert close(bench.merged["first"], before)
    model = peft_model(4)
    load_start(model, order)
    torch.testing.assert_close(outputs(model), outputs(initial), rtol=1e-5, atol=1e-6)


def test_what_start_returns_can_be_started_from() -> None:
    bench, models = Bench(), cohort()
    bench.go(models)
    again = Bench()
    again.arrays = bench.arrays
    again.orders([12])
    assert close(again.merged["first"], exact(models))
    model = peft_model(2)
    load_merged(model, bench.arrays, LoraScale(ALPHA))
    torch.testing.assert_close(outputs(model), expected_outputs(bench), rtol=1e-4, atol=1e-5)


def test_base_weights_are_never_added_to_twice() -> None:
    bench = Bench()
    bench.go(cohort())
    (order,) = bench.orders([12])
    model = peft_model(4)
    before = outputs(model)
    for _ in range(3):
        load_start(model, order)
    torch.testing.assert_close(outputs(model), expected_outputs(bench), rtol=1e-4, atol=1e-5)
    load_merged(model, None)
    assert torch.equal(outputs(model), before)


def test_another_model_than_the_servers_is_refused() -> None:
    (order,) = Bench().orders([12])
    with pytest.raises(ConfigurationError, match="other target layers or heads"):
        load_start(peft_model(4, targets=["first"]), order)


def test_equal_ranks_give_what_stock_fedavg_gives() -> None:
    bench, models = Bench("fedavg"), {node: randomise(peft_model(4), node) for node in RANKS}
    replies = [answer(order, models[order.metadata.dst_node_id]) for order in bench.orders()]
    arrays, metrics = bench.merge(replies)
    stock, stock_metrics = FedAvg().aggregate_train(1, replies)
    assert arrays is not None
    assert stock is not None
    assert metrics == stock_metrics
    mine, theirs = arrays.to_torch_state_dict(), stock.to_torch_state_dict()
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-5, atol=1e-7)
    (order, *_) = bench.orders()
    sent = order.content.array_records["arrays"].to_torch_state_dict()
    assert all(torch.equal(sent[key], value) for key, value in mine.items())
    assert "global" not in order.content


# ---- clients that send anything

State = dict[str, Tensor]
Change = Callable[[State, dict[str, Any]], object]
A, B = "base_model.model.first.lora_A.weight", "base_model.model.first.lora_B.weight"


def _put(key: str, value: Tensor) -> Change:
    return lambda state, _: state.update({key: value})


def _scaled(key: str, factor: float) -> Change:
    return lambda state, _: state.update({key: state[key] * factor})


def _say(**metrics: Any) -> Change:
    return lambda _, said: said.update({name.replace("_", "-"): value for name, value in metrics.items()})


BAD: dict[str, tuple[Change, str]] = {
    "no lora_A": (lambda state, _: state.pop(A), "has no lora_A.weight beside it"),
    "no lora_B": (lambda state, _: state.pop(B), "has no lora_B.weight beside it"),
    "no layer": (lambda state, _: (state.pop(A), state.pop(B)), "lacks layer first"),
    "nothing": (lambda state, _: state.clear(), "lacks layer first"),
    "unknown layer": (_put(A.replace("first", "third"), torch.ones(2, 3)), "has no lora_B"),
    "a head": (_put("base_model.model.score.weight", torch.ones(2, 2)), "head score.weight"),
    "dora": (_put(A.replace("lora_A", "lora_magnitude_vector"), torch.ones(3)), "no factor of plain LoRA"),
    "dense": (_put(A.replace("lora_A", "lora_dense"), torch.ones(16, 12)), "a dense matrix"),
    "wrong shape": (_put(A, torch.ones(4, 13)), "shape (16, 13)"),
    "ranks apart": (_put(A, torch.ones(3, 12)), "do not form"),
    "rank 0": (lambda state, _: state.update({A: torch.ones(0, 12), B: torch.ones(16, 0)}), "expected (r, in)"),
    "a vector": (_put(A, torch.ones(12)), "expected (r, in)"),
    "nan": (_scaled(A, math.nan), "NaN or infinity"),
    "infinity": (_scaled(B, math.inf), "NaN or infinity"),
    "beyond float32": (
        lambda state, _: state.update({A: torch.full((4, 12), 1e300, dtype=torch.float64)}),
        "NaN or infinity",
    ),
    "integers": (_put(A, torch.ones(4, 12, dtype=torch.int32)), "is of int32"),
    "complex": (_put(A, torch.ones(4, 12, dtype=torch.complex64)), "is of complex64"),
    "no weight": (lambda _, said: said.pop("num-examples"), "num-examples is None"),
    "weight 1e12": (_say(num_examples=1e12), "num-examples is 1000000000000.0"),
    "negative weight": (_say(num_examples=-5), "num-examples is -5.0"),
    "no examples": (_say(num_examples=0), "num-examples is 0.0"),
    "nan examples": (_say(num_examples=math.nan), "num-examples is nan"),
    "a list": (_say(num_examples=[3, 4]), "num-examples is None"),
    "alpha 0": (_say(lora_alpha=0.0), "LoRA's scale is 0.0"),
    "alpha nan": (_say(lora_scaling=math.nan), "LoRA's scale is nan"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_reply_is_left_out_and_the_round_goes_on(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    bench, models = Bench(), cohort()
    change, said = BAD[fault]
    replies = []
    for order in bench.orders():
        node = order.metadata.dst_node_id
        state, metrics = dict(get_peft_model_state_dict(models[node])), {"num-examples": WEIGHTS[node]}
        if node == 12:
            change(state, metrics)
        content = {"arrays": ArrayRecord(dict(state)), "metrics": MetricRecord({**metrics})}
        replies.append(Message(RecordDict({**content}), reply_to=order))
    with caplog.at_level(logging.WARNING):
        bench.merge(replies)
    (record,) = caplog.records
    assert record.getMessage().startswith("node 12 is left out: ")
    assert said in record.getMessage()
    assert close(bench.merged["first"], exact({node: models[node] for node in (11, 13)}))


def _zipped() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, one=np.ones((4, 12), np.float32))
    return buffer.getvalue()


def _lying() -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 12)})
    return buffer.getvalue()


@pytest.mark.parametrize(
    "array",
    [
        Array("float32", (4, 12), "numpy.ndarray", b"no array"),
        Array("float32", (4, 12), "numpy.ndarray", b""),
        Array("float32", (4, 12), "numpy.ndarray", _zipped()),
        Array("float32", (4, 12), "numpy.ndarray", _lying()),
        Array("float32", (4, 12), "own.format", b"1234"),
        Array(np.array([["x"] * 12] * 4)),
    ],
    ids=["bytes", "empty", "archive", "lying header", "own format", "text"],
)
def test_bytes_that_are_no_array_are_left_out(array: Array, caplog: pytest.LogCaptureFixture) -> None:
    bench, models = Bench(), cohort()
    replies = [answer(order, models[order.metadata.dst_node_id]) for order in bench.orders()]
    replies[1].content.array_records["arrays"][A] = array
    bench.merge(replies)
    assert "node 12 is left out: array 'base_model.model.first.lora_A.weight'" in caplog.text
    assert close(bench.merged["first"], exact({node: models[node] for node in (11, 13)}))


def test_errors_strangers_and_repetitions_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    bench, models = Bench(min_completion=0.3), cohort()
    orders = bench.orders()
    stranger = Message(RecordDict(), 99, MessageType.TRAIN)
    good = answer(orders[0], models[11])
    replies = [
        Message(Error(2, "out of memory"), reply_to=orders[1]),
        good,
        answer(orders[0], models[12]),
        answer(stranger, models[13]),
        Message(RecordDict(), reply_to=orders[2]),
    ]
    bench.merge(replies)
    assert close(bench.merged["first"], exact({11: models[11]}))
    for said in ("node 12 is left out: error 2: out of memory", "node 11 is left out: nobody asked", "node 99 is left"):
        assert said in caplog.text
    assert "node 13 is left out: it has 0 MetricRecords" in caplog.text


def test_without_a_quorum_everything_stays(caplog: pytest.LogCaptureFixture) -> None:
    bench, models = Bench(min_completion=0.6), cohort()
    bench.go(models)
    before, arrays = bench.merged["first"], bench.arrays
    orders = bench.orders()
    assert bench.merge([answer(orders[0], randomise(models[11], 99))]) == (None, None)
    assert "round 2 changes nothing: 1 of 3 replies are valid" in caplog.text
    assert torch.equal(bench.merged["first"], before)
    assert bench.arrays is arrays
    assert bench.merge([]) == (None, None)
    bench.go(cohort(seed=50))
    assert close(bench.merged["first"], exact(cohort()) + exact(cohort(seed=50)))


def test_a_sum_beyond_float32_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    bench, models = Bench("fedavg"), {node: peft_model(4) for node in RANKS}
    for model in models.values():
        for value in model.parameters():
            value.data = torch.full_like(value, 3e38)
    bench.go(models)
    assert "round 1 changes nothing: " in caplog.text
    assert float(bench.merged["first"].abs().max()) == 0


def test_a_norm_can_be_bounded(caplog: pytest.LogCaptureFixture) -> None:
    bench, models = Bench(max_update_norm=50.0), cohort()
    for value in models[12].parameters():
        value.data *= 100
    bench.go(models)
    assert "exceeds max_update_norm 50" in caplog.text
    assert close(bench.merged["first"], exact({node: models[node] for node in (11, 13)}))


def test_equal_ranks_are_asked_of_those_who_differ(caplog: pytest.LogCaptureFixture) -> None:
    bench, models = Bench("fedavg", min_completion=0.3), cohort()
    bench.go(models)
    assert caplog.text.count("this strategy needs 4, as initial_arrays") == 2
    assert bench.strategy.adapter.layout.layers[0][3] == 4


def test_half_precision_is_taken() -> None:
    bench, models = Bench(), cohort()
    bench.go({node: model.half() for node, model in models.items()})
    assert close(bench.merged["first"], exact(models))


# ---- phases and refusals


def test_evaluations_are_averaged_and_bad_ones_left_out(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.go(cohort())
    orders = bench.orders(kind=MessageType.EVALUATE)
    said = [{"num-examples": 10, "loss": 1.0}, {"num-examples": 30, "loss": 2.0}, {"loss": 99.0}]
    replies = [
        Message(RecordDict({"metrics": MetricRecord({**metrics})}), reply_to=order)
        for order, metrics in zip(orders, said, strict=True)
    ]
    assert bench.strategy.aggregate_evaluate(1, replies) == {"loss": pytest.approx(1.75)}
    assert "node 13 is left out: its num-examples is None" in caplog.text
    bench.orders(kind=MessageType.EVALUATE)
    assert bench.strategy.aggregate_evaluate(1, []) is None


def test_cohorts_are_drawn_from_the_seed() -> None:
    nodes = list(range(100, 120))

    def drawn(seed: int) -> list[list[int]]:
        bench = Bench(fraction_train=0.25, seed=seed)
        return [[order.metadata.dst_node_id for order in bench.orders(nodes)] for _ in range(2)]

    first, second = drawn(0)
    assert len(first) == len(second) == 5
    assert first == sorted(first)
    assert first != second
    assert drawn(0) == [first, second]
    assert drawn(1) != [first, second]


def test_too_few_nodes_do_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(min_available_nodes=3)
    assert bench.orders([]) == []
    assert bench.merge([]) == (None, None)
    assert "round 1 goes on with 0 nodes, 3 were wanted" in caplog.text
    assert Bench(fraction_train=0.0).orders() == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ffa_lora", "a frozen factor drawn from a seed"),
        ("fedsa_lora", "must keep factors of their own"),
        ("fed_sb", "must train and send"),
        ("slora", "must train and send sparse"),
    ],
)
def test_strategies_that_need_more_of_a_client_are_refused(name: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"cannot serve {name}: .*{said}.*; use .*flora") as caught:
        FlowerStrategy(aggregation_strategy(name))
    assert name not in str(caught.value).partition("; use ")[2].split(", or")[0].split(", ")


def test_a_penalty_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="penalise some of their rank slots"):
        FlowerStrategy(aggregation_strategy("hetlora", prune=0.5), lora_alpha=8)


def test_wrong_settings_are_one_sentence() -> None:
    flora = aggregation_strategy("flora")
    with pytest.raises(ConfigurationError, match="exclude one another"):
        FlowerStrategy(flora, lora_alpha=1, scaling=1)
    with pytest.raises(ConfigurationError, match="LoRA's scale is -1"):
        FlowerStrategy(flora, lora_alpha=-1)
    with pytest.raises(ConfigurationError, match="has not begun"):
        _ = FlowerStrategy(flora).adapter


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({}, "hold no finite LoRA"),
        ({A: torch.full((4, 12), math.nan), B: torch.zeros(16, 4)}, "hold no finite LoRA"),
        ({A: torch.ones(4, 12, dtype=torch.int64), B: torch.zeros(16, 4)}, "initial_arrays: array .* is of int64"),
        ({A: torch.ones(4, 12), B: torch.ones(16, 4)}, "tell FlowerStrategy their lora_alpha"),
        ({"base_model.model.first.lora_embedding_A": torch.ones(4, 12)}, "no factor of plain LoRA"),
    ],
)
def test_initial_arrays_that_are_no_lora_are_refused(state: State, said: str) -> None:
    bench = Bench(unknown=True)
    bench.arrays = ArrayRecord(dict(state))
    with pytest.raises(ConfigurationError, match=said):
        bench.orders()


def test_arrays_changed_by_a_wrapping_strategy_are_refused() -> None:
    bench = Bench()
    bench.go(cohort())
    copied = ArrayRecord({**bench.arrays})
    noisy = {key: Array(array.numpy() + 1) for key, array in bench.arrays.items()}
    bench.arrays = copied
    assert bench.orders()
    bench.arrays = ArrayRecord(noisy)
    with pytest.raises(ConfigurationError, match="no other strategy may wrap FlowerStrategy"):
        bench.orders()
