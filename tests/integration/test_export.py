"""Export: what stock PEFT or transformers load is base + global + start adapter, whatever they consist of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from common.adapter import Adapter
from common.adapter_file import read_state, whole_adapter
from common.base_model import add_update
from common.errors import ConfigurationError, LoRAFleetError, StoreError, UserError
from common.experiment import Experiment
from common.federation import ServerState
from common.lowrank import Dense, LowRank, Update
from common.peft_folder import read_adapter
from common.store import RunStore
from common.tasks.causal_lm import BUILTIN_BASE
from common.workspace import model_spec, task_of
from server.app import create_run
from server.export import export
from server.journal import StoreJournal
from server.record import RoundRecord
from simulations import simulate
from simulations.run import FinishedRun
from tests.tiny import tiny

TOKENS = torch.tensor([[3, 14, 15, 9, 2, 6], [5, 35, 8, 9, 7, 900]])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(TOKENS).logits
    return found


def by_hand(experiment: Experiment, *adapters: Adapter) -> nn.Module:
    """Add adapters to the base model's weights, one after another."""
    model = task_of(experiment).load_base("fp32")
    for adapter in adapters:
        for name, update in adapter.layers.items():
            module = model.get_submodule(name)
            module.weight = nn.Parameter(add_update(module, update.dense()))
        for name, value in adapter.extras.items():
            place, _, key = name.rpartition(".")
            setattr(model.get_submodule(place), key, nn.Parameter(value))
    return model


def exported(path: Path) -> nn.Module:
    """Load an exported folder as anybody would."""
    if (path / "adapter_config.json").exists():
        return cast(nn.Module, AutoPeftModelForCausalLM.from_pretrained(str(path)))
    return cast(nn.Module, AutoModelForCausalLM.from_pretrained(path))


def random_adapter(experiment: Experiment, ranks: Mapping[str, int], seed: int, heads: bool = False) -> Adapter:
    """Build an adapter with a rank per layer; -1 is dense."""
    spec = model_spec(experiment)
    numbers = torch.Generator().manual_seed(seed)
    layers: dict[str, Update] = {}
    for name, rank in ranks.items():
        out, inn = spec.layers[name]
        if rank < 0:
            layers[name] = Dense(0.05 * torch.randn(out, inn, generator=numbers))
        else:
            b, a = torch.randn(out, rank, generator=numbers), torch.randn(rank, inn, generator=numbers)
            layers[name] = LowRank(0.05 * b, a)
    moved = {name: head + 0.3 * torch.randn(head.shape, generator=numbers) for name, head in spec.heads.items()}
    return Adapter.pack(layers, moved if heads else {})


def stored(home: Path, experiment: Experiment, models: Sequence[tuple[Adapter, Adapter]], best: int = 0) -> str:
    """Enter a run into the store whose rounds ended with these start and global adapters."""
    spec = model_spec(experiment)
    with RunStore.open(home) as store:
        run = create_run(store, experiment).id
        journal = StoreJournal(store, run)
        for number, (start, total) in enumerate(models):
            journal.begin(number, [], 0)
            record = RoundRecord(number, (), 0, datetime.now(UTC))
            journal.commit(record, ServerState(spec, start, total, number), best=number == best)
    return run


EMPTY = Adapter.empty()
ATTENTION = "model.layers.{}.self_attn.{}_proj"
MIXED = {ATTENTION.format(0, "q"): 1, ATTENTION.format(0, "v"): -1, ATTENTION.format(2, "q"): 7}
OTHERS = {ATTENTION.format(0, "q"): 3, ATTENTION.format(0, "v"): 2, ATTENTION.format(3, "v"): 4}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module", params=["flora", "lora_lego"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A real run of two rounds, large steps."""
    home = tmp_path_factory.mktemp(request.param)
    return simulate(tiny(home, f"strategy.name={request.param}", "training.learning_rate=0.1"), home)


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_a_run_is_exported_as_it_was_evaluated(run: FinishedRun, tmp_path: Path, form: Any) -> None:
    out = export(run.run.id, run.home, tmp_path / "out", form)
    experiment = Experiment.from_json(run.run.experiment)
    assert run.adapter is not None
    state = read_state(run.home / cast(str, run.rounds[-1].state_path), model_spec(experiment))
    found = logits(exported(out))
    torch.testing.assert_close(
        found, logits(by_hand(experiment, state.global_adapter, state.start)), rtol=1e-4, atol=1e-4
    )
    assert float((found - logits(by_hand(experiment))).abs().max()) > 0.05, "training did nothing"
    torch.testing.assert_close(found, logits(by_hand(experiment, read_adapter(run.adapter))), rtol=1e-4, atol=1e-4)
    # The loss the clients measured is that of the exported model.
    task, clients = task_of(experiment), tuple(experiment.simulated_clients().items())
    rows = task.client_data("ben", clients, experiment.seed).held_out
    measured = next(m.value for m in run.measured if (m.round, m.client, m.name) == (2, "ben", "held_out_loss"))
    assert task.evaluate(exported(out), rows)["loss"] == pytest.approx(measured, abs=1e-4)


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_dense_and_low_rank_layers_of_all_ranks_add_up(home: Path, tmp_path: Path, form: Any) -> None:
    experiment = tiny(tmp_path)
    start, total = random_adapter(experiment, OTHERS, 1), random_adapter(experiment, MIXED, 2)
    name = stored(home, experiment, [(start, total)])
    found = logits(exported(export(name, home, tmp_path / "out", form)))
    torch.testing.assert_close(found, logits(by_hand(experiment, total, start)), rtol=1e-4, atol=1e-4)
    for part in (total, start):
        assert float((found - logits(by_hand(experiment, part))).abs().max()) > 0.01


@pytest.mark.parametrize("form", ["peft", "merged"])
@pytest.mark.parametrize("head", ["model.norm", "layers.1.mlp.down_proj", "lm_head"])
def test_heads_are_exported(home: Path, tmp_path: Path, form: Any, head: str) -> None:
    """Also a head whose weight the base model shares with its embedding."""
    experiment = tiny(tmp_path, f'adapter.options.head=["{head}"]')
    start = random_adapter(experiment, OTHERS, 1, heads=True)
    assert len(start.extras) == 1
    name = stored(home, experiment, [(start, EMPTY)])
    found = logits(exported(export(name, home, tmp_path / "out", form)))
    torch.testing.assert_close(found, logits(by_hand(experiment, start)), rtol=1e-4, atol=1e-4)
    assert float((found - logits(by_hand(experiment, Adapter.pack(start.layers)))).abs().max()) > 0.01


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_an_output_layer_shared_with_the_embedding_is_adapted_alone(home: Path, tmp_path: Path, form: Any) -> None:
    experiment = tiny(tmp_path, 'adapter.options.target_modules=["lm_head"]')
    total = random_adapter(experiment, {"lm_head": 3}, 1)
    out = export(stored(home, experiment, [(EMPTY, total)]), home, tmp_path / "out", form)
    torch.testing.assert_close(logits(exported(out)), logits(by_hand(experiment, total)), rtol=1e-4, atol=1e-4)
    if form == "merged":
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_merged_model_keeps_what_its_base_shares(home: Path, tmp_path: Path) -> None:
    name = stored(home, tiny(tmp_path), [(random_adapter(tiny(tmp_path), OTHERS, 1), EMPTY)])
    out = export(name, home, tmp_path / "out", "merged")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_conv1d_models_are_exported(home: Path, tmp_path: Path, form: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = GPT2Config(vocab_size=2048, n_embd=16, n_layer=2, n_head=2, n_positions=64)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN_BASE / file, tmp_path / "gpt2")
    base = f"task.options.base_model='{tmp_path / 'gpt2'}'"
    experiment = tiny(tmp_path, base, 'adapter.options.target_modules=["c_attn", "c_fc"]')
    total = random_adapter(experiment, {"transformer.h.0.attn.c_attn": 2, "transformer.h.1.mlp.c_fc": -1}, 2)
    name = stored(home, experiment, [(EMPTY, total)])
    found = logits(exported(export(name, home, tmp_path / "out", form)))
    torch.testing.assert_close(found, logits(by_hand(experiment, total)), rtol=1e-4, atol=1e-4)


def test_a_merged_model_needs_nothing_else(home: Path, tmp_path: Path) -> None:
    experiment = tiny(tmp_path)
    out = export(
        stored(home, experiment, [(random_adapter(experiment, OTHERS, 1), EMPTY)]), home, tmp_path / "o", "merged"
    )
    assert AutoTokenizer.from_pretrained(out)("def x")["input_ids"]
    assert not (out / "adapter_config.json").exists()


def test_our_own_file_holds_the_same_numbers(run: FinishedRun, tmp_path: Path) -> None:
    file = export("last", run.home, tmp_path / "out", "lorafleet")
    assert file == tmp_path / "out" / "adapter.safetensors"
    assert run.adapter is not None
    assert read_adapter(file).sha256() == read_adapter(run.adapter).sha256()


@pytest.mark.parametrize("form", ["peft", "lorafleet", "run"])
def test_a_run_starts_where_another_ended(run: FinishedRun, tmp_path: Path, form: str) -> None:
    """Round 0 of the new run is the old run's last model, to the loss each client measures."""
    place = {"run": f"run:{run.run.id}"}.get(form) or str(export(run.run.id, run.home, tmp_path / "o", cast(Any, form)))
    experiment = Experiment.from_json(run.run.experiment)
    options = experiment.adapter.options | {"start_from": place}
    changed = {
        "adapter": experiment.adapter.model_copy(update={"options": options}),
        "federation": experiment.federation.model_copy(update={"rounds": 1}),
        "strategy": experiment.strategy.model_copy(update={"name": "flora"}),
    }
    again = simulate(experiment.model_copy(update=changed), run.home)
    state = read_state(run.home / cast(str, again.rounds[0].state_path), model_spec(experiment))
    assert run.adapter is not None
    old = read_adapter(run.adapter)
    assert whole_adapter(state).layers.keys() == old.layers.keys()
    for name, update in whole_adapter(state).layers.items():
        torch.testing.assert_close(update.dense(), old.layers[name].dense(), rtol=1e-4, atol=1e-6)
    ended = {m.client: m.value for m in run.measured if m.round == 2 and m.name == "held_out_loss"}
    begun = {m.client: m.value for m in again.measured if m.round == 0 and m.name == "held_out_loss"}
    assert begun == pytest.approx(ended, abs=1e-5)
    after = read_state(run.home / cast(str, again.rounds[1].state_path), model_spec(experiment))
    assert whole_adapter(after).sha256() != whole_adapter(state).sha256()


def one_slot(experiment: Experiment, size: float) -> Adapter:
    out, inn = model_spec(experiment).layers[ATTENTION.format(0, "q")]
    return Adapter.pack({ATTENTION.format(0, "q"): LowRank(torch.full((out, 1), size), torch.ones(1, inn))})


def size_of(path: Path) -> float:
    (update,) = read_adapter(path).layers.values()
    return round(float(update.dense()[0, 0]), 4)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run whose round n is an adapter of size n; round 2 is the best."""
    home = tmp_path_factory.mktemp("three")
    experiment = tiny(home)
    return stored(home, experiment, [(EMPTY, one_slot(experiment, float(n))) for n in range(4)], best=2), home


@pytest.mark.parametrize(
    ("options", "size"), [({}, 3.0), ({"round": 1}, 1.0), ({"best": True}, 2.0), ({"round": 3}, 3.0)], ids=str
)
def test_the_round_is_chosen(three: tuple[str, Path], tmp_path: Path, options: dict[str, Any], size: float) -> None:
    name, home = three
    assert size_of(export(name, home, tmp_path / "out", "lorafleet", **options)) == size
    assert size_of(export(name[:15], home, tmp_path / "peft", "peft", **options)) == size


def test_a_round_that_changes_nothing_is_told(home: Path, tmp_path: Path) -> None:
    name = stored(home, tiny(tmp_path), [(EMPTY, EMPTY)])
    with pytest.raises(ConfigurationError, match="the adapter changes nothing yet; export a round after training"):
        export(name, home, tmp_path / "out")
    assert logits(exported(export(name, home, tmp_path / "merged", "merged"))).isfinite().all()


def refused(kind: type[LoRAFleetError], said: str, *args: Any, **options: Any) -> None:
    with pytest.raises(kind) as caught:
        export(*args, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_round_is_answered_with_those_there_are(three: tuple[str, Path], tmp_path: Path) -> None:
    name, home = three
    refused(UserError, f"run {name} has no round 9; it has 0 to 3", name, home, tmp_path / "out", round=9)
    refused(UserError, "there is: ", "nobody", home, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(three: tuple[str, Path], tmp_path: Path) -> None:
    name, home = three
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    refused(UserError, "full is not an empty folder; give another --out", name, home, tmp_path / "full")
    refused(UserError, "mine.txt is not an empty folder", name, home, tmp_path / "full" / "mine.txt")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert export(name, home, tmp_path / "empty") == tmp_path / "empty"


def test_a_run_without_rounds_has_nothing_to_export(home: Path, tmp_path: Path) -> None:
    with RunStore.open(home) as store:
        name = create_run(store, tiny(tmp_path)).id
    refused(UserError, f"run {name} has no committed round to export", name, home, tmp_path / "out")


def test_a_run_never_evaluated_has_no_best_round(home: Path, tmp_path: Path) -> None:
    name = stored(home, tiny(tmp_path), [(EMPTY, EMPTY)], best=-1)
    refused(
        UserError, "was never evaluated, so no round is best; give --round N", name, home, tmp_path / "o", best=True
    )


def test_a_damaged_state_is_found(home: Path, tmp_path: Path) -> None:
    name = stored(home, tiny(tmp_path), [(EMPTY, one_slot(tiny(tmp_path), 1.0))])
    (file,) = (home / "runs" / name).rglob("state.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(LoRAFleetError, "state.safetensors", name, home, tmp_path / "out")


def test_a_home_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    refused(StoreError, "home", "last", tmp_path / "home", tmp_path / "out")
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("form", ["peft", "merged", "lorafleet"])
def test_a_place_that_cannot_be_written_is_told(three: tuple[str, Path], tmp_path: Path, form: Any) -> None:
    name, home = three
    (tmp_path / "file").write_text("")
    refused(StoreError, "cannot be written: Not a directory", name, home, tmp_path / "file" / "out", form=form)


def test_a_disk_that_is_full_is_told(three: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, home = three
    monkeypatch.setattr("common.peft_folder.WEIGHTS", "no/such/folder.safetensors")
    refused(StoreError, "cannot be written: ", name, home, tmp_path / "out")


def test_another_format_is_refused(three: tuple[str, Path], tmp_path: Path) -> None:
    name, home = three
    refused(
        ConfigurationError, "there is no format 'gguf'; choose peft, merged or lorafleet", name, home, tmp_path, "gguf"
    )


def test_a_base_model_that_is_gone_is_told(home: Path, tmp_path: Path) -> None:
    base = shutil.copytree(BUILTIN_BASE, tmp_path / "base")
    experiment = tiny(tmp_path, f"task.options.base_model='{base}'")
    name = stored(home, experiment, [(EMPTY, one_slot(experiment, 1.0))])
    shutil.rmtree(base)
    refused(UserError, "cannot be loaded", name, home, tmp_path / "out", "merged")


def test_the_export_names_base_and_revision(home: Path, tmp_path: Path) -> None:
    experiment = tiny(tmp_path, "task.options.revision=v3")
    out = export(stored(home, experiment, [(EMPTY, one_slot(experiment, 1.0))]), home, tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(BUILTIN_BASE), "v3")
