"""A run's adapter in the form somebody else wants: PEFT folder, merged model, or our own file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from torch import Tensor, nn

from common.adapter import Adapter
from common.adapter_file import adapter_bytes, read_state, whole_adapter
from common.base_model import add_update
from common.errors import ConfigurationError, StoreError, UserError
from common.experiment import Experiment
from common.peft_folder import write_peft_folder
from common.store import Round, Run, RunStore, verify
from common.workspace import model_spec, task_of
from server.folders import whole_or_nothing
from strategies import AGGREGATION

Format = Literal["peft", "merged", "lorafleet"]

Own = Callable[[Path, int, Adapter], Adapter]
"""Completes a round's start adapter by what one client keeps to itself; is given the run's folder and the round."""


def export(
    name: str,
    home: Path,
    out: Path,
    form: Format = "peft",
    round: int | None = None,
    best: bool = False,
    own: Own | None = None,
) -> Path:
    """Write a run's adapter to a folder.

    Parameters
    ----------
    name : str
        Id of the run, its beginning, or ``last``.
    home : Path
        Folder of the store.
    out : Path
        Folder to write; must be empty or missing.
    form : {"peft", "merged", "lorafleet"}
        A PEFT folder; the whole model with the adapter added to its weights; or one adapter file.
    round : int, optional
        Round to export; default the last.
    best : bool
        Export the best round instead.
    own : callable, optional
        For strategies whose clients keep factors of their own: whose model to export.

    Returns
    -------
    Path
        What was written.

    Raises
    ------
    UserError
        If the run has no such round, ``out`` is not empty, or the strategy has no one model and no client is named.
    """
    with RunStore.open(home, read_only=True) as store:
        run = store.get_run(name)
        experiment = Experiment.from_json(run.experiment)
        chosen = _round(run, store.rounds(run.id), round, best)
        assert chosen.state_path is not None and chosen.state_sha256 is not None
        path, folder = store.artefact_file(run.id, chosen.state_path), store.run_folder(run.id)
    verify(path, chosen.state_sha256)
    _check_own(experiment, run, own)
    state = read_state(path, model_spec(experiment))
    if own is not None:
        state = replace(state, start=own(folder, chosen.round, state.start))
    adapter = whole_adapter(state)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder; give another --out")
    try:
        with whole_or_nothing(out) as unfinished:
            written = _write(adapter, experiment, unfinished, form)
        return out / written.relative_to(unfinished)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{out} cannot be written: {getattr(error, 'strerror', None) or error}") from None


def _check_own(experiment: Experiment, run: Run, own: Own | None) -> None:
    name = experiment.strategy.name
    personal = AGGREGATION.plugin(name).capabilities.client_memory
    if personal and own is None:
        raise UserError(
            f"run {run.id} has no one model: under strategy {name} every client keeps factors of its own; name one "
            f"with --client: {', '.join(experiment.simulated_clients())}"
        )
    if own is not None and not personal:
        raise UserError(f"--client is for strategies whose clients keep factors of their own; {name} has one model")


def _round(run: Run, rounds: list[Round], number: int | None, best: bool) -> Round:
    ended = {row.round: row for row in rounds if row.state_path is not None}
    if not ended:
        raise UserError(f"run {run.id} has no committed round to export")
    if best:
        if run.best_round is None:
            raise UserError(f"run {run.id} was never evaluated, so no round is best; give --round N")
        number = run.best_round
    wanted = max(ended) if number is None else number
    if wanted not in ended:
        raise UserError(f"run {run.id} has no round {wanted}; it has {min(ended)} to {max(ended)}")
    return ended[wanted]


def _write(adapter: Adapter, experiment: Experiment, out: Path, form: Format) -> Path:
    task = task_of(experiment)
    if form == "peft":
        base = (task.base_place, task.base_revision)
        write_peft_folder(adapter, out, task.architecture(), base, task.peft_task_type)
        return out
    if form == "merged":
        return _write_merged(adapter, experiment, out)
    if form == "lorafleet":
        out.mkdir(parents=True, exist_ok=True)
        (file := out / "adapter.safetensors").write_bytes(adapter_bytes(adapter))
        return file
    raise ConfigurationError(f"there is no format {form!r}; choose peft, merged or lorafleet")


def _write_merged(adapter: Adapter, experiment: Experiment, out: Path) -> Path:
    task = task_of(experiment)
    model = task.load_base("fp32")
    for name, update in adapter.layers.items():
        _put(model, f"{name}.weight", add_update(model.get_submodule(name), update.dense()))
    for name, value in adapter.extras.items():
        _put(model, name, value)
    model.save_pretrained(out)  # type: ignore[operator]
    for file in Path(task.base_place).glob("*token*") if Path(task.base_place).is_dir() else ():
        shutil.copy(file, out)
    return out


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter; an output layer that was the embedding itself is a layer of its own then."""
    module, _, key = name.rpartition(".")
    holder = model.get_submodule(module)
    before = getattr(holder, key)
    setattr(holder, key, nn.Parameter(value, requires_grad=False))
    if any(parameter is before for parameter in model.parameters()):
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
