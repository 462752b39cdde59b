"""A training step of DP-SGD beside a step without privacy: time and memory of every way to per-row gradients.

Arguments: a part of a setting's name, to measure that setting only.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from reporting import ROOT, in_fresh_process, peak_above, report
from torch import nn

from client.privacy.engine import Engine, Gradients, open_engine
from tests.private_models import Case, adapted, freeze, labels, llama, next_tokens, unet

WAYS = ("plain", "own", "hooks", "functorch", "ghost", "one at a time")
REPEATS = 9
MEMORY_STEPS = 3
CLIP = 1.0
WIDE = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


@dataclass(frozen=True)
class Setting:
    """A model and a batch.

    Parameters
    ----------
    name : str
        As in the table.
    build : callable
        Builds it.
    """

    name: str
    build: Callable[[], Case]


def demo(rank: int) -> Case:
    """The built-in base model, every linear layer adapted."""
    from transformers import AutoModelForCausalLM

    return texts(AutoModelForCausalLM.from_pretrained(ROOT / "simulations" / "demo" / "base"), rank, 8, 128)


def texts(model: nn.Module, rank: int, rows: int, tokens: int, targets: Any = "all-linear", ffa: bool = False) -> Case:
    """A causal language model on rows of full length."""
    model = adapted(model, r=rank, lora_alpha=2 * rank, target_modules=targets)
    ids = torch.randint(2, 2048, (rows, tokens))
    return Case(
        freeze(model, "lora_A") if ffa else model,
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        next_tokens,
    )


def bert(rows: int, tokens: int) -> Case:
    """BERT of the size called tiny, two layers of 128, with a saved head."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2
    )
    model = BertForSequenceClassification(config)
    model = adapted(model, r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"])
    ids = torch.randint(2, 2048, (rows, tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(2, (rows,))}
    return Case(model, batch, labels)


def diffusion() -> Case:
    """A UNet of 64 and 128 channels on 32 × 32 latents, attention adapted."""
    return unet(rows=8, size=32, channels=(64, 128), rank=8)


SETTINGS = (
    Setting("demo base model, all linear, r 8, 8 × 128", lambda: demo(8)),
    Setting("demo base model, all linear, r 16, 8 × 128", lambda: demo(16)),
    Setting("Llama 4 × 256, all linear, r 8, 8 × 128", lambda: texts(llama(**WIDE), 8, 8, 128)),
    Setting("Llama 4 × 256, q and v, r 8, 8 × 128", lambda: texts(llama(**WIDE), 8, 8, 128, ["q_proj", "v_proj"])),
    Setting("Llama 4 × 256, all linear, r 8, A frozen, 8 × 128", lambda: texts(llama(**WIDE), 8, 8, 128, ffa=True)),
    Setting("Llama 4 × 256, all linear, r 8, 32 × 32", lambda: texts(llama(**WIDE), 8, 32, 32)),
    Setting("Llama 4 × 256, all linear, r 64, 16 × 32", lambda: texts(llama(**WIDE), 64, 16, 32)),
    Setting("BERT 2 × 128, q and v, r 8, head, 16 × 64", lambda: bert(16, 64)),
    Setting("UNet 64 and 128, attention, r 8, 8 × 32²", diffusion),
)


@contextmanager
def stepping(way: str, case: Case) -> Iterator[Callable[[], None]]:
    """Give what runs one whole step: forward, backward, clipping, noise and AdamW; a round opens an engine once."""
    optimizer = torch.optim.AdamW(case.parameters, lr=1e-5)
    if way == "plain":
        yield lambda: _stepped(optimizer, lambda: case.all_losses().mean().backward())
    elif way == "one at a time":
        yield lambda: _stepped(optimizer, lambda: _one_at_a_time(case))
    else:
        with open_engine(
            case.model,
            case.parameters,
            optimizer,
            gradients=cast(Gradients, way),
            noise_multiplier=1.0,
            clipping_norm=CLIP,
            expected_rows=case.rows,
            generator=torch.Generator(case.parameters[0].device).manual_seed(0),
        ) as engine:
            yield lambda: _stepped(optimizer, lambda: _private(engine, case))


def _private(engine: Engine, case: Case) -> None:
    engine.add(case.all_losses, case.rows)
    engine.noise()


def _stepped(optimizer: torch.optim.Optimizer, gradients: Callable[[], None]) -> None:
    gradients()
    optimizer.step()
    optimizer.zero_grad()


def _one_at_a_time(case: Case) -> None:
    """Clip each row's gradient after a pass of its own, and add noise."""
    sums = [torch.zeros_like(parameter) for parameter in case.parameters]
    for row in range(case.rows):
        alone = {key: tensor[row : row + 1] for key, tensor in case.batch.items()}
        case.losses(case.model, alone).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(case.parameters, CLIP)
        assert torch.isfinite(norm)
        for total, parameter in zip(sums, case.parameters, strict=True):
            if parameter.grad is not None:
                total += parameter.grad
            parameter.grad = None
    for total, parameter in zip(sums, case.parameters, strict=True):
        parameter.grad = (total + torch.randn_like(total) * CLIP) / case.rows


def built(setting: Setting, device: str = "cpu") -> Case:
    """Build a setting's model and batch on a device, the same each time."""
    torch.manual_seed(0)
    case = setting.build()
    return Case(case.model.to(device), {key: tensor.to(device) for key, tensor in case.batch.items()}, case.losses)


def times(setting: Setting, device: str = "cpu") -> dict[str, float]:
    """Return the least time of a step by every way, all taken in turn in one process: processor seconds on a CPU."""
    case = built(setting, device)
    best = dict.fromkeys(WAYS, float("inf"))
    clock = time.process_time if device == "cpu" else time.perf_counter
    for _ in range(REPEATS):
        for way in WAYS:
            with stepping(way, case) as work:
                for _ in ("warms up", "is measured"):
                    start = clock()
                    work()
                    if device == "cuda":
                        torch.cuda.synchronize()
                best[way] = min(best[way], clock() - start)
    return best


def memory(setting: Setting, way: str) -> int:
    """Return by how many bytes some steps make this process grow above model, optimizer and batch."""
    with stepping(way, built(setting)) as work:
        work()  # what is loaded or kept for good is not a step's
        return peak_above(lambda: [work() for _ in range(MEMORY_STEPS)])[1]


def memory_on_gpu(setting: Setting, way: str) -> int:
    """Return the peak of the GPU's memory above model, optimizer and batch, in bytes."""
    with stepping(way, built(setting, "cuda")) as work:
        work()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(MEMORY_STEPS):
            work()
        return torch.cuda.max_memory_allocated() - before


def cells(values: dict[str, float], unit: float, text: str) -> list[str]:
    """Show the first value whole, and the others relative to it."""
    first = values["plain"]
    return [text.format(first * unit), *(f"{values[way] / first:.2f}" for way in WAYS[1:])]


def main() -> None:
    """Measure what the arguments ask for, and report."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if len(sys.argv) == 4:
        number, way, where = int(sys.argv[1]), sys.argv[2], sys.argv[3]
        sys.stdout.write(str((memory_on_gpu if where == "cuda" else memory)(SETTINGS[number], way)))
        return
    # Every larger tensor is given back when it is freed, so that resident memory is what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    rows = []
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for number, setting in enumerate(SETTINGS):
            if len(sys.argv) > 1 and sys.argv[1] not in setting.name:
                continue
            name = setting.name if device == "cpu" else f"{setting.name}, GPU"
            rows.append([name, "time", *cells(times(setting, device), 1e3, "{:.0f} ms")])
            peaks = {way: float(in_fresh_process([__file__, str(number), way, device])) for way in WAYS}
            rows.append([name, "memory", *cells(peaks, 1e-6, "{:.0f} MB")])
            print("\n".join(" | ".join(row) for row in rows[-2:]), flush=True)
    report("private_step", "A step of DP-SGD", TEXT, ["setting", "", "without privacy", *WAYS[1:]], rows)


TEXT = (
    "One training step (forward, backward, clipping, noise, AdamW) relative to a step of the same adapter without "
    "privacy, PEFT's own. Each setting's ways are measured in turn in one process, the least processor time of "
    f"{REPEATS}, one thread; memory is the peak above model, optimizer and batch in a process of its own. own: one "
    "backward pass of ours; hooks, functorch and ghost: Opacus's; one at a time: every row through the model alone. "
    "Less time than without privacy is possible: a LoRA branch is one node, and its narrow products are laid out the "
    "way they run fastest, which the ordinary step's are not."
)


if __name__ == "__main__":
    main()
