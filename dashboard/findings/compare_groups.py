"""Which runs are one experiment under several seeds, and what to call each: by what tells it from the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from common.store import Run
from dashboard.settings import ABSENT, flat, settings
from dashboard.words import visible

SEED, STRATEGY, NAME, CODE = "seed", "strategy.name", "name", "code"
LONGEST = 60
"""Letters of a group's name."""
Settings = Mapping[str, str]


@dataclass(frozen=True)
class Group:
    """Runs that differ by nothing but their seed.

    Parameters
    ----------
    label : str
        Its name, another one for each group of a comparison.
    runs : tuple of Run
        One per seed, in the order of their seeds.
    repeats : tuple of Run
        Further runs of those seeds, which would make the spread look smaller than it is.
    """

    label: str
    runs: tuple[Run, ...]
    repeats: tuple[Run, ...]


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Put runs together whose configuration and code are the same but for the seed, in the order of the runs."""
    found: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(sorted(settings_of(run).items())), []).append(run)
    every = [dict(items) for items in found]
    labels = _labels(every, [members[0] for members in found.values()])
    return [Group(label, *_one_per_seed(members)) for label, members in zip(labels, found.values(), strict=True)]


def differing(groups: Sequence[Settings]) -> list[str]:
    """Return the settings in which some differ, strategy first, names and code last."""
    paths = sorted({path for group in groups for path in group}, key=_importance)
    return [path for path in paths if len({group.get(path, ABSENT) for group in groups}) > 1]


def untold(names: Sequence[str], groups: Sequence[Settings]) -> list[str]:
    """Return the settings that differ between groups though their names do not say so."""
    told = " · ".join(names)
    paths = [path for path in differing(groups) if path not in (NAME, STRATEGY, CODE)]
    return [path for path in paths if _short(path) not in told]


def distinct(names: Iterable[str]) -> list[str]:
    """Make labels of names: visible, short, and each another one."""
    found: list[str] = []
    for name in names:
        shown = label = visible(name, LONGEST) or "(no name)"
        number = 1
        while label in found:
            number += 1
            label = f"{shown} ({number})"
        found.append(label)
    return found


def settings_of(run: Run) -> dict[str, str]:
    """Return what makes a run what it is but for its seed: its configuration and its code."""
    if not settings(run):
        return {"run": visible(run.id)}  # what cannot be read is like nothing else
    known = {path: value for path, value in flat(run).items() if path != SEED}
    return {**known, CODE: visible(run.fingerprint[:12])}


def _one_per_seed(runs: Sequence[Run]) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
    worst_first = sorted(runs, key=lambda run: (run.status == "completed", run.rounds_done, run.created_at))
    kept = {run.seed: run for run in worst_first}
    chosen = tuple(kept[seed] for seed in sorted(kept))
    return chosen, tuple(run for run in runs if run not in chosen)


def _labels(groups: Sequence[Settings], samples: Sequence[Run]) -> list[str]:
    """Name groups by as few settings as tell all of them apart; the strategy is always said where it differs."""
    paths = differing(groups)
    told = paths[:1] if paths[:1] == [STRATEGY] else []
    while _apart(groups, told) < len(groups):
        told.append(max((path for path in paths if path not in told), key=lambda path: _apart(groups, [*told, path])))
    if not told:
        return [visible(run.strategy, LONGEST) for run in samples]
    return distinct(_joined(_said(path, group) for path in told) for group in groups)


def _joined(said: Iterable[str]) -> str:
    """Join what tells a group apart; a run is often named after its strategy, which is then said once."""
    kept: dict[str, str] = {}
    for text in said:
        kept.setdefault(text.replace("-", "_"), text)
    return " · ".join(kept.values())


def _apart(groups: Sequence[Settings], paths: Sequence[str]) -> int:
    return len({tuple(group.get(path, ABSENT) for path in paths) for group in groups})


def _said(path: str, settings: Settings) -> str:
    value = settings.get(path, ABSENT).strip('"')
    return value if path == NAME or path.endswith(".name") else f"{_short(path)} {value}"


def _short(path: str) -> str:
    return path.rpartition(".")[2]


def _importance(path: str) -> tuple[int, str]:
    special = {STRATEGY: 0, NAME: 2, CODE: 3}
    return special.get(path, 1), path
