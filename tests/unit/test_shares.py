"""Which documents each client holds: partitions of one source, sources of their own, pools, pieces, refusals."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from common.errors import DataError
from common.experiment import ClientSettings
from common.tasks import Clients, clients_key
from common.text import Document, documents, shares, stdlib
from common.text.partition import Partition
from common.text.shares import Share, TextSource, client_share, notices, pieces
from common.text.stdlib import installed

COUNTS = {"ann": 9, "bob": 5, "cleo": 2}
"""Documents per key in the table that most tests share out."""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("table") / "mails.jsonl"
    rows = [{"body": f"{owner} writes {n}: {'x' * n}", "owner": owner} for owner, c in COUNTS.items() for n in range(c)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


def source(place: str | None, kind: str = "natural", **options: Any) -> TextSource:
    scheme = Partition(kind=kind, alpha=options.pop("alpha", 0.5))  # type: ignore[arg-type]
    return TextSource(place, scheme, "body", "owner", options.pop("held_out", 0.2), **options)


def clients(*names: str, **settings: ClientSettings) -> Clients:
    return clients_key(dict.fromkeys(names, ClientSettings()) | settings)


def held(given: TextSource, known: Clients, seed: int = 0) -> dict[str, Share]:
    return {name: client_share(given, name, known, seed) for name, _ in known}


def texts(*parts: Share) -> Counter[str]:
    return Counter(document.text for part in parts for document in (*part.train, *part.held_out))


def sizes(found: dict[str, Share]) -> list[int]:
    return [len(share.train) + len(share.held_out) for share in found.values()]


def test_natural_shares_follow_the_keys(table: str) -> None:
    found = held(source(table), clients(*COUNTS))
    assert dict(zip(found, sizes(found), strict=True)) == COUNTS
    for name, share in found.items():
        assert {document.key for document in (*share.train, *share.held_out)} == {name}


def test_a_client_may_take_another_key_than_its_name(table: str) -> None:
    known = clients(one=ClientSettings(data="bob"), two=ClientSettings(data="cleo"))
    found = held(source(table), known)
    assert sizes(found) == [5, 2]
    assert all("bob" in text for text in texts(found["one"]))


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "size"])
def test_other_shares_hold_every_document_once(table: str, kind: str) -> None:
    found = held(source(table, kind), clients("a", "b", "c"))
    every = texts(*found.values())
    assert len(every) == sum(COUNTS.values())
    assert set(every.values()) == {1}
    assert min(sizes(found)) > 0


def test_iid_shares_are_equal_and_size_shares_grow(table: str) -> None:
    assert sizes(held(source(table, "iid"), clients("a", "b", "c", "d"))) == [4, 4, 4, 4]
    growing = sizes(held(source(table, "size"), clients("a", "b", "c")))
    assert growing == sorted(growing)
    assert growing[0] < growing[2]


def test_a_small_alpha_skews_the_keys(table: str) -> None:
    def keys(alpha: float) -> float:
        """Count the keys a client holds, on average over seeds."""
        found = [held(source(table, "dirichlet", alpha=alpha), clients("a", "b"), seed) for seed in range(5)]
        counts = [len({document.key for document in share.train}) for each in found for share in each.values()]
        return sum(counts) / len(counts)

    assert keys(0.05) < keys(100.0)


@pytest.mark.parametrize("kind", ["natural", "iid", "dirichlet", "size"])
def test_shares_follow_from_the_seed(table: str, kind: str) -> None:
    known, given = clients(*COUNTS), source(table, kind)
    first = held(given, known)
    shares._partitioned.cache_clear()
    assert held(given, known) == first
    assert held(given, known, seed=1) != first


def test_held_out_is_a_share_of_the_documents(table: str) -> None:
    share = held(source(table, held_out=0.34), clients(*COUNTS))["ann"]
    assert (len(share.train), len(share.held_out)) == (6, 3)
    assert not {document.id for document in share.train} & {document.id for document in share.held_out}


def test_pieces_are_cut_before_they_are_shared_out(table: str) -> None:
    whole = texts(*held(source(table, "iid"), clients("a", "b")).values())
    cut = texts(*held(source(table, "iid", piece=16), clients("a", "b")).values())
    assert sum(map(len, cut.elements())) == sum(map(len, whole.elements()))
    assert max(map(len, cut)) == 16
    found = held(source(table, "iid", piece=16), clients(*(f"c{number}" for number in range(12))))
    assert min(sizes(found)) > 1


def test_pieces_of_a_document_join_to_it_again() -> None:
    document = Document("a.txt", "key", "0123456789" + " " * 5 + "abc")
    assert pieces(document, 5) == [
        Document("a.txt:0", "key", "01234"),
        Document("a.txt:5", "key", "56789"),
        Document("a.txt:15", "key", "abc"),
    ]


@pytest.mark.parametrize("place", ["table", None])
def test_a_pool_is_the_union_of_its_members(table: str, tmp_path: Path, place: str | None) -> None:
    known = dict.fromkeys(COUNTS, ClientSettings())
    if place is None:
        for name in COUNTS:
            (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"body": f"{name} {n}"}) for n in range(4)))
        known = {name: ClientSettings(data=str(tmp_path / f"{name}.jsonl")) for name in COUNTS}
    frozen = clients_key(known | {"all": ClientSettings(pool=("ann", "cleo"))})
    given = source(table) if place else TextSource(None, Partition(), "body", None, 0.2)
    found = held(given, frozen)
    assert found["all"].train == found["ann"].train + found["cleo"].train
    assert found["all"].held_out == found["ann"].held_out + found["cleo"].held_out
    alone = held(given, clients_key(known))
    assert all(found[name] == alone[name] for name in COUNTS), "a pool changed its members' shares"


def test_clients_with_sources_of_their_own(tmp_path: Path) -> None:
    for name in ("ada", "ben"):
        (tmp_path / name).mkdir()
        for number in range(5):
            (tmp_path / name / f"{number}.txt").write_text(f"{name} {number}")
    known = clients(**{name: ClientSettings(data=str(tmp_path / name)) for name in ("ada", "ben")})
    found = held(TextSource(None, Partition(), "text", None, 0.2), known)
    assert {text.split()[0] for text in texts(found["ben"])} == {"ben"}
    assert sizes(found) == [5, 5]


@pytest.mark.parametrize(
    ("settings", "content", "said"),
    [
        (
            ClientSettings(),
            None,
            "client ada has no data; set clients.ada.data to a path, or task.options.source for all",
        ),
        (ClientSettings(data="mine.txt"), None, "client ada: mine.txt does not exist"),
        (ClientSettings(data="mine.txt"), "", "client ada: mine.txt holds no text"),
        (ClientSettings(data="mine.txt"), "x", "client ada: mine.txt is a single document too short to split"),
        (ClientSettings(data="mine.csv"), "txt\nx\n", "client ada: mine.csv row 1 has no column 'text'"),
    ],
    ids=["no data", "no file", "empty file", "one letter", "no column"],
)
def test_a_client_whose_data_cannot_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: ClientSettings, content: str | None, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None and settings.data is not None:
        Path(settings.data).write_text(content)
    with pytest.raises(DataError) as caught:
        client_share(TextSource(None, Partition(), "text", None, 0.2), "ada", clients(ada=settings), 0)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "kind", "said"),
    [
        (("ann", "dan"), "natural", "part dan would be empty: no document has this key; keys are 'ann', 'bob', 'cleo'"),
        (tuple(f"c{number:02d}" for number in range(17)), "iid", "17 parts cannot share 16 documents"),
        (tuple(f"c{number:02d}" for number in range(16)), "size", "would be empty"),
    ],
)
def test_shares_that_would_be_empty_are_refused(table: str, names: tuple[str, ...], kind: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        held(source(table, kind), clients(*names))
    assert said in str(caught.value)


def test_two_clients_cannot_hold_one_key(table: str) -> None:
    known = clients(one=ClientSettings(data="bob"), two=ClientSettings(data="bob"))
    with pytest.raises(DataError, match="part bob is named twice"):
        held(source(table), known)


def test_a_share_too_small_to_split_names_its_client(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"body": "long enough", "owner": "ann"}\n{"body": "x", "owner": "bob"}')
    with pytest.raises(DataError, match="client bob: "):
        held(source(str(tmp_path / "t.jsonl")), clients("ann", "bob"))


def test_a_missing_package_is_told_and_another_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_email(names: Sequence[str]) -> list[str]:
        return [name for name in installed(names) if name != "email"]

    monkeypatch.setattr(documents, "installed", without_email)
    monkeypatch.setattr(stdlib, "installed", without_email)
    stand_in = installed(stdlib.OWNER_SUBSTITUTES)[0]
    given = TextSource("builtin:code", Partition(), "text", None, 0.2)
    known = clients("asyncio", "email")
    shares._partitioned.cache_clear()
    try:
        assert notices(given, known) == [f"email is not installed here; {stand_in} takes its place"]
        assert {document.key for document in client_share(given, "email", known, 0).train} == {stand_in}
    finally:
        shares._partitioned.cache_clear()


def test_there_is_nothing_to_tell_of_other_sources(table: str) -> None:
    assert notices(source(table), clients(*COUNTS)) == []
    assert notices(TextSource("builtin:code", Partition(kind="iid"), "text", None, 0.2), clients("a")) == []


def test_a_data_set_folder_is_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"body": f"{owner} {n}", "owner": owner} for owner in ("ann", "bob") for n in range(5)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = held(source(f"hub:{folder}"), clients("ann", "bob"))
    assert {text.split()[0] for text in texts(found["bob"])} == {"bob"}
    assert sizes(found) == [5, 5]
