"""What server and client say to each other, beside tensors: small frozen records, checked when they arrive."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import ClientError
from common.federation import TrainedFactors
from common.section import Name

MAX_HEADER = 1 << 20
"""Characters a header may have; beyond it a message is refused unread."""

HASH = "^[0-9a-f]{64}$"

BUDGET_EXHAUSTED = 10_001
"""Code of the error message of a client whose privacy budget is spent; Flower's own codes are far below."""

Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
"""How long something took."""

Moment = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
"""When a client took up an order, in seconds since the epoch of its own clock; 0 where it does not say."""


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


class SecureSession(Header):
    """Names one attempt at a secure sum; a client works on one at a time, and never goes back to an older one."""

    run: str
    round: int = Field(ge=1)
    attempt: int = Field(ge=1)
    id: str = Field(pattern=HASH)


class Masking(Header):
    """Orders that what was trained is masked: sealed shares from all the others, by name."""

    session: SecureSession
    shares: dict[Name, str]
    layout: str = Field(description="Of the widest client's adapter: all uploads are as long as its.")


class ModelOrder(Header):
    """Orders work on a model: ``start`` travels beside it, ``global`` and ``frames`` if the node lacks them."""

    run: str
    round: int = Field(ge=0)
    fingerprint: str
    client: str
    base_version: int = Field(ge=0)
    global_hash: str = Field(pattern=HASH)
    rank: int = Field(ge=1)
    seed: int = Field(ge=0)
    frozen_a: int | None = None
    frames_hash: str = Field("", max_length=64, description="Hash of the frames a core lies between.")
    keeps_b: bool = False
    density: float | None = Field(None, gt=0, le=1)


class TrainOrder(ModelOrder):
    """Orders one round of local training."""

    round: int = Field(ge=1)
    attempt: int = Field(ge=1)
    rounds: int = Field(ge=1)
    trains: TrainedFactors
    tail: tuple[float, float] | None = None
    feedback: bool = Field(False, description="Add what the wire format lost to the next update.")
    masking: Masking | None = None


class PrivacyReport(Header):
    """What a round of training under privacy cost, in declared public numbers only."""

    noise_multiplier: float = Field(gt=0, le=1e9, allow_inf_nan=False)
    clipping_norm: float = Field(gt=0, allow_inf_nan=False)
    sample_rate: float = Field(gt=0, le=1)
    steps: int = Field(ge=1)
    delta: float = Field(gt=0, lt=1)
    epsilon: float = Field(ge=0, allow_inf_nan=False, description="Of the run up to this round, as accounted.")
    second_epsilon: float | None = Field(None, ge=0, allow_inf_nan=False, description="By the other accountant.")
    rounds_left: int = Field(0, ge=0, description="Further rounds that the budget allows.")


class TrainAnswer(Header):
    """What training gave; the ``update`` travels beside it."""

    client: str = Field(max_length=64)
    round: int
    base_version: int
    num_examples: float
    seconds: Seconds
    began: Moment = 0.0
    ready: Seconds = Field(0.0, description="After it began: until training starts, once all is decoded and loaded.")
    metrics: dict[str, float] = Field(default_factory=dict, max_length=64)
    frozen_hash: str | None = Field(None, max_length=64)
    session: str = Field("", max_length=64, description="Secure session the update is masked for.")
    privacy: PrivacyReport | None = Field(None, description="Under sample-level privacy; then nothing else is told.")
    holds: tuple[str, ...] = Field((), max_length=2, description="Hashes of the global adapter and frames it keeps.")


class EvaluateOrder(ModelOrder):
    """Orders the evaluation of a model on the node's held-out part."""


class EvaluateAnswer(Header):
    """What evaluation gave."""

    client: str = Field(max_length=64)
    round: int
    num_examples: float = Field(gt=0)
    seconds: Seconds
    began: Moment = 0.0
    metrics: dict[str, float] = Field(default_factory=dict, max_length=64)
    holds: tuple[str, ...] = Field((), max_length=2, description="Hashes of the global adapter and frames it keeps.")


class PublicKeys(Header):
    """A client's public keys of one session: for sealing shares, and for masks."""

    cipher: str = Field(pattern=HASH)
    mask: str = Field(pattern=HASH)


class SecureOrder(Header):
    """Orders a step of a secure sum."""

    session: SecureSession
    fingerprint: str
    client: str


class SecureAnswer(Header):
    """What a client gives in a step of a secure sum."""

    session: SecureSession
    client: str = Field(max_length=64)


class KeysOrder(SecureOrder):
    """Asks for fresh public keys."""


class KeysAnswer(SecureAnswer):
    """The client's public keys."""

    keys: PublicKeys


class SharesOrder(SecureOrder):
    """Asks for shares of the client's secrets, sealed for every other client whose keys these are."""

    keys: dict[Name, PublicKeys]


class SharesAnswer(SecureAnswer):
    """Sealed shares by receiver, in hexadecimal digits."""

    shares: dict[Name, str]


class UnmaskOrder(SecureOrder):
    """Asks for what lifts the masks of a sum that holds exactly these clients."""

    survivors: tuple[Name, ...]


class UnmaskAnswer(SecureAnswer):
    """Shares in hexadecimal digits: of the survivors' seeds, and of the private mask keys of those who dropped out."""

    seeds: dict[Name, str]
    mask_keys: dict[Name, str]


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
