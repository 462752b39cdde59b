"""How documents are shared out among clients, and split into what each trains on and what it is judged by.

Shares are made by flwr-datasets' partitioners over a table of document numbers and keys. Everything follows
from the documents and a seed: neither the order they are listed in nor a global random state plays a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from common.errors import DataError
from common.seeds import derive_seed
from common.text import Document

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

_DRAWS = 20  # Dirichlet shares are drawn anew this often while a part comes out empty


class Partition(BaseModel):
    """How documents are shared out.

    Attributes
    ----------
    kind : str
        ``natural``: one part per key. ``iid``: equal parts at random. ``dirichlet``: each key's documents in
        shares drawn from a Dirichlet distribution. ``size``: at random, sizes growing as 1, 2, 3, …
    alpha : float > 0
        Concentration of ``dirichlet``: small gives each part few keys, large makes parts alike.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["natural", "iid", "dirichlet", "size"] = "natural"
    alpha: float = Field(default=0.5, gt=0, allow_inf_nan=False)


def partition(
    documents: Sequence[Document], scheme: Partition, parts: int | Sequence[str], seed: int = 0
) -> list[list[Document]]:
    """Share documents out: each goes to exactly one part.

    Parameters
    ----------
    documents : sequence of Document
    scheme : Partition
    parts : int or sequence of str
        How many parts, or their names. For ``natural`` names are the keys wanted, in order; documents of
        other keys are left out.
    seed : int

    Returns
    -------
    list of lists of Document
        One list per part, none of them empty.

    Raises
    ------
    DataError
        If a part would be empty, a name stands twice, or the documents have no keys where keys are needed.
    """
    names = [f"{number} of {parts}" for number in range(1, parts + 1)] if isinstance(parts, int) else list(parts)
    _check(documents, scheme, names)
    ordered = _shuffled(documents, seed, "partition")
    if scheme.kind == "natural":
        return _by_key(ordered, parts)
    if scheme.kind == "dirichlet":
        shares = _dirichlet(ordered, scheme.alpha, len(names), seed)
    else:
        shares = _by_count(ordered, scheme.kind, len(names))
    for name, share in zip(names, shares, strict=True):
        if not share:
            raise DataError(
                f"part {name} would get none of the {len(ordered)} documents; use fewer parts, more "
                "documents or another kind of partition"
            )
    return shares


def split(documents: Sequence[Document], held_out: float = 0.2, seed: int = 0) -> tuple[list[Document], list[Document]]:
    """Split by document into a part to train on and a part held out for evaluation.

    At least one document lies on each side; a single one is cut by its text, the end being held out.

    Parameters
    ----------
    documents : sequence of Document
    held_out : float in (0, 1)
        Share of the documents, or of the single document's characters, that is held out.
    seed : int

    Returns
    -------
    train, held_out : lists of Document

    Raises
    ------
    DataError
        If there is no document, or a single one too short to cut.
    """
    if not 0 < held_out < 1:
        raise DataError(f"the held-out share is {held_out}; it must lie between 0 and 1")
    if not documents:
        raise DataError("there is no document to split; check the data of this client")
    if len(documents) == 1:
        return _cut(documents[0], held_out)
    ordered = _shuffled(documents, seed, "split")
    count = min(max(round(held_out * len(ordered)), 1), len(ordered) - 1)
    return ordered[count:], ordered[:count]


def _check(documents: Sequence[Document], scheme: Partition, names: Sequence[str]) -> None:
    if not names:
        raise DataError("documents cannot be shared out among no parts; give at least one")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"part {twice} is named twice; a document can go to one part only")
    if len(names) > len(documents):
        raise DataError(
            f"{len(names)} parts cannot share {len(documents)} documents: part {names[len(documents)]} would be empty"
        )
    if scheme.kind in ("natural", "dirichlet") and not any(document.key for document in documents):
        raise DataError(f"a {scheme.kind} partition needs keys and these documents have none; name a key column")


def _by_key(documents: Sequence[Document], parts: int | Sequence[str]) -> list[list[Document]]:
    """Group by key; done here because importing flwr-datasets takes longer than all the rest of a start."""
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(document.key, []).append(document)
    known = sorted(groups)
    if isinstance(parts, int) and parts != len(known):
        raise DataError(f"{parts} parts for {len(known)} keys ({_listed(known)}); name the keys wanted")
    wanted = known if isinstance(parts, int) else parts
    missing = [name for name in wanted if name not in groups]
    if missing:
        raise DataError(f"part {missing[0]} would be empty: no document has this key; keys are {_listed(known)}")
    return [groups[name] for name in wanted]


def _by_count(documents: Sequence[Document], kind: str, parts: int) -> list[list[Document]]:
    from flwr_datasets.partitioner import IidPartitioner, LinearPartitioner

    if kind == "iid":
        return _apply(IidPartitioner(parts), documents)
    try:
        return _apply(LinearPartitioner(parts), documents)
    except ValueError as error:
        raise DataError(
            f"part 1 of {parts} would be empty: sizes growing as 1, 2, 3, … need more than {len(documents)} documents"
        ) from error


def _dirichlet(documents: Sequence[Document], alpha: float, parts: int, seed: int) -> list[list[Document]]:
    from flwr_datasets.partitioner import DirichletPartitioner

    for draw in range(_DRAWS):
        drawn = DirichletPartitioner(
            parts, "key", alpha, min_partition_size=0, seed=derive_seed(seed, "dirichlet", draw)
        )
        shares = _apply(drawn, documents)
        if all(shares):
            break
    return shares


def _apply(partitioner: Partitioner, documents: Sequence[Document]) -> list[list[Document]]:
    """Let a partitioner share out numbers; keys go as numbers too, since numpy alters some strings."""
    from datasets import Dataset

    known = {key: number for number, key in enumerate(sorted({document.key for document in documents}))}
    table = {"index": range(len(documents)), "key": [known[document.key] for document in documents]}
    partitioner.dataset = Dataset.from_dict({name: list(column) for name, column in table.items()})
    return [
        [documents[index] for index in partitioner.load_partition(part)["index"]]
        for part in range(partitioner.num_partitions)
    ]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:10]) + (", …" if len(names) > 10 else "")


def _cut(document: Document, held_out: float) -> tuple[list[Document], list[Document]]:
    text = document.text
    if len(text) < 2:
        raise DataError(f"{document.id} is a single document too short to split; add documents")
    at = min(max(round((1 - held_out) * len(text)), 1), len(text) - 1)
    head = Document(f"{document.id}:head", document.key, text[:at])
    tail = Document(f"{document.id}:tail", document.key, text[at:])
    return [head], [tail]


def _shuffled(documents: Sequence[Document], seed: int, purpose: str) -> list[Document]:
    """Order by a hash of each document, so that listing order plays no part."""
    return sorted(
        documents, key=lambda document: (derive_seed(seed, purpose, document.id), document.key, document.text)
    )
