"""Ranks and layers: how much of its rank each client uses where, and whether clients pull in one direction."""

from __future__ import annotations

import numpy as np
import streamlit as st

from common.store import Run
from dashboard.findings import layers_tables as tables
from dashboard.findings.layers_likeness import mean_of_pairs
from dashboard.findings.layers_names import kind_of
from dashboard.findings.layers_sentences import (
    about_directions,
    about_likeness,
    about_ranks,
    bullets,
    known_mean,
    percent,
    share_used,
    signed,
)
from dashboard.pieces import chosen_or_stop, live, table
from dashboard.queries import layers as asked
from dashboard.session import is_live, source
from dashboard.settings import setting
from dashboard.source import Look
from dashboard.views import layers_charts as charts
from dashboard.views.layers_charts import MAPS, Moment
from dashboard.words import code

LAST = "the last"
OF_MERGE = "The merge holds the directions of all clients, so its rank may exceed a client's."


def page() -> None:
    """Show it."""
    run = chosen_or_stop()
    st.title("Ranks and layers")
    st.caption(
        "A client's rank is how many independent directions it may change a layer in; the effective rank is how many "
        "of them hold 95 % of what it learned. The cosine of two updates is 1 if they pull the same way, 0 if they "
        "have nothing in common, −1 if one undoes the other."
    )
    look = source().look(run.id)
    rounds = look.ask(asked.measured_rounds, run.id)
    left, right, wide = st.columns([1, 1, 2])
    chosen = left.selectbox(
        "Round", [LAST, *map(str, reversed(rounds))], key="round", bind="query-params", help="With numbers on layers."
    )
    kind = right.selectbox("Layers", _kinds(look, run, rounds), key="layers", bind="query-params")
    shown = wide.segmented_control(
        "Map of clients and layers", list(MAPS), default="share used", required=True, key="map", bind="query-params"
    )
    live(lambda: _body(run, chosen, kind, shown or "share used"), is_live(run))


def _body(run: Run, chosen: str, kind: str, shown: str) -> None:
    look = source().look(run.id)
    rounds = look.ask(asked.measured_rounds, run.id)
    if not rounds:
        _unmeasured(run)
        charts.draw_energy(look, run)
        return
    number = rounds[-1] if chosen == LAST or int(chosen) not in rounds else int(chosen)
    moment = Moment(run, look, rounds, number, kind)
    _numbers(moment)
    st.markdown(f"**Round {number}**\n\n{bullets(_readings(moment))}")
    one, two = st.columns(2)
    with one:
        charts.draw_rank_map(moment, shown)
        charts.draw_directions(moment)
        charts.draw_merge(moment)
    with two:
        charts.draw_likeness(moment)
        charts.draw_directions_over_rounds(moment)
        charts.draw_norms_over_rounds(moment)
    charts.draw_energy(look, run)
    _in_numbers(moment)


def _kinds(look: Look, run: Run, rounds: list[int]) -> list[str]:
    """Offer kinds of layers where there are enough layers to choose from."""
    if not rounds:
        return [tables.EVERY]
    found = look.ask(asked.layer_ranks, run.id, rounds[-1])
    layers = list(look.ask(asked.of_merge, run.id, rounds[-1])["layer"]) if isinstance(found, str) else found.layers
    kinds = sorted({kind_of(name) for name in layers} - {tables.EVERY})
    return [tables.EVERY, *kinds] if 1 < len(kinds) < len(layers) and len(kinds) <= tables.MOST_ROWS else [tables.EVERY]


def _numbers(moment: Moment) -> None:
    """Answer the page's questions in four numbers."""
    ranks, likeness, merge = moment.ranks, moment.likeness, moment.merge
    use = float("nan") if isinstance(ranks, str) else known_mean(share_used(ranks))
    mean = float("nan") if isinstance(likeness, str) else mean_of_pairs(likeness.cosine)
    to_mean = known_mean(moment.directions["cosine"].to_numpy(dtype=np.float64))
    rank = known_mean(merge["effective_rank"].to_numpy(dtype=np.float64))
    one, two, three, four = st.columns(4)
    one.metric("Rank in use", percent(use), help="Effective rank over trained rank, mean over clients, layers.")
    two.metric(
        "Effective rank of the merge",
        f"{rank:.1f}" if np.isfinite(rank) else "–",
        help=f"Mean over layers. {OF_MERGE}",
    )
    three.metric("Clients to the average", signed(to_mean), help="Mean cosine; 1 is full agreement.")
    four.metric("Clients to each other", signed(mean), help="Mean cosine over pairs; 0 is nothing in common.")


def _readings(moment: Moment) -> list[str]:
    """Say what to read from the round."""
    ranks, likeness = moment.ranks, moment.likeness
    sentences = [] if isinstance(ranks, str) else about_ranks(ranks)
    sentences += [] if isinstance(likeness, str) else about_likeness(likeness)
    return [*sentences, *about_directions(moment.directions)]


def _in_numbers(moment: Moment) -> None:
    ranks = moment.ranks
    column = st.column_config.NumberColumn
    with st.expander("All layers and clients in numbers"):
        rows = tables.layers_in_numbers(None if isinstance(ranks, str) else ranks, moment.merge)
        table(
            rows,
            key="layers-in-numbers",
            layer=st.column_config.TextColumn("layer", pinned=True),
            rank=column("trained rank", format="%.1f", help="Mean over clients."),
            used=column("effective rank", format="%.1f", help="Mean over clients."),
            share=column("share used", format="percent"),
            effective_rank=column("effective rank of the merge", format="%.0f", help=OF_MERGE),
            merged_norm=column("norm of the merge", format="%.4g"),
        )
        table(
            tables.clients_in_numbers(None if isinstance(ranks, str) else ranks, moment.directions),
            key="clients-in-numbers",
            client=st.column_config.TextColumn("client", pinned=True),
            rank=column("trained rank", format="%.1f", help="Mean over layers."),
            used=column("effective rank", format="%.1f", help="Mean over layers."),
            share=column("share used", format="percent"),
            cosine=column("cosine to the average", format="%.3f"),
            norm=column("size of the update", format="%.4g"),
        )


def _unmeasured(run: Run) -> None:
    """Say why a run has no numbers on layers."""
    if setting(run, "secure_aggregation.enabled") is True:
        st.info(
            "This run uses secure aggregation: the server sees the sum of all updates and no single one. Nobody can "
            "say what one client does in a layer, and that is the point. Losses and bytes are on the page Run."
        )
    elif setting(run, "evaluation.certificate") is False:
        st.info(
            "This run was told not to measure its merges. Runs that do: "
            + code("lorafleet simulate … --set evaluation.certificate=true")
        )
    elif run.rounds_done == 0:
        st.info("No round has been merged yet; the first numbers come with round 1.")
    else:
        st.info("This run holds no numbers on layers: an older version made it, or none of its rounds was merged.")
