"""Privacy: what is spent of the budget, by whom, how long the rest lasts, and whom it protects."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import streamlit as st

from common.store import Run
from dashboard.charts import ROUND, Axis, level, lines, over
from dashboard.findings.budget import NOT_PRIVATE, Policy, answer, odds, pace, rounds_left, unit
from dashboard.findings.roster import natural
from dashboard.pieces import chosen_or_stop, draw, explain, live, table
from dashboard.queries import client_metrics, privacy
from dashboard.session import is_live, source
from dashboard.source import Look
from dashboard.views.privacy_without import without_privacy
from dashboard.words import labels, plain, visible

LARGEST, MEDIAN = "largest of all clients", "median client"
WIDTH = 120
MOST, DOTS = 10, 60
SILENT = {
    "sample": "what the network sees: when a client answers, and that it does. Beside its noised update a client tells "
    "nothing that is computed from its rows: no losses, no times and, unless the experiment declares them public, no "
    "number of rows",
    "client": "what the server itself learns: it sees every update before it adds noise, unless updates are summed "
    "under masks, and how long each client trained",
}
"""By mode, what the promise leaves out."""
NOT_SPENT = (
    "No round has recorded a spending yet. It is recorded as rounds are committed, and before the first one "
    "nothing is spent."
)
SPENT_COLUMNS = {
    "client": st.column_config.TextColumn("client", pinned=True),
    "epsilon": st.column_config.NumberColumn("ε spent", format="%.3f"),
    "share": st.column_config.ProgressColumn("of the budget", format="%.0f %%", min_value=0, max_value=100),
    "second": st.column_config.NumberColumn(
        "second ε", format="%.3f", help="By the second accountant, another way to add up; the first one decides."
    ),
    "round": st.column_config.NumberColumn("after round"),
}


def page() -> None:
    """Show a run's privacy, or what it means that it has none."""
    run = chosen_or_stop()
    st.title("Privacy")
    policy = Policy.of(run)

    def body() -> None:
        look = source().look(run.id)
        spent = look.ask(privacy.spending, run.id)
        latest = look.ask(client_metrics.latest, run.id, privacy.EPSILON)
        second = look.ask(client_metrics.latest, run.id, privacy.SECOND)
        spread = look.ask(privacy.spread, run.id, privacy.EPSILON)
        if spent.empty and not spread.empty:
            spent = spread[["round", "largest"]].rename(columns={"largest": "epsilon"})
        if policy.promises or not spent.empty:
            _show(look, run, policy, spent, spread, latest, second)
        else:
            without_privacy(run)

    live(body, is_live(run))


def _show(
    look: Look,
    run: Run,
    policy: Policy,
    spent: pd.DataFrame,
    spread: pd.DataFrame,
    latest: pd.DataFrame,
    second: pd.DataFrame,
) -> None:
    noise = _noise(look, run)
    if policy.seeded:
        st.error(NOT_PRIVATE)
    _head(run, policy, spent, noise, look.ask(privacy.least_left, run.id))
    st.markdown(unit(policy, look.ask(privacy.protected, run.id)))
    st.header("Spending over the rounds")
    _curves(look, run, policy, spent, spread, latest)
    left, right = st.columns(2)
    with left:
        _clients(policy, latest, second)
    with right:
        _draw_noise(noise)
    _meaning(policy, spent)


def _head(run: Run, policy: Policy, spent: pd.DataFrame, noise: pd.DataFrame, left: int | None) -> None:
    """Answer how much is spent and how long the rest lasts."""
    rounds, values = [int(number) for number in spent["round"]], [float(value) for value in spent["epsilon"]]
    running = is_live(run)
    st.markdown(answer(policy, rounds, values, run.rounds_planned, running, left) if values else NOT_SPENT)
    now = values[-1] if values else 0.0
    if policy.epsilon is not None:
        st.progress(min(1.0, max(0.0, now / policy.epsilon)), text=f"{now / policy.epsilon:.0%} of the budget is spent")
    shown = {
        "ε spent": f"{now:.3g}" if values else "–",
        "Budget ε": f"{policy.epsilon:g}" if policy.epsilon else "–",
        "Rounds left": _left(policy, rounds, values) if left is None else f"{left:,}",
        "δ": f"{policy.delta:.2g}" if policy.delta else "–",
        "Noise multiplier": _latest_noise(policy, noise),
        "Clipping norm": f"{policy.clipping_norm:g}" if policy.clipping_norm else "–",
    }
    with st.container(horizontal=True):
        for label, value in shown.items():
            st.metric(label, value, width=WIDTH)


def _left(policy: Policy, rounds: Sequence[int], spent: Sequence[float]) -> str:
    found = pace(rounds, spent)
    if policy.epsilon is None or found is None:
        return "–"
    return f"≈ {rounds_left(policy.epsilon, spent[-1], found[0]):,}"


def _latest_noise(policy: Policy, noise: pd.DataFrame) -> str:
    value = float(noise["value"].iloc[-1]) if len(noise) else policy.noise_multiplier
    return "–" if value is None else f"{value:.3g}"


def _noise(look: Look, run: Run) -> pd.DataFrame:
    """Return the noise multiplier by round, of the federation, or the median client's: columns round, value, series."""
    found = look.ask(client_metrics.client_curves, run.id, privacy.NOISE, ("",))
    if found.empty:
        found = look.ask(privacy.spread, run.id, privacy.NOISE).rename(columns={"median": "value"})
    return found[["round", "value"]].assign(series="noise")


def _curves(
    look: Look, run: Run, policy: Policy, spent: pd.DataFrame, spread: pd.DataFrame, latest: pd.DataFrame
) -> None:
    """Draw the largest spending, the median with its band and chosen clients against the budget."""
    named = labels(sorted(latest["client"], key=natural))
    chosen = st.multiselect(
        "Clients",
        list(named),
        format_func=lambda client: named.get(client, visible(client, 40)),
        key="lines",
        bind="query-params",
        max_selections=MOST,
        placeholder="add single clients",
    )
    single = look.ask(client_metrics.client_curves, run.id, privacy.EPSILON, tuple(chosen))
    parts = [
        spent.rename(columns={"epsilon": "value"}).assign(series=LARGEST),
        spread.rename(columns={"median": "value"})[["round", "value", "low", "high"]].assign(series=MEDIAN),
        single.assign(series=single["client"].map(named))[["round", "value", "series"]],
    ]
    rows = pd.concat([part for part in parts if len(part)], ignore_index=True) if len(spent) else pd.DataFrame()
    series = [name for name, part in ((LARGEST, spent), (MEDIAN, spread)) if len(part)]
    y = Axis("value", "ε spent", ".3~g", zero=True)
    band = "middle 80 % of the clients" if len(spread) else ""
    spec = lines(ROUND, y, (*series, *(named[name] for name in chosen)), band=band, dots=len(spent) <= DOTS)
    if policy.epsilon is not None and len(rows):
        rows.loc[0, "budget"] = policy.epsilon
        spec = over(spec, level(Axis("budget", "budget (ε)", "g")))
    draw("ε after each round", rows, spec, NOT_SPENT, key="spending", height=320)
    if policy.epsilon is not None and len(rows):
        explain("The broken line is the budget.")


def _clients(policy: Policy, latest: pd.DataFrame, second: pd.DataFrame) -> None:
    """Show what each client has spent."""
    st.markdown("**What each client has spent**")
    named = labels(sorted(latest["client"], key=natural))
    rows = latest[latest["value"].abs() < float("inf")].sort_values(["value", "client"], ascending=[False, True])
    if rows.empty:
        explain("No client's own spending is recorded, only the largest of all.")
        return
    shown = pd.DataFrame({"client": rows["client"].map(named), "epsilon": rows["value"], "round": rows["round"]})
    other = rows["client"].map(second.set_index("client")["value"])
    if other.notna().any():
        shown.insert(2, "second", other)
    if policy.epsilon is not None:
        shown.insert(2, "share", 100 * shown["epsilon"] / policy.epsilon)
    table(shown, key="spent", height=None if len(shown) < 7 else 280, **SPENT_COLUMNS)
    if "second" in shown:
        explain("Two accountants add the same steps up, and both are right: each gives an upper bound.")


def _draw_noise(noise: pd.DataFrame) -> None:
    """Draw the noise multiplier where it changes, else say what it is."""
    title, values = "Noise multiplier", {f"{value:.4g}" for value in noise["value"]}
    if len(values) == 1:
        st.markdown(f"**{title}**")
        explain(f"It is {values.pop()} in every round: the noise is that many times the clipping norm.")
        return
    spec = lines(ROUND, Axis("value", "noise multiplier", ".3~g", zero=True), ("noise",))
    draw(title, noise, spec, "This run has recorded no noise multiplier.", key="noise", height=240)


def _meaning(policy: Policy, spent: pd.DataFrame) -> None:
    """Say what the numbers mean."""
    now = float(spent["epsilon"].iloc[-1]) if len(spent) else None
    told = SILENT.get(policy.mode, "whatever else a client tells")
    factor = f" At ε = {now:.3g} that is {odds(now)}." if now is not None else ""
    with st.expander("What these numbers mean"):
        st.markdown(
            f"- **ε** bounds how much more probable any outcome can be with one unit of data than without it: e to the "
            f"power of ε.{factor} Smaller is more private; it only grows, and restarts do not set it back.\n"
            "- **δ** is the probability with which this bound may fail. It should be well below one in the number of "
            "units.\n"
            "- **Clipping norm:** no unit may change an update by more than this. **Noise multiplier:** the random "
            "noise that is added, as a multiple of it.\n"
            "- The ε of one row is that of *its* client; ε of rows and ε of clients are two promises, never added.\n"
            f"- Not covered is {told}."
        )
        if policy.accountant:
            st.markdown(f"The spending is added up by the accountant {plain(policy.accountant)}.")
