"""Hold every private part of Flower that common/flower.py touches against the installed version."""

from __future__ import annotations

import importlib
import inspect
import logging
from typing import Any

import pytest

ADVICE = "adapt common/flower.py (and this test) before raising the pinned version of flwr"


def moved(what: str) -> str:
    return f"Flower's internals moved: {what}; {ADVICE}"


def private(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        pytest.fail(moved(f"{module}.{name} is gone ({error})"))


@pytest.fixture(scope="module")
def flower() -> Any:
    try:
        return importlib.import_module("common.flower")
    except ImportError as error:
        pytest.fail(moved(str(error)))


def test_the_checked_version_is_installed() -> None:
    version = private("flwr", "__version__")
    assert version.split(".")[:2] == ["1", "41"], moved(f"flwr {version} is installed, 1.41 was checked")


def test_a_message_can_be_built_once_the_task_is_identified(flower: Any) -> None:
    from flwr.app import Message, RecordDict

    flower.identify_task(7)
    message = Message(RecordDict(), 1000, "train")
    assert message.metadata.run_id == 7, moved("TaskIdentity.run_id no longer sets a message's run")
    assert message.metadata.src_node_id == flower.SERVER_NODE_ID, moved("TaskIdentity.node_id is not used")
    server_node = private("flwr.common.constant", "SUPERLINK_NODE_ID")
    assert server_node == flower.SERVER_NODE_ID, moved(f"the server's node id is now {server_node}")


def test_a_message_takes_the_id_its_reply_refers_to(flower: Any) -> None:
    from flwr.app import Message, RecordDict

    flower.identify_task(7)
    message = Message(RecordDict(), 1000, "train")
    assert message.metadata.message_id == "", moved("a new message already has an id")
    flower.set_message_id(message, "message-1")
    assert message.metadata.message_id == "message-1", moved("Metadata keeps its id under another name")
    reply = Message(RecordDict(), reply_to=message)
    assert reply.metadata.reply_to_message_id == "message-1", moved("a reply refers to something else")


def test_an_expired_message_can_still_be_answered(flower: Any) -> None:
    from flwr.app import Error, Message, RecordDict

    flower.identify_task(7)
    message = Message(RecordDict(), 1000, "train", ttl=1e-6)
    reply = Message(Error(flower.ErrorCode.MESSAGE_UNAVAILABLE, "late"), reply_to=message)
    assert reply.error.code == 3, moved("MESSAGE_UNAVAILABLE is not error 3 any more")


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (0, "unknown"),
        (1, "load_client_app_exception"),
        (2, "client_app_raised_exception"),
        (3, "message_unavailable"),
        (4, "reply_message_unavailable"),
        (5, "node_unavailable"),
        (6, "mod_failed_precondition"),
        (7, "invalid_fab"),
        (8, "client_app_crashed"),
    ],
)
def test_error_codes_keep_their_meaning(flower: Any, code: int, name: str) -> None:
    assert flower.error_name(code) == name, moved(f"error {code} is now {flower.error_name(code)}")


def test_an_unknown_error_code_has_a_name(flower: Any) -> None:
    assert flower.error_name(99) == "error_99"


def test_a_run_record_can_be_empty(flower: Any) -> None:
    assert flower.empty_run(7).run_id == 7, moved("Run.create_empty does not keep the run id")


def test_rays_grid_says_how_often_to_ask() -> None:
    ray_grid = private("flwr.superlink.grid", "InMemoryGrid")
    parameters = inspect.signature(ray_grid).parameters
    assert "pull_interval" in parameters, moved("InMemoryGrid has no pull_interval any more")
    assert parameters["pull_interval"].default == 0.1, moved("InMemoryGrid's pull_interval changed")


def test_the_in_process_grid_has_all_a_grid_must_have() -> None:
    from flwr.serverapp import Grid

    grid = importlib.import_module("simulations.drivers.inprocess").InProcessGrid
    missing = sorted(grid.__abstractmethods__)
    assert not missing, moved(f"a Grid now needs {', '.join(missing)}")
    for name in Grid.__abstractmethods__ - {"run"}:
        ours = list(inspect.signature(getattr(grid, name)).parameters)
        theirs = list(inspect.signature(getattr(Grid, name)).parameters)
        assert ours == theirs, moved(f"Grid.{name} takes {theirs}, ours {ours}")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("flwr.supercore.telemetry", "FLWR_TELEMETRY_ENABLED"),
        ("flwr.supercore.constant", "FLWR_DISABLE_UPDATE_CHECK"),
        ("flwr.common.constant", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"),
    ],
)
def test_the_switches_are_still_read(flower: Any, module: str, name: str) -> None:
    private(module, name)
    environment: dict[str, str] = {}
    flower.set_environment_defaults(environment)
    assert name in environment


def test_the_environment_wins_over_the_defaults(flower: Any) -> None:
    environment = {"FLWR_TELEMETRY_ENABLED": "1"}
    flower.set_environment_defaults(environment)
    assert environment["FLWR_TELEMETRY_ENABLED"] == "1"
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"


def test_flowers_logger_can_be_silenced(flower: Any) -> None:
    logger = private("flwr.supercore", "log").__self__
    before = logger.level
    try:
        flower.quiet_logger(logging.ERROR)
        assert not logger.isEnabledFor(logging.WARNING), moved("Flower logs under another name")
    finally:
        logger.setLevel(before)


@pytest.mark.parametrize(
    "field",
    ["num_supernodes", "client_resources_num_cpus", "client_resources_num_gpus"],
)
def test_the_ray_drivers_settings_still_exist(field: str) -> None:
    config = private("flwr.proto.federation_config_pb2", "SimulationConfig")
    assert field in config.DESCRIPTOR.fields_by_name, moved(f"--federation-config has no {field} any more")


def test_flower_still_says_when_no_client_fits() -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    check = private("flwr.simulation.ray_transport.ray_actor", "pool_size_from_resources")
    words = importlib.import_module("simulations.drivers.flower_runtime").NO_ROOM
    assert words in inspect.getsource(check), moved("a machine too small for one client is reported otherwise")


def test_a_failed_simulation_is_still_described_as_before() -> None:
    source = inspect.getsource(importlib.import_module("flwr.simulation.app"))
    assert "Simulation failed with exception: " in source, moved("a failure's details begin otherwise")
