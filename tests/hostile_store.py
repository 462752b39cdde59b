"""A store that means harm: markup, endless and invisible text, numbers that are none, and rows that fit nothing.

Whatever shows it must show it as text. What runs or loads where it must not leaves a trace: ``window.hacked``, an
element that :data:`INJECTED` finds, a dialog, or a request to :data:`ELSEWHERE`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from common.experiment_file import load_experiment
from common.store import (
    Artefact,
    Client,
    ClientRound,
    ClientStatus,
    Event,
    Metric,
    Round,
    RunStore,
    Statistic,
    write_artefact,
)

START = datetime(2026, 11, 1, tzinfo=UTC)
ELSEWHERE = "198.51.100.7"
"""An address that nobody has."""
INJECTED = "[data-hostile]"
"""Selects elements made of the store's texts."""

MARKUP = (
    "<script data-hostile>window.hacked = 1; alert(1)</script>",
    f'<img data-hostile src="http://{ELSEWHERE}/a.png" onerror="window.hacked = 1; alert(1)">',
    '<svg data-hostile onload="window.hacked = 1">',
    "</text><b data-hostile>bold</b>",
    "[press me](javascript:window.hacked=1)",
    f"![picture](http://{ELSEWHERE}/b.png)",
    f"http://{ELSEWHERE}/c www.example.com a@example.com",
    "# heading\n\n- item\n\n| a | b |\n|---|---|\n| 1 | 2 |",
    "**strong** _slanted_ ~~gone~~ `code` \\",
    "$\\frac{1}{0}$ $$\\href{javascript:window.hacked=1}{x}$$",
    ":red[red] :material/delete: :smile: :rainbow[rainbow] :red-background[x] :streamlit:",
    "```\nfence\n```",
)
ODD = (
    "\u202eright to left\u202c \u2066isolated\u2069",
    "zero\u200bwidth\u200d\ufeff and a\u0301\u0302\u0303\u0304\u0305\u0306\u0307\u0308 pile",
    "a NUL \0, a bell \a, an escape \x1b[31mred\x1b[0m",
    "half a surrogate \ud800",
    "=HYPERLINK(1)",
    "@SUM(1+1)*cmd",
    "a.b[0]['c']\\.d",
    "datum['x'] {0} %s %(x)s ${window.hacked=1} {{7*7}}",
    "__proto__",
    "constructor",
    "NaN",
    "null",
    "",
    " ",
    "line\nbreak\ttab\rreturn",
    "../../etc/passwd",
    "'; DROP TABLE runs; --",
    "😀" * 60,
    "long " * 800,
    "W" * 4_000,
)
TEXTS = MARKUP + ODD
NUMBERS = (math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, -0.0, 0.0, 1.0)
BROKEN_JSON = ("", "no JSON", "[]", "null", "3", '{"task": 3}', "[" * 5_000, '{"a":' * 500 + "1" + "}" * 500)
SHAPES = (
    None,
    3,
    "text",
    [],
    {},
    {"left_out": MARKUP[0]},
    {"clients": None, "server": None, "cosine": None, "layers": None},
    {"clients": {"a": [["train", math.nan, math.inf]]}, "server": [["train"]]},
    {"clients": {"a": [["train", "x", None]]}, "server": [[MARKUP[0], -1e308, 1e308]]},
    {"clients": ["a"], "cosine": [[1.0, 2.0], []], "layers": ["l"], "rank": [], "effective_rank": [[None, {}]]},
    {"clients": list(MARKUP), "cosine": [[math.nan] * 12] * 12, "layers": [1], "rank": [["x"]], "effective_rank": 3},
)
"""Statistics that are not what their kind promises."""


def hostile_store(home: Path) -> list[str]:
    """Fill a home through the real store; return the ids of its runs, oldest first."""
    makers: tuple[Callable[[RunStore, str], None], ...] = (
        _run_of_texts,
        _run_of_numbers,
        _run_without_rounds,
        _run_without_clients,
        _run_of_broken_statistics,
        _run_of_distant_rounds,
        _run_that_failed,
    )
    names = [
        f"hostile-{number}{maker.__name__.removeprefix('_run').replace('_', '-')}"
        for number, maker in enumerate(makers, 1)
    ]
    broken = [f"broken-{number}" for number in range(len(BROKEN_JSON))]
    clock = iter(range(1_000_000))
    with RunStore.open(home, clock=lambda: START + timedelta(seconds=next(clock))) as store:
        for name, experiment in zip(broken, BROKEN_JSON, strict=True):
            _create(store, name, experiment, text=TEXTS[len(experiment) % len(TEXTS)])
        for name, make in zip(names, makers, strict=True):
            _create(store, name, load_experiment("synthetic").model_dump_json())
            make(store, name)
    with RunStore.open(home, clock=lambda: datetime.max.replace(tzinfo=UTC)) as store:
        _create(store, "hostile-8-of-the-last-day", load_experiment("synthetic").model_dump_json())
    return [*broken, *names, "hostile-8-of-the-last-day"]


def _create(store: RunStore, name: str, experiment: str, text: str = "hostile") -> None:
    store.create_run(
        name,
        name=text,
        task=text,
        strategy=text,
        seed=2**63 - 1,
        experiment=experiment,
        rounds_planned=4,
        fingerprint=text,
    )


def _run_of_texts(store: RunStore, run: str) -> None:
    """Every text in every place that takes one."""
    store.update_run(run, name=MARKUP[1], reason=" ".join(TEXTS))
    store.record_members([Client(run, text, START, 4, text, text, 2**62, 2**62) for text in TEXTS])
    file = write_artefact(store.run_folder(run), "<img src=x onerror=alert(1)>.bin", b"x")
    for number in range(3):
        phases = dict.fromkeys(TEXTS, 1.0)
        store.commit_round(
            Round(run, number, START, "committed", TEXTS[number], TEXTS, phases=phases, seconds=3.0, epsilon=1.0),
            _clients_of_texts(run, number),
            _metrics_of_texts(run, number),
            [] if number else [Artefact(run, 0, MARKUP[0], file.path, file.sha256, file.nbytes)],
            [Event(run, text, text, START, number, text, {text: text}) for text in TEXTS],
            _statistics_of_texts(run, number),
            rounds_done=number,
            best_metric=2.0,
        )


def _clients_of_texts(run: str, number: int) -> list[ClientRound]:
    statuses: tuple[ClientStatus, ...] = ("accepted", "rejected", "failed", "late", "offline")
    return [
        ClientRound(run, number, text, statuses[(i + number) % 5], text, 4, 10**30, 10**30, metadata={"": text})
        for i, text in enumerate(TEXTS)
    ]


def _metrics_of_texts(run: str, number: int) -> list[Metric]:
    known = ("held_out_loss", "train_loss", "cosine_to_mean", "update_norm", "epsilon", "noise_multiplier")
    places = list(enumerate(TEXTS))
    return [
        *(Metric(run, number, name, 2.0 - number / 2) for name in ("held_out_loss", "unseen_loss")),
        *(Metric(run, number, name, 2.0 - number / 2 + i / 100, text) for name in known for i, text in places if text),
        *(Metric(run, number, text, float(i)) for i, text in places),
        *(Metric(run, number, "effective_rank", float(i), "", text) for i, text in places),
    ]


def _statistics_of_texts(run: str, number: int) -> list[Statistic]:
    names = list(TEXTS)
    table = [[0.5] * len(names)] * len(names)
    spans = {text: [[text, 0.0, 1.0], ["train", 1.0, 2.0 + i]] for i, text in enumerate(names)}
    layers = {"clients": names, "layers": names, "rank": table, "effective_rank": table}
    return [
        Statistic(run, number, "timeline", {"clients": spans, "server": [["train", 0.0, 3.0]]}),
        Statistic(run, number, "similarity", {"clients": names, "cosine": table}),
        Statistic(run, number, "layers", layers),
    ]


def _run_of_numbers(store: RunStore, run: str) -> None:
    """Metrics that are no numbers, sizes past 64 bits, times that run backwards."""
    for number in range(len(NUMBERS)):
        value = NUMBERS[number]
        clients = [
            ClientRound(run, number, f"client-{i}", "accepted", None, 10**30, -(10**30), 10**30, -5, odd)
            for i, odd in enumerate(NUMBERS)
        ]
        names = ("held_out_loss", "worst_client_loss", "unseen_loss", "train_loss", "epsilon", "noise_multiplier")
        metrics = [Metric(run, number, name, value) for name in names]
        metrics += [Metric(run, number, name, odd, f"client-{i}") for name in names for i, odd in enumerate(NUMBERS)]
        metrics += [Metric(run, number, "effective_rank", odd, "", f"layer-{i}") for i, odd in enumerate(NUMBERS)]
        row = Round(
            run,
            number,
            START - timedelta(days=number),
            "committed",
            cohort=tuple(f"client-{i}" for i in range(len(NUMBERS))),
            bytes_up=10**30,
            bytes_down=-1,
            seconds=value,
            phases={"train": value, "aggregate": value, "evaluate": "long", "nothing": None},  # type: ignore[dict-item]
            error=value,
            epsilon=value,
            committed_at=datetime.min.replace(tzinfo=UTC),
        )
        store.commit_round(row, clients, metrics, rounds_done=number, best_metric=math.nan, best_round=2**63)


def _run_without_rounds(store: RunStore, run: str) -> None:
    """A run that was created and then nothing."""
    store.add_event(run, "note", MARKUP[0])


def _run_without_clients(store: RunStore, run: str) -> None:
    """Rounds in which nobody did anything, and nothing was measured."""
    for number in range(3):
        store.commit_round(Round(run, number, START, "committed"), rounds_done=number)
    store.begin_round(run, 3, [])


def _run_of_broken_statistics(store: RunStore, run: str) -> None:
    """Statistics of every wrong shape under every kind."""
    for number, data in enumerate(SHAPES):
        statistics = [Statistic(run, number, kind, data) for kind in ("timeline", "similarity", "layers", MARKUP[0])]
        metrics = [Metric(run, number, "held_out_loss", 1.0)]
        store.commit_round(
            Round(run, number, START, "committed", cohort=("a",)),
            metrics=metrics,
            statistics=statistics,
            rounds_done=number,
        )


def _run_of_distant_rounds(store: RunStore, run: str) -> None:
    """Round numbers that nobody should count up to."""
    for number in (-5, 0, 7, 10**9, 2**63 - 1):
        metrics = [Metric(run, number, "held_out_loss", 1.0, client) for client in ("", "ada")]
        clients = [ClientRound(run, number, "ada", "accepted")]
        store.commit_round(Round(run, number, START, "committed", cohort=("ada",)), clients, metrics, rounds_done=2**63)
    store.update_run(run, rounds_planned=-3)


def _run_that_failed(store: RunStore, run: str) -> None:
    """A failure whose reason goes on and on."""
    store.commit_round(Round(run, 1, START, "failed", MARKUP[0] * 200, cohort=("ada",)))
    store.set_status(run, "failed", MARKUP[1] + "\n" + "because " * 2_000)
