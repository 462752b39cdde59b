"""Audit the mechanism: see whether the noise that is accounted for is really there, in the code that trains.

Canaries are rows whose gradient is ten times the clipping norm along a coordinate of their own: the output of a linear
layer for an input that has one entry. Half of them, chosen by fair coins, are trained on with the engine, the sampler
and the step that train models. How far the weights have moved along each coordinate is that canary's score; whoever
knows the scores guesses who took part, and the better that works, the larger ε must be.

An audit can prove that noise is missing. It cannot prove that all is well: it sees neither the data nor the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor, nn

from client.privacy.audit_settings import Setting
from client.privacy.engine import open_engine
from client.privacy.lower_bound import (
    Scores,
    epsilon_by_gaussian,
    epsilon_by_guesses,
    lower_epsilon,
    pooled_std,
    standard_error,
)
from client.privacy.steps import StepPlan, poisson_samples, private_step
from common.privacy.noise import secret_generator
from common.workspace import choose_device

LOUDNESS = 10.0
"""A canary's gradient in clipping norms: clipping, if it works, makes it one."""

MICRO_BATCH = 256

LEAST_MEMORY = 0.5
"""Share of what canaries must move the weights by; less cannot be chance, and an audit of nothing proves nothing."""

FALSE_ALARM = 1e-3
"""Probability that an audit of correct code fails, over all settings and both checks of each: bound and memory."""

POWER = 0.99
"""Probability with which an audit that is said to see a bug sees it."""

RISK_OF_GUESSES = 0.05
"""Probability that the bound by guesses is too high, whatever the noise is like. At a much smaller one the theorem's
share of δ alone, 2 · canaries · δ, outweighs all guesses."""

GUESSES_COUNT = 1.5
"""From this claim on the bound by guesses decides, too: with Gaussian noise it then stays so far below the claim that
it alarms for nothing even less often than the others. Below it is shown only."""


@dataclass(frozen=True)
class Finding:
    """What an audit of one setting found.

    Parameters
    ----------
    setting : Setting
        What was audited.
    claimed : float
        ε as accounted.
    gaussian, guesses : float
        Lower bounds on ε.
    memory : float
        How far trained canaries moved the weights, over what was due.
    sees_half : bool
        Whether half the noise would have shown: with too few canaries or too much noise it may not.
    trouble : str
        Why it is not passed; empty if it is.
    """

    setting: Setting
    claimed: float
    gaussian: float
    guesses: float
    memory: float
    sees_half: bool
    trouble: str

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the claim."""
        return not self.trouble

    @property
    def empirical(self) -> float:
        """The lower bound that decides."""
        return max(self.gaussian, self.guesses) if self.claimed >= GUESSES_COUNT else self.gaussian


def audit(
    settings: Sequence[Setting], stepped: Callable[[], object] = lambda: None, test_seed: int | None = None
) -> list[Finding]:
    """Train on canaries under each setting, and judge what their scores betray.

    Parameters
    ----------
    settings : sequence of Setting
        One after another.
    stepped : callable
        Called after every step.
    test_seed : int, optional
        Draws coins, samples and noise from a seed, for tests.
    """
    risk = FALSE_ALARM / (2 * len(settings))
    found = []
    for number, setting in enumerate(settings):
        included, excluded = _scores(setting, stepped, test_seed, number)
        found.append(_judged(setting, included, excluded, risk))
    return found


def decisive(findings: Sequence[Finding]) -> Finding:
    """Return the finding whose bound is nearest to its claim, or furthest above it."""
    return max(findings, key=lambda finding: finding.empirical / max(finding.claimed, 1e-9))


def _scores(
    setting: Setting, stepped: Callable[[], object], test_seed: int | None, number: int
) -> tuple[Scores, Scores]:
    """Train on half the canaries; return how far the weights moved for those and for the others, in clipping norms."""
    device = choose_device(setting.device)
    coins = secret_generator("cpu", test_seed, "canaries", number)
    taken = torch.rand(setting.canaries, generator=coins) < 0.5
    rows, expected = taken.nonzero().flatten(), setting.mechanism.sample_rate * setting.canaries / 2
    model = nn.Linear(setting.canaries, 1, bias=False, device=device)
    before = model.weight.detach().clone()
    _train(model, rows, setting, expected, stepped, (test_seed, number))
    moved = (before - model.weight.detach()).flatten().double().cpu() * expected / setting.clipping_norm
    return moved[taken].numpy(), moved[~taken].numpy()


def _train(
    model: nn.Linear,
    rows: Tensor,
    setting: Setting,
    expected: float,
    stepped: Callable[[], object],
    seeds: tuple[int | None, int],
) -> None:
    test_seed, number = seeds
    parameters, device = list(model.parameters()), model.weight.device
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    plan = StepPlan(setting.mechanism, setting.clipping_norm, setting.steps, MICRO_BATCH, test_seed)
    engine = open_engine(
        model,
        parameters,
        optimizer,
        gradients=setting.gradients,
        noise_multiplier=setting.mechanism.noise_multiplier,
        clipping_norm=setting.clipping_norm,
        expected_rows=expected,
        generator=secret_generator(device, test_seed, "audit", number),
    )

    def losses_of(numbers: Tensor) -> Tensor:
        inputs = torch.zeros(len(numbers), setting.canaries, device=device)
        inputs[torch.arange(len(numbers)), rows[numbers]] = LOUDNESS * setting.clipping_norm
        output: Tensor = model(inputs)
        return output.flatten()

    with engine as running:
        for drawn in poisson_samples(len(rows), plan, "audit", number):
            private_step(running, drawn, plan.micro_batch, losses_of)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            stepped()


def _judged(setting: Setting, included: Scores, excluded: Scores, risk: float) -> Finding:
    """Compare what scores betray with what is claimed."""
    claimed, due = setting.claimed, setting.steps * setting.mechanism.sample_rate
    if not (np.isfinite(included).all() and np.isfinite(excluded).all()):
        return Finding(setting, claimed, 0.0, 0.0, 0.0, False, "the weights are not finite any more")
    memory = float(included.mean() - excluded.mean()) / due
    error = pooled_std(included, excluded) * math.sqrt(1 / len(included) + 1 / len(excluded)) / due
    finding = Finding(
        setting,
        claimed,
        epsilon_by_gaussian(included, excluded, setting.delta, risk),
        epsilon_by_guesses(included, excluded, setting.delta, RISK_OF_GUESSES),
        memory,
        _sees_half(setting, claimed, risk),
        "",
    )
    return replace(finding, trouble=_trouble(finding, memory + float(norm.isf(risk)) * error))


def _trouble(finding: Finding, most_memory: float) -> str:
    """Say what speaks against a claim; empty if nothing does."""
    if finding.empirical > finding.claimed:
        return (
            f"at least ε = {finding.empirical:.3g} was spent where {finding.claimed:.3g} is claimed: noise, clipping "
            "or sampling is wrong"
        )
    if most_memory < LEAST_MEMORY:
        return (
            f"no memory of canaries: they moved the weights by {max(0.0, finding.memory):.0%} of what was due; nothing "
            "was trained, or not on these rows"
        )
    return ""


def _sees_half(setting: Setting, claimed: float, risk: float) -> bool:
    """Foretell whether the Gaussian bound would exceed the claim if the noise were half of what it should be."""
    (noise, rate), steps, half = setting.mechanism, setting.steps, setting.canaries / 2
    apart = steps * rate / math.sqrt(steps * ((noise / 2) ** 2 + rate * (1 - rate) / 2))
    surely = apart - float(norm.isf(1 - POWER)) * standard_error(apart, half, half)
    return lower_epsilon(surely, half, half, setting.delta, risk) > claimed
