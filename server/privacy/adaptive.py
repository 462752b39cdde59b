"""A clipping norm that follows a quantile of the updates' norms, told by nothing but a noised count.

``b_k = 1`` if ``‖u_k‖ ≤ C``; ``f = (Σ (b_k − ½) + N(0, σ_b²)) / n + ½``; ``C ← C exp(−η (f − γ))``: too many below it
make it smaller, too few larger. An update that becomes zero moves the sum by 1 at most, so the count is a Gaussian
mechanism of noise multiplier ``σ_b``; with ``z_Δ = (z⁻² − σ_b⁻²)^(−½)`` on the updates both together cost ``z``.

Andrew, Thakkar, McMahan, Ramaswamy: Differentially Private Learning with Adaptive Clipping, NeurIPS 2021, arXiv
1905.03871, algorithm 1, with their σ_b of a twentieth of the clients. Departures: neighbours differ in a client's whole
update, not in whether it is counted, which is public, so that it moves the sum by 1 and not by ½ (theorem 1); σ_b is at
least 2 z, or no noise on the updates would be left to choose in small cohorts; C stays within a factor of a million of
where it began.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from common.federation import ServerState
from common.privacy.settings import PrivacySettings

NORM = "privacy.clipping_norm"
"""Name of C among a state's extras."""

REACH = 1e6
"""How far C may go from where it began."""

COUNTED = 20
"""Clients per unit of the count's noise."""


def clipping_norm(state: ServerState, privacy: PrivacySettings) -> float:
    """Return C of the next release."""
    kept = state.extras.get(NORM) if privacy.adaptive_clipping else None
    return privacy.clipping_norm if kept is None else bounded(float(kept.reshape(-1)[0]), privacy.clipping_norm)


def remembered(norm: float) -> Mapping[str, Tensor]:
    """Return C as a state's extra."""
    return {NORM: torch.tensor([norm], dtype=torch.float64)}


def count_noise(clients: int, noise: float) -> float:
    """Return σ_b."""
    return max(clients / COUNTED, 2 * noise)


def update_noise(noise: float, of_count: float) -> float:
    """Return z_Δ."""
    return 1 / math.sqrt(noise**-2 - of_count**-2)


def next_norm(norm: float, fraction: float, privacy: PrivacySettings) -> float:
    """Return C after a release in which a noised fraction of the updates was not clipped."""
    step = math.exp(-privacy.clipping_rate * (fraction - privacy.target_quantile))
    return bounded(norm * step, privacy.clipping_norm)


def bounded(norm: float, began: float) -> float:
    """Keep C within reach of where it began; what is no number is back there."""
    return began if math.isnan(norm) else min(max(norm, began / REACH), began * REACH)
