"""The whole configuration of a run: frozen, complete, and checked before anything starts.

Every field's description is the text of ``docs/configuration.md``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from common.errors import ConfigurationError
from common.plugins import explain
from common.privacy.settings import Budget, PrivacySettings
from common.privacy.telling import private_contradictions, with_private_defaults
from common.section import Name, Section


class PluginChoice(Section):
    """A plug-in by name, with its own options."""

    name: Name = Field(description="File name of the plug-in, without .py.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="The plug-in's own options; see its section below."
    )


class AdapterChoice(PluginChoice):
    """The adapter method."""

    name: Name = Field("lora", description="File name of the plug-in, without .py.")


class StrategyChoice(PluginChoice):
    """The aggregation strategy."""

    name: Name = Field("flora", description="File name of the plug-in, without .py.")


class RobustChoice(PluginChoice):
    """What is done against bad clients before merging."""

    name: Name = Field("none", description="File name of the plug-in, without .py; none: merge what passed the checks.")


class OptimizerChoice(PluginChoice):
    """What the server does with the merged update."""

    name: Name = Field("none", description="File name of the plug-in, without .py; none: take the update as it is.")


class ClientSettings(Section):
    """One simulated client. On a real node its own client.toml takes this place."""

    data: str | None = Field(
        None,
        description="With a task source and natural partition: the key of its documents (default: the client's name). "
        "Without a task source: a path or data-set name of its own.",
    )
    rank: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="Rank it trains; default: the adapter's; auto: what its device can carry, at most the adapter's.",
    )
    upload_bytes: int | None = Field(
        None, ge=1, description="Bytes of one upload; its rank is the largest that fits, at most the one given."
    )
    download_bytes: int | None = Field(
        None, ge=1, description="Bytes of one download, instead of federation.download_bytes."
    )
    pool: tuple[str, ...] = Field((), description="Names of clients whose training data it holds together.")
    sample_rate: float | None = Field(
        None, gt=0, le=1, description="Chance of each of its rows to be in a step, instead of privacy.sample_rate."
    )
    budget: Budget | None = Field(
        None, description="The owner's own limit; the stricter of it and the experiment's privacy holds."
    )
    trains: bool = Field(True, description="Takes part in training.")
    evaluates: bool = Field(True, description="Evaluates the model on its held-out part.")


class TrainingSettings(Section):
    """Local training on a client."""

    steps: int = Field(20, ge=1, description="Optimizer steps per round.")
    batch_size: int = Field(8, ge=1, description="Rows per forward pass.")
    accumulation: int = Field(1, ge=1, description="Forward passes per optimizer step.")
    learning_rate: float = Field(5e-3, gt=0, description="Peak learning rate of AdamW.")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant",
        description="Fall of the learning rate over the whole run, round by round and step by step.",
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up at the beginning of every round.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    proximal_mu: float = Field(
        0.0, ge=0, description="FedProx: adds μ/2 times the squared distance from the round's start to the loss."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Autocast of forward and backward; auto: bf16 on a GPU that has it, fp32 elsewhere.",
    )
    base_precision: Literal["fp32", "bf16", "4bit"] = Field(
        "fp32", description="How a node holds the base model; 4bit needs bitsandbytes and a GPU."
    )
    global_adapter: Literal["merged", "unmerged"] = Field(
        "merged",
        description="merged: nodes train on a copy of the target layers with the global adapter added; "
        "unmerged: the global adapter runs beside the base (smaller, 1.1–1.4 times slower; needed for 4bit).",
    )
    gradient_checkpointing: bool = Field(False, description="Trade a second forward pass for memory.")
    device: str = Field("auto", description="auto (a GPU if there is one), cpu, cuda or cuda:N.")
    threads: int = Field(
        1, ge=1, le=256, description="CPU threads of each client's training; part of the same-bits promise."
    )


def quorum(min_completion: float, cohort: int) -> int:
    """Return how many valid replies a round of so many clients needs: at least one, at most all."""
    # 0.3 × 10 is a little above 3
    return max(1, math.ceil(min(1.0, max(0.0, min_completion)) * cohort - 1e-9))


class FederationSettings(Section):
    """Rounds, cohorts and what happens when clients fail."""

    rounds: int = Field(5, ge=1, description="Rounds to train.")
    cohort_fraction: float = Field(1.0, gt=0, le=1, description="Share of the online clients sampled each round.")
    cohort_size: int | None = Field(None, ge=1, description="Clients sampled each round, instead of the fraction.")
    min_completion: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of the cohort whose valid replies a round needs (at least one reply).",
    )
    deadline_s: float = Field(3600.0, gt=0, description="Seconds a client has to answer.")
    join_timeout_s: float = Field(300.0, gt=0, description="Seconds to wait for enough clients to be online.")
    on_failure: Literal["skip", "stop"] = Field(
        "skip", description="After a round without quorum: skip to the next one, or stop the run."
    )
    patience: int | None = Field(None, ge=1, description="Stop after this many rounds without a better held-out loss.")
    weighting: Literal["examples", "equal"] = Field(
        "examples", description="Weight of a client in the average; equal by default where privacy hides their number."
    )
    max_num_examples: int = Field(
        10_000_000, ge=1, description="Replies that claim more examples than this are left out."
    )
    max_update_norm: float | None = Field(
        None, gt=0, description="Replies whose factors' norm exceeds this are left out."
    )
    max_weight_share: float | None = Field(
        None, gt=0, le=1, description="Largest share of a round's weight one client may have; the rest is shared out."
    )
    wire: Literal["fp32", "fp16", "bf16", "int8", "int4"] = Field(
        "fp32", description="Number format of uploads; int8 and int4 send the change in blocks with a scale each."
    )
    error_feedback: bool = Field(
        True, description="Clients add what int8 or int4 lost to their next upload, where the strategy allows it."
    )
    wire_down: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="Number format of downloads.")
    download_rank: int | None = Field(
        None,
        ge=1,
        description="Largest rank of a downloaded layer; cut by SVD, the loss is recorded. Not below the clients' rank "
        "where a strategy starts all of them from the same numbers.",
    )
    download_energy: float | None = Field(
        None, gt=0, lt=1, description="Share of each downloaded layer's squared norm to keep."
    )
    download_bytes: int | None = Field(
        None, ge=1, description="Bytes of one download; the largest rank that fits is sent."
    )
    keep_replies: bool = Field(False, description="Keep every reply after its round is committed.")


class EvaluationSettings(Section):
    """Where and how often the model is evaluated."""

    on: tuple[Literal["clients", "server"], ...] = Field(
        ("clients",),
        description="clients: each on its held-out part; server: on the task's public data, the default under privacy.",
    )
    every: int = Field(1, ge=1, description="Evaluate every so many rounds; round 0 and the last one always.")
    fraction: float = Field(1.0, gt=0, le=1, description="Share of the clients that evaluate, sampled once per run.")
    certificate: bool = Field(
        True, description="Measure the merge's error against the exact average, while clients evaluate."
    )


class SecureSettings(Section):
    """Secure aggregation: the server learns the sum of the updates, and no update."""

    enabled: bool = Field(False, description="Mask every upload; needs a linear strategy.")
    min_cohort: int = Field(3, ge=2, description="Clients a sum must hold; with fewer nothing is revealed.")
    threshold: float = Field(
        2 / 3, gt=0.5, le=1, description="Share of a round's clients that must stay to its end; fewer reveal nothing."
    )


class SimulationSettings(Section):
    """Simulated clients on one machine."""

    driver: Literal["inprocess", "ray"] = Field("inprocess", description="Where clients run.")
    workers: int = Field(0, ge=0, description="Clients trained side by side; 0: one per CPU core (one on a GPU).")
    clients: int = Field(0, ge=0, description="Number of virtual clients, instead of a [clients] table.")
    ranks: tuple[int, ...] = Field((), description="Ranks of the virtual clients, in turn.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Chance that a client fails in a round, seeded.")
    offline: float = Field(0.0, ge=0, lt=1, description="Chance that a client is offline in a round, seeded.")
    stragglers: float = Field(0.0, ge=0, lt=1, description="Chance that a client answers late in a round, seeded.")
    straggler_delay_s: float = Field(5.0, gt=0, description="Seconds a straggler waits before it answers.")
    attackers: int = Field(0, ge=0, description="Clients that lie, drawn from the seed.")
    attack_scale: float = Field(-10.0, ge=-1e6, le=1e6, description="Attackers multiply what they learned by this.")
    persistent_ledger: bool = Field(
        False,
        description="Count what clients spend of their privacy over all experiments of this home "
        "(--persistent-ledger); otherwise a budget counts one run only.",
    )
    client_cpus: int = Field(1, ge=1, description="CPUs per client (ray driver).")
    client_gpus: float = Field(0.0, ge=0, description="GPUs per client (ray driver).")


class Experiment(Section):
    """Everything that defines a run."""

    name: Name = Field("experiment", description="Short name; part of the run's id.")
    seed: int = Field(0, ge=0, lt=2**63, description="Every random choice of the run derives from it.")
    task: PluginChoice = Field(description="Data, base model, loss and evaluation.")
    adapter: AdapterChoice = Field(
        default_factory=AdapterChoice,
        description="How an adapter is attached and trained.",
    )
    strategy: StrategyChoice = Field(default_factory=StrategyChoice, description="How the server merges adapters.")
    robust: RobustChoice = Field(
        default_factory=RobustChoice, description="What is done against bad clients before merging."
    )
    server_optimizer: OptimizerChoice = Field(
        default_factory=OptimizerChoice, description="What the server does with the merged update."
    )
    clients: dict[Name, ClientSettings] = Field(
        default_factory=dict, description="Simulated clients by name: [clients.NAME]."
    )
    training: TrainingSettings = Field(default_factory=TrainingSettings, description="Local training.")
    federation: FederationSettings = Field(default_factory=FederationSettings, description="Rounds and cohorts.")
    privacy: PrivacySettings = Field(default_factory=PrivacySettings, description="Differential privacy.")
    secure_aggregation: SecureSettings = Field(default_factory=SecureSettings, description="Masked uploads.")
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings, description="Evaluation.")
    simulation: SimulationSettings = Field(default_factory=SimulationSettings, description="Simulation.")

    @classmethod
    def parse(cls, table: Mapping[str, Any]) -> Experiment:
        """Build an experiment from nested tables; under privacy some defaults differ.

        Raises
        ------
        ConfigurationError
            With every unknown key, wrong value and contradiction at once.
        """
        try:
            experiment = cls.model_validate(with_private_defaults(table))
        except ValidationError as error:
            raise ConfigurationError(explain(error, "experiment", cls)) from None
        if problems := experiment.contradictions():
            raise ConfigurationError(problems)
        return experiment

    @classmethod
    def from_json(cls, text: str) -> Experiment:
        """Read what ``model_dump_json`` wrote."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ConfigurationError(explain(error, "experiment", cls)) from None

    def contradictions(self) -> list[str]:
        """List settings that exclude one another, in sentences."""
        training, federation, simulation = self.training, self.federation, self.simulation
        found = []
        if training.base_precision == "4bit" and training.global_adapter == "merged":
            found.append(
                'training.base_precision "4bit" cannot be merged into; set training.global_adapter = "unmerged"'
            )
        if federation.cohort_size is not None and federation.cohort_fraction != 1.0:
            found.append("federation.cohort_size and federation.cohort_fraction exclude one another; set one")
        if simulation.clients and self.clients:
            found.append("simulation.clients and the [clients] table exclude one another; use one")
        if not simulation.clients and not self.clients:
            found.append("there are no clients; add a [clients.NAME] table or set simulation.clients")
        if simulation.ranks and not simulation.clients:
            found.append("simulation.ranks belongs to simulation.clients; give each [clients.NAME] its rank instead")
        if any(rank < 1 for rank in simulation.ranks):
            found.append(f"simulation.ranks holds {min(simulation.ranks)}; ranks are at least 1")
        pooled = {name for client in self.clients.values() for name in client.pool}
        if unknown := pooled - set(self.clients):
            found.append(f"a client's pool names unknown clients: {', '.join(sorted(unknown))}")
        if nested := [name for name in pooled & set(self.clients) if self.clients[name].pool]:
            found.append(f"a client's pool names clients that are pools themselves: {', '.join(sorted(nested))}")
        if self.clients and not any(client.trains for client in self.clients.values()):
            found.append("no client trains; set trains = true for at least one")
        trained = simulation.clients or sum(client.trains for client in self.clients.values())
        if simulation.attackers > trained:
            found.append(
                f"simulation.attackers = {simulation.attackers} are more than the {trained} clients that train"
            )
        if federation.patience and not self.evaluation.on:
            found.append('federation.patience needs evaluations; set evaluation.on = ["clients"]')
        return found + private_contradictions(self)

    def simulated_clients(self) -> dict[str, ClientSettings]:
        """List the clients of a simulation by name, virtual ones made up, in the order of their names."""
        if not self.simulation.clients:
            return dict(sorted(self.clients.items()))
        width = len(str(self.simulation.clients))
        ranks = self.simulation.ranks or (None,)
        return {
            f"client-{i + 1:0{width}d}": ClientSettings(rank=ranks[i % len(ranks)])
            for i in range(self.simulation.clients)
        }


def differences(old: Experiment, new: Experiment) -> list[str]:
    """List the settings in which two experiments differ, as ``key: old -> new``."""
    before, after = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    keys = sorted(set(before) | set(after))
    return [
        f"{key}: {before.get(key, 'not set')} -> {after.get(key, 'not set')}"
        for key in keys
        if before.get(key) != after.get(key)
    ]


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat
