"""Causal language modelling: its loss against transformers' own, base models of every state, rows and sources."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from common.errors import ConfigurationError, DataError
from common.experiment import ClientSettings
from common.tasks import Clients, Rows, clients_key
from common.tasks.causal_lm import BUILTIN_BASE, BUILTIN_UNSEEN, CausalLm, TextRows, tokenizer_of
from common.text.documents import read_documents
from common.text.stdlib import UNSEEN
from common.text.windows import IGNORED, TokenRows

WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "looked", "at", "the", "moon"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return CausalLm().load_base("fp32")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of documents of unequal lengths."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(6):
        (folder / f"{number}.txt").write_text(" ".join(WORDS[: number + 3] * (4 + 7 * number)))
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny GPT-2 that has dropout, and a tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_embd=16, n_layer=1, n_head=2, n_positions=64)).save_pretrained(
            folder
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN_BASE / name, folder)
    return folder


def only(folder: Path, **settings: Any) -> Clients:
    return clients_key({"ada": ClientSettings(data=str(folder), **settings)})


def held_out(task: CausalLm, folder: Path) -> TokenRows:
    rows = task.client_data("ada", only(folder), 0).held_out
    assert isinstance(rows, TextRows)
    return rows.rows


def own_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> float:
    """Return the loss transformers computes itself."""
    with torch.no_grad():
        return float(cast(Any, model)(input_ids=ids, labels=labels).loss)


@pytest.mark.parametrize("packing", [True, False])
def test_row_losses_are_transformers_own(model: nn.Module, texts: Path, packing: bool) -> None:
    rows = held_out(CausalLm(sequence_length=24, packing=packing), texts)
    assert bool((rows.labels == IGNORED).any()) != packing
    with torch.no_grad():
        losses = CausalLm().row_losses(model, TextRows(rows).take(torch.arange(len(rows))))
    own = [own_loss(model, rows.input_ids[[n]], rows.labels[[n]]) for n in range(len(rows))]
    torch.testing.assert_close(losses, torch.tensor(own), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_evaluation_is_transformers_own_loss_over_all_tokens(
    model: nn.Module, texts: Path, packing: bool, batch: int
) -> None:
    task = CausalLm(sequence_length=24, packing=packing, eval_rows=1000, eval_batch_size=batch)
    rows = held_out(task, texts)
    assert task.evaluate(model, TextRows(rows))["loss"] == pytest.approx(
        own_loss(model, rows.input_ids, rows.labels), rel=1e-5
    )


@pytest.mark.parametrize(("total", "limit", "chosen"), [(9, 3, [0, 4, 8]), (5, 5, [0, 1, 2, 3, 4]), (7, 1, [0])])
def test_evaluated_rows_are_spread_evenly(model: nn.Module, total: int, limit: int, chosen: list[int]) -> None:
    ids = torch.arange(total * 4).view(total, 4)
    rows = TextRows(TokenRows(ids, ids))
    measured = CausalLm(eval_rows=limit).evaluate(model, rows)["loss"]
    assert measured == pytest.approx(own_loss(model, ids[chosen], ids[chosen]), rel=1e-5)


def test_a_row_without_a_counted_token_costs_nothing(model: nn.Module) -> None:
    ids = torch.ones(2, 4, dtype=torch.long)
    rows = TextRows(TokenRows(ids, torch.full_like(ids, IGNORED)))
    with torch.no_grad():
        assert CausalLm().row_losses(model, rows.take(torch.arange(2))).tolist() == [0.0, 0.0]
    assert CausalLm().evaluate(model, rows) == {"loss": 0.0}


def test_samples_continue_the_prompt(model: nn.Module) -> None:
    task = CausalLm(prompts=("def ", "import os"), new_tokens=4)
    samples = task.samples(model)
    assert [sample.prompt for sample in samples] == ["def ", "import os"]
    ids = tokenizer_of(task.base_place, None)("def ", return_tensors="pt")["input_ids"]
    for _ in range(4):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert samples[0].text == tokenizer_of(task.base_place, None).decode(ids[0, -4:])
    assert CausalLm().samples(model) == []


def test_the_base_models_own_dropout_is_switched_off(gpt2: Path) -> None:
    assert GPT2LMHeadModel.from_pretrained(gpt2).config.attn_pdrop > 0
    task = CausalLm(base_model=str(gpt2))
    model = task.load_base("fp32").train()
    batch = {"input_ids": torch.arange(8).view(1, 8), "labels": torch.arange(8).view(1, 8)}
    assert torch.equal(task.row_losses(model, batch), task.row_losses(model, batch))


def test_the_revision_goes_with_every_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    for kind in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
        loader = getattr(transformers, kind)
        real = loader.from_pretrained

        def load(place: str, *, real: Any = real, **settings: Any) -> Any:
            asked.append(settings.get("revision"))
            return real(place, **settings)

        monkeypatch.setattr(loader, "from_pretrained", load)
    task = CausalLm(revision="v2")
    task.load_base("fp32")
    tokenizer_of(task.base_place, "v2")
    assert len(asked) >= 3
    assert set(asked) == {"v2"}
    assert task.base_key("fp32") != CausalLm().base_key("fp32")


def corrupt(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"no weights"),
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "no such model"}'),
    ],
)
def test_a_damaged_base_model_is_one_line(gpt2: Path, tmp_path: Path, name: str, content: bytes) -> None:
    folder = shutil.copytree(gpt2, tmp_path / "base")
    corrupt(folder, name, content)
    with pytest.raises(DataError, match=r"base model '.*base' cannot be loaded: .") as caught:
        CausalLm(base_model=str(folder)).load_base("fp32")
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape_are_one_line(gpt2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gpt2, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_embd": 32}))
    with pytest.raises(DataError, match="cannot be loaded: ") as caught:
        CausalLm(base_model=str(folder)).load_base("fp32")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"{"], ids=["missing", "damaged"])
def test_a_tokenizer_that_is_none_is_one_line(gpt2: Path, tmp_path: Path, texts: Path, content: bytes | None) -> None:
    folder = shutil.copytree(gpt2, tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    if content is not None:
        corrupt(folder, "tokenizer.json", content)
    with pytest.raises(DataError, match=r"cannot be loaded: |has no tokenizer") as caught:
        CausalLm(base_model=str(folder)).check_data(only(texts), 0)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end_of_text_is_refused(gpt2: Path, tmp_path: Path, texts: Path) -> None:
    folder = shutil.copytree(gpt2, tmp_path / "base")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="has no tokenizer with an end-of-text token; add its tokenizer files"):
        CausalLm(base_model=str(folder)).check_data(only(texts), 0)


def test_rows_longer_than_the_model_can_see_are_refused(gpt2: Path, texts: Path) -> None:
    task = CausalLm(base_model=str(gpt2), sequence_length=65)
    with pytest.raises(ConfigurationError, match=r"sequence_length 65 .* at most 64"):
        task.check_data(only(texts), 0)
    CausalLm(base_model=str(gpt2), sequence_length=64).check_data(only(texts), 0)


def test_four_bits_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="4bit"):
        CausalLm().load_base("4bit")


def test_clients_rows_are_their_own_documents(texts: Path) -> None:
    task = CausalLm(sequence_length=16, held_out=0.5)
    data = task.client_data("ada", only(texts), 0)
    written = {path.read_text() for path in texts.iterdir()}
    decode = tokenizer_of(task.base_place, None).decode
    for rows in (data.train, data.held_out):
        joined = decode(rows.take(torch.arange(len(rows)))["input_ids"].flatten())
        *whole, last = joined.split("<eos>")
        assert whole
        assert set(whole) <= written
        assert any(text.startswith(last) for text in written)


def test_public_data_are_the_unseen_packages_or_a_source(texts: Path) -> None:
    task = CausalLm(public=BUILTIN_UNSEEN)
    documents = [document for document in read_documents("builtin:code") if document.key in UNSEEN]
    assert sorted(task._public_documents(), key=lambda d: d.id) == sorted(documents, key=lambda d: d.id)
    assert len(_rows(CausalLm(public=str(texts), sequence_length=16))) > 0
    assert CausalLm().public_data() is None


def _rows(task: CausalLm) -> Rows:
    rows = task.public_data()
    assert rows is not None
    return rows


def test_missing_public_data_are_found_early(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        CausalLm(public=str(tmp_path / "nowhere")).check_data(only(texts), 0)


def test_a_client_with_too_little_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"client ada: a\.txt is a single document too short to split"):
        CausalLm(packing=False, held_out=0.5).client_data("ada", only(tmp_path), 0)
