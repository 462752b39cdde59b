"""Causal language modelling: predict the next token of the owners' texts.

One example is one row of ``sequence_length`` tokens, as in ``input_ids [382, 70, 1204, …]``,
``labels`` the same. With packing a row may span documents; without, a row is one window of one document.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from common.base_model import four_bit
from common.errors import ConfigurationError, DataError
from common.tasks import Batch, ClientData, Clients, Rows, Sample, Task
from common.text import Document
from common.text.documents import read_documents
from common.text.partition import Partition
from common.text.shares import TextSource, client_share, notices
from common.text.stdlib import code_documents, resolve_unseen
from common.text.windows import IGNORED, TokenRows, pack, per_document

BUILTIN = "builtin"
BUILTIN_BASE = Path(__file__).resolve().parents[2] / "simulations" / "demo" / "base"
BUILTIN_UNSEEN = "builtin:unseen"


@dataclass(frozen=True)
class TextRows:
    """Token rows as a task's examples."""

    rows: TokenRows
    records: tuple[bytes, ...] = ()
    """What the rows were cut from: whole texts, those held out among them. Ledgers know the data by these."""

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.rows)

    def take(self, numbers: Tensor) -> Batch:
        """Gather rows into a batch: input_ids and labels, shape (batch, tokens)."""
        return {"input_ids": self.rows.input_ids[numbers], "labels": self.rows.labels[numbers]}


class CausalLm(Task):
    """Fine-tune a causal language model on texts."""

    peft_task_type: ClassVar[str] = "CAUSAL_LM"
    path_options: ClassVar[tuple[str, ...]] = ("base_model", "source", "public")
    private_options: ClassVar[Mapping[str, Any]] = {"packing": False}
    row: ClassVar[str] = (
        "one window of one document, at most sequence_length tokens; a document of several windows is several rows"
    )

    base_model: str = Field(
        BUILTIN, description='Folder or hub name of a transformers model; "builtin": the small demo model.'
    )
    revision: str | None = Field(None, description="Hub revision of the base model.")
    source: str | None = Field(
        None,
        description='One source for all clients: a file, a folder, "hub:NAME[:CONFIG[:SPLIT]]" or "builtin:code". '
        "Without it each client names its own data.",
    )
    text_column: str = Field("text", description="Column of tables that holds the text.")
    key_column: str | None = Field(
        None, description="Column of tables that names the owner, for natural and dirichlet partitions."
    )
    partition: Literal["natural", "iid", "dirichlet", "size"] = Field(
        "natural",
        description="How one source is shared out: by key, at random, skewed by Dirichlet, or in growing sizes.",
    )
    alpha: float = Field(0.5, gt=0, description="Dirichlet concentration; small is skewed.")
    piece_characters: int | None = Field(
        None,
        ge=16,
        description="Cut documents into pieces of so many characters before sharing them out, for many clients.",
    )
    held_out: float = Field(0.2, gt=0, lt=1, description="Share of each client's documents kept for evaluation.")
    public: str | None = Field(
        None, description='Source the server evaluates on; "builtin:unseen": packages nobody owns.'
    )
    sequence_length: int = Field(128, ge=2, description="Tokens per row.")
    packing: bool = Field(
        True, description="Join documents into full rows; otherwise one row is one window of one document."
    )
    eval_rows: int = Field(32, ge=1, description="Rows of an evaluation at most, spread evenly.")
    eval_batch_size: int = Field(16, ge=1, description="Rows per forward pass of an evaluation.")
    prompts: tuple[str, ...] = Field(
        (), description="Beginnings the server lets the model continue, before and after training."
    )
    new_tokens: int = Field(32, ge=1, description="Tokens generated per prompt.")

    @property
    def couples_rows(self) -> str | None:
        """Find packing: a packed row holds several documents."""
        return "task.options.packing joins documents into one row; set it to false" if self.packing else None

    def base_key(self, precision: str) -> str:
        """Name the base model and how it is held."""
        return f"{self.base_model}@{self.revision}:{precision}"

    def load_base(self, precision: str) -> nn.Module:
        """Load the model with transformers; its own dropout is switched off, so that runs repeat."""
        from transformers import AutoModelForCausalLM

        settings: dict[str, Any] = {"dtype": torch.bfloat16 if precision == "bf16" else torch.float32}
        if precision == "4bit":
            settings = {"quantization_config": four_bit(), "device_map": "auto"}
        load = AutoModelForCausalLM.from_pretrained
        place, revision = self.base_place, self.revision
        return cast(nn.Module, _loaded(load, place, config=self._config(), revision=revision, **settings))

    def architecture(self) -> nn.Module:
        """Build the model on torch's meta device from its configuration alone."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return cast(nn.Module, AutoModelForCausalLM.from_config(self._config()))

    def check_data(self, clients: Clients, seed: int) -> list[str]:
        """Read and share out all documents, without tokenising them; see that the model can take the rows."""
        tokenizer_of(self.base_place, self.revision)
        limit = getattr(self._config(), "max_position_embeddings", None)
        if limit is not None and self.sequence_length > limit:
            raise ConfigurationError(
                f"task.options.sequence_length {self.sequence_length} is too long: {self.base_model} sees "
                f"at most {limit} tokens"
            )
        for name, _ in clients:
            client_share(self._source, name, clients, seed)
        if self.public is not None:
            self._public_documents()
        return notices(self._source, clients)

    def client_data(self, client: str, clients: Clients, seed: int) -> ClientData:
        """Tokenise one client's documents; the last few clients stay in memory."""
        return _client_rows(self, client, clients, seed)

    def public_data(self) -> Rows | None:
        """Tokenise the public documents."""
        return None if self.public is None else _public_rows(self)

    def row_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of each row's tokens, shape (batch,)."""
        losses, counted = _token_losses(model, batch)
        return losses.sum(dim=1) / counted.sum(dim=1).clamp(min=1)

    def evaluate(self, model: nn.Module, rows: Rows) -> dict[str, float]:
        """Mean cross-entropy per token over evenly spread rows."""
        numbers = torch.linspace(0, len(rows) - 1, min(self.eval_rows, len(rows))).round().long()
        total, tokens = 0.0, 0
        with torch.inference_mode():
            for chunk in numbers.split(self.eval_batch_size):
                losses, counted = _token_losses(model, rows.take(chunk))
                total += float(losses.double().sum())
                tokens += int(counted.sum())
        return {"loss": total / max(tokens, 1)}

    def made_up_rows(self, count: int) -> Batch:
        """Draw tokens, and end each row earlier than the one before."""
        generator = torch.Generator().manual_seed(0)
        tokens = len(tokenizer_of(self.base_place, self.revision))
        input_ids = torch.randint(tokens, (count, self.sequence_length), generator=generator)
        labels = input_ids.clone()
        for row in range(count):
            labels[row, self.sequence_length - row * self.sequence_length // (2 * count) :] = IGNORED
        return {"input_ids": input_ids, "labels": labels}

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        """Perplexity of the mean cross-entropy."""
        return {"perplexity": math.exp(min(means["loss"], 700.0))}

    def samples(self, model: nn.Module) -> Sequence[Sample]:
        """Continue each prompt greedily."""
        tokenizer = tokenizer_of(self.base_place, self.revision)
        device = next(model.parameters()).device
        made = []
        for prompt in self.prompts:
            encoded = tokenizer(prompt, return_tensors="pt").to(device)
            with torch.inference_mode():
                tokens = cast(Any, model).generate(
                    input_ids=encoded["input_ids"],
                    attention_mask=encoded["attention_mask"],
                    max_new_tokens=self.new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.eos_token_id,
                )
            made.append(Sample(prompt, tokenizer.decode(tokens[0][encoded["input_ids"].shape[1] :])))
        return made

    @property
    def base_place(self) -> str:
        """Folder or hub name of the base model."""
        return str(BUILTIN_BASE) if self.base_model == BUILTIN else self.base_model

    @property
    def base_revision(self) -> str | None:
        """Hub revision of the base model."""
        return self.revision

    @property
    def _source(self) -> TextSource:
        scheme = Partition(kind=self.partition, alpha=self.alpha)
        return TextSource(self.source, scheme, self.text_column, self.key_column, self.held_out, self.piece_characters)

    def _config(self) -> Any:
        from transformers import AutoConfig

        config = _loaded(AutoConfig.from_pretrained, self.base_place, revision=self.revision)
        for key, value in config.to_dict().items():
            if ("dropout" in key or "pdrop" in key) and isinstance(value, float):
                setattr(config, key, 0.0)
        return config

    def _public_documents(self) -> list[Document]:
        assert self.public is not None
        if self.public == BUILTIN_UNSEEN:
            return [document for package in resolve_unseen()[0].values() for document in code_documents(package)]
        return read_documents(self.public, text_column=self.text_column)

    def _rows(self, documents: Sequence[Document]) -> TextRows:
        tokenizer = tokenizer_of(self.base_place, self.revision)
        tokens = tokenizer([document.text for document in documents], add_special_tokens=False)["input_ids"]
        cut = pack if self.packing else per_document
        return TextRows(cut(tokens, self.sequence_length, tokenizer.eos_token_id))


@lru_cache(maxsize=32)
def _client_rows(task: CausalLm, client: str, clients: Clients, seed: int) -> ClientData:
    share = client_share(task._source, client, clients, seed)
    records = tuple(sorted({document.text.encode() for document in (*share.train, *share.held_out)}))
    try:
        return ClientData(replace(task._rows(share.train), records=records), task._rows(share.held_out))
    except DataError as error:
        raise DataError(f"client {client}: {error}") from None


@lru_cache(maxsize=2)
def _public_rows(task: CausalLm) -> TextRows:
    return task._rows(task._public_documents())


@lru_cache(maxsize=2)
def tokenizer_of(place: str, revision: str | None) -> Any:
    """Load a model's tokenizer once per process.

    Raises
    ------
    DataError
        If there is none that knows any text and how a text ends.
    """
    from transformers import AutoTokenizer

    tokenizer = _loaded(AutoTokenizer.from_pretrained, place, revision=revision)
    if not tokenizer("text")["input_ids"] or tokenizer.eos_token_id is None:
        raise DataError(f"base model {place!r} has no tokenizer with an end-of-text token; add its tokenizer files")
    return tokenizer


def _token_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return each position's loss (0 where ignored) and whether it counts, both (B, T - 1)."""
    device = next(model.parameters()).device
    labels = batch["labels"][:, 1:].to(device)
    logits = model(input_ids=batch["input_ids"].to(device), use_cache=False).logits[:, :-1].float()
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(labels.shape), labels != IGNORED


def _loaded(load: Any, place: str, **settings: Any) -> Any:
    """Call one of transformers' loaders, with its failures in one line."""
    try:
        return load(place, **settings)
    except Exception as error:  # they raise every kind of error: network, formats, shapes
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"base model {place!r} cannot be loaded: {reason[0]}") from error
