"""The table of what goes with what says what the strategies themselves say."""

from __future__ import annotations

import pytest

from strategies import AGGREGATION, aggregation_strategy
from strategies.matrix import capability_matrix, uploads
from strategies.robust import ROBUST

ROWS = {row.name: row for row in capability_matrix()}


def test_every_strategy_has_a_row() -> None:
    assert list(ROWS) == AGGREGATION.names()


@pytest.mark.parametrize("name", AGGREGATION.names())
def test_a_row_repeats_the_capabilities(name: str) -> None:
    row, able = ROWS[name], AGGREGATION.plugin(name).capabilities
    assert (row.exact, row.mixed_ranks, row.secure_aggregation) == (able.exact, able.mixed_ranks, able.linear_uplink)
    assert (row.error_feedback, row.client_memory) == (able.same_coordinates, able.client_memory)
    linear = {rule for rule in ROBUST.names() if ROBUST.plugin(rule).needs_linear}
    assert linear <= set(row.robust) or not able.linear_uplink
    assert not linear & set(row.robust) or able.linear_uplink
    assert "none" not in row.robust


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("flora", "r (out + in)"),
        ("ffa_lora", "r · out"),
        ("fedsa_lora", "r · in"),
        ("rolora", "r · out or r · in in turn"),
        ("fed_sb", "r · out, then r · in, then r²"),
        ("slora", "density · out · in, then r (out + in)"),
    ],
)
def test_uploads_in_words(name: str, said: str) -> None:
    assert ROWS[name].uploads == said


def test_uploads_follow_the_options() -> None:
    assert uploads(aggregation_strategy("rolora", period=2)) == "r · out or r · in in turn"
    assert uploads(aggregation_strategy("slora", sparse_rounds=0)) == "r (out + in)"
