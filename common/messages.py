"""What server and client say to each other, beside tensors: small frozen records, checked when they arrive."""

from __future__ import annotations

from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import ClientError
from common.experiment import Name

MAX_HEADER = 1 << 20
"""Characters a header may have; beyond it a message is refused unread."""

HASH = "^[0-9a-f]{64}$"


class Header(BaseModel):
    """Base of all records that travel."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Query(Header):
    """Asks a node who it is."""

    run: str
    fingerprint: str


class Presence(Header):
    """A node's answer: its name and what its device can carry."""

    client: Name
    device: str = Field("", max_length=256)
    memory_bytes: int = Field(0, ge=0)
    max_rank: int | None = Field(None, ge=1)


class TrainOrder(Header):
    """Orders one round of local training; ``start`` travels beside it, and ``global`` if the node lacks it."""

    run: str
    round: int = Field(ge=1)
    attempt: int = Field(ge=1)
    rounds: int = Field(ge=1)
    fingerprint: str
    client: str
    base_version: int = Field(ge=0)
    global_hash: str = Field(pattern=HASH)
    rank: int = Field(ge=1)
    seed: int = Field(ge=0)
    trains: Literal["ab", "b", "a"]
    frozen_a: int | None = None


class TrainAnswer(Header):
    """What training gave; the ``update`` travels beside it."""

    client: str = Field(max_length=64)
    round: int
    base_version: int
    num_examples: float
    seconds: float = Field(ge=0, allow_inf_nan=False)
    metrics: dict[str, float] = Field(default_factory=dict, max_length=64)
    frozen_hash: str | None = Field(None, max_length=64)
    holds: str = Field("", max_length=64, description="Hash of the global adapter the node keeps.")


class EvaluateOrder(Header):
    """Orders the evaluation of a model on the node's held-out part."""

    run: str
    round: int = Field(ge=0)
    fingerprint: str
    client: str
    base_version: int = Field(ge=0)
    global_hash: str = Field(pattern=HASH)
    frozen_a: int | None = None


class EvaluateAnswer(Header):
    """What evaluation gave."""

    client: str = Field(max_length=64)
    round: int
    num_examples: float = Field(gt=0)
    seconds: float = Field(ge=0, allow_inf_nan=False)
    metrics: dict[str, float] = Field(default_factory=dict, max_length=64)
    holds: str = Field("", max_length=64, description="Hash of the global adapter the node keeps.")


H = TypeVar("H", bound=Header)


def read_header(kind: type[H], text: object) -> H:
    """Read a record that came over the wire.

    Raises
    ------
    ClientError
        If it is missing, too long, or not such a record.
    """
    if not isinstance(text, str) or len(text) > MAX_HEADER:
        raise ClientError(f"the message has no readable {kind.__name__}")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ClientError(f"the message is no {kind.__name__}: {where} {first['msg']}") from None
