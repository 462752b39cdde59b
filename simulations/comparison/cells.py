"""The cells of a comparison: what ``--vary`` spells out, each one an experiment, or why it cannot be one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

from common.errors import ConfigurationError, UserError
from common.experiment import Experiment
from common.experiment_file import PLUGIN_SECTIONS, Table, load_experiment, read_table

SEED = "seed"
PLUGIN_NAMES = tuple(f"{section}.name" for section in PLUGIN_SECTIONS)

_CLOSING = {"[": "]", "{": "}", '"': '"', "'": "'"}


@dataclass(frozen=True)
class Variation:
    """One varied setting."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Parameters
    ----------
    row : str
        Label of the row it belongs to.
    seed : int
        Seed of the experiment.
    settings : mapping of str to str
        Varied keys and their values, without the seed.
    experiment : Experiment or None
        None where the settings make none.
    problem : str
        Why they do not.
    reference : bool
        Whether it is a run to compare with.
    owner : str
        The one owner that trains, where each trains alone.
    """

    row: str
    seed: int
    settings: dict[str, str] = field(default_factory=dict)
    experiment: Experiment | None = None
    problem: str = ""
    reference: bool = False
    owner: str = ""

    @property
    def text(self) -> str:
        """Name the cell in a line of progress."""
        named = [f"{key}={value}" for key, value in self.settings.items()]
        return " ".join([*(named or [self.row]), *([self.owner] if self.owner else []), f"seed={self.seed}"])


def parse_vary(texts: Sequence[str]) -> list[Variation]:
    """Read ``key=v1,v2`` arguments; commas inside brackets and quotes belong to a value.

    Raises
    ------
    ConfigurationError
        If one has another form, or a key or value stands twice.
    """
    found: dict[str, Variation] = {}
    for text in texts:
        key, separator, values = text.partition("=")
        key = key.strip()
        if not separator or not key:
            raise ConfigurationError(f"--vary {text!r} is not of the form key=value1,value2")
        if key in found:
            raise ConfigurationError(f"--vary {key} stands twice; give all its values at once")
        parts = _split(values, text)
        if not all(parts):
            raise ConfigurationError(f"--vary {text!r} has an empty value; give key=value1,value2")
        if twice := [part for part in parts if parts.count(part) > 1]:
            raise ConfigurationError(f"--vary {text!r} has {twice[0]} twice; once is enough")
        found[key] = Variation(key, tuple(parts))
    return list(found.values())


def federated_cells(source: str, overrides: Sequence[str], variations: Sequence[Variation]) -> list[Cell]:
    """Build every combination of the varied settings, once per seed.

    Parameters
    ----------
    source : str
        Preset or file.
    overrides : sequence of str
        ``--set`` arguments, applied first.
    variations : sequence of Variation
        What is varied.

    Returns
    -------
    list of Cell
        Seed by seed, so that an interrupted comparison has whole tables of fewer seeds.

    Raises
    ------
    UserError
        If the source cannot be read or a seed is no number.
    """
    seeds = _seeds(read_table(source), overrides, variations)
    varied = [variation for variation in variations if variation.key != SEED]
    rows = [dict(zip([v.key for v in varied], values, strict=True)) for values in product(*(v.values for v in varied))]
    return [_cell(source, overrides, settings, seed) for seed in seeds for settings in rows]


def label(settings: dict[str, str]) -> str:
    """Name a row: plug-ins by their name alone, other settings with their key."""
    return ", ".join(value if key in PLUGIN_NAMES else f"{key}={value}" for key, value in settings.items())


def _seeds(table: Table, overrides: Sequence[str], variations: Sequence[Variation]) -> list[int]:
    """List the seeds that are averaged over: the varied ones, or the experiment's own."""
    texts = next((variation.values for variation in variations if variation.key == SEED), None)
    if texts is None:
        given = [text.partition("=")[2] for text in overrides if text.partition("=")[0].strip() == SEED]
        texts = (str(given[-1] if given else table.get(SEED, 0)),)
    try:
        return list(dict.fromkeys(int(text) for text in texts))
    except ValueError:
        raise ConfigurationError(f"seeds are whole numbers, not {', '.join(texts)}") from None


def _cell(source: str, overrides: Sequence[str], settings: dict[str, str], seed: int) -> Cell:
    # Choosing a plug-in drops the options of another one, so names come before options.
    ordered = sorted(settings, key=lambda key: key not in PLUGIN_NAMES)
    assigned = [f"{key}={settings[key]}" for key in ordered]
    try:
        experiment = load_experiment(source, [*overrides, *assigned, f"{SEED}={seed}"])
    except UserError as error:
        return Cell(label(settings) or source, seed, settings, problem=str(error))
    return Cell(label(settings) or experiment.strategy.name, seed, settings, experiment)


def _split(values: str, whole: str) -> list[str]:
    parts, inside = [""], ""
    for letter in values:
        if inside and letter == inside[-1]:
            inside = inside[:-1]
        elif letter in _CLOSING and inside[-1:] not in ("'", '"'):
            inside += _CLOSING[letter]
        if letter == "," and not inside:
            parts.append("")
        else:
            parts[-1] += letter
    if inside:
        raise ConfigurationError(f"--vary {whole!r}: {inside[-1]} is missing")
    return [part.strip() for part in parts]
