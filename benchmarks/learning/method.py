"""A method as plain settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from spo_ext.losses import Objective

Family = Literal["spo", "ppo", "grpo", "sft", "expert"]
Baseline = Literal[
    "group",
    "leave_one_out",
    "online_group",
    "natural",
    "distinct",
    "running",
    "reference",
    "smoothed",
]
Offline = Literal["none", "diverse", "near", "own"]
Replay = Literal["uniform", "mixed"]


@dataclass(frozen=True)
class Method:
    """How a policy is improved; a setting says on what.

    family:
        "spo": `spo_ext.loss`. "ppo": clipped ratios, a value network of its own, kl in the reward.
        "grpo": clipped ratios, rewards normalised in the group, kl in the loss. "sft": likelihood
        of the offline solutions. "expert": likelihood of its own correct programs.
    SPO:
        objective, beta: of `spo_ext.loss`. final_beta: beta goes there in equal ratios.
        baseline: the prompt value Q_0. "group", "leave_one_out" and "running" are the estimators
            group, leave_one_out and ema of `spo_ext.prompt_value`; "online_group" leaves offline
            rows out of the group's mean; "natural" is a mean in which passed and failed programs
            count as often as the policy wrote them, however many were drawn; with "distinct" equal
            programs of a group count as one, in it and in the loss; "reference" is Monte Carlo
            before training, "smoothed" the same with half a success and half a failure more.
        value_beta: of baselines that sample the reference, as in A*-PO; None for that of the loss.
        taper: failures fade by `spo_ext.taper_weights`.
        rare_power: a group weighs (1 - its pass rate) to this power.
        per_token: a program weighs the batch's mean length over its own.
        straight_from: a residual larger than this has the gradient of one as large, None for never
            (the loss of Huber); in reward units, those of beta times nats.
    Data:
        offline: correct programs in all styles alike ("diverse") or in those that the reference
            prefers ("near"), or all that an earlier run of the method "group" sampled ("own").
        offline_share: of the rows of a batch.
        temperature: of the sampled programs and their behaviour log-probabilities; evaluations are
            always at 1.
        distinct: the sampled programs of a prompt are drawn without replacement, see
            `sample_distinct`; ppo and grpo then take them for draws from the policy.
        guided_share: of the sampled programs of a prompt, those that begin as an offline one does.
        updates: per sampled batch. SPO draws a batch from the store for each; ppo and grpo go over
            the sampled batch again.
        replay: after the first update, which is of all that was sampled ("uniform"), or of problems
            with correct and wrong programs ("mixed"): replay_size of each, half of them correct.
            Problems are drawn by (1 - their pass rate so far) to the power replay_rare.
        max_age: SPO draws from so many sampled batches at most, None from all.
        sync_every: batches sampled before the policy is looked at again.
    A supervised start:
        sft_share: of all steps, on offline programs at sft_learning_rate. reset_reference: the
            result is the reference of the rest. sharpen: the temperature whose policy it is then
            made into, by dividing the head.
    Controls:
        kl: price of a nat, as beta is. clip: of the ratio. gae_lambda: of ppo's advantages.
        decoupled: the ratio is to the policy before the batch's first update, and a token counts by
            that policy's truncated ratio to the one that wrote it (Hilton et al. 2022).
        offline_weight: of the likelihood of offline rows, beside the loss of sampled ones.
    """

    name: str
    family: Family = "spo"
    learning_rate: float = 3e-4
    objective: Objective = "group"
    beta: float = 0.03
    final_beta: float | None = None
    baseline: Baseline = "group"
    value_beta: float | None = None
    taper: bool = True
    rare_power: float = 0.0
    per_token: bool = False
    straight_from: float | None = None
    offline: Offline = "none"
    offline_share: float = 0.0
    temperature: float = 1.0
    distinct: bool = False
    guided_share: float = 0.0
    updates: int = 1
    replay: Replay = "uniform"
    replay_size: int = 8
    replay_rare: float = 0.0
    max_age: int | None = None
    sync_every: int = 1
    sft_share: float = 0.0
    sft_learning_rate: float = 1e-3
    reset_reference: bool = True
    sharpen: float = 1.0
    kl: float = 0.05
    clip: float = 0.2
    gae_lambda: float = 1.0
    decoupled: bool = False
    value_learning_rate: float = 1e-3
    offline_weight: float = 0.0

    def __post_init__(self) -> None:
        choices = {"family": Family, "baseline": Baseline, "offline": Offline, "replay": Replay}
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                self._refuse(name, f"one of {', '.join(get_args(allowed))}")
        if self.objective not in ("squared", "cross_entropy", "advantage", "group"):
            self._refuse("objective", "squared, cross_entropy, advantage or group")
        for name in ("offline_share", "guided_share", "sft_share"):
            if not 0 <= getattr(self, name) <= 1:
                self._refuse(name, "in [0, 1]")
        for name in ("temperature", "sharpen"):
            if getattr(self, name) <= 0:
                self._refuse(name, "greater than 0")
        if self.straight_from is not None and self.straight_from <= 0:
            self._refuse("straight_from", "greater than 0, or None")
        if self.straight_from is not None and self.objective not in ("squared", "group"):
            self._refuse("straight_from", "None where the loss is not the square of a residual")
        for name in ("updates", "sync_every", "replay_size"):
            if getattr(self, name) < 1:
                self._refuse(name, "at least 1")
        if self.offline == "none" and (self.needs_offline or self.offline_weight):
            self._refuse("offline", "diverse, near or own where offline programs are used")
        if self.objective == "group" and self.baseline in ("running", "reference", "smoothed"):
            words = "group, leave_one_out, online_group, natural or distinct for objective group"
            self._refuse("baseline", words)
        if self.family == "sft" and self.offline_share != 1:
            self._refuse("offline_share", "1 for sft")
        if self.family == "spo" and self.offline_share == 1 and not self.estimates_q0:
            self._refuse("baseline", "reference or smoothed where no group is sampled")

    def beta_at(self, share: float) -> float:
        """share: of the training that is done, in [0, 1]."""
        end = self.beta if self.final_beta is None else self.final_beta
        return float(self.beta * (end / self.beta) ** share)

    @property
    def needs_offline(self) -> bool:
        return bool(self.offline_share or self.guided_share or self.sft_share)

    @property
    def estimates_q0(self) -> bool:
        """Whether samples of the reference are drawn before training."""
        return self.family == "spo" and self.baseline in ("reference", "smoothed", "running")

    @property
    def draws_again(self) -> bool:
        """Whether every update draws a batch of its own."""
        return self.family not in ("ppo", "grpo")

    @property
    def softness(self) -> float | None:
        """Reward per nat of KL at the method's optimum, None if it has none.

        grpo has a different one for every problem: its rewards are divided by their deviation.
        """
        return {"spo": self.beta, "ppo": self.kl}.get(self.family)

    def _refuse(self, name: str, wanted: str) -> None:
        got = getattr(self, name)
        raise ValueError(f"method {self.name}: {name} must be {wanted}, got {got!r}")
