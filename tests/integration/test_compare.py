"""A real comparison of tiny runs: killed in the middle, continued without repeating, and what it leaves behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from common.store import RunStore
from server.progress import Progress, listening
from simulations.comparison.compare import compare
from simulations.comparison.report import Comparison
from tests.tiny import write_texts

STRATEGIES, SEEDS, OWNERS = ("flora", "ffa_lora"), (0, 1), {"ada": 2, "dot": 4}
VARY = [f"strategy.name={','.join(STRATEGIES)}", "seed=0,1"]
CELLS = len(STRATEGIES) * len(SEEDS) + len(SEEDS) * (1 + len(OWNERS))


def _source(folder: Path) -> str:
    texts = write_texts(folder, tuple(OWNERS))
    clients = "\n".join(f"[clients.{name}]\ndata = '{texts[name]}'\nrank = {rank}" for name, rank in OWNERS.items())
    file = folder / "tiny.toml"
    file.write_text(f"""
name = "tiny"
[task]
name = "causal_lm"
options = {{sequence_length = 16, eval_rows = 2, public = '{texts["ada"]}'}}
[adapter]
name = "lora"
options = {{target_modules = ["q_proj"]}}
[training]
steps = 1
batch_size = 2
[federation]
rounds = 1
[evaluation]
on = ["clients", "server"]
[simulation]
workers = 2
{clients}
""")
    return str(file)


def _stop_in_cell(number: int) -> Callable[[Progress], None]:
    """Interrupt a comparison when training of the given cell begins."""
    cell = [0]

    def listen(step: Progress) -> None:
        if found := re.match(r"cell (\d+) of", step.text):
            cell[0] = int(found[1])
        if step.kind == "dispatched" and cell[0] == number:
            raise KeyboardInterrupt

    return listen


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def interrupted(place: Path) -> list[dict[str, str]]:
    """Kill a comparison in its third cell, and again in its sixth; return the runs and their status each time."""
    source, found = _source(place), []
    for number in (3, 6):
        with pytest.raises(KeyboardInterrupt), listening(_stop_in_cell(number)):
            compare(source, [], VARY, place / "out")
        found.append(_runs(place / "out"))
    return found


@pytest.fixture(scope="module")
def finished(place: Path, interrupted: list[dict[str, str]]) -> Comparison:
    return compare(str(place / "tiny.toml"), [], VARY, place / "out")


def _runs(out: Path) -> dict[str, str]:
    """Return the status of all runs by id, oldest first."""
    with RunStore.open(out / "home", read_only=True) as store:
        return {run.id: run.status for run in reversed(store.runs())}


def _used(comparison: Comparison) -> list[str]:
    return [run for row in comparison.rows for outcome in row.outcomes for run in outcome.runs]


def test_a_killed_comparison_goes_on_without_repeating(
    place: Path, interrupted: list[dict[str, str]], finished: Comparison
) -> None:
    once, twice = interrupted
    assert list(once.values()) == ["completed", "completed", "interrupted"]
    assert list(twice.values()) == ["completed"] * 5 + ["interrupted"]
    after = _runs(place / "out")
    assert list(after.values()) == ["completed"] * CELLS
    assert list(twice)[:3] == list(once)  # the interrupted run was finished, not begun again
    assert list(after)[:6] == list(twice)
    assert sorted(_used(finished)) == sorted(after)


def test_a_finished_comparison_runs_nothing(place: Path, finished: Comparison) -> None:
    def refuse(step: Progress) -> None:
        assert step.kind == "notice", step

    with listening(refuse):
        again = compare(str(place / "tiny.toml"), [], VARY, place / "out")
    assert again.as_dict() == finished.as_dict()


def test_all_rows_begin_where_the_untrained_model_is(finished: Comparison) -> None:
    assert [row.label for row in finished.rows] == [*STRATEGIES, "centralised", "local"]
    for seed in range(len(SEEDS)):
        before = [row.outcomes[seed].curve[0] for row in finished.rows]
        for point in before:
            assert point.held_out == pytest.approx(before[0].held_out, abs=1e-6)
            assert point.worst == pytest.approx(before[0].worst, abs=1e-6)
            assert point.unseen == pytest.approx(before[0].unseen, abs=1e-6)
    changes = [outcome.measures["change"] for row in finished.rows for outcome in row.outcomes]
    assert all(change != 0 for change in changes)
    assert len(set(changes)) == len(changes)


def test_references_send_nothing_and_strategies_what_the_store_counted(place: Path, finished: Comparison) -> None:
    flora, ffa, *references = finished.rows
    assert all("bytes_up" not in row.measures for row in references)
    with RunStore.open(place / "out" / "home", read_only=True) as store:
        for row in (flora, ffa):
            sent = [sum(r.bytes_up for r in store.rounds(outcome.runs[0])) for outcome in row.outcomes]
            assert row.measures["bytes_up"].mean == sum(sent) / len(sent)
            assert row.measures["bytes_up_per_client"].mean == sum(sent) / len(sent) / len(OWNERS)
    assert ffa.measures["bytes_up"].mean < flora.measures["bytes_up"].mean


def test_table_and_plot_are_written(place: Path, finished: Comparison) -> None:
    out = place / "out"
    assert json.loads((out / "comparison.json").read_text()) == finished.as_dict()
    assert len((out / "comparison.csv").read_text().splitlines()) == 1 + len(finished.rows)
    assert "lorafleet compare" in (out / "comparison.md").read_text()
    svg = (out / "comparison.svg").read_text()
    drawn = set(re.findall(r'row: (\w+)"[^>]*"line mark"[^>]*stroke="(#\w+)"', svg))
    assert sorted(label for label, _ in drawn) == sorted(row.label for row in finished.rows)
    assert len({colour for _, colour in drawn}) == len(finished.rows)
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "comparison.png").stat().st_size > 10_000
