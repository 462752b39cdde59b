"""A client's half of a secure sum, asked directly: what it answers once, what it refuses, and what it forgets."""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from flwr.app import Context, Message, MessageType, RecordDict

from client.app import app as client_app
from common.experiment import Experiment
from common.federation import ClientInfo, ServerState
from common.fingerprint import code_fingerprint
from common.flower import identify_task
from common.messages import (
    EvaluateAnswer,
    Header,
    KeysAnswer,
    KeysOrder,
    Masking,
    PublicKeys,
    SecureSession,
    SharesAnswer,
    SharesOrder,
    TrainAnswer,
    UnmaskAnswer,
    UnmaskOrder,
)
from common.secure.keys import KeyPair
from common.wire import read_message, write_message
from common.workspace import model_spec
from server.orders import OrderBook
from strategies import aggregation_strategy
from tests.tiny import tiny

NODE = 7
NAMES = ("ada", "ben", "cyd", "dot")
SECURE = ("secure_aggregation.enabled=true", "strategy.name=ffa_lora")


@dataclass
class Bench:
    """A server's half of a secure sum, by hand."""

    experiment: Experiment
    home: str
    session: SecureSession = field(default_factory=lambda: session(1, 1))
    keys: dict[str, PublicKeys] = field(default_factory=dict)
    sealed: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def book(self) -> OrderBook:
        strategy = aggregation_strategy("ffa_lora")
        return OrderBook("r", self.experiment, strategy, self.state)

    @property
    def state(self) -> ServerState:
        return aggregation_strategy("ffa_lora").init(model_spec(self.experiment))

    def send(self, name: str, kind: str, content: RecordDict) -> Message:
        config = {"experiment": self.experiment.model_dump_json(), "run-id": "r", "home": self.home}
        node = {"partition-id": NAMES.index(name), "num-partitions": 4}
        message = Message(content, NODE, kind, ttl=60)
        return client_app(message, Context(1, NODE, node, RecordDict(), config))  # type: ignore[arg-type]

    def head(self, name: str) -> dict[str, Any]:
        return {"session": self.session, "fingerprint": code_fingerprint(), "client": name}

    def ask_keys(self, name: str) -> Message:
        return self.send(name, "query.keys", write_message(KeysOrder(**self.head(name))))

    def ask_shares(self, name: str, keys: dict[str, PublicKeys] | None = None) -> Message:
        order = SharesOrder(**self.head(name), keys=self.keys if keys is None else keys)
        return self.send(name, "query.shares", write_message(order))

    def ask_upload(self, name: str, **changes: Any) -> Message:
        shares = {sender: each[name] for sender, each in self.sealed.items() if sender != name}
        layout = self.book.train(1, 1, ClientInfo("dot", 8), NODE).start.layout.to_json()
        masking = Masking(session=self.session, shares=shares, layout=layout).model_copy(update=changes)
        return self.order(name, masking)

    def order(self, name: str, masking: Masking | None) -> Message:
        rank = {"ada": 2, "ben": 4, "cyd": 2, "dot": 8}[name]
        number = self.session.round
        return self.send(
            name,
            MessageType.TRAIN,
            self.book.train(number, 1, ClientInfo(name, rank), NODE, masking).message.content,
        )

    def ask_unmask(self, name: str, *survivors: str) -> Message:
        return self.send(
            name, "query.unmask", write_message(UnmaskOrder(**self.head(name), survivors=survivors or NAMES))
        )

    def share_all(self) -> None:
        """Take the first two steps with all clients."""
        self.keys = {name: read(self.ask_keys(name), KeysAnswer).keys for name in NAMES}
        self.sealed = {name: read(self.ask_shares(name), SharesAnswer).shares for name in NAMES}

    def vault(self, name: str) -> Path:
        return Path(self.home) / "runs" / "r" / "clients" / name / "secure" / "session.json"


def session(number: int, attempt: int) -> SecureSession:
    return SecureSession(run="r", round=number, attempt=attempt, id=f"{number}{attempt}" * 32)


H = TypeVar("H", bound=Header)


def read(reply: Message, kind: type[H]) -> H:
    assert reply.has_content(), reply.error.reason
    return read_message(reply.content, kind)[0]


def refusal(reply: Message) -> str:
    assert reply.has_error()
    return reply.error.reason


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    identify_task(1)
    return Bench(tiny(tmp_path, *SECURE), str(tmp_path / "home"))


def test_asked_again_a_client_gives_the_same_keys_and_shares(bench: Bench) -> None:
    bench.share_all()
    assert read(bench.ask_keys("ada"), KeysAnswer).keys == bench.keys["ada"]
    assert read(bench.ask_shares("ada"), SharesAnswer).shares == bench.sealed["ada"]
    assert len({key.mask for key in bench.keys.values()} | {key.cipher for key in bench.keys.values()}) == 8


def test_secrets_are_for_the_owner_only(bench: Bench) -> None:
    bench.ask_keys("ada")
    assert stat.S_IMODE(bench.vault("ada").stat().st_mode) == 0o600
    assert stat.S_IMODE(bench.vault("ada").parent.stat().st_mode) == 0o700


def test_shares_are_given_once_and_to_known_clients_only(bench: Bench) -> None:
    bench.share_all()
    fewer = {name: bench.keys[name] for name in ("ada", "ben", "cyd")}
    assert "already sent, to other clients" in refusal(bench.ask_shares("ada", fewer))


def other_keys(name: str, keys: dict[str, PublicKeys]) -> dict[str, PublicKeys]:
    pair = KeyPair.fresh().public.hex()
    return keys | {name: PublicKeys(cipher=pair, mask=KeyPair.fresh().public.hex())}


def test_keys_that_make_no_sense_are_refused(bench: Bench) -> None:
    bench.keys = {name: read(bench.ask_keys(name), KeysAnswer).keys for name in NAMES}
    two = {name: bench.keys[name] for name in ("ada", "ben")}
    assert "not those this client sent" in refusal(bench.ask_shares("ada", other_keys("ada", bench.keys)))
    assert "have the same key" in refusal(bench.ask_shares("ada", bench.keys | {"dot": bench.keys["ben"]}))
    assert "2 clients began the secure sum, at least 3" in refusal(bench.ask_shares("ada", two))
    assert "not those this client sent" in refusal(bench.ask_shares("ada", {}))
    low_order = bench.keys | {"dot": PublicKeys(cipher="0" * 64, mask=bench.keys["dot"].mask)}
    assert "public key" in refusal(bench.ask_shares("ada", low_order))
    assert read(bench.ask_shares("ada"), SharesAnswer).shares.keys() == {"ben", "cyd", "dot"}


def test_nothing_is_trained_without_masks(bench: Bench) -> None:
    assert "asks for a plain update" in refusal(bench.order("ada", None))


def test_nothing_is_trained_for_shares_that_do_not_fit(bench: Bench) -> None:
    bench.share_all()
    own = {sender: each["ada"] for sender, each in bench.sealed.items() if sender != "ada"}
    for shares, words in (
        ({"ben": own["ben"]}, "2 clients take part in the secure sum, 3 are needed"),
        (own | {"eve": own["ben"]}, "not from the clients whose keys were announced"),
        (own | {"ben": own["cyd"]}, "the shares from ben cannot be opened"),
        (own | {"ben": bench.sealed["ben"]["cyd"]}, "the shares from ben cannot be opened"),
        (own | {"ben": "zz"}, "the shares from ben cannot be read"),
    ):
        assert words in refusal(bench.ask_upload("ada", shares=shares)), words
    assert "layout cannot be used" in refusal(bench.ask_upload("ada", layout="[]"))
    narrow = bench.book.train(1, 1, ClientInfo("ada", 1), NODE).start.layout.to_json()
    assert "other layers, ranks or heads" in refusal(bench.ask_upload("ben", layout=narrow))


def test_of_one_session_one_order_is_trained(bench: Bench) -> None:
    bench.share_all()
    first = bench.ask_upload("ada")
    again = bench.ask_upload("ada")
    assert first.content.array_records["arrays"]["update"].data == again.content.array_records["arrays"]["update"].data
    fewer = {sender: bench.sealed[sender]["ada"] for sender in ("ben", "cyd")}
    assert "already has an update of this client" in refusal(bench.ask_upload("ada", shares=fewer))


def test_masks_are_lifted_once_for_one_sum(bench: Bench) -> None:
    bench.share_all()
    for name in NAMES[:3]:
        assert read(bench.ask_upload(name), TrainAnswer).num_examples == 1.0
    survivors = NAMES[:3]
    first = read(bench.ask_unmask("ada", *survivors), UnmaskAnswer)
    assert first.seeds.keys() == set(survivors)
    assert first.mask_keys.keys() == {"dot"}
    assert read(bench.ask_unmask("ada", *survivors[::-1]), UnmaskAnswer) == first
    assert "already lifted for another sum" in refusal(bench.ask_unmask("ada", *NAMES))
    kept = bench.vault("ada").read_text()
    for secret in (bench.keys["ada"].mask, "".join(bench.sealed["ada"].values())):
        assert secret not in kept
    assert '"mask":""' in kept
    assert '"seed":""' in kept
    assert '"shares":{}' in kept


def test_sums_that_would_reveal_too_much_are_refused(bench: Bench) -> None:
    bench.share_all()
    assert "sent nothing that could be unmasked" in refusal(bench.ask_unmask("ada"))
    bench.ask_upload("ada")
    assert "holds 2 clients, 3 are needed; nothing is revealed" in refusal(bench.ask_unmask("ada", "ada", "ben"))
    assert "holds 2 clients" in refusal(bench.ask_unmask("ada", "ada", "ada", "ben", "ben"))
    assert "does not hold this client's own update" in refusal(bench.ask_unmask("ada", "ben", "cyd", "dot"))
    assert "holds eve, who has no part" in refusal(bench.ask_unmask("ada", "ada", "ben", "eve"))
    assert read(bench.ask_unmask("ada"), UnmaskAnswer).mask_keys == {}


def test_other_sessions_are_unknown(bench: Bench) -> None:
    bench.share_all()
    bench.session = session(1, 1).model_copy(update={"id": "f" * 64})
    for reply in (bench.ask_shares("ada"), bench.ask_upload("ada"), bench.ask_unmask("ada")):
        assert "knows no secure session ffffffff of round 1" in refusal(reply)
    assert "already is in a newer secure session" in refusal(bench.ask_keys("ada"))


def test_a_newer_session_replaces_an_older_one_and_never_the_other_way_round(bench: Bench) -> None:
    bench.share_all()
    old = bench.vault("ada").read_text()
    bench.session = session(1, 2)
    assert read(bench.ask_keys("ada"), KeysAnswer).keys != bench.keys["ada"]
    assert bench.keys["ada"].mask not in bench.vault("ada").read_text()
    assert old != bench.vault("ada").read_text()
    bench.session = session(1, 1)
    assert "already is in a newer secure session" in refusal(bench.ask_keys("ada"))
    bench.session = session(2, 1)
    assert bench.ask_keys("ada").has_content()
    bench.session = session(1, 9)
    assert "already is in a newer secure session, of round 2" in refusal(bench.ask_keys("ada"))


def test_a_round_whose_masks_were_lifted_is_not_summed_again(bench: Bench) -> None:
    bench.share_all()
    bench.ask_upload("ada")
    bench.ask_unmask("ada")
    bench.session = session(1, 2)
    assert "already lifted once" in refusal(bench.ask_keys("ada"))
    bench.session = session(2, 3)
    assert bench.ask_keys("ada").has_content()


def test_when_its_round_is_evaluated_the_secrets_go(bench: Bench) -> None:
    bench.share_all()
    order = bench.book.evaluate(1, "ada", NODE)
    assert read(bench.send("ada", MessageType.EVALUATE, order.message.content), EvaluateAnswer).client == "ada"
    assert '"mask":""' in bench.vault("ada").read_text()
    assert "its secrets are gone" in refusal(bench.ask_keys("ada"))
    assert "its secrets are gone" in refusal(bench.ask_upload("ada"))


def test_damaged_secrets_are_not_used(bench: Bench) -> None:
    bench.share_all()
    bench.vault("ada").write_text("{")
    assert "cannot be read; remove" in refusal(bench.ask_upload("ada"))


def test_a_client_without_a_folder_takes_no_part(bench: Bench) -> None:
    bench.home = ""
    assert "has no folder of its own" in refusal(bench.ask_keys("ada"))
