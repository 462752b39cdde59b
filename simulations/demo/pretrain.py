"""Make the demo's base model: a small Llama pretrained on English prose of Python's documentation.

Run as ``python -m simulations.demo.pretrain --out DIR``. It reads the standard library of the running
interpreter (see `common.text.stdlib`), so another Python version gives slightly other weights. What the
clients own, and what they are judged by, is no part of the corpus.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common.seeds import derive_seed
from common.text import Document
from common.text.partition import split
from common.text.stdlib import OWNERS, code_documents, prose_documents, resolve_owners, resolve_unseen
from common.text.windows import TokenRows, pack

PAD, EOS = "<pad>", "<eos>"
PROBE = (
    "The value of an expression is computed when the statement is executed. If the object has no such "
    "attribute, an exception is raised, and the method returns the default value that was passed to it."
)
"""A fixed text whose loss is in the model card, so that anyone can check the weights in a second."""

MEASURED_LENGTH = 128


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, beside the corpus.

    Attributes
    ----------
    steps, rows, length : int
        Optimizer steps, rows per step, tokens per row.
    peak_rate : float
        Learning rate after ``warm_up`` steps; falls along a cosine to a twentieth of it.
    """

    seed: int = 0
    vocabulary: int = 2048
    steps: int = 900
    rows: int = 8
    length: int = 256
    peak_rate: float = 3e-3
    warm_up: int = 50
    weight_decay: float = 0.1
    held_out: float = 0.05


@dataclass(frozen=True)
class Measured:
    """What one making of the model took and gave.

    Attributes
    ----------
    seconds : float
        Processor time of all threads, which other programs and pauses of the machine do not change.
    losses : dict of str to float
        What was measured to nats per token, before any federation.
    """

    parameters: int
    characters: int
    tokens: int
    seconds: float
    losses: dict[str, float]


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text can be encoded and comes back as it was."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def new_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """Create the untrained model (2.2 million parameters, input and output embeddings tied)."""
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=recipe.length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(recipe.seed, "weights"))
        return LlamaForCausalLM(config)


def rows_of(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, length: int) -> TokenRows:
    """Tokenise documents and pack them into rows."""
    encoded = tokenizer([document.text for document in documents])["input_ids"]
    return pack(encoded, length, tokenizer.eos_token_id)


def train(model: LlamaForCausalLM, rows: TokenRows, recipe: Recipe) -> None:
    """Train on windows drawn anywhere in the corpus, printing a running loss."""
    stream = rows.input_ids.flatten()
    generator = torch.Generator().manual_seed(derive_seed(recipe.seed, "windows"))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.peak_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
    )
    running = math.log(recipe.vocabulary)
    model.train()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.peak_rate * _schedule(step, recipe)
        starts = torch.randint(0, len(stream) - recipe.length, (recipe.rows, 1), generator=generator)
        batch = stream[starts + torch.arange(recipe.length)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += 0.03 * (loss.item() - running)
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} of {recipe.steps}: loss {running:.3f}", flush=True)
    model.eval()


def _schedule(step: int, recipe: Recipe) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return min(1.0, (step + 1) / recipe.warm_up) * (0.05 + 0.95 * cosine)


@torch.no_grad()
def loss_of(model: LlamaForCausalLM, rows: TokenRows, limit: int = 64) -> float:
    """Return the mean loss per token (nats) of at most ``limit`` evenly spaced rows."""
    chosen = torch.linspace(0, len(rows) - 1, min(limit, len(rows))).long()
    return float(model(input_ids=rows.input_ids[chosen], labels=rows.labels[chosen]).loss)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights as fp16 and a configuration that asks for fp32 arithmetic."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.float32
    model.config.save_pretrained(out)
    halves = {name: value.half() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    (out / "model.safetensors").write_bytes(to_safetensors(halves, metadata={"format": "pt"}))


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, held_out: Sequence[Document]
) -> dict[str, float]:
    """Measure losses on the probe, on held-out prose, and on the code of owners and unseen packages."""
    texts = {"probe text": [Document("probe", "", PROBE)], "held-out prose": list(held_out)}
    for package in resolve_owners(OWNERS)[0].values():
        texts[f"owner {package}, held-out files"] = split(code_documents(package))[1]
    for package in resolve_unseen()[0].values():
        texts[f"unseen {package}, all files"] = code_documents(package)
    return {what: loss_of(model, rows_of(documents, tokenizer, MEASURED_LENGTH)) for what, documents in texts.items()}


def model_card(recipe: Recipe, measured: Measured) -> str:
    """Write down what the model is, how it was made and how good it is."""
    losses = "\n".join(f"| {what} | {loss:.4f} |" for what, loss in measured.losses.items())
    return f"""# Base model of the LoRAFleet demo

A Llama of {measured.parameters:,} parameters (hidden size 192, 4 layers, 4 heads, tied embeddings) over a
byte-level BPE of {recipe.vocabulary:,} tokens. It has read documentation in English and no source file, so
that a federation of code owners has something to learn. Weights are stored in fp16 and computed with in fp32.
It is good for nothing else.

## How it was made

    python -m simulations.demo.pretrain --out simulations/demo/base --steps {recipe.steps}

- Corpus: the language reference's topics as `pydoc` ships them, and docstrings of more than 80 characters of
  Python {platform.python_version()}'s standard library, each once: {measured.characters:,} characters,
  {measured.tokens:,} tokens. Left out: tests, the packages of the demo's owners, the unseen packages, the
  substitutes of both, and modules named after them. One document in {round(1 / recipe.held_out)} was held
  out for measuring.
- Training: seed {recipe.seed}, {recipe.steps:,} steps of {recipe.rows} rows of {recipe.length} tokens, AdamW
  (0.9, 0.95), weight decay {recipe.weight_decay}, gradient norm clipped to 1, peak learning rate
  {recipe.peak_rate} after {recipe.warm_up} steps, cosine to a twentieth of it.
- It took about {round(measured.seconds, -1):.0f} s of processor time, {torch.get_num_threads()} threads together
  (torch {torch.__version__.partition("+")[0]}).

## Loss before federation

Nats per token of the weights as stored, in at most 64 rows of {MEASURED_LENGTH} tokens, evenly spread.

| text | loss |
|---|---|
{losses}
"""


def main() -> None:
    """Train, save, measure what was saved, and write the model card."""
    parser = argparse.ArgumentParser(description="Make the base model of the LoRAFleet demo.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimizer steps (%(default)s)")
    arguments = parser.parse_args()
    recipe = Recipe(steps=arguments.steps)
    begin = time.process_time()
    train_part, held_out = split(prose_documents(), recipe.held_out, recipe.seed)
    texts = [document.text for document in train_part]
    tokenizer = train_tokenizer(texts, recipe.vocabulary)
    model = new_model(tokenizer, recipe)
    rows = rows_of(train_part, tokenizer, recipe.length)
    train(model, rows, recipe)
    save(model, tokenizer, arguments.out)
    seconds = time.process_time() - begin
    losses = measure(LlamaForCausalLM.from_pretrained(arguments.out), tokenizer, held_out)
    measured = Measured(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        characters=sum(map(len, texts)),
        tokens=rows.input_ids.numel(),
        seconds=seconds,
        losses=losses,
    )
    (arguments.out / "MODEL_CARD.md").write_text(model_card(recipe, measured), encoding="utf-8")


if __name__ == "__main__":
    main()
