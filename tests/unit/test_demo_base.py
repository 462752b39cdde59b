"""The committed base model: small, complete, and as good as its card says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from simulations.demo.pretrain import PROBE, Recipe, new_model

BASE = Path(__file__).parents[2] / "simulations" / "demo" / "base"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(BASE).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(BASE)


def test_it_is_at_most_five_megabytes_and_names_no_place() -> None:
    assert {path.name for path in BASE.iterdir()} == {
        "MODEL_CARD.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 5_000_000
    for path in (*BASE.glob("*.md"), *BASE.glob("*config.json")):
        assert not re.search(r"/(home|root|tmp|usr|work|opt)/", path.read_text(encoding="utf-8"))


def test_it_loads_with_two_million_parameters_in_fp32(model: PreTrainedModel) -> None:
    assert model.dtype == torch.float32
    assert 2_000_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 2_300_000
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters" in card()


def test_its_loss_on_the_probe_is_the_cards(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = torch.tensor([[*tokenizer(PROBE)["input_ids"], tokenizer.eos_token_id]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss == pytest.approx(stated("probe text"), abs=2e-3)


def test_it_learned_prose_and_has_code_to_learn() -> None:
    owners = [float(loss) for loss in re.findall(r"\| owner .* \| ([\d.]+) \|", card())]
    assert len(owners) == 4
    assert stated("held-out prose") < min(owners)


def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "def f(x):\n\treturn  'ü €\x00'\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id) == (2048, 0, 1)


def test_the_recipe_makes_a_model_of_this_shape_without_touching_the_global_generator(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = torch.random.get_rng_state()
    fresh = new_model(tokenizer, Recipe())
    assert torch.random.get_rng_state().equal(before)
    shapes = {name: value.shape for name, value in fresh.state_dict().items()}
    assert shapes == {name: value.shape for name, value in model.state_dict().items()}


def card() -> str:
    """Return the model card's text."""
    return (BASE / "MODEL_CARD.md").read_text(encoding="utf-8")


def stated(what: str) -> float:
    """Return a loss the card states."""
    found = re.search(rf"\| {re.escape(what)} \| ([\d.]+) \|", card())
    assert found, f"the card states no loss on {what}"
    return float(found[1])
