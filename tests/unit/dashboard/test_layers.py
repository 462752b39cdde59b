"""Ranks and layers: what is asked, how it is thinned and put into words, and the page itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from common.store import Metric, Round, RunStore, Statistic
from dashboard.findings import layers_tables as tables
from dashboard.findings.layers_likeness import Pair, extremes, mean_of_pairs, order
from dashboard.findings.layers_names import arranged, block_means, group_labels, groups, kind_of, short_names
from dashboard.findings.layers_sentences import about_directions, about_likeness, about_ranks
from dashboard.queries import layers
from dashboard.queries.layers import UNREADABLE, LayerRanks, Likeness
from dashboard.views.layers_charts import _height
from tests.hostile_store import SHAPES, TEXTS, hostile_store
from tests.pages import Opener

START = datetime(2026, 1, 1, tzinfo=UTC)
RUN = "r1"
NAMES = ["layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj"]
CLIENTS = ["ada", "ben", "cyd"]
RANK = [[4, 4, 4, 4], [8, 8, 8, 8], [2, 2, 2, None]]
USED = [[2, 4, 3, 3], [1, 8, 6, 7], [1, 2, 2, None]]
COSINES = (0.9, -0.2, 0.5)
COSINE = [[1.0, -0.41, 0.2], [-0.41, 1.0, 0.1], [0.2, 0.1, 1.0]]
RANKS = LayerRanks(tuple(CLIENTS), tuple(NAMES), np.array(RANK, dtype=float), np.array(USED, dtype=float))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def store(home: Path) -> Iterator[RunStore]:
    with RunStore.open(home) as opened:
        yield opened


def create(store: RunStore, experiment: str = "{}", status: str = "completed") -> None:
    store.create_run(
        RUN, name="n", task="t", strategy="flora", seed=0, experiment=experiment, rounds_planned=3, fingerprint=""
    )
    if status == "completed":
        store.set_status(RUN, "completed")


def commit(store: RunStore, number: int, statistics: bool = True, **more: float) -> None:
    """Commit a round whose numbers are round ones."""
    metrics = [Metric(RUN, number, "cosine_to_mean", value, name) for name, value in zip(CLIENTS, COSINES, strict=True)]
    metrics += [Metric(RUN, number, "update_norm", 2.0, name) for name in CLIENTS]
    for place, name in enumerate(NAMES):
        metrics += [Metric(RUN, number, "effective_rank", 5.0 + place, layer=name)]
        metrics += [Metric(RUN, number, "merged_norm", number + place / 10, layer=name)]
    metrics += [Metric(RUN, number, name, value) for name, value in more.items()]
    data = {"clients": CLIENTS, "layers": NAMES, "rank": RANK, "effective_rank": USED}
    kept = [
        Statistic(RUN, number, "layers", data),
        Statistic(RUN, number, "similarity", {"clients": CLIENTS, "cosine": COSINE}),
    ]
    row = Round(RUN, number, START, "committed")
    store.commit_round(row, metrics=metrics, statistics=kept if statistics else [], rounds_done=number)


def ask(store: RunStore, query: Any, *given: Any) -> Any:
    with store.reading() as connection:
        return query(connection, RUN, *given)


def test_it_finds_the_rounds_that_have_numbers(store: RunStore) -> None:
    create(store)
    assert ask(store, layers.measured_rounds) == []
    store.commit_round(Round(RUN, 0, START, "committed"))
    commit(store, 1, statistics=False)
    assert ask(store, layers.measured_rounds) == [1]
    commit(store, 2)
    commit(store, 3, statistics=False)
    assert ask(store, layers.measured_rounds) == [2]
    assert ask(store, layers.merged_rounds) == [1, 2, 3]


def test_queries_answer_with_what_was_stored(store: RunStore) -> None:
    create(store)
    for number in (1, 2):
        commit(store, number, discarded_energy=0.1 * number)
    store.commit_round(
        Round(RUN, 3, START, "committed"),
        metrics=[
            Metric(RUN, 3, "download_discarded_energy", value, name) for name, value in (("ada", 0.2), ("ben", 0.4))
        ]
        + [Metric(RUN, 3, "cosine_to_mean", value, name) for name, value in (("ada", math.nan), ("ben", math.inf))]
        + [Metric(RUN, 3, "merged_norm", math.nan, layer="layers.0.q_proj")],
    )
    ranks = ask(store, layers.layer_ranks, 2)
    assert ranks.clients == tuple(CLIENTS)
    np.testing.assert_array_equal(ranks.rank, RANKS.rank)
    np.testing.assert_array_equal(ranks.used, RANKS.used)
    np.testing.assert_array_equal(ask(store, layers.likeness, 2).cosine, COSINE)
    assert ask(store, layers.layer_ranks, 3) == "" == ask(store, layers.likeness, 3)
    merge = ask(store, layers.of_merge, 2)
    assert merge.to_dict("list") == {
        "layer": NAMES,
        "effective_rank": [5.0, 6.0, 7.0, 8.0],
        "merged_norm": [2.0, 2.1, 2.2, 2.3],
    }
    assert ask(store, layers.norms, (1, 3)).to_dict("list") == {
        "round": [1] * 4,
        "layer": NAMES,
        "value": [1.0, 1.1, 1.2, 1.3],
    }
    found = ask(store, layers.directions, 1)
    assert found.to_dict("list") == {"client": ["ben", "cyd", "ada"], "cosine": [-0.2, 0.5, 0.9], "norm": [2.0] * 3}
    assert ask(store, layers.directions, 3).empty
    assert ask(store, layers.energy_left_out).round(9).to_dict("list") == {
        "round": [1, 2, 3],
        "series": ["merge", "merge", "downloads"],
        "value": [0.1, 0.2, 0.3],
        "highest": [0.1, 0.2, 0.4],
    }


def test_a_map_gives_each_of_few_clients_room_for_its_name() -> None:
    def height(count: int) -> int:
        return _height(pd.DataFrame({"client": [f"c{number}" for number in range(count)] * 2}), "client")

    assert [height(count + 1) - height(count) for count in (1, 29)] == [21, 21]
    assert height(31) == height(50) < height(30)


def test_agreement_gives_cosines_that_some_client_had(store: RunStore) -> None:
    create(store)
    values = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    metrics = [Metric(RUN, 1, "cosine_to_mean", value, f"c{value}") for value in (*values, math.nan, -math.inf)]
    store.commit_round(Round(RUN, 1, START, "committed"), metrics=metrics)
    found = ask(store, layers.agreement, (1, 2))
    assert found.to_dict("records") == [{"round": 1, "low": 0.0, "median": 0.4, "high": 0.8, "lowest": 0.0}]


def test_statistics_are_read_without_trust() -> None:
    good = {"clients": ["a", "b"], "layers": ["l"], "rank": [[2], [None]], "effective_rank": [[3], [1]]}
    found = layers.read_layer_ranks(good)
    assert isinstance(found, LayerRanks)
    assert np.isnan(found.used).all()  # more than the rank, or of no rank
    for change in (
        {"clients": ["a", "a"]},
        {"clients": ["a"]},
        {"clients": []},
        {"layers": "l"},
        {"layers": [1]},
        {"rank": [[2], ["3"]]},
        {"rank": [[2], [{}]]},
        {"rank": [[2, 2], [2, 2]]},
        {"rank": [[10**400], [1]]},
        {"effective_rank": None},
    ):
        assert layers.read_layer_ranks(good | change) == UNREADABLE, change
    assert layers.read_likeness({"left_out": "too many"}) == "too many"
    wild = layers.read_likeness({"clients": ["a", "b"], "cosine": [[1, math.nan], [2.0, math.inf]]})
    assert isinstance(wild, Likeness)
    np.testing.assert_array_equal(wild.cosine, [[1, np.nan], [np.nan, np.nan]])


@pytest.mark.parametrize("data", SHAPES)
def test_no_shape_of_a_statistic_breaks_it(data: object) -> None:
    for read in (layers.read_layer_ranks, layers.read_likeness):
        assert isinstance(read(data), str | LayerRanks | Likeness)


def test_names_of_statistics_are_those_of_the_other_tables() -> None:
    found = layers.read_likeness({"clients": ["half \ud800", "a\0b"], "cosine": [[1, 0], [0, 1]]})
    assert isinstance(found, Likeness)
    assert found.clients == ("half \\ud800", "a\\x00b")


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (NAMES, ["0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj"]),
        (["model.layers.3.attn.q", "model.layers.12.attn.q"], ["3", "12"]),
        (["m.h.0.attn.c", "m.h.0.mlp.fc.c"], ["attn", "mlp.fc"]),
        (["a.b", "a.b.c"], ["b", "b.c"]),
        (["a", "b"], ["a", "b"]),
        (["model.lm_head"], ["lm_head"]),
        (["x.<b>", "x.\u202e"], ["<b>", "\N{REPLACEMENT CHARACTER}"]),
    ],
)
def test_short_names_leave_out_what_all_share(names: list[str], short: list[str]) -> None:
    assert short_names(names) == short


def test_short_names_stay_different() -> None:
    names = sorted({text[:200] for text in TEXTS})
    assert len(set(short_names(names))) == len(names)


def test_layers_are_ordered_by_number_and_grouped_by_kind() -> None:
    names = [f"m.{i}.{kind}" for i in sorted(range(12), key=str) for kind in ("q", "v")]
    places, starts = arranged(names, 24)
    assert [names[place] for place in places][:5] == ["m.0.q", "m.0.v", "m.1.q", "m.1.v", "m.2.q"]
    assert starts == list(range(24))
    places, starts = arranged(names, 10)
    assert [names[place] for place in places] == [f"m.{i}.{kind}" for kind in ("q", "v") for i in range(12)]
    assert starts == [0, 3, 6, 9, 12, 15, 18, 21]
    assert group_labels([short_names(names)[place] for place in places], starts)[:2] == ["0.q – 2.q", "3.q – 5.q"]
    assert len(arranged([f"kind{i}x" for i in range(300)], 50)[1]) == 50
    assert [kind_of(name) for name in ("m.0.q", "m.0", "7")] == ["q", "m", "7"]
    assert groups(7, 3) == [0, 3, 6]
    assert groups(0, 3) == []


def test_blocks_are_means_of_what_is_known() -> None:
    matrix = np.array([[1.0, 3.0, 5.0], [np.nan, 5.0, np.nan], [7.0, np.nan, np.nan]])
    np.testing.assert_array_equal(block_means(matrix, [0, 2], [0, 2]), [[3.0, 5.0], [7.0, np.nan]])


def test_the_order_puts_who_agrees_side_by_side() -> None:
    first, second = [0, 2, 4, 6], [1, 3, 5, 7]
    cosine = np.full((8, 8), -0.3)
    for group in (first, second):
        cosine[np.ix_(group, group)] = 0.8
    assert order(cosine) == first + second
    assert sorted(order(np.full((5, 5), np.nan))) == list(range(5))
    assert [order(np.eye(count)) for count in (0, 1, 2)] == [[], [0], [0, 1]]


def test_extremes_are_those_a_search_finds() -> None:
    assert extremes(np.array(COSINE)) == (Pair(0, 1, -0.41), Pair(0, 2, 0.2))
    assert extremes(np.array([[1.0]])) is None
    assert extremes(np.array([[1.0, np.nan], [np.nan, 1.0]])) is None
    assert mean_of_pairs(np.array(COSINE)) == pytest.approx((-0.41 + 0.2 + 0.1) / 3)
    assert math.isnan(mean_of_pairs(np.eye(1)))


def test_sentences_say_what_to_read() -> None:
    assert about_ranks(RANKS) == [
        "Clients train ranks 2 to 8 (median 4) in 4 layers. "
        "75 % of that would hold 95 % of what they learned: the rank fits.",
        "Layer **0\\.q\\_proj** uses the least, 1.3 of 4.7 ranks; **0\\.v\\_proj** the most, 4.7 of 4.7 ranks.",
    ]
    assert about_likeness(Likeness(tuple(CLIENTS), np.array(COSINE))) == [
        "On average two clients' updates have a cosine of −0.04: they hardly agree.",
        "**ada** and **ben** pull in opposite directions (cosine −0.41): what one learns the other takes back.",
    ]
    alike = Likeness(("a", "b"), np.array([[1.0, 0.95], [0.95, 1.0]]))
    assert about_likeness(alike)[1] == "**a** and **b** learn almost the same (cosine 0.95); is it the same data?"
    assert len(about_likeness(Likeness(("a",), np.eye(1)))) == 1
    against = pd.DataFrame({"client": ["ben", "cyd"], "cosine": [-0.2, 0.5], "norm": [1.0, 1.0]})
    assert about_directions(against) == [
        "**ben** works against the average (cosine −0.20): look at its data and its learning rate."
    ]
    assert about_directions(against.assign(cosine=[-0.2, -0.1]))[0].startswith("2 clients work against")
    assert about_directions(against.assign(cosine=[0.1, 0.5])) == []


@pytest.mark.parametrize(("used", "told"), [(2, "a smaller rank would do"), (8, "a larger rank may learn more")])
def test_the_advice_follows_the_use(used: int, told: str) -> None:
    rank = np.full((2, 3), 8.0)
    sentences = about_ranks(LayerRanks(("a", "b"), ("x", "y", "z"), rank, np.full((2, 3), float(used))))
    assert told in sentences[0]
    assert sentences[0].startswith("Clients train rank 8 in 3 layers.")
    assert sentences[1] == "All layers use about as much of their rank."
    unknown = about_ranks(LayerRanks(("a",), ("x",), np.full((1, 1), np.nan), np.full((1, 1), np.nan)))
    assert unknown == ["No layer was trained as factors here, so there is no rank to speak of."]


def test_tables_of_a_small_federation_hold_every_number() -> None:
    cells = tables.rank_cells(RANKS)
    assert len(cells) == 12
    assert cells.iloc[4].to_dict() == {"client": "ben", "layer": "0.q_proj", "trained": 8, "used": 1, "share": 0.125}
    pairs = tables.likeness_cells(Likeness(tuple(CLIENTS), np.array(COSINE)))
    assert sorted(pairs["cosine"]) == sorted(np.ravel(COSINE))
    one = tables.only(RANKS, "v_proj")
    assert one.layers == ("layers.0.v_proj", "layers.1.v_proj")
    assert one.rank.shape == (3, 2)
    assert tables.only(RANKS, "nothing") is RANKS


def test_tables_of_a_large_federation_are_thinned() -> None:
    clients, names = tuple(f"c{i}" for i in range(200)), tuple(f"m.{i}.{kind}" for i in range(150) for kind in "qv")
    many = LayerRanks(clients, names, np.full((200, 300), 8.0), np.full((200, 300), 4.0))
    cells = tables.rank_cells(many)
    assert len(cells) <= 3_000
    assert set(cells["share"]) == {0.5}
    assert len(tables.likeness_cells(Likeness(clients, np.eye(200)))) <= 3_000
    merge = pd.DataFrame({"layer": names, "effective_rank": 3.0, "merged_norm": 1.0})
    assert len(tables.merge_by_layer(merge)) <= tables.MOST_COLUMNS
    rounds = tables.thinned(range(10_000))
    assert (len(rounds), rounds[0], rounds[-1]) == (tables.MOST_ROUNDS, 0, 9_999)
    norms = pd.DataFrame(
        [(number, name, 1.0) for number in rounds for name in names], columns=["round", "layer", "value"]
    )
    assert len(tables.norm_cells(norms, rounds)) <= 3_000
    directions = pd.DataFrame({"client": clients, "cosine": np.linspace(-1, 1, 200), "norm": 1.0})
    ends = tables.ends_of(directions)
    assert (len(ends), ends["cosine"].min(), ends["cosine"].max()) == (24, -1.0, 1.0)


def test_empty_tables_have_their_columns() -> None:
    merge = pd.DataFrame({"layer": [], "effective_rank": [], "merged_norm": []})
    assert list(tables.merge_by_layer(merge)["layer"]) == []
    assert tables.norm_cells(pd.DataFrame({"round": [], "layer": [], "value": []}), ()).empty
    assert list(tables.layers_in_numbers(RANKS, merge)["layer"]) == NAMES
    assert tables.layers_in_numbers(None, merge).empty
    directions = pd.DataFrame({"client": ["dot"], "cosine": [0.5], "norm": [1.0]})
    assert list(tables.clients_in_numbers(RANKS, directions)["client"]) == [*CLIENTS, "dot"]


@pytest.fixture
def look(home: Path, open_page: Opener) -> Opener:
    """Open the page."""
    return partial(open_page, home, "layers")


def texts(app: AppTest) -> str:
    return "\n".join(str(part.value) for kind in ("markdown", "caption", "info") for part in getattr(app, kind))


def test_the_page_shows_the_last_round(store: RunStore, look: Opener) -> None:
    create(store)
    commit(store, 1)
    commit(store, 2, discarded_energy=0.25)
    app = look(run=RUN)
    assert [metric.value for metric in app.metric] == ["75 %", "6.5", "0.40", "−0.04"]
    assert "**Round 2**" in texts(app)
    assert "pull in opposite directions" in texts(app)
    assert "merge: 75.0% kept" in texts(app)
    assert len(app.get("vega_lite_chart")) == 7
    assert list(app.selectbox(key="round").options) == ["the last", "2", "1"]
    app.selectbox(key="round").select("1").run()
    assert "**Round 1**" in texts(app)
    app.selectbox(key="layers").select("q_proj").run()
    assert not app.exception
    assert app.metric[1].value == "6.0"


def test_the_address_chooses_round_and_map(store: RunStore, look: Opener) -> None:
    create(store)
    commit(store, 1)
    commit(store, 2)
    app = look(run=RUN, round="1", map="effective rank")
    assert "**Round 1**" in texts(app)
    assert "Effective rank per client and layer" in texts(app)
    assert "**Round 2**" in texts(look(run=RUN, round="900"))


@pytest.mark.parametrize(
    ("experiment", "told"),
    [
        ('{"secure_aggregation": {"enabled": true}}', "secure aggregation"),
        ('{"evaluation": {"certificate": false}}', "evaluation.certificate=true"),
        ("{}", "No round has been merged yet"),
    ],
)
def test_without_numbers_it_says_why(store: RunStore, experiment: str, told: str, look: Opener) -> None:
    create(store, experiment)
    app = look(run=RUN)
    assert told in texts(app)
    assert not app.get("vega_lite_chart")


def test_a_run_of_an_older_version_shows_what_it_has(store: RunStore, look: Opener) -> None:
    create(store)
    commit(store, 1, statistics=False)
    app = look(run=RUN)
    assert "Round 1 holds no ranks of single clients: an older version made the run" in texts(app)
    assert len(app.get("vega_lite_chart")) == 4
    assert [metric.value for metric in app.metric] == ["–", "6.5", "0.40", "–"]


def test_what_was_left_out_is_told_letter_for_letter(store: RunStore, look: Opener) -> None:
    create(store)
    note = {"left_out": "300 <b>clients</b>"}
    store.commit_round(
        Round(RUN, 1, START, "committed"),
        statistics=[Statistic(RUN, 1, kind, note) for kind in ("layers", "similarity")],
    )
    assert "300 \\<b\\>clients\\<\\/b\\>" in texts(look(run=RUN))


def test_a_store_that_means_harm_does_none(home: Path, look: Opener) -> None:
    hostile_store(home)
    for name in ("1-of-texts", "2-of-numbers", "5-of-broken-statistics", "6-of-distant-rounds"):
        assert "Ranks and layers" in [title.value for title in look(run=f"hostile-{name}").title]
