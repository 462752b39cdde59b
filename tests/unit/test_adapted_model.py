"""A worker's model: factors switched in and read back, global adapter, shared base, heads, seeded dropout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from common.adapted_model import ADAPTER, AdaptedModel, SeededDropout
from common.adapter import Adapter
from common.base_model import BaseModel, base_model
from common.errors import ConfigurationError
from common.lowrank import Dense, LowRank, Update
from common.methods.lora import Lora

TOKENS = torch.tensor([[3, 14, 15, 9, 2, 6], [5, 35, 8, 9, 7, 9]])
SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
TARGETS = ("q_proj", "v_proj", "down_proj")


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return build().eval()


def llama() -> nn.Module:
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**SMALL)))


def classifier() -> nn.Module:
    return seeded(lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=3)))


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0.0, attn_pdrop=0.0)
    return seeded(lambda: GPT2LMHeadModel(config))


class Picture(nn.Module):
    """A convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, kernel_size=3, padding=1, stride=2)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.conv(x).relu().flatten(1))
        return result


PIXELS = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)


def picture() -> nn.Module:
    return seeded(Picture)


def adapted(build: Callable[[], nn.Module] = llama, merge: bool = True, **options: Any) -> AdaptedModel:
    options = {"target_modules": TARGETS} | options
    return AdaptedModel(BaseModel(build), Lora(**options), merge_global=merge)


def random_adapter(model: AdaptedModel, rank: int, seed: int = 1, size: float = 0.1, dense: bool = False) -> Adapter:
    numbers = torch.Generator().manual_seed(seed)
    layers: dict[str, Update] = {}
    for name, (out, inn) in model.spec(0).layers.items():
        if dense:
            layers[name] = Dense(size * torch.randn(out, inn, generator=numbers))
        else:
            b, a = torch.randn(out, rank, generator=numbers), torch.randn(rank, inn, generator=numbers)
            layers[name] = LowRank(size * b, a)
    heads = {name: torch.randn(head.shape, generator=numbers) for name, head in model.heads.items()}
    return Adapter.pack(layers, heads)


def logits(model: nn.Module, inputs: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        found = model(inputs)
    result: Tensor = found if isinstance(found, Tensor) else found.logits
    return result


def with_update(build: Callable[[], nn.Module], *adapters: Adapter) -> nn.Module:
    """Build ``W + Σ Δ`` the obvious way: a plain model whose weights are added to."""
    model = build()
    for adapter in adapters:
        for name, update in adapter.layers.items():
            module = model.get_submodule(name)
            delta = update.dense()
            weight = module.weight
            assert isinstance(weight, Tensor)
            delta = delta.T if type(module).__name__ == "Conv1D" else delta.reshape(weight.shape)
            weight.data = weight.data + delta
    return model


@pytest.mark.parametrize("rank", [4, 8, 16])
@pytest.mark.parametrize("alpha", [None, 8.0, 64.0], ids=str)
def test_factors_keep_their_bits_when_the_scale_is_a_power_of_two(rank: int, alpha: float | None) -> None:
    model = adapted(alpha=alpha)
    given = random_adapter(model, rank)
    model.load(given)
    assert torch.equal(model.read().flat, given.flat)
    assert model.read().layout == given.layout


@pytest.mark.parametrize("rank", [4, 8, 16])
def test_factors_come_back_to_rounding_at_any_scale(rank: int) -> None:
    model = adapted(alpha=7.0, rslora=True)
    given = random_adapter(model, rank)
    model.load(given)
    torch.testing.assert_close(model.read().flat, given.flat, rtol=1e-6, atol=1e-6)
    assert torch.equal(model.read().inner_factors, given.inner_factors)


def test_ranks_can_change_from_client_to_client() -> None:
    model = adapted()
    for rank in (4, 16, 1, 8):
        given = random_adapter(model, rank, seed=rank)
        model.load(given)
        assert torch.equal(model.read().flat, given.flat)


@pytest.mark.parametrize(("build", "targets"), [(llama, TARGETS), (gpt2, ("c_attn", "c_proj"))], ids=["llama", "gpt2"])
@pytest.mark.parametrize("rank", [4, 8, 16])
def test_the_model_computes_what_a_real_peft_adapter_computes(
    build: Callable[[], nn.Module], targets: tuple[str, ...], rank: int
) -> None:
    model = adapted(build, target_modules=targets)
    given = random_adapter(model, rank)
    model.load(given)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), fan_in_fan_out=build is gpt2)
    real = get_peft_model(build(), config)  # type: ignore[arg-type]
    for name, update in given.layers.items():
        assert isinstance(update, LowRank)
        layer: Any = real.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data = update.a.clone()
        layer.lora_B["default"].weight.data = update.b / 2
    assert torch.equal(logits(model.model), logits(real.eval()))


BUILDS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], Tensor]] = {
    "llama": (llama, TARGETS, TOKENS),
    "gpt2": (gpt2, ("c_attn", "c_proj"), TOKENS),
    "convolution": (picture, ("conv", "out"), PIXELS),
}


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "unmerged"])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "low rank"])
@pytest.mark.parametrize(("build", "targets", "inputs"), BUILDS.values(), ids=BUILDS)
def test_the_model_is_base_plus_global_plus_start(
    build: Callable[[], nn.Module], targets: tuple[str, ...], inputs: Tensor, dense: bool, merge: bool
) -> None:
    model = adapted(build, merge, target_modules=targets)
    whole = random_adapter(model, 5, seed=2, dense=dense)
    start = random_adapter(model, 3, seed=3)
    plain = logits(model.model, inputs)
    model.use_global(whole, "one")
    model.load(Adapter.empty())
    expected = logits(with_update(build, whole), inputs)
    torch.testing.assert_close(logits(model.model, inputs), expected, rtol=1e-5, atol=1e-5)
    model.load(start)
    expected = logits(with_update(build, whole, start), inputs)
    torch.testing.assert_close(logits(model.model, inputs), expected, rtol=1e-5, atol=1e-5)
    model.use_global(Adapter.empty(), "none")
    model.load(Adapter.empty())
    assert torch.equal(logits(model.model, inputs), plain)


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "unmerged"])
def test_a_layer_that_the_global_adapter_drops_is_pristine_again(merge: bool) -> None:
    model = adapted(merge=merge)
    whole = random_adapter(model, 2)
    first = dict(list(whole.layers.items())[:1])
    model.use_global(whole, "all")
    model.use_global(Adapter.pack(first), "first")
    model.load(Adapter.empty())
    expected = logits(with_update(llama, Adapter.pack(first)))
    torch.testing.assert_close(logits(model.model), expected, rtol=1e-5, atol=1e-5)
    assert model.holds("first")
    assert not model.holds("all")


def test_a_bf16_base_trains_fp32_factors_and_is_merged_in_fp32() -> None:
    model = AdaptedModel(BaseModel(lambda: llama().bfloat16()), Lora(target_modules=TARGETS))
    given = random_adapter(model, 4)
    model.load(given)
    assert torch.equal(model.read().flat, given.flat)
    model.use_global(given, "one")
    name = next(iter(given.layers))
    weight = model.layers[name].get_base_layer().weight
    pristine = llama().bfloat16().get_submodule(name).weight
    assert torch.equal(weight, (pristine.float() + given.layers[name].dense()).bfloat16())


def pointers(model: nn.Module) -> dict[str, int]:
    found = {name.replace(".base_layer", ""): value.data_ptr() for name, value in model.named_parameters()}
    return {name.removeprefix("base_model.model."): place for name, place in found.items() if "lora_" not in name}


def test_workers_share_the_base_and_nothing_else() -> None:
    base = BaseModel(llama)
    one, two = (AdaptedModel(base, Lora(target_modules=TARGETS)) for _ in range(2))
    assert pointers(one.model) == pointers(two.model)
    assert set(pointers(one.model)) == set(dict(llama().named_parameters()))
    mine, other = random_adapter(one, 4, seed=1), random_adapter(one, 8, seed=2)
    one.load(mine)
    two.load(other)
    before = logits(two.model)
    one.use_global(random_adapter(one, 3, seed=3), "v")
    train_a_little(one)
    assert torch.equal(two.read().flat, other.flat)
    assert torch.equal(logits(two.model), before)
    assert not torch.equal(one.read().flat, mine.flat)
    two.use_global(random_adapter(one, 3, seed=3), "v")
    name = next(iter(mine.layers))
    assert one.layers[name].get_base_layer().weight.data_ptr() == two.layers[name].get_base_layer().weight.data_ptr()


def train_a_little(model: AdaptedModel, factors: Any = "ab", steps: int = 2) -> list[nn.Parameter]:
    parameters = model.train_only(factors)
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
    model.model.train()
    for _ in range(steps):
        found = model.model(TOKENS)
        found.logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.model.eval()
    return parameters


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "unmerged"])
def test_training_leaves_the_base_as_it_was(merge: bool) -> None:
    pristine = llama()
    before = copy.deepcopy(pristine.state_dict())
    base = BaseModel(lambda: pristine)
    model = AdaptedModel(base, Lora(target_modules=TARGETS), merge_global=merge)
    whole = random_adapter(model, 3)
    model.use_global(whole, "v")
    model.load(random_adapter(model, 4))
    train_a_little(model)
    model.use_global(Adapter.empty(), "")
    after = pristine.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    fresh = AdaptedModel(base, Lora(target_modules=TARGETS))
    assert torch.equal(logits(fresh.model), logits(llama()))


@pytest.mark.parametrize(("factors", "learning"), [("ab", "AB"), ("b", "B"), ("a", "A")])
def test_only_the_named_factors_learn(factors: str, learning: str) -> None:
    model = adapted()
    given = random_adapter(model, 4)
    model.load(given)
    chosen = train_a_little(model, factors)
    named = {name for name, parameter in model.model.named_parameters() if parameter.requires_grad}
    assert named == {name for name, _ in model.model.named_parameters() if f"lora_{learning[0]}" in name} | {
        name for name, _ in model.model.named_parameters() if f"lora_{learning[-1]}" in name
    }
    assert len(chosen) == len(named)
    got = model.read()
    numel = given.layout.head_numel
    assert torch.equal(got.flat[:numel], given.flat[:numel]) == ("b" not in factors)
    assert torch.equal(got.inner_factors, given.inner_factors) == ("a" not in factors)


def test_flags_follow_the_order_of_the_moment() -> None:
    model = adapted()
    assert len(model.train_only("ab")) == 2 * len(model.train_only("b"))
    assert not any(p.requires_grad for name, p in model.model.named_parameters() if "lora_A" in name)


def head_model(merge: bool = True) -> AdaptedModel:
    return adapted(classifier, merge, head=("score",))


def test_heads_are_loaded_trained_read_and_never_shared() -> None:
    base = BaseModel(classifier)
    one, two = (AdaptedModel(base, Lora(target_modules=TARGETS, head=("score",))) for _ in range(2))
    assert list(one.heads) == ["score.weight"]
    given = random_adapter(one, 4)
    one.load(given)
    assert torch.equal(one.read().flat, given.flat)
    assert torch.equal(logits(two.model), logits(classifier()))
    train_a_little(one, "b")
    assert not torch.equal(one.read().extras["score.weight"], given.extras["score.weight"])
    assert torch.equal(two.heads["score.weight"], classifier().get_submodule("score").weight)
    one.load(given)
    assert torch.equal(one.read().flat, given.flat)
    one.load(Adapter.empty())
    assert torch.equal(logits(one.model), logits(classifier()))


def test_the_head_is_part_of_what_is_computed() -> None:
    model = head_model()
    given = random_adapter(model, 4)
    model.load(given)
    expected = with_update(classifier, given)
    expected.get_submodule("score").weight.data = given.extras["score.weight"].clone()
    torch.testing.assert_close(logits(model.model), logits(expected), rtol=1e-5, atol=1e-5)


def test_the_description_keeps_the_initial_heads() -> None:
    model = head_model()
    model.load(random_adapter(model, 4))
    train_a_little(model)
    spec = model.spec(9)
    assert torch.equal(spec.heads["score.weight"], classifier().get_submodule("score").weight)
    assert (spec.seed, spec.method) == (9, "lora")


def test_the_description_names_layers_as_the_base_model_does() -> None:
    spec = adapted(gpt2, target_modules=("c_attn", "c_proj")).spec(0)
    assert spec.layers["transformer.h.0.attn.c_attn"] == (48, 16)
    assert spec.layers["transformer.h.1.mlp.c_proj"] == (16, 64)
    assert list(spec.layers) == sorted(spec.layers)
    assert adapted(picture, target_modules=("conv",)).spec(0).layers == {"conv": (4, 27)}


def test_layers_that_an_adapter_lacks_change_nothing() -> None:
    model = adapted()
    model.load(random_adapter(model, 4))
    model.load(Adapter.empty())
    assert torch.equal(logits(model.model), logits(llama()))
    assert not model.read().flat[: model.read().layout.head_numel].any()


def test_what_is_loaded_is_copied() -> None:
    model = adapted(alpha=4.0)
    given = random_adapter(model, 4)
    before = given.flat.clone()
    model.load(given)
    train_a_little(model)
    assert torch.equal(given.flat, before)


def test_a_dense_layer_that_nobody_says_learns_does_not() -> None:
    model = adapted()
    given = random_adapter(model, 4, dense=True)
    model.load(given)
    assert not any(parameter.numel() for parameter in model.train_only("sparse"))
    assert torch.equal(model.read().flat, given.flat)


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "unmerged"])
@pytest.mark.parametrize("load", [True, False], ids=["load", "use_global"])
def test_the_adapter_of_another_model_is_refused(merge: bool, load: bool) -> None:
    model = adapted(merge=merge)
    before = logits(model.model)
    use = model.load if load else lambda adapter: model.use_global(adapter, "v")
    with pytest.raises(ConfigurationError, match=r"layer transformer\.h\.0\.attn\.c_attn that this model does not"):
        use(random_adapter(adapted(gpt2, target_modules=("c_attn",)), 2))
    name = next(iter(model.layers))
    with pytest.raises(ConfigurationError, match=rf"{name} is \(16, 17\); the model's is \(16, 24\)"):
        use(Adapter.pack({name: LowRank(torch.zeros(16, 2), torch.zeros(2, 17))}))
    with pytest.raises(ConfigurationError, match=rf"{name} is \(17, 24\)"):
        use(Adapter.pack({name: LowRank(torch.zeros(17, 2), torch.zeros(2, 24))}))
    assert torch.equal(logits(model.model), before)
    assert not model.holds("v")


def with_dropout(seed: int, model: AdaptedModel) -> Tensor:
    """Compute in training mode with the dropout that ``seed`` gives."""
    model.load(random_adapter(model, 4), seed)
    model.model.train()
    try:
        return logits(model.model)
    finally:
        model.model.eval()


def test_dropout_follows_its_seed_and_nothing_else() -> None:
    model, other = adapted(dropout=0.5), adapted(dropout=0.5)
    first = with_dropout(1, model)
    torch.rand(7)  # torch's global generator plays no part
    assert torch.equal(with_dropout(1, other), first)
    assert not torch.equal(with_dropout(2, model), first)
    assert torch.equal(with_dropout(1, model), first)
    model.load(random_adapter(model, 4))
    torch.testing.assert_close(
        logits(model.model), logits(with_update(llama, random_adapter(model, 4))), rtol=1e-5, atol=1e-5
    )


def test_each_layer_drops_other_entries() -> None:
    model = adapted(dropout=0.5)
    model.load(random_adapter(model, 4), 1)
    dropouts = [layer.lora_dropout[ADAPTER].train() for layer in model.layers.values()]
    masks = {tuple(dropout(torch.ones(16)).tolist()) for dropout in dropouts}
    assert len(masks) == len(dropouts)


def test_dropout_keeps_the_mean() -> None:
    dropout = SeededDropout(0.25).train()
    dropped = dropout(torch.ones(40_000))
    assert dropped.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)
    assert torch.equal(dropout.eval()(torch.ones(5)), torch.ones(5))


def test_the_global_generator_is_left_alone() -> None:
    base = BaseModel(llama)
    before = torch.random.get_rng_state()
    model = AdaptedModel(base, Lora(target_modules=TARGETS, dropout=0.5))
    model.use_global(random_adapter(model, 2), "v")
    model.load(random_adapter(model, 4), 3)
    train_a_little(model)
    model.read()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_process_loads_a_base_model_once_and_keeps_the_last() -> None:
    loaded = []

    def load() -> nn.Module:
        loaded.append(1)
        return llama()

    one = base_model("test: one", load)
    assert base_model("test: one", load) is one
    base_model("test: two", load)
    assert base_model("test: one", load) is not one
    assert len(loaded) == 3


def test_a_merged_copy_is_built_once_per_version() -> None:
    base = BaseModel(llama)
    model = AdaptedModel(base, Lora(target_modules=TARGETS))
    whole = random_adapter(model, 2)
    first = base.merged(whole, "one")
    assert base.merged(whole, "one") is first
    assert base.merged(whole, "two") is not first
