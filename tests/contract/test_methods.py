"""What every adapter method must do; runs over whatever methods are found, on tiny models of three kinds."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from common.adapted_model import AdaptedModel
from common.adapter import Adapter
from common.base_model import BaseModel, add_update
from common.errors import ConfigurationError
from common.federation import Dispatch
from common.lowrank import LowRank, Update
from common.methods import METHODS, AdapterMethod
from common.start import starting_adapter

TOKENS = torch.tensor([[3, 14, 15, 9, 2, 6], [5, 35, 8, 9, 7, 9]])
RANKS = (1, 3, 8)
SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
NAMES = METHODS.names()


def having(*options: str) -> list[str]:
    """List the methods that have these options."""
    return [name for name in NAMES if {*options} <= METHODS.plugin(name).model_fields.keys()]


SCALED: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAMES),
    *((name, {"alpha": 3.0}) for name in having("alpha")),
    *((name, {"alpha": 3.0, "rslora": True}) for name in having("alpha", "rslora")),
]


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return build().eval()


def llama() -> nn.Module:
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**SMALL)))


def classifier() -> nn.Module:
    return seeded(lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL | {"num_labels": 3})))


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0.0, attn_pdrop=0.0)
    return seeded(lambda: GPT2LMHeadModel(config))


BASES: Mapping[Callable[[], nn.Module], tuple[str, ...]] = {llama: ("q_proj", "down_proj"), gpt2: ("c_attn", "c_fc")}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def method(name: str, **options: Any) -> AdapterMethod:
    """Build a method on two of the small model's layers."""
    return METHODS.create(name, {"target_modules": ["q_proj", "down_proj"]} | options)


def adapted(name: str, build: Callable[[], nn.Module] = llama, **options: Any) -> AdaptedModel:
    return AdaptedModel(BaseModel(build), method(name, **options))


def trained(model: AdaptedModel, rank: int, seed: int = 1) -> Adapter:
    """Start as a client of this rank does, then move every number, as training would."""
    spec = model.spec(0)
    start = starting_adapter(Dispatch(Adapter.pack({}, spec.heads, spec.method), rank, seed), spec)
    generator = torch.Generator().manual_seed(seed)
    return start.with_flat(start.flat + 0.2 * torch.randn(start.flat.shape, generator=generator))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


def folded(build: Callable[[], nn.Module], adapter: Adapter) -> nn.Module:
    """Add an adapter to a plain model: its layers to the weights, its heads in the place of the model's."""
    model = build()
    for layer, update in adapter.layers.items():
        module = model.get_submodule(layer)
        module.weight = nn.Parameter(add_update(module, update.dense()))
    for head, value in adapter.extras.items():
        model.get_parameter(head).data = value
    return model


def test_it_says_what_it_is(name: str) -> None:
    """Options with a description and a default; the paper it follows."""
    plugin = METHODS.plugin(name)
    for option, field in plugin.model_fields.items():
        assert field.description, f"{option} has no description"
        assert field.description.endswith("."), f"{option}'s description is no sentence"
        assert not field.is_required(), f"{option} has no default"
    assert METHODS.create(name) == plugin.model_validate({})
    assert plugin.__doc__
    assert re.search(r"arXiv\s\d{4}\.\d{5}", sys.modules[plugin.__module__].__doc__ or ""), "it cites no paper"
    assert plugin.exact in ("mean", "stack", "dense")
    assert set(plugin.path_options) <= set(plugin.model_fields)
    with pytest.raises(ConfigurationError, match=f"adapter method {name}: unknown key 'no_such_option'; known are: "):
        METHODS.create(name, {"no_such_option": 1})


def test_options_survive_json_and_hash(name: str) -> None:
    given = method(name, rank=3)
    again = METHODS.create(name, json.loads(given.model_dump_json()))
    assert again == given
    assert hash(again) == hash(given)


@pytest.mark.parametrize("build", BASES)
@pytest.mark.parametrize("rank", RANKS)
def test_the_start_changes_nothing(name: str, rank: int, build: Callable[[], nn.Module]) -> None:
    model = adapted(name, build, target_modules=BASES[build])
    spec = model.spec(0)
    model.load(starting_adapter(Dispatch(Adapter.empty(spec.method), rank, 7), spec))
    torch.testing.assert_close(logits(model.model), logits(build()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("build", BASES)
@pytest.mark.parametrize("rank", RANKS)
def test_what_is_read_was_loaded(name: str, rank: int, build: Callable[[], nn.Module]) -> None:
    model = adapted(name, build, target_modules=BASES[build])
    given = trained(model, rank)
    model.load(given)
    assert model.read().layout == given.layout
    torch.testing.assert_close(model.read().flat, given.flat, rtol=1e-6, atol=1e-6)
    model.load(trained(model, 2, seed=3))
    model.load(given)
    torch.testing.assert_close(model.read().flat, given.flat, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("build", BASES)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("plugin", "options"), SCALED, ids=str)
def test_folding_equals_the_forward_pass(
    plugin: str, options: dict[str, Any], rank: int, build: Callable[[], nn.Module]
) -> None:
    """The layers that ``read`` gives, added to the weights, are the adapted model."""
    model = adapted(plugin, build, target_modules=BASES[build], **options)
    model.load(trained(model, rank))
    found = logits(model.model)
    assert not torch.allclose(found, logits(build()), atol=1e-3), "the adapter does nothing"
    torch.testing.assert_close(found, logits(folded(build, model.read())), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("plugin", "options"), SCALED, ids=str)
def test_the_scaling_is_what_training_uses(plugin: str, options: dict[str, Any], rank: int) -> None:
    """``ΔW = s B A``: the factor PEFT holds times the factor s is what ``read`` gives."""
    model = adapted(plugin, **options)
    given = trained(model, rank)
    model.load(given)
    for layer, module in model.layers.items():
        held, update = module.lora_B["default"].weight, given.layers[layer]
        assert isinstance(update, LowRank)
        torch.testing.assert_close(held * model.method.scaling(update.rank), update.b)
        assert module.scaling["default"] == model.method.scaling(update.rank)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {1: 2.0, 4: 2.0, 16: 2.0}),
        ({"rslora": True}, {1: 2.0, 4: 2.0, 16: 2.0}),
        ({"alpha": 8.0}, {1: 8.0, 4: 2.0, 16: 0.5}),
        ({"alpha": 8.0, "rslora": True}, {1: 8.0, 4: 4.0, 16: 2.0}),
    ],
    ids=str,
)
def test_loras_scaling_by_hand(options: dict[str, Any], expected: dict[int, float]) -> None:
    lora = METHODS.create("lora", options)
    assert {rank: lora.scaling(rank) for rank in expected} == expected


def test_a_target_that_matches_nothing_lists_candidates(name: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        method(name, target_modules=["q_proj", "query"]).config(llama())
    assert str(caught.value) == (
        "target module 'query' matches no layer; candidates: "
        "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    )


@pytest.mark.parametrize("target", ["model", "embed_tokens", "proj", ""])
def test_only_layers_that_can_be_adapted_are_targets(name: str, target: str) -> None:
    with pytest.raises(ConfigurationError, match=f"target module '{target}' matches no layer"):
        method(name, target_modules=[target]).config(llama())


def test_no_target_at_all_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="target_modules: Tuple should have at least 1 item"):
        method(name, target_modules=[])


def test_targets_are_names_or_their_ends(name: str) -> None:
    one = adapted(name, target_modules=["layers.1.self_attn.q_proj"])
    assert list(one.layers) == ["model.layers.1.self_attn.q_proj"]
    assert len(adapted(name, target_modules=["q_proj"]).layers) == 2


@pytest.mark.parametrize(("build", "count"), [(llama, 14), (gpt2, 8)])
def test_all_linear_is_every_linear_layer_but_the_output(name: str, build: Callable[[], nn.Module], count: int) -> None:
    model = adapted(name, build, target_modules="all-linear")
    assert len(model.layers) == count
    assert not any(layer.endswith("lm_head") for layer in model.layers)
    model.load(trained(model, 2))
    torch.testing.assert_close(logits(model.model), logits(folded(build, model.read())), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"], ids=str)
def test_a_head_is_trained_whole_and_travels(name: str, targets: Any) -> None:
    model = adapted(name, classifier, target_modules=targets, head=["score"])
    spec = model.spec(0)
    assert {head: tuple(value.shape) for head, value in spec.heads.items()} == {"score.weight": (3, 16)}
    assert not any("score" in layer for layer in spec.layers)
    torch.testing.assert_close(spec.heads["score.weight"], classifier().get_parameter("score.weight").detach())
    learning = model.train_only("b")
    assert any(parameter is model.heads["score.weight"] for parameter in learning)
    model.load(trained(model, 2))
    model.model(TOKENS).logits.sum().backward()
    gradient = model.heads["score.weight"].grad
    assert gradient is not None
    assert float(gradient.abs().max()) > 0
    with torch.no_grad():
        model.heads["score.weight"].add_(1.0)
    read = model.read()
    torch.testing.assert_close(read.extras["score.weight"], trained(model, 2).extras["score.weight"] + 1.0)
    torch.testing.assert_close(logits(model.model), logits(folded(classifier, read)), rtol=1e-4, atol=1e-5)


def test_an_unknown_head_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="head 'scores' matches no module of the base model"):
        method(name, head=["scores"]).config(classifier())


@pytest.mark.parametrize("name", having("dropout"))
def test_dropout_repeats_and_evaluation_has_none(name: str) -> None:
    model = adapted(name, dropout=0.5)
    given = trained(model, 4)

    def passes(seed: int) -> list[Tensor]:
        model.load(given, seed)
        model.model.train()
        found = []
        for number in range(2):
            model.begin_pass(number)
            found.append(logits(model.model))
        model.model.eval()
        return found

    first, second = passes(3)
    again = passes(3)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)
    assert not torch.equal(first, passes(4)[0])
    plain = adapted(name)
    plain.load(given)
    assert torch.equal(logits(model.model), logits(plain.model))


def test_without_a_place_to_start_there_is_no_initial_adapter(name: str) -> None:
    assert method(name).initial() is None


def test_all_layers_of_a_rank_are_updates_of_the_models_shape(name: str) -> None:
    model = adapted(name)
    layers: Mapping[str, Update] = trained(model, 100).layers
    assert {layer: update.shape for layer, update in layers.items()} == dict(model.spec(0).layers)
    model.load(Adapter.pack(layers))
    torch.testing.assert_close(logits(model.model), logits(folded(llama, model.read())), rtol=1e-3, atol=1e-4)
