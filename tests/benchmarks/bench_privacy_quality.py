"""What privacy costs in quality, by ε and strategy: the demo in short form, and the synthetic task; does frozen a help?

Every cell is a run of ``lorafleet compare``; those that are done are not run again. The argument is the folder of the
runs (default ``lorafleet-results/privacy``).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import altair as alt
from reporting import RESULTS, report

from dashboard.palette import SERIES
from simulations.comparison.compare import compare
from simulations.comparison.rows import Row

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("lorafleet-results/privacy")
STRATEGIES = ("fedavg", "ffa_lora", "flora")
ENDLESS = "∞"


@dataclass(frozen=True)
class Study:
    """One task: what is run, and what is measured.

    Parameters
    ----------
    name, title, text : str
        Of the page.
    source : str
        Preset.
    settings : tuple of str
        For all cells.
    seeds : int
        Number of seeds, from 0.
    epsilons : tuple of float
        Budgets; training without privacy is run beside them.
    plain : tuple of str
        Further settings without privacy: rows per step, of which privacy draws as many on average.
    measure : str
        Number that is compared.
    unit : str
        What that number is, for the plot.
    """

    name: str
    title: str
    text: str
    source: str
    settings: tuple[str, ...]
    seeds: int
    epsilons: tuple[float, ...]
    plain: tuple[str, ...]
    measure: str
    unit: str


DEMO = Study(
    "privacy_quality_demo",
    "Privacy and quality: the demo in short form",
    "Four owners of Python packages, rank 8 each, {rounds} rounds of 4 steps, a row (a window of 128 tokens) in a step "
    "with a chance of 0.025 (15 to 43 rows a step), clipping norm 0.3, δ = 1e-5. Loss on packages that nobody owns, "
    "mean ± standard deviation over seeds; before training {before}. ∞ is training without privacy, as many steps of "
    "24 rows each.",
    "fedavg",
    (
        "federation.rounds=4",
        "training.steps=4",
        "training.learning_rate=2e-2",
        "training.schedule=cosine",
        "training.batch_size=8",
        "evaluation.every=4",
        'evaluation.on=["server"]',
        "task.options.public=builtin:unseen",
        "task.options.packing=false",
        "task.options.prompts=[]",
        "federation.weighting=equal",
        "privacy.sample_rate=0.025",
        "privacy.clipping_norm=0.3",
    ),
    3,
    (1, 3, 8),
    ("training.accumulation=3",),
    "unseen_loss",
    "loss on unseen packages",
)

SYNTHETIC = tuple(
    Study(
        f"privacy_quality_rank{rank}",
        f"Privacy and quality: the synthetic task, adapters of rank {rank}",
        "Four clients learn a rank-4 update of two layers (24 × 32 and 16 × 48), {rounds} rounds of 10 steps, a row in "
        "a step with a chance of 0.125, clipping norm 0.3, δ = 1e-5. What is left of the loss above the known optimum, "
        "mean ± standard deviation over seeds; held-out loss before training {before}. A frozen random a of rank 4 "
        "spans little of the inputs, one of rank 24 half of them and more: the price of freezing it is the difference "
        "at ∞.",
        "synthetic",
        (
            *(f"clients.client-{number}.rank={rank}" for number in (1, 2, 3, 4)),
            f"adapter.options.rank={rank}",
            "task.options.skew=0",
            "federation.rounds=10",
            "federation.weighting=equal",
            'evaluation.on=["clients"]',
            "privacy.sample_rate=0.125",
            "privacy.clipping_norm=0.3",
        ),
        5,
        (0.5, 1, 2, 4, 8, 16, 32),
        (),
        "excess_loss",
        "loss above the optimum",
    )
    for rank in (4, 24)
)


def main() -> None:
    """Run all studies."""
    for study in (*SYNTHETIC, DEMO):
        run(study)


def run(study: Study) -> None:
    """Run a study, and write its table and plot."""
    start = time.perf_counter()
    vary = [f"strategy.name={','.join(STRATEGIES)}", f"seed={','.join(map(str, range(study.seeds)))}"]
    budgets = f"privacy.epsilon={','.join(f'{epsilon:g}' for epsilon in study.epsilons)}"
    home = FOLDER / study.name / "home"
    private = compare(
        study.source,
        [*study.settings, "privacy.mode=sample"],
        [*vary, budgets],
        FOLDER / study.name / "private",
        home,
        references=False,
    )
    settings = [*study.settings, *study.plain]
    plain = compare(study.source, settings, vary, FOLDER / study.name / "plain", home, references=False)
    rows = [*private.rows, *plain.rows]
    draw(study, rows)
    hours = (time.perf_counter() - start) / 3600
    header = ["ε", *(f"`{name}`" for name in STRATEGIES)]
    epsilons = [*(f"{epsilon:g}" for epsilon in study.epsilons), ENDLESS]
    table = [[epsilon, *(told(study, rows, name, epsilon) for name in STRATEGIES)] for epsilon in epsilons]
    text = study.text.format(rounds=len(rows[0].outcomes[0].curve) - 1, before=f"{before(study, rows):.3f}")
    commands = f"    {private.command}\n    {plain.command}"
    text += f"\n\n{commands}\n\n- hours of runs: {hours:.2f}\n\n![{study.title}]({study.name}.svg)"
    report(study.name, study.title, text, header, table)


def cell(rows: Sequence[Row], strategy: str, epsilon: str) -> Row:
    """Find the row of a strategy and a budget."""
    wanted = {"strategy.name": strategy} | ({} if epsilon == ENDLESS else {"privacy.epsilon": epsilon})
    return next(row for row in rows if {k: v for k, v in row.settings.items() if k != "seed"} == wanted)


def told(study: Study, rows: Sequence[Row], strategy: str, epsilon: str) -> str:
    """Write what came of a cell."""
    found = cell(rows, strategy, epsilon)
    if study.measure not in found.measures:
        return found.status
    estimate = found.measures[study.measure]
    return f"{estimate.mean:.3f} ± {estimate.sd or 0:.3f}"


def before(study: Study, rows: Sequence[Row]) -> float:
    """Return the measure before training, as a mean over seeds."""
    curves = [outcome.curve[0] for outcome in rows[0].outcomes]
    values = [point.unseen if study.measure == "unseen_loss" else point.held_out for point in curves]
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


def draw(study: Study, rows: Sequence[Row]) -> None:
    """Plot the measure against ε, one line per strategy."""
    epsilons = [*(f"{epsilon:g}" for epsilon in study.epsilons), ENDLESS]
    values = []
    for name in STRATEGIES:
        for epsilon in epsilons:
            estimate = cell(rows, name, epsilon).measures.get(study.measure)
            if estimate is not None:
                spread = estimate.sd or 0.0
                low, high = estimate.mean - spread, estimate.mean + spread
                values.append({"strategy": name, "ε": epsilon, "mean": estimate.mean, "low": low, "high": high})
    x = alt.X("ε:N", sort=epsilons, axis=alt.Axis(labelAngle=0), title="ε")
    scale = alt.Scale(domain=list(STRATEGIES), range=list(SERIES[: len(STRATEGIES)]))
    colour = alt.Color("strategy:N", scale=scale, title=None)
    chart = alt.Chart(alt.InlineData(values=values))
    y = alt.Y("mean:Q", title=study.unit, scale=alt.Scale(zero=False))
    line = chart.mark_line(point=True).encode(x, y, color=colour)
    band = chart.mark_area(opacity=0.12).encode(x, alt.Y("low:Q"), alt.Y2("high:Q"), color=colour)
    RESULTS.mkdir(parents=True, exist_ok=True)
    alt.layer(band, line).properties(width=420, height=280).save(str(RESULTS / f"{study.name}.svg"))


if __name__ == "__main__":
    main()
