"""PEFT folders: what PEFT wrote is read at its own scale, what we write PEFT loads, all but plain LoRA is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from common.adapted_model import PREFIX, lora_layers
from common.adapter import Adapter
from common.adapter_file import adapter_bytes
from common.base_model import add_update
from common.errors import ConfigurationError, DataError
from common.lowrank import Dense, LowRank, Update
from common.peft_folder import CONFIG, WEIGHTS, read_adapter, write_peft_folder

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


def seeded(build: Callable[[], nn.Module], seed: int = 5) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().eval()


def llama() -> nn.Module:
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**SMALL)))


def classifier() -> nn.Module:
    return seeded(lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL | {"num_labels": 3})))


def gpt2() -> nn.Module:
    return seeded(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)))


class Picture(nn.Module):
    """A convolution, and two linear layers of which one's name is the end of the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, kernel_size=3, padding=1, stride=2)
        self.fc = nn.Linear(16, 6)
        self.top = nn.ModuleDict({"fc": nn.Linear(6, 5)})

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.top["fc"](self.fc(self.conv(x).relu().flatten(1)))
        return result


def picture() -> nn.Module:
    return seeded(Picture)


PIXELS = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = model(PIXELS if any(isinstance(module, nn.Conv2d) for module in model.modules()) else TOKENS)
    result: Tensor = found if isinstance(found, Tensor) else found.logits
    return result


def random_updates(model: nn.Module, ranks: Mapping[str, int]) -> Adapter:
    """Build updates of the given ranks; -1 is a dense layer."""
    generator = torch.Generator().manual_seed(2)
    layers: dict[str, Update] = {}
    for name, rank in ranks.items():
        module = model.get_submodule(name)
        weight = cast(Tensor, module.weight)
        out, inn = (weight.shape[1], weight.shape[0]) if type(module).__name__ == "Conv1D" else weight.flatten(1).shape
        if rank < 0:
            layers[name] = Dense(0.3 * torch.randn(out, inn, generator=generator))
        else:
            b, a = torch.randn(out, rank, generator=generator), torch.randn(rank, inn, generator=generator)
            layers[name] = LowRank(0.3 * b, a)
    return Adapter.pack(layers)


def with_adapter(build: Callable[[], nn.Module], adapter: Adapter) -> nn.Module:
    model = build()
    for name, update in adapter.layers.items():
        module = model.get_submodule(name)
        module.weight = nn.Parameter(add_update(module, update.dense()))
    for name, value in adapter.extras.items():
        model.get_parameter(name).data = value
    return model


LLAMA = {
    "model.layers.0.self_attn.q_proj": 1,
    "model.layers.0.mlp.down_proj": 3,
    "model.layers.1.self_attn.q_proj": 8,
    "model.layers.1.mlp.up_proj": -1,
}
GPT2 = {"transformer.h.0.attn.c_attn": 2, "transformer.h.1.attn.c_attn": 5, "transformer.h.1.mlp.c_proj": -1}


@pytest.mark.parametrize(("build", "ranks"), [(llama, LLAMA), (gpt2, GPT2)])
def test_peft_loads_what_is_written(tmp_path: Path, build: Callable[[], nn.Module], ranks: dict[str, int]) -> None:
    base = build()
    cast(Any, base).save_pretrained(tmp_path / "base")
    adapter = random_updates(base, ranks)
    write_peft_folder(adapter, tmp_path / "out", base, (str(tmp_path / "base"), None), "CAUSAL_LM")
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    assert list(lora_layers(loaded)) == sorted(ranks)
    found = outputs(loaded)
    assert not torch.allclose(found, outputs(build()), atol=1e-2)
    torch.testing.assert_close(found, outputs(with_adapter(build, adapter)), rtol=1e-4, atol=1e-4)


def test_peft_loads_convolutions_and_names_that_end_alike(tmp_path: Path) -> None:
    adapter = random_updates(picture(), {"conv": 3, "fc": 2, "top.fc": 5})
    write_peft_folder(adapter, tmp_path, picture(), ("picture", None), "FEATURE_EXTRACTION")
    loaded = PeftModel.from_pretrained(picture(), tmp_path)
    torch.testing.assert_close(
        outputs(loaded.base_model), outputs(with_adapter(picture, adapter)), rtol=1e-4, atol=1e-4
    )


def test_peft_loads_heads(tmp_path: Path) -> None:
    base = classifier()
    cast(Any, base).save_pretrained(tmp_path / "base")
    head = {"score.weight": torch.linspace(-1, 1, 48).view(3, 16)}
    adapter = Adapter.pack(random_updates(base, {"model.layers.0.self_attn.v_proj": 2}).layers, head)
    write_peft_folder(adapter, tmp_path / "out", base, (str(tmp_path / "base"), None), "SEQ_CLS")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path / "out"), num_labels=3)
    torch.testing.assert_close(outputs(loaded), outputs(with_adapter(classifier, adapter)), rtol=1e-4, atol=1e-4)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    adapter = Adapter.pack(random_updates(llama(), LLAMA).layers, {"score.weight": torch.ones(2, 3)})
    write_peft_folder(adapter, tmp_path, llama(), ("base", None), "CAUSAL_LM")
    again = read_adapter(tmp_path)
    assert torch.equal(again.extras["score.weight"], torch.ones(2, 3))
    assert again.layers.keys() == adapter.layers.keys()
    for name, update in adapter.layers.items():
        torch.testing.assert_close(again.layers[name].dense(), update.dense(), rtol=1e-5, atol=1e-6)
        if isinstance(update, LowRank):
            assert torch.equal(cast(LowRank, again.layers[name]).a, update.a)
    (tmp_path / "adapter.safetensors").write_bytes(adapter_bytes(adapter))
    assert torch.equal(read_adapter(tmp_path / "adapter.safetensors").flat, adapter.flat)


def test_the_configuration_says_what_is_inside(tmp_path: Path) -> None:
    write_peft_folder(random_updates(llama(), LLAMA), tmp_path, llama(), ("some/base", "v2"), "CAUSAL_LM")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert config["revision"] == "v2"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["inference_mode"] is True
    assert config["use_rslora"] is False
    assert sorted(config["target_modules"]) == sorted(LLAMA)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS}


@pytest.mark.parametrize("layers", [{}, {"model.layers.0.self_attn.q_proj": 0}], ids=["none", "rank 0"])
def test_an_adapter_that_changes_nothing_is_not_written(tmp_path: Path, layers: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="the adapter changes nothing yet; export a round after training"):
        write_peft_folder(random_updates(llama(), layers), tmp_path / "out", llama(), ("base", None), "CAUSAL_LM")
    assert not (tmp_path / "out").exists()


def made_by_peft(folder: Path, build: Callable[[], nn.Module] = llama, config: Any = None, **options: Any) -> PeftModel:
    """Let PEFT write a folder of an adapter whose factors are all random."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | options
    with torch.random.fork_rng():
        torch.manual_seed(9)
        model = get_peft_model(cast(Any, build()), config or LoraConfig(**cast(Any, settings)))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter) * 0.2
    assert isinstance(model, PeftModel)
    model.save_pretrained(str(folder))
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 7}},
        {"alpha_pattern": {"down_proj": 3, "model.layers.1.self_attn.q_proj": 11}},
        {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 5}, "use_rslora": True},
        {"alpha_pattern": {r".*\.1\..*proj": 2.5}},
        {"init_lora_weights": "gaussian"},
        {"lora_dropout": 0.3},
        {"target_modules": r".*layers\.1.*(gate|up)_proj"},
    ],
    ids=str,
)
def test_folders_of_peft_are_read_at_their_scale(tmp_path: Path, options: dict[str, Any]) -> None:
    model = made_by_peft(tmp_path, **options)
    found = read_adapter(tmp_path)
    modules = lora_layers(model)
    assert found.layers.keys() == modules.keys()
    for name, update in found.layers.items():
        torch.testing.assert_close(update.dense(), modules[name].get_delta_weight("default"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs(with_adapter(llama, found)), outputs(model), rtol=1e-4, atol=1e-5)


def test_conv1d_layers_of_peft_are_read(tmp_path: Path) -> None:
    model = made_by_peft(tmp_path, gpt2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    torch.testing.assert_close(
        outputs(with_adapter(gpt2, read_adapter(tmp_path))), outputs(model), rtol=1e-4, atol=1e-5
    )


def test_convolutions_of_peft_are_read(tmp_path: Path) -> None:
    model = made_by_peft(tmp_path, picture, target_modules=["conv", "top.fc"])
    torch.testing.assert_close(
        outputs(with_adapter(picture, read_adapter(tmp_path))), outputs(model), rtol=1e-4, atol=1e-5
    )


def test_heads_of_peft_are_read(tmp_path: Path) -> None:
    model = made_by_peft(tmp_path, classifier, modules_to_save=["score"], task_type="SEQ_CLS")
    found = read_adapter(tmp_path)
    assert list(found.extras) == ["score.weight"]
    torch.testing.assert_close(outputs(with_adapter(classifier, found)), outputs(model), rtol=1e-4, atol=1e-5)


def test_half_precision_is_widened(tmp_path: Path) -> None:
    made_by_peft(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({name: value.bfloat16() for name, value in tensors.items()}, tmp_path / WEIGHTS)
    update = read_adapter(tmp_path).layers["model.layers.0.self_attn.q_proj"]
    assert isinstance(update, LowRank)
    assert update.a.dtype == torch.float32
    assert torch.equal(update.a, tensors[PREFIX + "model.layers.0.self_attn.q_proj.lora_A.weight"].bfloat16().float())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "holds LoRA with use_dora; only plain LoRA can be taken over"),
        ({"config": IA3Config(target_modules=["q_proj"], feedforward_modules=[])}, "holds IA3 weights; only plain"),
        ({"build": gpt2, "target_modules": ["c_attn"], "bias": "all"}, "holds trained biases (bias 'all'); only"),
        ({"build": gpt2, "target_modules": ["c_attn"], "bias": "lora_only"}, "(bias 'lora_only')"),
        ({"lora_bias": True, "build": gpt2, "target_modules": ["c_attn"]}, "holds LoRA with lora_bias"),
        ({"init_lora_weights": "pissa"}, "holds factors for changed base weights (init_lora_weights 'pissa')"),
        ({"init_lora_weights": "olora"}, "(init_lora_weights 'olora')"),
        ({"target_modules": ["embed_tokens"]}, "model.embed_tokens.lora_embedding_A is not expressible as plain LoRA"),
        ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, "holds LoRA with trainable_token_indices"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_anything_but_plain_lora_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    made_by_peft(tmp_path, **options)
    with pytest.raises(DataError, match=re.escape(said)) as caught:
        read_adapter(tmp_path)
    assert "\n" not in str(caught.value)


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / CONFIG).unlink(), "is no readable PEFT folder"),
        (lambda folder: (folder / WEIGHTS).unlink(), "expected adapter_config.json and adapter_model.safetensors"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 20), "is no readable PEFT folder"),
        (lambda folder: (folder / CONFIG).write_text("{"), "is no readable PEFT folder"),
        (lambda folder: (folder / CONFIG).write_bytes(b"\xff"), "is no readable PEFT folder"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "holds no adapter configuration"),
        (lambda folder: edit(folder, lora_alpha="much"), "has lora_alpha 'much'; expected a number"),
        (lambda folder: edit(folder, lora_alpha=float("nan")), "has lora_alpha nan; expected a number"),
        (lambda folder: edit(folder, lora_alpha=None), "has lora_alpha None; expected a number"),
        (lambda folder: edit(folder, alpha_pattern=[3]), "alpha_pattern is [3]; expected a table of layers"),
        (lambda folder: edit(folder, alpha_pattern={"(": 3}), "alpha_pattern has a key that is no regular exp"),
        (lambda folder: keep(folder, "lora_A"), "has lora_A but no lora_B"),
        (lambda folder: keep(folder, "lora_B"), "holds no LoRA layer"),
        (lambda folder: keep(folder, "nothing"), "holds no LoRA layer"),
        (lambda folder: cut(folder), "do not form b (out, r) @ a (r, in)"),
    ],
    ids=range(15),
)
def test_a_damaged_folder_is_one_line(tmp_path: Path, damage: Callable[[Path], Any], said: str) -> None:
    made_by_peft(tmp_path)
    damage(tmp_path)
    with pytest.raises((DataError, ConfigurationError), match=re.escape(said)) as caught:
        read_adapter(tmp_path)
    assert "\n" not in str(caught.value)


LIES = "layer model.layers.0.self_attn.q_proj has rank {}"
FACTORS = "but its tensors are lora_A (4, 16) and lora_B (16, 4), of rank 4; PEFT cannot load such a folder"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank_pattern": {"q_proj": 7}}, f"{LIES.format(7)} by adapter_config.json, {FACTORS}"),
        ({"r": 0}, "has rank 0 by adapter_config.json, but"),
        ({"r": -3}, "has rank -3 by"),
        ({"r": 4.0}, "has rank 4.0 by"),
        ({"r": None}, "has rank None by"),
        ({"rank_pattern": [4]}, "rank_pattern is [4]; expected a table of layers"),
        ({"rank_pattern": {"(a+)+$|(.*)*x": 4}}, "rank_pattern has a key that is no regular expression to read safely"),
        ({"lora_alpha": 10**400}, "lora_alpha 100000000000000000...0000000000000000000; expected a number, at most"),
        ({"peft_type": "two\nlines"}, "holds no known kind of weights"),
    ],
    ids=range(9),
)
def test_a_configuration_that_lies_is_refused_and_a_rank_by_peft_too(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    made_by_peft(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(DataError, match=re.escape(said)) as caught:
        read_adapter(tmp_path)
    assert "\n" not in str(caught.value)
    if "r" in changes or changes.get("rank_pattern") == {"q_proj": 7}:
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda name, value: value[:0] if "lora_A" in name else value[:, :0],
            "lora_A (0, 24) and lora_B (16, 0) do not form",
        ),
        (lambda name, value: value.flatten(), "lora_A (96,) and lora_B (64,) do not form"),
        (lambda name, value: value.sum(), "lora_A () and lora_B () do not form b (out, r) @ a (r, in)"),
        (lambda name, value: value.to(torch.complex64), "holds torch.complex64; expected plain numbers"),
    ],
    ids=["no rows", "vector", "scalar", "complex"],
)
def test_tensors_that_are_no_factors_are_one_line(
    tmp_path: Path, change: Callable[[str, Tensor], Tensor], said: str
) -> None:
    made_by_peft(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({name: change(name, value).contiguous() for name, value in tensors.items()}, tmp_path / WEIGHTS)
    with pytest.raises(DataError, match=re.escape(said)):
        read_adapter(tmp_path)


@pytest.mark.parametrize("name", ["a..b", "(a+)+$", "two\nlines", "x" * 300])
def test_a_layer_that_no_module_can_be_is_refused(tmp_path: Path, name: str) -> None:
    """Its name would become a pattern of what is written."""
    made_by_peft(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(tensors | {f"{PREFIX}{name}.lora_A.weight": torch.ones(4, 16)}, tmp_path / WEIGHTS)
    with pytest.raises(DataError, match="is named as no module's weight") as caught:
        read_adapter(tmp_path)
    assert "\n" not in str(caught.value)


def test_half_a_layer_among_whole_ones_is_refused(tmp_path: Path) -> None:
    made_by_peft(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors[f"{PREFIX}model.layers.1.self_attn.q_proj.lora_A.weight"]
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(DataError, match="q_proj has lora_B but no lora_A"):
        read_adapter(tmp_path)


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path) -> None:
    place = tmp_path / "folder"
    made_by_peft(place)
    kept = (place / CONFIG).read_text()
    (place / CONFIG).write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"folder: adapter_config\.json is nested too deeply"):
        read_adapter(place)
    (place / CONFIG).write_text(kept + " " * 1_000_000)
    with pytest.raises(DataError, match=r"adapter_config\.json is larger than 1000000 bytes"):
        read_adapter(place)
    for name in (CONFIG, WEIGHTS):
        content = (place / name).read_bytes()
        for make in (lambda path: path.symlink_to("/dev/zero"), os.mkfifo):
            (place / name).unlink()
            make(place / name)
            with pytest.raises(DataError, match=f"{name} is no regular file"):
                read_adapter(place)
            with pytest.raises(DataError, match="is no regular file; give a PEFT folder or an adapter file"):
                read_adapter(place / name)
        (place / name).unlink()
        (tmp_path / name).write_bytes(content if name == WEIGHTS else kept.encode())
        (place / name).symlink_to(tmp_path / name)  # as Hugging Face's cache does
    assert read_adapter(place).layers


def keep(folder: Path, part: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: value for name, value in tensors.items() if part in name}, folder / WEIGHTS)


def cut(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(
        {name: value[:3].contiguous() if "lora_A" in name else value for name, value in tensors.items()},
        folder / WEIGHTS,
    )


@pytest.mark.parametrize("content", [None, b"", b"no safetensors"], ids=["missing", "empty", "text"])
def test_a_file_that_is_no_adapter_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "adapter.safetensors").write_bytes(content)
    with pytest.raises(DataError, match="give a PEFT folder or an adapter file of LoRAFleet") as caught:
        read_adapter(tmp_path / "adapter.safetensors")
    assert "\n" not in str(caught.value)


def test_weights_alone_are_no_adapter_file(tmp_path: Path) -> None:
    made_by_peft(tmp_path / "folder")
    shutil.move(tmp_path / "folder" / WEIGHTS, tmp_path / WEIGHTS)
    with pytest.raises(DataError, match="holds no adapter adapter"):
        read_adapter(tmp_path / WEIGHTS)
