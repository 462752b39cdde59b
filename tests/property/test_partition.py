"""Laws of sharing out and splitting: nothing is lost or doubled, and listing order plays no part."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from common.errors import DataError
from common.text import Document
from common.text.partition import Partition, partition, split

KINDS = ("natural", "iid", "dirichlet", "size")

documents_of_any_kind = st.lists(
    st.builds(Document, id=st.text(max_size=5), key=st.sampled_from(["", "a", "a\x00", "b", "ü"]), text=st.text()),
    min_size=1,
    max_size=40,
)
seeds = st.integers(min_value=0, max_value=2**63 - 1)


def made(**counts: int) -> list[Document]:
    """Make so many documents per key."""
    return [Document(f"{key}/{n}", key, f"text {key} {n}") for key, count in counts.items() for n in range(count)]


@given(documents_of_any_kind, st.sampled_from(KINDS), st.integers(1, 6), seeds, st.randoms())
def test_every_document_goes_to_exactly_one_part(
    documents: list[Document], kind: str, parts: int, seed: int, order: random.Random
) -> None:
    if kind == "natural":
        parts = len({document.key for document in documents})
    try:
        shares = partition(documents, Partition(kind=kind), parts, seed)
    except DataError:
        # Refused for an empty part; which cases are is the subject of the tests below.
        assume(False)
    assert len(shares) == parts
    assert all(shares)
    assert Counter(document for share in shares for document in share) == Counter(documents)
    order.shuffle(documents)
    assert partition(documents, Partition(kind=kind), parts, seed) == shares


@given(documents_of_any_kind, st.floats(0.01, 0.99), seeds, st.randoms())
def test_a_split_has_two_sides_and_loses_nothing(
    documents: list[Document], held_out: float, seed: int, order: random.Random
) -> None:
    if len(documents) == 1 and len(documents[0].text) < 2:
        with pytest.raises(DataError, match="too short to split"):
            split(documents, held_out, seed)
        return
    train, kept = split(documents, held_out, seed)
    assert train
    assert kept
    if len(documents) == 1:
        assert train[0].text + kept[0].text == documents[0].text
        return
    assert Counter(train + kept) == Counter(documents)
    order.shuffle(documents)
    assert split(documents, held_out, seed) == (train, kept)


def test_natural_parts_are_the_keys_wanted_in_their_order() -> None:
    shares = partition(made(a=3, b=2, c=1), Partition(), ["c", "a"])
    assert [sorted(document.id for document in share) for share in shares] == [["c/0"], ["a/0", "a/1", "a/2"]]


def test_iid_parts_are_equal_and_mixed() -> None:
    shares = partition(made(a=20, b=20), Partition(kind="iid"), 4)
    assert [len(share) for share in shares] == [10, 10, 10, 10]
    assert all({document.key for document in share} == {"a", "b"} for share in shares)


def test_sizes_grow_as_1_2_3() -> None:
    shares = partition(made(a=30, b=30), Partition(kind="size"), 3)
    assert [len(share) for share in shares] == [10, 20, 30]


def test_dirichlet_skews_the_more_the_smaller_alpha() -> None:
    def largest_share(alpha: float) -> float:
        shares = partition(made(a=100, b=100, c=100), Partition(kind="dirichlet", alpha=alpha), 3, seed=1)
        return max(Counter(d.key for d in share).most_common(1)[0][1] / len(share) for share in shares)

    assert largest_share(1000.0) < 0.4 < 0.8 < largest_share(0.1)


def test_another_seed_shares_out_differently() -> None:
    documents = made(a=20, b=20)
    for kind in ("iid", "dirichlet", "size"):
        assert partition(documents, Partition(kind=kind), 3, 0) != partition(documents, Partition(kind=kind), 3, 1)
    assert split(documents, seed=0) != split(documents, seed=1)


def test_a_fifth_of_the_files_is_held_out() -> None:
    train, held_out = split(made(a=10), 0.2)
    assert (len(train), len(held_out)) == (8, 2)


def test_a_single_document_is_cut_by_its_text() -> None:
    train, held_out = split([Document("a.txt", "k", "0123456789")], 0.2)
    assert train == [Document("a.txt:head", "k", "01234567")]
    assert held_out == [Document("a.txt:tail", "k", "89")]


@pytest.mark.parametrize(
    ("scheme", "parts", "reason"),
    [
        (Partition(), ["a", "z"], "part z would be empty: no document has this key; keys are 'a', 'b'"),
        (Partition(), ["a", "a"], "part a is named twice"),
        (Partition(), 3, "3 parts for 2 keys"),
        (Partition(kind="iid"), 5, "part 5 of 5 would be empty"),
        (Partition(kind="iid"), ["u", "v", "w", "x", "y"], "part y would be empty"),
        (Partition(kind="size"), 3, "part 1 of 3 would be empty"),
        (Partition(kind="dirichlet", alpha=1e-3), 4, "would get none of the 4 documents"),
        (Partition(kind="iid"), 0, "no parts"),
    ],
)
def test_empty_parts_are_refused_by_name(scheme: Partition, parts: int | list[str], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        partition(made(a=2, b=2), scheme, parts)


@pytest.mark.parametrize("kind", ["natural", "dirichlet"])
def test_partitions_by_key_need_keys(kind: str) -> None:
    with pytest.raises(DataError, match="name a key column"):
        partition([Document("1", "", "x"), Document("2", "", "y")], Partition(kind=kind), 2)


@pytest.mark.parametrize("wrong", [{"kind": "random"}, {"alpha": 0}, {"alpha": float("nan")}, {"beta": 1}])
def test_wrong_schemes_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Partition(**wrong)


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.2])
def test_a_share_held_out_that_leaves_a_side_empty_is_refused(held_out: float) -> None:
    with pytest.raises(DataError, match="between 0 and 1"):
        split(made(a=3), held_out)


def test_no_documents_cannot_be_split() -> None:
    with pytest.raises(DataError, match="no document to split"):
        split([])
