"""The round loop in one process: real server, real clients, every policy, and the model everybody means."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, MessageType
from torch import Tensor

from client.app import app as client_app
from common.adapter import Adapter
from common.adapter_file import read_adapter_file, read_state, whole_adapter
from common.errors import ConfigurationError, DataError, RunError, StoreError, UserError
from common.experiment import Experiment
from common.messages import TrainOrder
from common.seeds import chance
from common.store import ClientRound, Round, RunStore, verify
from common.tasks import Rows, clients_key
from common.wire import read_message
from common.workspace import model_spec, task_of
from server.progress import Progress, listening
from simulations import simulate
from simulations.run import FinishedRun
from tests.tiny import Client, drive, name_of, tiny

STRATEGIES = {
    "flora": (),
    "fedavg": ("clients.dot.rank=4", "clients.ben.rank=4", "clients.ada.rank=4", "clients.cyd.rank=4"),
    "ffa_lora": (),
    "lora_lego": (),
    "lora_lego merge": ("strategy.options.mode=merge",),
}


UNJUDGED = ("evaluation.on=[]",)


def strategy(name: str) -> tuple[str, ...]:
    return (f"strategy.name={name.split()[0]}", *STRATEGIES[name])


def rows(run: FinishedRun, number: int | None = None) -> list[ClientRound]:
    with RunStore.open(run.home, read_only=True) as store:
        return store.client_rounds(run.run.id, number)


def fates(run: FinishedRun, number: int | None = None) -> dict[str, str]:
    return {row.client: row.status for row in rows(run, number)}


def reasons(run: FinishedRun, number: int | None = None) -> dict[str, str | None]:
    return {row.client: row.reason for row in rows(run, number)}


def sha256(run: FinishedRun) -> str:
    assert run.adapter is not None
    assert run.run.adapter_sha256 is not None
    verify(run.adapter, run.run.adapter_sha256)
    return run.run.adapter_sha256


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_runs_to_its_end(tmp_path: Path, name: str) -> None:
    steps: list[Progress] = []
    with listening(steps.append):
        run = simulate(tiny(tmp_path, *strategy(name)), tmp_path)
    assert (run.run.status, run.run.rounds_done, run.run.reason) == ("completed", 2, None)
    assert [row.status for row in run.rounds] == ["committed"] * 3
    assert set(fates(run, 1).values()) == {"accepted"}
    assert len(run.metrics["held_out_loss"]) == 3
    assert len(run.metrics["train_loss"]) == 2
    spec = model_spec(Experiment.from_json(run.run.experiment))
    assert run.adapter is not None
    adapter = read_adapter_file(run.adapter)
    assert {layer: update.shape for layer, update in adapter.layers.items()} == dict(spec.layers)
    heard = [(step.kind, step.round) for step in steps if step.kind not in ("planned", "run_started")]
    assert heard == [("round_started", 0), ("evaluated", 0), ("committed", 0)] + [
        (kind, number)
        for number in (1, 2)
        for kind in ("round_started", "dispatched", *["reply"] * 4, "aggregated", "evaluated", "committed")
    ] + [("run_finished", 2)]


def test_the_loss_falls(tmp_path: Path) -> None:
    run = simulate(tiny(tmp_path, "training.steps=8", "training.learning_rate=0.02"), tmp_path)
    losses = run.metrics["held_out_loss"]
    assert losses[2] < losses[0] - 0.5
    assert run.run.best_round == min(range(3), key=losses.__getitem__)
    assert run.run.best_metric == min(losses)


@pytest.mark.parametrize("name", ["flora", pytest.param("lora_lego", marks=pytest.mark.long)])
def test_the_bits_follow_from_the_seed_and_not_from_the_workers(tmp_path: Path, name: str) -> None:
    def bits(*options: str) -> str:
        return sha256(simulate(tiny(tmp_path, *strategy(name), *UNJUDGED, *options), tmp_path))

    assert bits("simulation.workers=1") == bits("simulation.workers=2") == bits("simulation.workers=2")
    assert bits("seed=1") != bits()


def test_the_order_of_arrival_plays_no_part(tmp_path: Path) -> None:
    """Ada, the first by name, answers last."""
    others, heard = threading.Event(), []

    def slow(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN and name_of(experiment, context) == "ada":
            assert others.wait(60)
        return client_app(message, context)

    def listen(step: Progress) -> None:
        if step.kind == "reply":
            heard.append(step.client)
        if len(heard) == 3:
            others.set()

    experiment = tiny(tmp_path, "federation.rounds=1")
    with listening(listen):
        late = drive(experiment, tmp_path, slow)
    assert heard[3] == "ada"
    assert sha256(late) == sha256(simulate(experiment, tmp_path))


def test_one_experiment_after_another_in_one_process_leaves_no_trace(tmp_path: Path) -> None:
    plan = ("training.steps=2", "evaluation.on=['clients', 'server']", f"task.options.public='{tmp_path}/texts/ada'")
    alone = simulate(tiny(tmp_path, *plan), tmp_path)
    simulate(tiny(tmp_path, *plan, "adapter.options.dropout=0.5", "seed=3"), tmp_path)
    again = simulate(tiny(tmp_path, *plan), tmp_path)
    assert sha256(alone) == sha256(again)
    assert alone.metrics == again.metrics
    assert len(alone.metrics["unseen_loss"]) == 3


def losses_by_hand(experiment: Experiment, adapter: Adapter) -> dict[str, float]:
    """Evaluate ``W + Δ``: the plain base model, its weights added to, on every client's held-out part."""
    task = task_of(experiment)
    model = task.load_base("fp32").eval()
    for name, update in adapter.layers.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.data += update.dense()
    return {name: task.evaluate(model, held_out_of(experiment, name))["loss"] for name in experiment.clients}


def held_out_of(experiment: Experiment, name: str) -> Rows:
    clients = clients_key(experiment.simulated_clients())
    return task_of(experiment).client_data(name, clients, experiment.seed).held_out


@pytest.mark.parametrize(("name", "merge"), [(name, "merged") for name in STRATEGIES] + [("flora", "unmerged")])
def test_clients_evaluate_the_base_plus_the_whole_adapter(tmp_path: Path, name: str, merge: str) -> None:
    options = (*strategy(name), "training.learning_rate=0.05", f'training.global_adapter="{merge}"')
    experiment = tiny(tmp_path, *options, "clients.ben.evaluates=false", "clients.cyd.evaluates=false")
    run = simulate(experiment, tmp_path)
    with RunStore.open(tmp_path, read_only=True) as store:
        for row in run.rounds[1:]:
            assert row.state_path is not None
            state = read_state(store.artefact_file(run.run.id, row.state_path), model_spec(experiment))
            whole = whole_adapter(state)
            told = {m.client: m.value for m in store.metrics(run.run.id, "held_out_loss", row.round) if m.client}
            expected = losses_by_hand(experiment, whole)
            assert told == pytest.approx({name: expected[name] for name in ("ada", "dot")}, abs=1e-5)
    assert run.adapter is not None
    assert read_adapter_file(run.adapter).sha256() == whole.sha256()
    before, after = (run.round_metrics(number)["held_out_loss"] for number in (0, 2))
    assert abs(before - after) > 1e-3


def test_a_federation_goes_on_from_an_adapter(tmp_path: Path) -> None:
    first = simulate(tiny(tmp_path, "federation.rounds=1", "training.learning_rate=0.05"), tmp_path)
    second = simulate(
        tiny(tmp_path, f"adapter.options.start_from='{first.adapter}'", "strategy.name=ffa_lora"), tmp_path
    )
    assert second.metrics["held_out_loss"][0] == pytest.approx(first.metrics["held_out_loss"][1], abs=1e-6)
    experiment = Experiment.from_json(second.run.experiment)
    assert second.adapter is not None
    told = {m.client: m.value for m in second.measured if m.name == "held_out_loss" and m.round == 2 and m.client}
    assert told == pytest.approx(losses_by_hand(experiment, read_adapter_file(second.adapter)), abs=1e-5)


def silenced(experiment: Experiment, rounds: set[int], names: set[str] | None = None) -> Client:
    """Build clients that fail to train in some rounds."""

    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN:
            order, _ = read_message(message.content, TrainOrder)
            if order.round in rounds and (names is None or order.client in names):
                raise ValueError(f"no power in round {order.round}")
        return client_app(message, context)

    return client


def test_a_round_below_its_quorum_fails_and_the_next_one_goes_on(tmp_path: Path) -> None:
    experiment = tiny(tmp_path, "federation.rounds=3", "federation.min_completion=0.5")
    steps: list[Progress] = []
    with listening(steps.append):
        run = drive(experiment, tmp_path, silenced(experiment, {2}, {"ada", "ben", "cyd"}))
    assert [row.status for row in run.rounds] == ["committed", "committed", "failed", "committed"]
    assert run.rounds[2].reason == "1 valid reply of 4, 2 needed"
    assert (run.run.status, run.run.rounds_done) == ("completed", 3)
    assert fates(run, 2) == {"ada": "failed", "ben": "failed", "cyd": "failed", "dot": "accepted"}
    assert reasons(run, 2)["ada"] == "ValueError: no power in round 2"
    assert [step.round for step in steps if step.kind == "round_failed"] == [2]
    assert run.round_metrics(2)["held_out_loss"] == run.round_metrics(1)["held_out_loss"]
    # A failed round changes nothing, so it is the same as having had two rounds.
    expected = simulate(tiny(tmp_path, "federation.rounds=2"), tmp_path)
    assert run.metrics["train_loss"][0] == expected.metrics["train_loss"][0]
    assert run.rounds[2].state_sha256 == run.rounds[1].state_sha256 == expected.rounds[1].state_sha256


@pytest.mark.parametrize(
    ("share", "silent", "status"),
    [(0.5, 2, "committed"), (0.5, 3, "failed"), (0.6, 2, "failed"), (0.75, 1, "committed"), (1.0, 1, "failed")],
)
def test_the_quorum_is_at_least_the_share(tmp_path: Path, share: float, silent: int, status: str) -> None:
    experiment = tiny(tmp_path, f"federation.min_completion={share}", *UNJUDGED)
    run = drive(experiment, tmp_path, silenced(experiment, {1}, set(sorted(experiment.clients)[:silent])))
    assert run.rounds[1].status == status


def test_five_clients_at_half_need_three(tmp_path: Path) -> None:
    ranks = dict.fromkeys("abcde", 2)
    experiment = tiny(tmp_path, *UNJUDGED, ranks=ranks)
    run = drive(experiment, tmp_path, silenced(experiment, {1}, {"a", "b", "c"}))
    assert run.rounds[1].reason == "2 valid replies of 5, 3 needed"


def test_a_run_may_stop_at_a_failed_round_and_tries_it_again(tmp_path: Path) -> None:
    undisturbed = simulate(tiny(tmp_path), tmp_path)
    experiment = tiny(tmp_path, 'federation.on_failure="stop"')
    with pytest.raises(RunError, match=r"round 2 failed: 0 valid replies of 4, 2 needed; mend it and resume") as caught:
        drive(experiment, tmp_path, silenced(experiment, {2}))
    assert caught.value.exit_code == 3
    with RunStore.open(tmp_path) as store:
        run = store.get_run("last")
        assert (run.status, run.rounds_done, run.adapter_path) == ("failed", 1, None)
        assert [event.kind for event in store.events(run.id)][-2:] == ["failed", "run_failed"]
    resumed = drive(experiment, tmp_path, run=run.id)
    assert [row.status for row in resumed.rounds] == ["committed"] * 3
    assert sha256(resumed) == sha256(undisturbed)


def test_a_run_that_trained_nothing_has_failed(tmp_path: Path) -> None:
    experiment = tiny(tmp_path)
    with pytest.raises(RunError, match="nothing was trained") as caught:
        drive(experiment, tmp_path, silenced(experiment, {1, 2}))
    assert caught.value.exit_code == 3
    with RunStore.open(tmp_path) as store:
        run = store.get_run("last")
        assert (run.status, run.rounds_done, run.adapter_path) == ("failed", 2, None)
        assert [row.status for row in store.rounds(run.id)] == ["committed", "failed", "failed"]


def test_patience_ends_a_run_that_does_not_get_better(tmp_path: Path) -> None:
    options = ("federation.rounds=9", "federation.patience=2", "training.learning_rate=1e-30")
    steps: list[Progress] = []
    with listening(steps.append):
        run = simulate(tiny(tmp_path, *options), tmp_path)
    assert (run.run.status, run.run.rounds_done, run.run.best_round) == ("completed", 2, 0)
    (notice,) = [step.text for step in steps if step.kind == "notice"]
    assert notice == "stopped: 2 rounds without a better loss (federation.patience)"


def cohorts(run: FinishedRun) -> list[tuple[str, ...]]:
    return [row.cohort for row in run.rounds[1:]]


def test_cohorts_are_drawn_from_the_seed(tmp_path: Path) -> None:
    options = ("federation.cohort_size=2", "federation.rounds=4", *UNJUDGED)
    one, two = (simulate(tiny(tmp_path, *options), tmp_path) for _ in range(2))
    other = simulate(tiny(tmp_path, *options, "seed=1"), tmp_path)
    assert cohorts(one) == cohorts(two) != cohorts(other)
    assert all(len(set(cohort)) == 2 for cohort in cohorts(one))
    assert len(set(cohorts(one))) > 1
    assert {row.client for row in rows(one, 1)} == set(one.rounds[1].cohort)


def test_a_share_of_the_clients_can_be_asked(tmp_path: Path) -> None:
    run = simulate(tiny(tmp_path, "federation.cohort_fraction=0.75", *UNJUDGED), tmp_path)
    assert [len(cohort) for cohort in cohorts(run)] == [3, 3]


def test_clients_that_only_evaluate_never_train(tmp_path: Path) -> None:
    run = simulate(tiny(tmp_path, "clients.ada.trains=false", "clients.ben.evaluates=false"), tmp_path)
    assert cohorts(run) == [("ben", "cyd", "dot")] * 2
    assert {m.client for m in run.measured if m.name == "held_out_loss"} == {"", "ada", "cyd", "dot"}


def test_offline_and_failing_clients_are_simulated_from_the_seed(tmp_path: Path) -> None:
    options = ("simulation.offline=0.4", "simulation.dropout=0.4", "federation.rounds=4", "federation.min_completion=0")
    options += UNJUDGED
    one, two = (simulate(tiny(tmp_path, *options), tmp_path) for _ in range(2))
    for number in range(1, 5):
        assert reasons(one, number) == reasons(two, number)
        assert set(fates(one, number)) == {"ada", "ben", "cyd", "dot"}
        for name, fate in fates(one, number).items():
            away = chance(0.4, 0, "offline", number, name)
            lost = chance(0.4, 0, "dropout", number, name)
            assert fate == ("offline" if away else "failed" if lost else "accepted")
            assert (name in one.rounds[number].cohort) == (not away)
    told = {reason for number in range(1, 5) for reason in reasons(one, number).values()}
    assert told == {None, "offline in this round (simulation.offline)", "dropped out (simulation.dropout)"}


def test_a_straggler_within_the_deadline_counts(tmp_path: Path) -> None:
    run = simulate(
        tiny(tmp_path, "simulation.stragglers=0.5", "simulation.straggler_delay_s=0.05", "federation.rounds=1"),
        tmp_path,
    )
    assert set(fates(run, 1).values()) == {"accepted"}
    assert sha256(run) == sha256(simulate(tiny(tmp_path, "federation.rounds=1"), tmp_path))


def test_virtual_clients_have_the_ranks_of_the_plan(tmp_path: Path) -> None:
    options = ("simulation.clients=3", "simulation.ranks=[2, 5]", "clients={}", "task.options.partition=iid")
    run = simulate(tiny(tmp_path, *options, f"task.options.source='{tmp_path}/texts'"), tmp_path)
    assert {row.client: row.rank for row in rows(run, 1)} == {"client-1": 2, "client-2": 5, "client-3": 2}


def test_evaluation_can_be_rare(tmp_path: Path) -> None:
    run = simulate(tiny(tmp_path, "evaluation.every=2", "federation.rounds=3"), tmp_path)
    assert sorted({m.round for m in run.measured if m.name == "held_out_loss"}) == [0, 2, 3]
    assert [sorted(row.phases) for row in run.rounds] == [
        ["evaluate"],
        ["aggregate", "train"],
        ["aggregate", "evaluate", "train"],
        ["aggregate", "evaluate", "train"],
    ]
    assert all(row.exact and row.error == pytest.approx(0, abs=1e-6) for row in run.rounds[1:])


def test_the_certificate_can_be_left_out(tmp_path: Path) -> None:
    run = simulate(tiny(tmp_path, "evaluation.certificate=false", "federation.rounds=1"), tmp_path)
    assert run.rounds[1].error is None
    assert "cosine_to_mean" not in {metric.name for metric in run.measured}


def test_the_certificate_measures_every_client(tmp_path: Path) -> None:
    run = simulate(tiny(tmp_path, *strategy("lora_lego"), "federation.rounds=1"), tmp_path)
    assert not run.rounds[1].exact
    assert run.rounds[1].error is not None
    assert run.rounds[1].error > 0
    for name in ("cosine_to_mean", "update_norm"):
        assert {m.client for m in run.measured if m.name == name} == {"ada", "ben", "cyd", "dot"}


def test_each_number_of_a_round_is_there(tmp_path: Path) -> None:
    run = simulate(tiny(tmp_path), tmp_path)
    row = run.rounds[2]
    assert isinstance(row, Round)
    clients = rows(run, 2)
    evaluation = row.bytes_down - sum(client.bytes_down for client in clients)
    assert evaluation > 0
    assert 0 < row.bytes_up - sum(client.bytes_up for client in clients) < 2000
    assert sum(row.phases.values()) <= row.seconds
    numbers = run.round_metrics(2)
    losses = {m.client: m.value for m in run.measured if m.name == "held_out_loss" and m.round == 2 and m.client}
    assert numbers["worst_client_loss"] == max(losses.values())
    assert numbers["client_loss_spread"] == max(losses.values()) - min(losses.values())
    trained = {m.client: m.value for m in run.measured if m.name == "train_loss" and m.round == 2 and m.client}
    weights = {client.client: client.num_examples for client in clients}
    mean = sum(weights[name] * value for name, value in trained.items()) / sum(weights.values())
    assert numbers["train_loss"] == pytest.approx(mean)


def test_equal_weights_can_be_asked_for(tmp_path: Path) -> None:
    one = simulate(tiny(tmp_path, 'federation.weighting="equal"', "federation.rounds=1"), tmp_path)
    two = simulate(tiny(tmp_path, "federation.rounds=1"), tmp_path)
    assert sha256(one) != sha256(two)
    assert [row.num_examples for row in rows(one, 1)] == [row.num_examples for row in rows(two, 1)]


def test_fp16_halves_what_travels(tmp_path: Path) -> None:
    full, half = (
        simulate(tiny(tmp_path, f'federation.wire="{wire}"', f'federation.wire_down="{wire}"'), tmp_path)
        for wire in ("fp32", "fp16")
    )
    assert sum(r.bytes_up for r in rows(half, 1)) < 0.55 * sum(r.bytes_up for r in rows(full, 1))
    assert half.rounds[2].bytes_down < 0.55 * full.rounds[2].bytes_down
    assert half.metrics["held_out_loss"] == pytest.approx(full.metrics["held_out_loss"], abs=0.01)
    assert sha256(half) != sha256(full)


def test_a_frozen_a_never_travels(tmp_path: Path) -> None:
    whole, half = (simulate(tiny(tmp_path, f"strategy.name={name}"), tmp_path) for name in ("flora", "ffa_lora"))
    # q_proj and v_proj are square: b is half of the factors
    assert sum(r.bytes_up for r in rows(half, 1)) < 0.6 * sum(r.bytes_up for r in rows(whole, 1))


@pytest.mark.parametrize("keep", [True, False])
def test_replies_are_kept_only_when_asked_for(tmp_path: Path, keep: bool) -> None:
    run = simulate(tiny(tmp_path, f"federation.keep_replies={str(keep).lower()}"), tmp_path)
    with RunStore.open(tmp_path, read_only=True) as store:
        folder = store.run_folder(run.run.id)
        files = {path.relative_to(tmp_path).as_posix() for path in folder.glob("rounds/*/replies/*")}
        named = {row.artefact_path: row.artefact_sha256 for row in rows(run) if row.artefact_path}
        assert files == set(named)
        assert len(files) == (8 if keep else 0)
        assert {artefact.path for artefact in store.artefacts(run.run.id, "reply")} == files
        for path, digest in named.items():
            assert path is not None
            assert digest is not None
            verify(store.artefact_file(run.run.id, path), digest)


def test_the_store_tells_what_happened(tmp_path: Path) -> None:
    experiment = tiny(tmp_path)
    run = drive(experiment, tmp_path, silenced(experiment, {1}, {"ben"}))
    with RunStore.open(tmp_path, read_only=True) as store:
        events = store.events(run.run.id)
        assert [(event.kind, event.round, event.client) for event in events] == [
            ("round_started", 0, None),
            ("committed", 0, None),
            ("round_started", 1, None),
            ("dispatched", 1, None),
            ("left_out", 1, "ben"),
            ("aggregated", 1, None),
            ("committed", 1, None),
            ("round_started", 2, None),
            ("dispatched", 2, None),
            ("aggregated", 2, None),
            ("committed", 2, None),
            ("run_finished", 2, None),
        ]
        assert events[2].data == {"clients": ["ada", "ben", "cyd", "dot"], "rounds": 2}
        assert events[3].data == {"clients": ["ada", "ben", "cyd", "dot"], "k": 4, "n": 4}
        assert events[4].text == "ben is left out: ValueError: no power in round 1"
        assert events[5].data == {"k": 3, "n": 4, "needed": 2}
        for artefact in store.artefacts(run.run.id):
            verify(store.artefact_file(run.run.id, artefact.path), artefact.sha256)
        assert {artefact.kind for artefact in store.artefacts(run.run.id)} == {"state"}


def test_the_server_lets_the_model_speak_before_and_after(tmp_path: Path) -> None:
    options = ("evaluation.on=['server']", "task.options.prompts=['def ']", "task.options.new_tokens=3")
    run = simulate(tiny(tmp_path, *options, f"task.options.public='{tmp_path}/texts/dot'"), tmp_path)
    assert "held_out_loss" not in run.metrics
    assert len(run.metrics["unseen_loss"]) == 3
    assert run.run.best_metric == min(run.metrics["unseen_loss"])
    with RunStore.open(tmp_path, read_only=True) as store:
        made = store.artefacts(run.run.id, "samples")
        assert [artefact.round for artefact in made] == [0, 2]
        samples = json.loads(store.artefact_file(run.run.id, made[0].path).read_text())
    assert [sample["prompt"] for sample in samples] == ["def "]


def test_nobody_has_to_evaluate(tmp_path: Path) -> None:
    run = simulate(tiny(tmp_path, "evaluation.on=[]"), tmp_path)
    assert run.run.status == "completed"
    assert "held_out_loss" not in run.metrics
    assert (run.run.best_round, run.run.best_metric) == (None, None)


def test_evaluating_clients_can_be_few_and_stay_the_same(tmp_path: Path) -> None:
    run = simulate(tiny(tmp_path, "evaluation.fraction=0.5"), tmp_path)
    judges = [{m.client for m in run.measured if m.name == "held_out_loss" and m.round == n} for n in range(3)]
    assert len(judges[0]) == 1 + 2
    assert judges[0] == judges[1] == judges[2]


def test_unequal_ranks_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="fedavg needs equal ranks"):
        simulate(tiny(tmp_path, "strategy.name=fedavg"), tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_missing_data_is_found_before_anything_runs(tmp_path: Path) -> None:
    experiment = tiny(tmp_path, f"clients.ben.data='{tmp_path}/nowhere'")
    with pytest.raises(DataError, match=r"client ben: .*nowhere does not exist") as caught:
        simulate(experiment, tmp_path / "home")
    assert isinstance(caught.value, UserError)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "home").exists()


def test_a_home_that_cannot_be_written_is_found_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    steps: list[Progress] = []
    for home in (tmp_path / "file", tmp_path / "file" / "home", Path("/proc/home")):
        with pytest.raises(StoreError, match=r"cannot write .*; ") as caught, listening(steps.append):
            simulate(tiny(tmp_path), home)
        assert isinstance(caught.value, UserError)
    assert {step.kind for step in steps} <= {"planned", "notice"}


def test_a_plug_in_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is: fed_sb, fedavg, "):
        simulate(tiny(tmp_path, "strategy.name=fedavrg"), tmp_path)


def test_a_run_leaves_torch_as_it_found_it(tmp_path: Path) -> None:
    torch.manual_seed(3)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    simulate(tiny(tmp_path, "federation.rounds=1", "adapter.options.dropout=0.1"), tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_each_client_works_under_its_own_name(tmp_path: Path) -> None:
    experiment, seen = tiny(tmp_path, "federation.rounds=1"), []

    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN:
            order, _ = read_message(message.content, TrainOrder)
            seen.append((order.client, name_of(experiment, context), order.rank, order.attempt, order.rounds))
        return client_app(message, context)

    drive(experiment, tmp_path, client)
    assert sorted(seen) == [(name, name, experiment.clients[name].rank, 1, 1) for name in sorted(experiment.clients)]
