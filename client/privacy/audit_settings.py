"""What an audit looks at: noise, sample rate, steps, clipping norm and engine."""

from __future__ import annotations

from dataclasses import dataclass, replace

from client.privacy.engine import Gradients
from common.errors import UserError
from common.experiment import Experiment
from common.privacy.accounting import Mechanism, Spending
from common.privacy.limits import least_noise, limits
from common.privacy.settings import Budget, PrivacySettings

CANARIES = 2000
"""Made up by default; a bound's width falls with the root of their number."""

MOST_STEPS = 200
"""Steps of an experiment's plan that are run; what they spend is claimed, not what all would."""

SHARPEST = 100
"""Steps of the sharp setting at most."""


@dataclass(frozen=True)
class Setting:
    """What is audited.

    Parameters
    ----------
    name : str
        For people.
    mechanism : Mechanism
        Noise and sample rate of a step.
    steps : int
        Steps trained.
    delta : float
        At which ε is claimed.
    clipping_norm : float
        Largest norm of a row's gradient.
    gradients : {"own", "hooks", "functorch", "ghost"}
        The engine.
    canaries : int
        How many, half of them trained on.
    device : str
        Where; auto, cpu, cuda or cuda:N.
    """

    name: str
    mechanism: Mechanism
    steps: int = 1
    delta: float = 1e-5
    clipping_norm: float = 1.0
    gradients: Gradients = "own"
    canaries: int = CANARIES
    device: str = "cpu"

    @property
    def claimed(self) -> float:
        """ε as accounted, by the tighter accountant: the less is claimed, the more an audit asks."""
        return Spending.of(self.mechanism, self.steps).epsilon(self.delta, "prv")


def default_settings(canaries: int = CANARIES) -> list[Setting]:
    """Return the settings that see most bugs in a few seconds: a sharp one, and one that samples."""
    return [
        sharp(Setting("sharp", Mechanism(1.0, 1.0), canaries=canaries)),
        Setting("sampled", Mechanism(2.0, 0.25), 20, canaries=canaries),
    ]


def sharp(setting: Setting) -> Setting:
    """Return the setting that sees most with a given noise: every row in each step, until canaries stand out of it."""
    noise = setting.mechanism.noise_multiplier
    steps = max(1, min(SHARPEST, round(noise**2)))
    return replace(setting, name="sharp", mechanism=Mechanism(noise, 1.0), steps=steps)


def settings_of(experiment: Experiment, canaries: int = CANARIES) -> list[Setting]:
    """Return an experiment's settings: as many steps of its plan as fit, and the sharp one with the same noise.

    Where clients differ in sample rates or budgets, it is the plan of those with the least noise.

    Raises
    ------
    UserError
        If it does not protect rows.
    ConfigurationError
        If no noise keeps its budget.
    """
    privacy = experiment.privacy
    if not privacy.protects_rows:
        raise UserError(
            f'an audit checks the noise that clients add, but privacy.mode is "{privacy.mode}"; audit an experiment '
            'with privacy.mode = "sample", or leave SOURCE out'
        )
    rounds = privacy.participations or experiment.federation.rounds
    steps = rounds * experiment.training.steps
    clients = experiment.simulated_clients().values()
    kinds = {(client.sample_rate or privacy.sample_rate, client.budget) for client in clients if client.trains}
    kinds = kinds or {(privacy.sample_rate, None)}
    noise, rate = min((_noise(privacy, rate, budget, steps), rate) for rate, budget in kinds)
    planned = Setting(
        "as planned",
        Mechanism(noise, rate),
        min(steps, MOST_STEPS),
        delta=privacy.delta,
        clipping_norm=privacy.clipping_norm,
        gradients=privacy.gradients,
        canaries=canaries,
        device=experiment.training.device,
    )
    return [planned, sharp(planned)]


def _noise(privacy: PrivacySettings, rate: float, budget: Budget | None, steps: int) -> float:
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    return least_noise(limits(privacy, budget), rate, steps, privacy.accountant)
