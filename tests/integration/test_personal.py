"""FedSA-LoRA end to end: what never leaves a client, what it remembers, and whose model can be exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, MessageType
from typer.testing import CliRunner

import lorafleet
from client.app import app as client_app
from client.memory import recall, remember
from client.own import OWN, keep_own, with_own
from common.adapter import Adapter
from common.adapter_file import adapter_bytes, read_adapter_file, read_state
from common.errors import ConfigurationError, TrainingError, UserError
from common.experiment import Experiment
from common.federation import ServerState
from common.lowrank import LowRank
from common.messages import EvaluateOrder, TrainAnswer, TrainOrder
from common.start import fresh_a
from common.store import RunStore
from common.wire import read_message
from common.workspace import model_spec, workspace
from server.export import export
from server.plan import make_plan
from server.progress import Progress, listening
from simulations import resume, simulate
from simulations.personal import with_kept
from simulations.run import FinishedRun
from tests.tiny import drive, name_of, synthetic, tiny

EQUAL = (4,) * 4
CLIENTS = tuple(f"client-{number}" for number in range(1, 5))


def build(*options: str) -> Experiment:
    return synthetic("strategy.name=fedsa_lora", *options, ranks=EQUAL)


def folder(run: FinishedRun, client: str) -> Path:
    return run.home / "runs" / run.run.id / "clients" / client


def state(run: FinishedRun, number: int) -> ServerState:
    path = run.rounds[number].state_path
    assert path is not None
    return read_state(run.home / path, model_spec(Experiment.from_json(run.run.experiment)))


def kept(run: FinishedRun, client: str, number: int = 4) -> dict[str, torch.Tensor]:
    found = recall(folder(run, client), OWN, number + 1)
    assert found is not None
    return found


def memories(run: FinishedRun) -> list[torch.Tensor]:
    return [kept(run, client)["b"] for client in CLIENTS]


def same_memories(one: FinishedRun, other: FinishedRun) -> bool:
    return all(torch.equal(x, y) for x, y in zip(memories(one), memories(other), strict=True))


def rejected(run: FinishedRun) -> list[str]:
    with RunStore.open(run.home, read_only=True) as store:
        rows = store.client_rounds(run.run.id)
    return [f"{row.client} in {row.round}: {row.reason}" for row in rows if row.status != "accepted"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A run that nobody disturbs."""
    return drive(build(), tmp_path_factory.mktemp("whole"))


HEAD = 'adapter.options.head=["model.norm"]'


@pytest.mark.parametrize("wire", ["fp32", "int8"])
def test_no_message_brings_a_b_or_a_head(tmp_path: Path, wire: str) -> None:
    """Every blob of every message is exactly as long as all a; none holds a client's b."""
    options = ("strategy.name=fedsa_lora", "federation.rounds=3", f"federation.wire={wire}", HEAD)
    experiment = tiny(tmp_path, *options, ranks=dict.fromkeys(("ada", "ben"), 4))
    seen: list[tuple[str, str, str, int]] = []
    blobs: list[bytes] = []

    def noting(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        kind = message.metadata.message_type
        pairs = {MessageType.TRAIN: (TrainOrder, TrainAnswer), MessageType.EVALUATE: (EvaluateOrder, None)}.get(kind)
        if pairs is not None:
            for content, header in zip((message.content, reply.content), pairs, strict=True):
                parcels = {} if header is None else read_message(content, header)[1]
                seen.extend((kind, name, parcel.part, parcel.layout.numel) for name, parcel in parcels.items())
                blobs.extend(bytes(parcel.data) for name, parcel in parcels.items() if name != "global")
        return reply

    run = drive(experiment, tmp_path, noting)
    assert not rejected(run)
    assert {part for _, name, part, _ in seen if name in ("start", "update")} == {"inner"}
    assert {size for _, name, _, size in seen if name == "global"} == {0}
    numbers = {"fp32": 4, "int8": 1 + 2 / 128}[wire] * 8 * 4 * 192
    assert {len(blob) for blob in blobs} <= {0, 8 * 4 * 192 * 4, numbers}
    for name in ("ada", "ben"):
        own = kept(run, name, 3)
        assert set(own) == {"b", "head.model.norm.weight"}
        needle = own["b"].numpy().tobytes()[:64]
        assert not any(needle in blob for blob in blobs)
    assert run.adapter is not None


def test_the_servers_state_holds_no_b(whole: FinishedRun) -> None:
    for number in range(1, 5):
        held = state(whole, number)
        assert not held.start.flat[: held.start.layout.head_numel].any()
        assert held.start.inner_factors.any()
        assert not held.global_adapter.layers
        assert not held.extras


def test_clients_share_a_and_differ_in_b(whole: FinishedRun) -> None:
    first = state(whole, 1).start.layers["layers.0"]
    assert isinstance(first, LowRank)
    own = memories(whole)
    assert all(each.any() for each in own)
    assert not any(torch.equal(own[i], own[j]) for i in range(4) for j in range(i))


def test_all_clients_begin_with_one_a_and_no_b(tmp_path: Path) -> None:
    """At ``b = 0`` a has no gradient: after the first step of the first round it is as it was drawn."""
    run = drive(build("training.steps=1", "federation.rounds=1"), tmp_path)
    start = state(run, 1).start
    seeds = {seed for seed in _seeds(tmp_path)}
    assert len(seeds) == 1
    for name, part in start.layers.items():
        assert isinstance(part, LowRank)
        torch.testing.assert_close(part.a, fresh_a(next(iter(seeds)), name, *part.a.shape))


def _seeds(home: Path) -> set[int]:
    seeds = set()

    def noting(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN:
            seeds.add(read_message(message.content, TrainOrder)[0].seed)
        return client_app(message, context)

    drive(build("training.steps=1", "federation.rounds=1"), home / "again", noting)
    return seeds


def test_what_is_learned_stays_from_round_to_round(whole: FinishedRun) -> None:
    """The loss falls below what one round from b = 0 reaches: each round begins with the b of the one before."""
    losses = whole.metrics["held_out_loss"]
    assert losses == sorted(losses, reverse=True)
    before, after = kept(whole, "client-1", 3)["b"], kept(whole, "client-1", 4)["b"]
    moved = float((after - before).norm() / before.norm())
    assert 0 < moved < 0.9


def test_a_client_is_judged_with_its_own_b(whole: FinishedRun) -> None:
    experiment = Experiment.from_json(whole.run.experiment)
    place = workspace(experiment)
    clients = tuple(experiment.simulated_clients().items())
    for client in CLIENTS:
        rows = place.task.client_data(client, clients, experiment.seed).held_out
        losses = {}
        for owner in CLIENTS:
            place.adapted.use_global(Adapter.empty(), "none")
            place.adapted.load(with_own(state(whole, 4).start, kept(whole, owner)))
            losses[owner] = place.task.evaluate(place.adapted.model, rows)["loss"]
        (measured,) = (m.value for m in whole.measured if (m.round, m.client, m.name) == (4, client, "held_out_loss"))
        assert losses[client] == pytest.approx(measured, rel=1e-5)
        assert min(losses, key=lambda owner: losses[owner]) == client


@pytest.mark.parametrize("where", [("reply", 2), ("aggregated", 2), ("committed", 3), ("dispatched", 4)], ids=str)
def test_a_run_that_was_interrupted_comes_to_the_same_bits(
    tmp_path: Path, whole: FinishedRun, where: tuple[str, int]
) -> None:
    def stop(step: Progress) -> None:
        if (step.kind, step.round) == where:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), listening(stop):
        drive(build(), tmp_path)
    with RunStore.open(tmp_path) as store:
        name = store.get_run("last").id
    resumed = drive(build(), tmp_path, run=name)
    assert resumed.run.adapter_sha256 == whole.run.adapter_sha256
    assert same_memories(resumed, whole)
    assert resumed.metrics["held_out_loss"] == whole.metrics["held_out_loss"]


def test_a_client_that_lost_its_answer_trains_again_from_the_b_it_had(tmp_path: Path, whole: FinishedRun) -> None:
    def forgetful(message: Message, context: Context) -> Message:
        client_app(message, context)
        name = name_of(build(), context)
        for answer in tmp_path.rglob(f"{name}/answer.safetensors"):
            answer.unlink()
        return client_app(message, context)

    run = drive(build(), tmp_path, forgetful)
    assert run.run.adapter_sha256 == whole.run.adapter_sha256
    assert same_memories(run, whole)


def lose(home: Path, client: str, when: int) -> Callable[[Message, Context], Message]:
    def losing(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN:
            order, _ = read_message(message.content, TrainOrder)
            if (order.client, order.round) == (client, when):
                for file in home.rglob(f"{client}/memory/*"):
                    file.unlink()
        return client_app(message, context)

    return losing


def test_a_lost_memory_is_a_new_client(tmp_path: Path, whole: FinishedRun) -> None:
    run = drive(build(), tmp_path, lose(tmp_path, "client-2", 3))
    assert not rejected(run)
    (worse,) = (m.value for m in run.measured if (m.round, m.client, m.name) == (3, "client-2", "held_out_loss"))
    (better,) = (m.value for m in whole.measured if (m.round, m.client, m.name) == (3, "client-2", "held_out_loss"))
    assert worse > better


def test_a_b_of_another_rank_does_not_count(tmp_path: Path) -> None:
    adapter = Adapter.pack({"x": LowRank(torch.zeros(3, 2), torch.ones(2, 4))}, {"head": torch.zeros(2)})
    trained = Adapter.pack({"x": LowRank(torch.ones(3, 2), torch.zeros(2, 4))}, {"head": torch.ones(2)})
    keep_own(tmp_path, 1, trained)
    joined = with_own(adapter, recall(tmp_path, OWN, 2))
    assert torch.equal(joined.flat, torch.ones(6 + 2 + 8))
    assert joined.layout == adapter.layout
    narrow = adapter.narrowed(1)
    assert with_own(narrow, recall(tmp_path, OWN, 2)) is narrow
    assert with_own(adapter, None) is adapter
    assert recall(tmp_path, OWN, 1) is None


def test_what_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    bad = Adapter.pack({"x": LowRank(torch.full((3, 2), float("nan")), torch.zeros(2, 4))})
    with pytest.raises(TrainingError, match=r"not finite and is not kept; lower training\.learning_rate"):
        keep_own(tmp_path, 1, bad)
    assert recall(tmp_path, OWN, 2) is None


def test_the_server_cannot_evaluate(tmp_path: Path) -> None:
    said = r'the server cannot evaluate under strategy fedsa_lora: .*; set evaluation.on = \["clients"\]'
    for on in ('["server"]', '["clients", "server"]'):
        with pytest.raises(ConfigurationError, match=said):
            make_plan(build(f"evaluation.on={on}"))
    assert not make_plan(build("evaluation.on=[]")).notices


def test_patience_watches_the_mean_of_the_clients(tmp_path: Path) -> None:
    run = drive(build("federation.patience=1", "training.learning_rate=1e-30", "federation.rounds=9"), tmp_path)
    assert (run.run.status, run.run.rounds_done) == ("completed", 1)


def test_an_adapter_with_heads_is_no_start(tmp_path: Path) -> None:
    path = tmp_path / "given.safetensors"
    path.write_bytes(adapter_bytes(Adapter.pack({}, {"model.norm.weight": torch.ones(192)})))
    options = ("strategy.name=fedsa_lora", HEAD, f"adapter.options.start_from='{path}'")
    with pytest.raises(ConfigurationError, match="has heads, which strategy fedsa_lora never sends"):
        make_plan(tiny(tmp_path, *options, ranks={"ada": 4, "ben": 4}))


def test_a_run_may_begin_with_an_adapter_of_layers(tmp_path: Path) -> None:
    """It becomes the global adapter, below every client's own factors."""
    given = Adapter.pack({"layers.0": LowRank(torch.full((24, 1), 0.1), torch.ones(1, 32))})
    path = tmp_path / "given.safetensors"
    path.write_bytes(adapter_bytes(given))
    run = drive(build(f"adapter.options.start_from='{path}'", "federation.rounds=2"), tmp_path)
    assert not rejected(run)
    assert torch.equal(state(run, 2).global_adapter.layers["layers.0"].dense(), given.layers["layers.0"].dense())
    out = export(run.run.id, run.home, tmp_path / "out", "lorafleet", own=_of("client-1"))
    exported = read_adapter_file(out).layers["layers.0"].dense()
    own = with_own(state(run, 2).start, kept(run, "client-1", 2)).layers["layers.0"].dense()
    torch.testing.assert_close(exported, given.layers["layers.0"].dense() + own)


def _of(client: str) -> Callable[[Path, int, Adapter], Adapter]:
    return lambda folder, number, start: with_kept(client, folder, number, start)


@pytest.mark.parametrize("number", [3, 4])
def test_a_clients_model_is_exported_as_it_was_judged(whole: FinishedRun, tmp_path: Path, number: int) -> None:
    out = export(whole.run.id, whole.home, tmp_path / "out", "lorafleet", round=number, own=_of("client-3"))
    expected = with_own(state(whole, number).start, kept(whole, "client-3", number))
    assert torch.equal(read_adapter_file(out).flat, expected.flat)
    assert expected.flat[: expected.layout.outer_numel].any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "has no one model: under strategy fedsa_lora .* name one with --client: client-1, client-2, client-3"),
        ({"own": _of("zoe")}, "client 'zoe' keeps nothing on this machine; there is: client-1, client-2, client-3"),
        ({"own": _of("../client-1")}, "keeps nothing on this machine"),
        (
            {"own": _of("client-1"), "round": 2},
            "client client-1 keeps nothing of round 2 or before; it forgets",
        ),
        ({"own": _of("client-1"), "round": 0}, "client client-1 keeps nothing of round 0"),
    ],
    ids=["nobody", "stranger", "path", "forgotten", "before"],
)
def test_what_cannot_be_exported_is_refused(
    whole: FinishedRun, tmp_path: Path, options: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        export(whole.run.id, whole.home, tmp_path / "out", "lorafleet", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_run_with_one_model_has_no_clients_of_its_own(tmp_path: Path) -> None:
    run = drive(synthetic("federation.rounds=1"), tmp_path)
    with pytest.raises(UserError, match=r"--client is for strategies .* factors of their own; flora has one"):
        export(run.run.id, run.home, tmp_path / "out", own=_of("client-1"))


def test_the_command_line_exports_a_clients_model(whole: FinishedRun, tmp_path: Path) -> None:
    given = ["export", "last", "--home", str(whole.home), "--out", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(lorafleet.app, [*given, "--client", "client-2"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["path"] == str(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_config.json").exists()


def test_a_run_is_no_start_for_another(whole: FinishedRun, tmp_path: Path) -> None:
    experiment = build(f"adapter.options.start_from='run:{whole.run.id}'")
    with pytest.raises(UserError, match=f"has no one model; start from a client's: lorafleet export {whole.run.id}"):
        simulate(experiment, whole.home)


def test_a_run_goes_back_as_far_as_its_clients_remember(tmp_path: Path) -> None:
    run = drive(build(), tmp_path)
    with pytest.raises(UserError, match="those of the newest two rounds; go back to round 3, or to 0"):
        resume(run.run.id, tmp_path, from_round=2)
    for number in (3, 0):
        again = resume(run.run.id, tmp_path, from_round=number)
        assert again.run.adapter_sha256 == run.run.adapter_sha256


def test_a_memory_of_a_round_that_was_taken_back_is_forgotten(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        remember(tmp_path, OWN, number, {"b": torch.full((2,), float(number))})
    remember(tmp_path, OWN, 2, {"b": torch.full((2,), 9.0)})
    found = recall(tmp_path, OWN, 99)
    assert found is not None
    assert found["b"].tolist() == [9, 9]
