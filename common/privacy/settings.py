"""What a federation asks for in privacy, and what an owner allows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from common.section import Section

Accountant = Literal["rdp", "prv"]
"""How spending is added up: Rényi orders (additive, quick), or the privacy loss itself (tighter, slower)."""

OTHER: dict[Accountant, Accountant] = {"rdp": "prv", "prv": "rdp"}
"""The one that is shown as a second number."""

UNIT = {"sample": "one row of one client's data", "client": "all that one client contributes"}
"""What a mode protects: with or without it the run turns out nearly the same."""


class Budget(Section):
    """An owner's limit for one data set, over all experiments."""

    epsilon: float = Field(gt=0, description="Largest ε over everything ever trained on the data.")
    delta: float = Field(1e-5, gt=0, lt=1, description="δ at which it is counted.")


class PrivacySettings(Section):
    """Differential privacy: what the federation asks of every client."""

    mode: Literal["none", "sample", "client"] = Field(
        "none",
        description="sample: clients train with DP-SGD and protect every row (an owner need not trust the server); "
        "client: the server clips updates and adds noise, and protects a client as a whole (linear strategies).",
    )
    epsilon: float = Field(
        8.0, gt=0, le=1e9, description="Budget of the whole experiment, per client; the noise is calibrated to it."
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="δ of the promise; well below one in the number of rows.")
    clipping_norm: float = Field(
        1.0,
        ge=1e-6,
        le=1e9,
        description="No row's gradient (sample) or client's update (client) counts for more than this norm.",
    )
    accountant: Accountant = Field(
        "rdp", description="The one that calibrates, plans and decides; the other is shown as a second number."
    )
    noise_multiplier: float | None = Field(
        None,
        ge=0.01,
        le=1e3,
        description="Noise as a multiple of clipping_norm, instead of what epsilon needs; training then goes on until "
        "epsilon is spent.",
    )
    sample_rate: float = Field(
        0.05,
        gt=0,
        le=1,
        description="Chance of each row to be in a step (sample). Public and equal for all clients unless "
        "[clients.NAME] says otherwise; a step then takes as many rows as were drawn, training.batch_size at a time.",
    )
    participations: int | None = Field(
        None, ge=1, description="Rounds a client takes part in at most; none: all of them. Fewer need less noise."
    )
    row_counts: Literal["private", "public"] = Field(
        "private",
        description="private: clients weigh the same and do not tell how many rows they have; public: owners declare "
        "their numbers of rows public, and are weighted by them.",
    )
    on_exhausted: Literal["skip", "stop"] = Field(
        "skip", description="When a client's budget is spent: go on without it, or stop the run."
    )
    gradients: Literal["own", "hooks", "functorch", "ghost"] = Field(
        "own",
        description="How per-row gradients are found (sample): own: one backward pass; the others are Opacus's, for "
        "comparison.",
    )
    adaptive_clipping: bool = Field(
        False, description="Let clipping_norm follow the updates' norms (client); the norms' count is noised, too."
    )
    target_quantile: float = Field(
        0.5, gt=0, lt=1, description="Share of the updates that adaptive clipping leaves unclipped."
    )
    clipping_rate: float = Field(0.2, gt=0, le=1, description="How fast adaptive clipping follows.")
    test_seed: int | None = Field(
        None, ge=0, description="Draws noise and samples from a seed, for tests: the run is marked not private."
    )

    @property
    def protects_rows(self) -> bool:
        """Whether clients train with DP-SGD."""
        return self.mode == "sample"

    @property
    def protects_clients(self) -> bool:
        """Whether the server clips updates and adds noise."""
        return self.mode == "client"

    @property
    def hides_counts(self) -> bool:
        """Whether numbers of rows must not be told."""
        return self.mode != "none" and self.row_counts == "private"
