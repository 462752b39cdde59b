"""The ``privacy audit`` verb: runs canaries through the code that trains, and shows what they betray."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import Progress

from common.errors import RunError, UserError
from common.wording import number
from simulations.terminal.tables import Output, numbers_table

if TYPE_CHECKING:
    from client.privacy.audit import Finding
    from client.privacy.audit_settings import Setting

SHOWN = 100.0
"""Larger ε are shown as such: how much larger tells nothing more."""

PASSED = "[green]Passed:[/] nothing shows that more privacy was spent than is claimed; {seen}. {limits}"
SEES = "missing or halved noise, or rows that are not clipped, would have shown"
SEES_LITTLE = "but halved noise might not have shown: more --canaries, or more --steps, would see more"
LIMITS = (
    "An audit can prove a claim wrong but never right: it looks at the noise on made-up rows, not at a model, its "
    "data, or persons with several rows."
)
FAILED = (
    "[red]Not passed:[/] this installation does not keep the promise it accounts for; train on no private data with it."
)


@dataclass(frozen=True)
class Asked:
    """What was asked for instead of a plan's or the default's; None leaves it as it is."""

    noise_multiplier: float | None = None
    sample_rate: float | None = None
    steps: int | None = None


def run_audit(source: str | None, overrides: Sequence[str], asked: Asked, canaries: int | None, output: Output) -> int:
    """Audit the mechanism; return 0 if passed, 3 if not."""
    from client.privacy.audit import audit, decisive

    settings = _settings(source, overrides, asked, canaries)
    shown = Console(stderr=True)
    with Progress(console=shown, transient=True, disable=output.as_json or not shown.is_terminal) as bar:
        task = bar.add_task("training on canaries", total=sum(setting.steps for setting in settings))
        findings = audit(settings, lambda: bar.advance(task))
    passed, nearest = all(finding.passed for finding in findings), decisive(findings)
    values = {
        "passed": passed,
        "claimed_epsilon": nearest.claimed,
        "empirical_epsilon": nearest.empirical,
        "delta": nearest.setting.delta,
        "settings": [_values(finding) for finding in findings],
    }
    output.show(values, _view(findings, passed))
    return 0 if passed else RunError.exit_code


def _settings(source: str | None, overrides: Sequence[str], asked: Asked, canaries: int | None) -> list[Setting]:
    """Choose what is audited: the defaults, an experiment's, or the one setting that was asked for."""
    from client.privacy.audit_settings import CANARIES, default_settings, settings_of
    from common.experiment_file import load_experiment
    from common.privacy.accounting import Mechanism
    from server.plan import option_problems

    if overrides and source is None:
        raise UserError("--set belongs to SOURCE, a preset or an experiment file; name one")
    _refuse_odd(asked)
    many = canaries or CANARIES
    found = settings_of(load_experiment(source, overrides, option_problems), many) if source else default_settings(many)
    if asked == Asked():
        return found
    noise, rate = found[0].mechanism
    mechanism = Mechanism(asked.noise_multiplier or noise, asked.sample_rate or rate)
    return [replace(found[0], name="as asked", mechanism=mechanism, steps=asked.steps or found[0].steps)]


def _refuse_odd(asked: Asked) -> None:
    noise, rate = asked.noise_multiplier, asked.sample_rate
    if noise is not None and not (math.isfinite(noise) and noise > 0):
        raise UserError(f"--noise-multiplier {noise:g} is no noise; give a number above 0")
    if rate is not None and not 0 < rate <= 1:
        raise UserError(f"--sample-rate {rate:g} is no chance of a row to be drawn; give a number above 0, at most 1")


def _values(finding: Finding) -> dict[str, Any]:
    setting = finding.setting
    return {
        "name": setting.name,
        "noise_multiplier": setting.mechanism.noise_multiplier,
        "sample_rate": setting.mechanism.sample_rate,
        "steps": setting.steps,
        "clipping_norm": setting.clipping_norm,
        "gradients": setting.gradients,
        "canaries": setting.canaries,
        "delta": setting.delta,
        "claimed_epsilon": finding.claimed,
        "empirical_epsilon": finding.empirical,
        "gaussian_bound": finding.gaussian,
        "distribution_free_bound": finding.guesses,
        "memory": finding.memory,
        "sees_half_noise": finding.sees_half,
        "passed": finding.passed,
        "trouble": finding.trouble,
    }


def _view(findings: Sequence[Finding], passed: bool) -> RenderableType:
    table = numbers_table(
        "setting", ">noise", ">sample rate", ">steps", ">claimed ε", ">at least", ">by guesses", "verdict"
    )
    for finding in findings:
        noise, rate = finding.setting.mechanism
        epsilons = [_epsilon(value) for value in (finding.claimed, finding.gaussian, finding.guesses)]
        verdict = "[green]passed[/]" if finding.passed else "[red]not passed[/]"
        table.add_row(
            finding.setting.name, number(noise, 3), f"{rate:g}", str(finding.setting.steps), *epsilons, verdict
        )
    setting = findings[0].setting
    head = (
        f"{setting.canaries} canaries, half of them trained on; gradients: {setting.gradients}; δ = {setting.delta:g}"
    )
    troubles = [f"[red]{escape(each.setting.name)}:[/] {escape(each.trouble)}" for each in findings if each.trouble]
    seen = SEES if any(each.sees_half for each in findings) else SEES_LITTLE
    return Group(head, table, *troubles, "", PASSED.format(seen=seen, limits=LIMITS) if passed else FAILED)


def _epsilon(value: float) -> str:
    return f"> {SHOWN:g}" if value > SHOWN else f"{value:.2f}"
