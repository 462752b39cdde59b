"""Tables of layers: read as PEFT reads them, and never slowly."""

from __future__ import annotations

import random
import re
import time

import pytest
from peft.utils.other import get_pattern_key

from common.errors import DataError
from common.layer_patterns import LONGEST, MOST, LayerTable

PARTS = ["a", "b", "1", "ab", ".", r"\.", r"\d", r"\w", ".*", ".+", ".*?"]


def test_the_same_key_fits_as_in_peft() -> None:
    draw, fitting = random.Random(4), 0
    for _ in range(5_000):
        keys = [
            draw.choice(["", "", "^"]) + "".join(draw.choices(PARTS, k=draw.randint(1, 6))) + draw.choice(["", "$"])
            for _ in range(3)
        ]
        layer = "".join(draw.choices("ab1..", k=draw.randint(1, 9)))
        table = {key: key for key in keys}
        wanted = table.get(get_pattern_key(keys, layer))
        assert LayerTable("table", table, 1).get(layer, None) == wanted, (keys, layer)
        fitting += wanted is not None
    assert fitting > 500


@pytest.mark.parametrize(
    "key", ["(", "(a+)+$", "(.*)*x", "a|b", "a+", "[ab]", "a{9}", r"\1", "a$b", "x" * (LONGEST + 1)]
)
def test_other_keys_are_refused(key: str) -> None:
    with pytest.raises(DataError, match="table has a key that is no regular expression to read safely") as caught:
        LayerTable("table", {key: 1}, 1)
    assert len(str(caught.value)) < 500


def test_no_key_is_slow() -> None:
    began = time.process_time()
    for key in (".*a" * 80 + "b", ".+" * 100 + "b", ".*." * 85, "." * 200 + "b", r".*\." * 50 + "b"):
        for layer in ("a" * LONGEST, "." * LONGEST, "a." * (LONGEST // 2)):
            LayerTable("table", {key: 1}, 1).get(layer, None)
    assert time.process_time() - began < 2


def test_what_is_no_table_and_one_too_large_are_refused() -> None:
    with pytest.raises(DataError, match=re.escape("table is [1]; expected a table of layers")):
        LayerTable("table", [1], 1)
    with pytest.raises(DataError, match="table has 3 keys for 2000000 layers; expected at most 2 keys"):
        LayerTable("table", {"a": 1, "b": 1, "c": 1}, MOST // 2)
    assert LayerTable("table", None, 1).get("a", 7) == 7
