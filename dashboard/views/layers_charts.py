"""The charts of ranks and layers: each draws one thing of one round, or of all, or says why it cannot."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from common.store import Run
from dashboard.charts import NAME, NAMED_COLUMNS, NAMED_ROWS, ROUND, Axis, bars, heat, lines, ranking
from dashboard.findings import layers_tables as tables
from dashboard.findings.layers_names import kind_of
from dashboard.pieces import draw, explain
from dashboard.queries import layers as asked
from dashboard.queries.layers import LayerRanks, Likeness
from dashboard.source import Look
from dashboard.words import code, plain

MAPS = {"share used": "share", "effective rank": "used", "trained rank": "trained"}
TITLES = {
    "share used": "Share of the rank in use",
    "effective rank": "Effective rank",
    "trained rank": "Rank trained",
}
CLIENT, LAYER = Axis("client", "client", kind="nominal"), Axis("layer", "layer", kind="nominal")
SHARE = Axis("share", "share of the rank in use", ".0%", zero=True)
USED = Axis("used", "effective rank", ".3~g", zero=True)
TRAINED = Axis("trained", "trained rank", ".3~g", zero=True)
COSINE = Axis("cosine", "cosine", ".2f")
NORM = Axis("norm", "size of the update", ".3~g")
AGREEMENT = Axis("value", "cosine to the average", ".2f")
MIDDLE, LOWEST = "middle client", "lowest client"
DOTTED = 60
CROWDED = 420
"""Height of a map of too many rows to name each: it is looked at as a whole."""
ENERGY = Axis("value", "energy left out", ".2~%", zero=True)


@dataclass(frozen=True)
class Moment:
    """One round of a run, as it was chosen: everything the page shows of it."""

    run: Run
    look: Look
    rounds: list[int]
    number: int
    kind: str

    @property
    def ranks(self) -> LayerRanks | str:
        """Ranks per client and layer, of the chosen layers."""
        found = self.look.ask(asked.layer_ranks, self.run.id, self.number)
        return found if isinstance(found, str) else tables.only(found, self.kind)

    @property
    def likeness(self) -> Likeness | str:
        """How alike clients are."""
        return self.look.ask(asked.likeness, self.run.id, self.number)

    @property
    def merge(self) -> pd.DataFrame:
        """The merge, per chosen layer."""
        found = self.look.ask(asked.of_merge, self.run.id, self.number)
        kept = found[[self.kind in (tables.EVERY, kind_of(name)) for name in found["layer"]]]
        return found if kept.empty else kept.reset_index(drop=True)

    @property
    def directions(self) -> pd.DataFrame:
        """Each client's direction."""
        return self.look.ask(asked.directions, self.run.id, self.number)


def draw_rank_map(moment: Moment, shown: str) -> None:
    """Draw ranks, or how much of them is used, per client and layer."""
    ranks = moment.ranks
    cells = pd.DataFrame() if isinstance(ranks, str) else tables.rank_cells(ranks)
    value = {"share": SHARE, "used": USED, "trained": TRAINED}[MAPS[shown]]
    known = cells.dropna(subset=[value.column], ignore_index=True) if len(cells) else cells
    more = tuple(axis for axis in (SHARE, USED, TRAINED) if axis is not value)
    spec = heat(
        LAYER, CLIENT, value, domain=(0.0, 1.0) if value is SHARE else (), more=more, every_name=_few(known, "layer")
    )
    title = f"{TITLES[shown]} per client and layer"
    why = _why(moment, ranks, "ranks of single clients")
    draw(title, known, spec, why, key="rank-map", height=_height(known, "client"))
    if not isinstance(ranks, str):
        _thinning(len(ranks.clients), len(ranks.layers))


def draw_likeness(moment: Moment) -> None:
    """Draw how alike clients are, two by two."""
    found = moment.likeness
    cells = pd.DataFrame() if isinstance(found, str) else tables.likeness_cells(found)
    known = cells.dropna(subset=["cosine"], ignore_index=True) if len(cells) else cells
    spec = heat(
        Axis("other", "and", kind="nominal"),
        Axis("one", "client", kind="nominal"),
        COSINE,
        diverging=True,
        every_name=_few(known, "other"),
    )
    why = _why(moment, found, "clients compared with each other")
    draw(
        "Cosine of clients to each other, those who agree side by side",
        known,
        spec,
        why,
        key="likeness",
        height=_height(known, "one"),
    )
    if not isinstance(found, str):
        _thinning(len(found.clients), 1)


def draw_directions(moment: Moment) -> None:
    """Draw who agrees with the average of a round, and who does not."""
    found = moment.directions
    ends = tables.ends_of(found)
    spec = ranking(Axis("name", "client", kind="nominal"), Axis("cosine", "cosine to the average", ".2f"), more=(NORM,))
    why = _why(moment, "", "cosines of clients to the average")
    draw("Clients to the average, lowest first", ends, spec, why, key="directions", height=_height(ends, "name"))
    if len(ends) < len(found):
        explain(f"The lowest and the highest {len(ends)} of {len(found)} clients.")


def draw_directions_over_rounds(moment: Moment) -> None:
    """Draw how far clients agree with the average, over all rounds."""
    rounds = tables.thinned(moment.look.ask(asked.merged_rounds, moment.run.id), 120)
    found = moment.look.ask(asked.agreement, moment.run.id, rounds)
    middle = found.assign(series=MIDDLE, value=found["median"])
    lowest = found[["round"]].assign(series=LOWEST, value=found["lowest"])
    rows = pd.concat([middle, lowest], ignore_index=True)
    spec = lines(
        ROUND, AGREEMENT, (MIDDLE, LOWEST), band="8 of 10 clients", dashed=(LOWEST,), dots=len(rounds) <= DOTTED
    )
    why = _why(moment, "", "cosines of clients to the average")
    draw("Clients to the average, over rounds", rows, spec, why, key="directions-over-rounds", height=240)


def draw_merge(moment: Moment) -> None:
    """Draw the effective rank of the merge, by layer."""
    found = tables.merge_by_layer(moment.merge).dropna(subset=["effective_rank"], ignore_index=True)
    spec = bars(LAYER, Axis("effective_rank", "effective rank", ".3~g"), ("merge",))
    why = _why(moment, "", "ranks of the merge")
    draw("Effective rank of the merge, by layer", found, spec, why, key="merge", height=240)


def draw_norms_over_rounds(moment: Moment) -> None:
    """Draw how large the merge was by layer, over rounds."""
    rounds = tables.thinned(moment.look.ask(asked.merged_rounds, moment.run.id))
    found = moment.look.ask(asked.norms, moment.run.id, rounds)
    kept = found[[moment.kind in (tables.EVERY, kind_of(name)) for name in found["layer"]]]
    cells = tables.norm_cells(found if kept.empty else kept, rounds)
    series = tuple(dict.fromkeys(cells["series"]))
    value = Axis("value", "Frobenius norm", ".3~g")
    few = len(series) <= tables.MOST_LINES
    spec = lines(ROUND, value, series) if few else heat(ROUND, NAME, value)
    why = _why(moment, "", "sizes of the merge")
    draw("Norm of the merged update, by layer", cells, spec, why, key="norms", height=240 if few else 300)


def draw_energy(look: Look, run: Run) -> None:
    """Draw what compression left out, over rounds."""
    found = look.ask(asked.energy_left_out, run.id)
    rows = found[found["round"].isin(tables.thinned(sorted(set(found["round"])), 300))].reset_index(drop=True)
    series = tuple(name for name in ("merge", "downloads") if name in set(rows["series"]))
    why = (
        "No merge and no download was compressed, so all energy was kept. "
        f"{code('federation.download_rank')} and strategies such as {code('flexlora')} trade energy for bytes."
    )
    more = (Axis("highest", "highest of a client", ".2~%"),)
    spec = lines(ROUND, ENERGY, series, more=more)
    draw("Energy left out by compression", rows, spec, why, key="energy", height=220)
    if len(rows):
        last = rows[rows["round"] == rows["round"].max()]
        told = [f"{name}: {1 - value:.1%} kept" for name, value in zip(last["series"], last["value"], strict=True)]
        explain(f"Energy is the squared norm of an update. In the last round, {', '.join(told)}.")


def _why(moment: Moment, found: object, what: str) -> str:
    """Say why there are no such numbers of this round: left out for a stated reason, or never kept."""
    if isinstance(found, str) and found:
        return f"Round {moment.number} holds no {what}: {plain(found)}."
    return f"Round {moment.number} holds no {what}: an older version made the run, or nothing was merged."


def _thinning(clients: int, layers: int) -> None:
    """Say so where a cell stands for several clients or layers."""
    most = {"clients": (clients, tables.MOST_ROWS), "layers": (layers, tables.MOST_COLUMNS)}
    told = [f"about {-(-count // limit)} {name}" for name, (count, limit) in most.items() if count > limit]
    if told:
        explain(f"A cell is the mean of {' and '.join(told)} that are neighbours.")


def _few(rows: pd.DataFrame, column: str) -> bool:
    """Tell whether each of a map's columns has room for its name."""
    return not rows.empty and rows[column].nunique() <= NAMED_COLUMNS


def _height(rows: pd.DataFrame, column: str) -> int:
    """Return the height of a chart with a row per value of a column."""
    count = rows[column].nunique() if len(rows) else 1
    return 85 + 21 * count if count <= NAMED_ROWS else CROWDED
