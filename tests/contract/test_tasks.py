"""What every task must do, over whatever tasks are found, on the data of the task's own preset."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import pytest
import torch
from peft import TaskType
from torch import nn

from common.errors import ConfigurationError, DataError
from common.experiment import ClientSettings, Experiment
from common.experiment_file import load_experiment, preset_names, read_table
from common.tasks import TASKS, Batch, Clients, Rows, Sample, Task, clients_key
from common.workspace import task_of


@dataclass(frozen=True)
class Case:
    """A task as its preset sets it up, with its base model."""

    task: Task
    clients: Clients
    model: nn.Module

    @property
    def client(self) -> str:
        """The first client."""
        return self.clients[0][0]

    def rows(self) -> Rows:
        """Held-out examples of the first client."""
        return self.task.client_data(self.client, self.clients, 0).held_out


def preset_of(task: str) -> Experiment:
    names = sorted(preset_names(), key=lambda name: (name != "quickstart", name))
    return load_experiment(next(name for name in names if read_table(name)["task"]["name"] == task))


@pytest.fixture(scope="module", params=TASKS.names())
def case(request: pytest.FixtureRequest) -> Case:
    experiment = preset_of(request.param)
    task = task_of(experiment)
    return Case(task, clients_key(experiment.simulated_clients()), task.load_base("fp32"))


def forget() -> None:
    """Empty every cache of the modules that read data, so that they read it again."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("common.tasks", "common.text")):
            for member in vars(module).values():
                if hasattr(member, "cache_clear"):
                    member.cache_clear()


def everything(rows: Rows) -> Batch:
    return rows.take(torch.arange(len(rows)))


def examples(rows: Rows) -> set[bytes]:
    """Return each example as bytes, whatever it consists of."""
    batch = everything(rows)
    parts = [tensor.reshape(len(rows), -1).contiguous().numpy() for _, tensor in sorted(batch.items())]
    return {b"".join(part[number].tobytes() for part in parts) for number in range(len(rows))}


def same(one: Rows, other: Rows) -> bool:
    a, b = everything(one), everything(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_it_says_what_it_is(case: Case) -> None:
    """Options with a description, a default and a bound where a number has one; a docstring of its own."""
    kind = type(case.task)
    for option, field in kind.model_fields.items():
        assert field.description, f"{option} has no description"
        assert field.description.endswith("."), f"{option}'s description is no sentence"
        assert not field.is_required(), f"{option} has no default"
        if field.annotation in (int, float):
            assert field.metadata, f"{option} takes any number"
    assert kind.__doc__
    assert sys.modules[kind.__module__].__doc__
    assert set(kind.path_options) <= set(kind.model_fields)
    assert kind.peft_task_type in {None, *TaskType}
    with pytest.raises(ConfigurationError, match="unknown key 'no_such_option'; known are: "):
        TASKS.create(case.task.plugin_name, {"no_such_option": 1})


def test_options_survive_json_and_hash(case: Case) -> None:
    again = TASKS.create(case.task.plugin_name, json.loads(case.task.model_dump_json()))
    assert again == case.task
    assert hash(again) == hash(case.task)


def test_the_base_is_named_by_what_is_loaded(case: Case) -> None:
    keys = {case.task.base_key(precision) for precision in ("fp32", "bf16", "4bit")}
    assert len(keys) == 3
    assert case.task.base_place


def test_the_architecture_has_the_models_shapes_and_no_weights(case: Case) -> None:
    outline = case.task.architecture()
    assert {name: value.shape for name, value in outline.named_parameters()} == {
        name: value.shape for name, value in case.model.named_parameters()
    }
    assert all(value.is_meta for value in outline.parameters())


def test_the_base_is_loaded_as_asked(case: Case) -> None:
    assert {value.dtype for value in case.model.parameters()} == {torch.float32}
    assert {value.dtype for value in case.task.load_base("bf16").parameters()} == {torch.bfloat16}


def test_the_base_has_no_dropout(case: Case) -> None:
    assert [module.p for module in case.model.modules() if isinstance(module, nn.Dropout) and module.p] == []


def test_every_client_has_examples_on_both_sides(case: Case) -> None:
    assert all(isinstance(notice, str) for notice in case.task.check_data(case.clients, 0))
    for name, _ in case.clients:
        data = case.task.client_data(name, case.clients, 0)
        for rows in (data.train, data.held_out):
            assert len(rows) > 0
            assert {len(tensor) for tensor in everything(rows).values()} == {len(rows)}


def test_no_example_is_held_by_two(case: Case) -> None:
    parts = []
    for name, _ in case.clients:
        data = case.task.client_data(name, case.clients, 0)
        parts += [examples(data.train), examples(data.held_out)]
    assert len(set.union(*parts)) == sum(map(len, parts))


def test_data_follow_from_the_seed(case: Case) -> None:
    first = case.task.client_data(case.client, case.clients, 0)
    forget()
    again = case.task.client_data(case.client, case.clients, 0)
    assert again is not first
    assert same(first.train, again.train)
    assert same(first.held_out, again.held_out)
    other = case.task.client_data(case.client, case.clients, 1)
    assert not same(first.held_out, other.held_out)


def test_a_pool_holds_what_its_members_hold(case: Case) -> None:
    members = [name for name, _ in case.clients][:2]
    clients = tuple(sorted([*case.clients, ("zz-pool", ClientSettings(pool=tuple(members)))]))
    pooled = case.task.client_data("zz-pool", clients, 0)
    alone = [case.task.client_data(name, clients, 0) for name in members]
    # Rows are cut from the joined documents, so the numbers of rows agree only up to remainders.
    for mine, theirs in (
        (pooled.train, [data.train for data in alone]),
        (pooled.held_out, [data.held_out for data in alone]),
    ):
        assert sum(map(len, theirs)) <= len(mine) <= sum(map(len, theirs)) + len(members)
    for name, data in zip(members, alone, strict=True):
        assert same(data.train, case.task.client_data(name, case.clients, 0).train), "a pool changed its members' data"


def test_rows_are_taken_by_number(case: Case) -> None:
    rows = case.rows()
    numbers = torch.tensor([len(rows) - 1, 0, 0])
    assert all(torch.equal(tensor, everything(rows)[key][numbers]) for key, tensor in rows.take(numbers).items())


def test_losses_are_one_per_row_and_can_be_learned_from(case: Case) -> None:
    batch = case.rows().take(torch.tensor([0, 0]))
    losses = case.task.row_losses(case.model, batch)
    assert losses.shape == (2,)
    assert torch.allclose(losses[0], losses[1])
    losses.mean().backward()
    gradients = [value.grad for value in case.model.parameters() if value.grad is not None]
    assert gradients
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert max(float(gradient.abs().max()) for gradient in gradients) > 0
    case.model.zero_grad(set_to_none=True)


def test_a_row_does_not_change_its_neighbours_loss(case: Case) -> None:
    rows = case.rows()
    with torch.no_grad():
        together = case.task.row_losses(case.model, rows.take(torch.tensor([0, len(rows) - 1])))
        alone = case.task.row_losses(case.model, rows.take(torch.tensor([0])))
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-6)


def test_evaluation_measures_the_loss_and_repeats(case: Case) -> None:
    rows = case.rows()
    measured = case.task.evaluate(case.model, rows)
    assert measured == case.task.evaluate(case.model, rows)
    assert all(isinstance(value, float) for value in measured.values())
    assert 0 < measured["loss"] < float("inf")


def test_evaluation_sees_a_change_of_the_model(case: Case) -> None:
    before = case.task.evaluate(case.model, case.rows())["loss"]
    weight = next(value for value in case.model.parameters() if value.dim() > 1)
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(0.5)
        assert case.task.evaluate(case.model, case.rows())["loss"] != before
    finally:
        weight.data = kept


def test_samples_are_text_and_repeat(case: Case) -> None:
    task = case.task.model_copy(update={"new_tokens": 3}) if hasattr(case.task, "new_tokens") else case.task
    made = list(task.samples(case.model))
    assert {type(sample) for sample in made} <= {Sample}
    assert all(sample.text + sample.prompt for sample in made)
    assert made == list(task.samples(case.model))


def test_public_data_belong_to_nobody(case: Case) -> None:
    rows = case.task.public_data()
    if rows is None:
        return
    assert len(rows) > 0
    held = [case.task.client_data(name, case.clients, 0) for name, _ in case.clients]
    assert not examples(rows) & set().union(*(examples(data.train) for data in held))


def test_a_base_model_that_is_not_there_is_one_line(case: Case) -> None:
    if "base_model" not in type(case.task).model_fields:  # made in code
        return
    task = case.task.model_copy(update={"base_model": "/no/such/folder"})
    for attempt in (task.architecture, lambda: task.load_base("fp32")):
        with pytest.raises(DataError, match="base model '/no/such/folder' cannot be loaded: ") as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_made_up_rows_are_like_rows_and_nobodys(case: Case) -> None:
    made, real = case.task.made_up_rows(4), everything(case.rows())
    assert {key: (value.dtype, value.shape[1:]) for key, value in made.items()} == {
        key: (value.dtype, value.shape[1:]) for key, value in real.items()
    }
    losses = case.task.row_losses(case.model, made)
    assert losses.shape == (4,)
    assert bool(losses.isfinite().all())
    assert len(set(losses.tolist())) == 4
    again = case.task.made_up_rows(4)
    assert all(torch.equal(made[key], again[key]) for key in made)
