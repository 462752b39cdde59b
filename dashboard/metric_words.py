"""What the numbers of a run are called on a page, and which way is better."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from dashboard.words import labels


class MetricWords(NamedTuple):
    """A number's name in a list, what its axis says, and whether more of it is better.

    ``axis`` is of our own: a name from the store never becomes part of how a chart is drawn.
    """

    title: str
    axis: str
    more_is_better: bool = False


KNOWN = {
    "held_out_loss": MetricWords("loss on held-out data", "loss"),
    "worst_client_loss": MetricWords("loss of the worst client", "loss"),
    "client_loss_spread": MetricWords("spread of the clients' losses", "loss"),
    "unseen_loss": MetricWords("loss on public data", "loss"),
    "train_loss": MetricWords("loss in training", "loss"),
    "held_out_accuracy": MetricWords("accuracy on held-out data", "accuracy", True),
    "held_out_perplexity": MetricWords("perplexity on held-out data", "perplexity"),
    "cosine_to_mean": MetricWords("cosine to the mean update", "cosine (1: same way)", True),
    "update_norm": MetricWords("size of the update", "norm"),
    "trust": MetricWords("trust of the robust rule", "share of its weight", True),
    "download_discarded_energy": MetricWords("energy lost in its download", "share of the squared norm"),
    "epsilon": MetricWords("privacy spent", "ε"),
    "second_epsilon": MetricWords("privacy spent, by the second accountant", "ε"),
    "rounds_left": MetricWords("rounds left in the privacy budget", "rounds", True),
    "noise_multiplier": MetricWords("noise multiplier", "noise multiplier", True),
    "clipping_norm": MetricWords("clipping norm", "norm"),
}
_BETTER = ("accuracy", "cosine", "trust", "score", "agreement", "f1")


def metric_words(name: str) -> MetricWords:
    """Return what a number is called."""
    known = KNOWN.get(name)
    return known or MetricWords(name, "value", any(part in name for part in _BETTER))


def metric_titles(names: Iterable[str]) -> dict[str, str]:
    """Return what numbers are called in a list to choose from, by name."""
    shown = labels(names)
    return {name: KNOWN[name].title if name in KNOWN else label for name, label in shown.items()}
