"""Numbers of layers and clients as tables that charts take, thinned to what an eye can tell apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from dashboard.findings.layers_likeness import order
from dashboard.findings.layers_names import (
    arranged,
    block_means,
    group_labels,
    groups,
    kind_of,
    natural,
    short_names,
    shown,
)
from dashboard.findings.layers_sentences import known_mean, share_used
from dashboard.queries.layers import LayerRanks, Likeness, Numbers

MOST_ROWS, MOST_COLUMNS = 50, 50
MOST_LINES = 6
MOST_ROUNDS = 60
EVERY = "all"


def only(ranks: LayerRanks, kind: str) -> LayerRanks:
    """Keep the layers of one kind; all of them for :data:`EVERY` or a kind there is none of."""
    kept = [place for place, name in enumerate(ranks.layers) if kind_of(name) == kind]
    if kind == EVERY or not kept:
        return ranks
    return LayerRanks(ranks.clients, tuple(ranks.layers[i] for i in kept), ranks.rank[:, kept], ranks.used[:, kept])


def rank_cells(ranks: LayerRanks) -> pd.DataFrame:
    """Return a row per client and layer, or per group of neighbours: client, layer, trained, used, share."""
    rows = groups(len(ranks.clients), MOST_ROWS)
    places, columns = arranged(ranks.layers, MOST_COLUMNS)
    names = short_names(ranks.layers)
    values = {"trained": ranks.rank, "used": ranks.used, "share": share_used(ranks)}
    cells = _cells(
        group_labels(shown(ranks.clients), rows),
        group_labels([names[place] for place in places], columns),
        **{name: block_means(matrix[:, places], rows, columns) for name, matrix in values.items()},
    )
    return cells.rename(columns={"row": "client", "column": "layer"})


def likeness_cells(likeness: Likeness) -> pd.DataFrame:
    """Return a row per pair of clients, or of groups of neighbours, in an order of likeness: one, other, cosine."""
    placed = order(likeness.cosine)
    starts = groups(len(placed), MOST_ROWS)
    names = group_labels(shown([likeness.clients[place] for place in placed]), starts)
    cells = _cells(names, names, cosine=block_means(likeness.cosine[placed][:, placed], starts, starts))
    return cells.rename(columns={"row": "one", "column": "other"})


def merge_by_layer(merge: pd.DataFrame) -> pd.DataFrame:
    """Return the merge's numbers per layer or group of neighbours: layer, effective_rank, merged_norm, series."""
    if merge.empty:
        return merge.assign(series=[])
    layers = list(merge["layer"])
    places, starts = arranged(layers, MOST_COLUMNS)
    numbers = merge[["effective_rank", "merged_norm"]].to_numpy(dtype=np.float64)[places]
    names = short_names(layers)
    found = pd.DataFrame(block_means(numbers, starts, [0, 1]), columns=["effective_rank", "merged_norm"])
    return found.assign(layer=group_labels([names[place] for place in places], starts), series="merge")


def norm_cells(norms: pd.DataFrame, rounds: Sequence[int]) -> pd.DataFrame:
    """Return the merge's norm per layer, or group of neighbours, and round: series, round, value."""
    if norms.empty:
        return pd.DataFrame(columns=["series", "round", "value"])
    table = norms.pivot_table(index="layer", columns="round", values="value").reindex(columns=rounds)
    places, starts = arranged(list(table.index), MOST_ROWS)
    names = short_names(list(table.index))
    means = block_means(table.to_numpy(dtype=np.float64)[places], starts, list(range(len(rounds))))
    layers = group_labels([names[place] for place in places], starts)
    return pd.DataFrame(
        {
            "series": np.repeat(layers, len(rounds)),
            "round": np.tile(np.array(rounds, dtype=np.int64), len(layers)),
            "value": means.ravel(),
        }
    ).dropna(subset=["value"], ignore_index=True)


def ends_of(directions: pd.DataFrame, most: int = 24) -> pd.DataFrame:
    """Return the clients of the lowest and of the highest cosines: name, cosine, norm."""
    known = directions.dropna(subset=["cosine"]).assign(name=lambda found: shown(list(found["client"])))
    if len(known) > most:
        known = pd.concat([known.head(most * 2 // 3), known.tail(most - most * 2 // 3)])
    return known[["name", "cosine", "norm"]].reset_index(drop=True)


def thinned(rounds: Sequence[int], most: int = MOST_ROUNDS) -> tuple[int, ...]:
    """Keep the first and the last round and every n-th between, at most ``most``."""
    if len(rounds) <= most:
        return tuple(rounds)
    return tuple(rounds[place * (len(rounds) - 1) // (most - 1)] for place in range(most))


def layers_in_numbers(ranks: LayerRanks | None, merge: pd.DataFrame) -> pd.DataFrame:
    """Return a row per layer: layer, rank, used, share (means over clients), effective_rank, merged_norm."""
    of_clients = _means("layer", () if ranks is None else ranks.layers, ranks, axis=0)
    found = of_clients.merge(merge.astype({"layer": object}), on="layer", how="outer")
    found = found.sort_values("layer", key=lambda names: names.map(natural), ignore_index=True)
    return found.assign(layer=shown(list(found["layer"]), 120))


def clients_in_numbers(ranks: LayerRanks | None, directions: pd.DataFrame) -> pd.DataFrame:
    """Return a row per client: client, rank, used, share (means over layers), cosine, norm."""
    of_layers = _means("client", () if ranks is None else ranks.clients, ranks, axis=1)
    found = of_layers.merge(directions.astype({"client": object}), on="client", how="outer")
    return found.assign(client=shown(list(found["client"]), 120))


def _means(name: str, names: Sequence[str], ranks: LayerRanks | None, axis: int) -> pd.DataFrame:
    parts = {} if ranks is None else {"rank": ranks.rank, "used": ranks.used, "share": share_used(ranks)}
    columns = {
        part: [known_mean(values) for values in (matrix.T if axis == 0 else matrix)] for part, matrix in parts.items()
    }
    empty: dict[str, list[float]] = {"rank": [], "used": [], "share": []}
    return pd.DataFrame({name: pd.Series(names, dtype="object"), **(columns or empty)})


def _cells(rows: Sequence[str], columns: Sequence[str], **values: Numbers) -> pd.DataFrame:
    """Return a row per cell, row by row."""
    names = {"row": np.repeat(rows, len(columns)), "column": np.tile(columns, len(rows))}
    return pd.DataFrame(names | {name: matrix.ravel() for name, matrix in values.items()})
