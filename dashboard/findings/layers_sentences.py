"""What to read from ranks and directions, in sentences: pure functions from numbers to Markdown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from dashboard.findings.layers_likeness import extremes, mean_of_pairs
from dashboard.findings.layers_names import short_names
from dashboard.queries.layers import LayerRanks, Likeness, Numbers
from dashboard.words import plain

ROOM = 0.5
"""Share of the rank in use below which a smaller rank would do."""
FULL = 0.85
"""Share above which a larger one may learn more."""
APART = -0.1
"""Cosine below which two clients undo each other's work."""
ALIKE = 0.9


def about_ranks(ranks: LayerRanks) -> list[str]:
    """Tell which ranks are trained and how much of them is used, as a whole and by layer."""
    trained = ranks.rank[np.isfinite(ranks.rank)]
    if not trained.size:
        return ["No layer was trained as factors here, so there is no rank to speak of."]
    low, high = int(trained.min()), int(trained.max())
    spoken = f"rank {low}" if low == high else f"ranks {low} to {high} (median {np.median(trained):g})"
    return [f"Clients train {spoken} in {_counted_layers(ranks)}. {_use(ranks)}", *_by_layer(ranks)]


def about_likeness(likeness: Likeness) -> list[str]:
    """Tell which clients agree, and which undo each other's work."""
    found = extremes(likeness.cosine)
    if found is None:
        return ["Only one client's update was merged: there is nobody to compare it with."]
    least, most = found
    names = [plain(name, 40) for name in likeness.clients]
    mean = mean_of_pairs(likeness.cosine)
    sentences = [f"On average two clients' updates have a cosine of {signed(mean)}: {_agreement(mean)}."]
    if least.cosine < APART:
        pair = f"**{names[least.one]}** and **{names[least.other]}** pull in opposite directions"
        sentences.append(f"{pair} (cosine {signed(least.cosine)}): what one learns the other takes back.")
    if most.cosine > ALIKE:
        pair = f"**{names[most.one]}** and **{names[most.other]}** learn almost the same"
        sentences.append(f"{pair} (cosine {signed(most.cosine)}); is it the same data?")
    return sentences


def about_directions(directions: pd.DataFrame) -> list[str]:
    """Tell who goes against the average; the lowest cosine is in the first row."""
    known = directions.dropna(subset=["cosine"])
    if len(known) < 2 or known["cosine"].iloc[0] >= 0:
        return []
    against = known[known["cosine"] < 0]
    name, lowest = plain(against["client"].iloc[0], 40), against["cosine"].iloc[0]
    if len(against) == 1:
        return [
            f"**{name}** works against the average (cosine {signed(lowest)}): look at its data and its learning rate."
        ]
    return [f"{len(against)} clients work against the average, most of all **{name}** (cosine {signed(lowest)})."]


def share_used(ranks: LayerRanks) -> Numbers:
    """Return the share of each trained rank that is used, shape (clients, layers); NaN where it is not known."""
    return np.divide(ranks.used, ranks.rank, out=np.full_like(ranks.rank, np.nan), where=np.isfinite(ranks.used))


def known_mean(values: Numbers) -> float:
    """Return the mean of what is known; NaN if nothing is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def _use(ranks: LayerRanks) -> str:
    share = known_mean(share_used(ranks))
    if not np.isfinite(share):
        return "How much of it is used was not measured."
    told = f"{percent(share)} of that would hold 95 % of what they learned"
    if share <= ROOM:
        return f"{told}: a smaller rank would do, and cost fewer bytes."
    if share >= FULL:
        return f"{told}: hardly any is spare, and a larger rank may learn more."
    return f"{told}: the rank fits."


def _by_layer(ranks: LayerRanks) -> list[str]:
    """Name the layers that use least and most of their rank, if they differ."""
    shares = share_used(ranks)
    by_layer = [known_mean(column) for column in shares.T]
    known = [place for place, share in enumerate(by_layer) if np.isfinite(share)]
    if len(known) < 2:
        return []
    least, most = min(known, key=by_layer.__getitem__), max(known, key=by_layer.__getitem__)
    if by_layer[most] - by_layer[least] < 0.05:
        return ["All layers use about as much of their rank."]
    names = short_names(ranks.layers)
    return [
        f"Layer **{plain(names[least])}** uses the least, {_of_rank(ranks, least)}; "
        f"**{plain(names[most])}** the most, {_of_rank(ranks, most)}."
    ]


def _of_rank(ranks: LayerRanks, layer: int) -> str:
    known = np.isfinite(ranks.used[:, layer])
    used, trained = ranks.used[known, layer], ranks.rank[known, layer]
    return f"{known_mean(used):.2g} of {known_mean(trained):.2g} ranks"


def _counted_layers(ranks: LayerRanks) -> str:
    return "one layer" if len(ranks.layers) == 1 else f"{len(ranks.layers)} layers"


def _agreement(mean: float) -> str:
    for least, words in ((0.7, "they learn much the same"), (0.3, "they agree in part"), (-0.05, "they hardly agree")):
        if mean >= least:
            return words
    return "they work against each other"


def percent(share: float) -> str:
    """Write a share, a dash where it is not known."""
    return f"{100 * share:.0f} %" if np.isfinite(share) else "–"


def signed(value: float) -> str:
    """Write a cosine, a dash where it is not known."""
    return f"{value:.2f}".replace("-", "−") if np.isfinite(value) else "–"


def bullets(sentences: Sequence[str]) -> str:
    """Write sentences as a list in Markdown."""
    return "\n".join(f"- {sentence}" for sentence in sentences)
