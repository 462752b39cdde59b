"""Whatever a store gives, a line holds: any float, any text, any JSON."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Table

from common.store.entities import ClientRound, Event, Metric, Round
from common.store.models import ClientRoundRow, EventRow, MetricRow, RoundRow, table_of
from common.store.packed_file import Unfit
from common.store.packed_rows import decode, encode
from common.store.rows import TABLES
from tests.property.test_store_roundtrip import client_rounds, events, json_values, metrics, rounds

ROWS = {Round: RoundRow, ClientRound: ClientRoundRow, Metric: MetricRow, Event: EventRow}


@given(entity=rounds | client_rounds | metrics | events)
def test_a_row_is_read_back_from_its_line(entity: Any) -> None:
    table, row = table_of(ROWS[type(entity)]), asdict(entity)
    line = encode(table, row)
    assert line.count(b"\n") == 1
    row.pop("id", None)
    # repr, since NaN is not equal to itself.
    assert repr(sorted(decode(table, line).items())) == repr(sorted(row.items()))


@given(data=st.data(), table=st.sampled_from(TABLES))
def test_a_row_of_anything_is_a_row_or_refused(data: st.DataObject, table: Table) -> None:
    names = [column.name for column in table.columns]
    values = data.draw(st.dictionaries(st.sampled_from([*names, "other"]), json_values, max_size=len(names)))
    with suppress(Unfit):
        assert decode(table, json.dumps(values).encode()).keys() <= set(names)
