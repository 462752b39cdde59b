"""Per-row gradients of one backward pass equal those of one example at a time, for every kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from client.privacy.gradients import record as record_module
from client.privacy.gradients.attach import per_sample
from common.adapted_model import AdaptedModel, SeededDropout, lora_layers
from common.adapter import Adapter
from common.base_model import BaseModel
from common.core_factor import cored
from common.lowrank import LowRank
from common.methods.lora import Lora
from tests import private_models as models
from tests.private_models import Case

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def recorded(case: Case, clipping_norm: float) -> tuple[Tensor, list[Tensor]]:
    """Return all rows' norms and the clipped sums, from one backward pass."""
    with per_sample(case.model, case.parameters) as record:
        record.rows = case.rows
        case.all_losses().sum().backward()
        norms, sums = record.norms(), record.clipped_sums(clipping_norm)
        return norms, [
            torch.zeros_like(parameter) if found is None else found
            for parameter, found in zip(case.parameters, sums, strict=True)
        ]


def errors(found: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """Return the error over all parameters, and the largest of one parameter, each relative.

    Some gradients are zero but for rounding (a bias of keys, say): one is not held to its own size below a thousandth
    of the whole.
    """
    whole = torch.cat([one.flatten() for one in expected]).norm()
    apart = [float((one - other).norm()) for one, other in zip(found, expected, strict=True)]
    sizes = [float(torch.maximum(one.norm(), whole / 1000)) for one in expected]
    return sum(gap**2 for gap in apart) ** 0.5 / float(whole), max(a / s for a, s in zip(apart, sizes, strict=True))


def assert_right(case: Case, expected: list[list[Tensor]] | None = None, tolerance: float = 1e-5) -> None:
    expected = case.one_at_a_time() if expected is None else expected
    norms = models.norms_of(expected)
    clipping_norm = float(norms.median())
    found_norms, found = recorded(case, clipping_norm)
    torch.testing.assert_close(found_norms, norms, rtol=tolerance, atol=0)
    whole, worst = errors(found, models.clipped_sums_of(expected, clipping_norm))
    assert whole < tolerance
    assert worst < 30 * tolerance


CASES: dict[str, Callable[[], Case]] = {
    "llama": lambda: models.llama_lora(),
    "llama padded": lambda: models.causal(models.adapted(models.llama(), target_modules="all-linear"), padded=True),
    "llama ffa": lambda: models.causal(models.freeze(models.llama_lora().model, "lora_A")),
    "llama only a": lambda: models.causal(models.freeze(models.llama_lora().model, "lora_B")),
    "llama lora_bias": lambda: models.llama_lora(lora_bias=True),
    "llama saved head and embedding": lambda: models.llama_lora(
        target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]
    ),
    "llama tied and trained": lambda: models.causal(
        models.thaw(models.llama(tie_word_embeddings=True).requires_grad_(False), "embed_tokens")
    ),
    "llama tied, head saved": lambda: models.causal(
        models.adapted(models.llama(tie_word_embeddings=True), target_modules=["q_proj"], modules_to_save=["lm_head"])
    ),
    "llama norms": lambda: models.causal(models.thaw(models.llama_lora().model, "norm")),
    "llama embedding adapter": lambda: models.llama_lora(target_modules=["embed_tokens", "v_proj"]),
    "bert": lambda: models.classifier("bert"),
    "roberta": lambda: models.classifier("roberta"),
    "gpt2": models.gpt2,
    "vit": models.vit,
    "unet": lambda: models.unet("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv"),
}


@pytest.mark.parametrize("name", CASES)
def test_norms_and_clipped_sums_equal_one_example_at_a_time(name: str) -> None:
    assert_right(CASES[name]())


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_rows_outside_a_record_are_trained_as_ever(name: str) -> None:
    case = CASES[name]()
    plain = torch.autograd.grad(case.all_losses().sum(), case.parameters)
    with per_sample(case.model, case.parameters):
        inside = torch.autograd.grad(case.all_losses().sum(), case.parameters)
    assert all(torch.equal(one, other) for one, other in zip(plain, inside, strict=True))


@pytest.mark.parametrize("share", [0.0, 1e9])  # gradients are always formed, and never
@pytest.mark.parametrize(
    "name", ["llama saved head and embedding", "llama tied and trained", "llama embedding adapter"]
)
def test_both_forms_give_the_same(name: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "STORES_LESS", share)
    assert_right(CASES[name]())


def from_one_pass(case: Case) -> list[list[Tensor]]:
    """Return each row's gradients from one ordinary forward pass: of the same dropout mask."""
    losses = case.all_losses()
    return [list(torch.autograd.grad(loss, case.parameters, retain_graph=True)) for loss in losses]


def test_dropout_drops_the_same_entries() -> None:
    case = models.llama_lora(lora_dropout=0.3)
    for name, module in case.model.named_modules():
        for key, child in module.named_children():
            if isinstance(child, nn.Dropout) and "lora_dropout" in name:
                setattr(module, key, SeededDropout(0.3))
    expected = from_one_pass(case)
    assert not torch.equal(expected[1][0], case.one_at_a_time()[1][0])
    assert_right(case, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_both_kinds_of_checkpointing_give_the_same(reentrant: bool) -> None:
    case = models.llama_lora(lora_dropout=0.0)
    expected = case.one_at_a_time()
    inner = cast(Any, case.model).get_base_model()
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        inner.enable_input_require_grads()
    assert_right(case, expected)


def test_a_second_frozen_adapter_takes_part() -> None:
    case = models.llama_lora()
    model = cast(Any, case.model)
    model.add_adapter("fixed", LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "fixed" in name:
            nn.init.normal_(parameter, std=0.1)
    model.base_model.set_adapter(["default", "fixed"])
    models.freeze(model, "fixed")
    assert_right(case)


def test_a_core_between_frozen_factors() -> None:
    case = models.llama_lora()
    layers = lora_layers(case.model).values()
    for layer in layers:
        b = layer.lora_B["default"]
        layer.lora_B["default"] = cored(b, torch.linalg.qr(b.weight.detach())[0])
    case.model.requires_grad_(False)
    models.thaw(case.model, "core")
    assert len(case.parameters) == len(layers)
    assert_right(case)


def test_a_global_adapter_beside_the_base_takes_part() -> None:
    model = AdaptedModel(BaseModel(models.llama), Lora(target_modules=("q_proj", "down_proj")), merge_global=False)
    shapes = model.spec(0).layers
    layers = {name: LowRank(torch.randn(out, 2), torch.randn(2, inn)) for name, (out, inn) in shapes.items()}
    model.load(Adapter.pack(layers, {}, "lora"))
    case = models.causal(model.model)
    parameters = model.train_only("ab")
    without = case.one_at_a_time()
    model.use_global(Adapter.pack(layers, {}, "lora"), "one")
    assert not torch.allclose(case.one_at_a_time()[0][0], without[0][0], rtol=0.01)
    assert len(parameters) == len(case.parameters)
    assert_right(case)


def test_a_bf16_base_under_fp32_adapters() -> None:
    case = models.causal(models.adapted(models.llama().bfloat16(), target_modules="all-linear"))
    assert {parameter.dtype for parameter in case.parameters} == {torch.float32}
    # A row alone and in a batch differ by the rounding of bf16, so that the same pass is the oracle.
    assert_right(case, from_one_pass(case), tolerance=1e-2)


def test_autocast_forward_and_backward_outside() -> None:
    case = models.llama_lora()
    exact = case.one_at_a_time()
    clipping_norm = float(models.norms_of(exact).median())
    inner = case.losses

    def under_autocast(model: nn.Module, batch: models.Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return inner(model, batch)

    norms, sums = recorded(Case(case.model, case.batch, under_autocast), clipping_norm)
    assert {found.dtype for found in sums} == {torch.float32}
    torch.testing.assert_close(norms, models.norms_of(exact), rtol=0.03, atol=0)
    assert errors(sums, models.clipped_sums_of(exact, clipping_norm))[0] < 0.03


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 3), (4, 5)),
        (nn.Linear(5, 3), (4, 2, 3, 5)),
        (Conv1D(3, 5), (4, 6, 5)),
        (nn.Conv2d(3, 2, 3, stride=2, padding=1), (4, 3, 5, 7)),
        (nn.Conv2d(3, 2, (2, 3), dilation=2, padding=(1, 2)), (4, 3, 6, 6)),
        (nn.Conv2d(3, 2, 1), (4, 3, 4, 4)),
        (nn.Conv2d(3, 2, 1, stride=2, bias=False), (4, 3, 5, 5)),
        (nn.LayerNorm((3, 5)), (4, 2, 3, 5)),
        (nn.LayerNorm(5, bias=False), (4, 5)),
        (nn.RMSNorm(5), (4, 2, 5)),
        (nn.GroupNorm(2, 4), (4, 4, 3, 3)),
        (LlamaRMSNorm(5), (4, 3, 2, 5)),
        (T5LayerNorm(5), (4, 3, 5)),
        (Gemma2RMSNorm(5), (4, 3, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_every_rule_alone(layer: nn.Module, shape: tuple[int, ...]) -> None:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    model = nn.Sequential(layer, nn.Tanh())
    assert_right(Case(model, {"x": torch.randn(shape)}, lambda model, batch: _sum(model(batch["x"]).square())))


def test_a_padding_number_learns_nothing() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, padding_idx=0), nn.Tanh())
    ids = torch.tensor([[1, 0, 1, 5], [0, 0, 2, 2]])
    assert_right(Case(model, {"ids": ids}, lambda model, batch: _sum(model(batch["ids"]) + 1)))


def _sum(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)


def test_a_layer_used_twice_adds_up() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.norm(self.layer(x).tanh())
            return x

    batch = {"x": torch.randn(4, 9, 4)}
    for tokens in (9, 1):  # gradients are formed; outer products are kept
        shorter = {"x": batch["x"][:, :tokens]}
        assert_right(Case(Twice(), shorter, lambda model, batch: _sum(model(batch["x"])[..., 0].sin())))


def test_rows_that_are_not_finite_count_as_zero() -> None:
    for shape in ((4, 3), (4, 20, 3)):
        x = torch.randn(shape)
        case = Case(nn.Linear(3, 3), {"x": x}, lambda model, batch: _sum(model(batch["x"]).sin()))
        expected = case.one_at_a_time()
        case.batch["x"][1] = torch.inf  # type: ignore[index]
        case.batch["x"][3].flatten()[0] = torch.nan  # type: ignore[index]
        norms, found = recorded(case, 0.5)
        assert [bool(torch.isfinite(norm)) for norm in norms] == [True, False, True, False]
        whole, _ = errors(found, models.clipped_sums_of([expected[0], expected[2]], 0.5))
        assert whole < 1e-5


def test_clipped_rows_have_at_most_the_norm_and_small_ones_are_untouched() -> None:
    x = torch.randn(6, 3)
    case = Case(nn.Linear(3, 2), {"x": x}, lambda model, batch: _sum(model(batch["x"])))
    norms, _ = recorded(case, 1.0)
    clipping_norm = float(norms.median()) + 1e-3
    for row, norm in enumerate(norms):
        alone = Case(case.model, {"x": x[row : row + 1]}, case.losses)
        (_, clipped), (_, plain) = recorded(alone, clipping_norm), recorded(alone, 1e9)
        size = torch.cat([part.flatten() for part in clipped]).double().norm()
        assert size <= clipping_norm * (1 + 1e-6)
        if norm < clipping_norm - 1e-5:
            assert all(torch.equal(one, other) for one, other in zip(clipped, plain, strict=True))


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize("frozen", ["nothing", "lora_A", "lora_B"])
@pytest.mark.parametrize("share", [0.0, 1.0, 1e9])
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("llama ffa", "llama only a")])
def test_whole_matrix(
    name: str, share: float, frozen: str, checkpointing: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_module, "STORES_LESS", share)
    case = CASES[name]()
    models.freeze(case.model, frozen)
    expected = case.one_at_a_time()
    model = cast(Any, case.model.get_base_model() if isinstance(case.model, PeftModel) else case.model)
    if checkpointing is not None and hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        if checkpointing:
            model.enable_input_require_grads()
    assert_right(case, expected)
