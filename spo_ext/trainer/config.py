"""The settings of `SPOTrainer`, beside those of transformers.TrainingArguments."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from spo_ext.checks import check_integer, check_name, check_one_of, number, refuse
from spo_ext.losses import Objective
from spo_ext.shown import hide_passwords
from spo_ext.store import SamplerConfig, Stratum
from spo_ext.store.records import Split

# The only value that is taken, and why.
_ONLY: dict[str, tuple[object, str]] = {
    "auto_find_batch_size": (False, "a smaller batch would cut groups apart"),
    "label_smoothing_factor": (0.0, "a completion has a reward, no labels"),
    "neftune_noise_alpha": (None, "the reference has no such noise, so it would count as learned"),
    "train_sampling_strategy": ("random", "the store draws: see mixture and strata"),
    "use_liger_kernel": (False, "the loss is computed without logits already"),
    "bf16_full_eval": (False, "evaluation samples in the precision of training: see bf16"),
    "fp16_full_eval": (False, "evaluation samples in the precision of training: see fp16"),
}


def refuse_unused(arguments: TrainingArguments) -> None:
    """Raises ValueError for a setting that would be ignored, or break the loss."""
    for name, (only, why) in _ONLY.items():
        value = getattr(arguments, name)
        if value != only:
            refuse("SPOConfig", name, f"{only!r} ({why})", value)


_OBJECTIVES = ("squared", "cross_entropy", "group", "advantage")
_REFERENCES = ("auto", "model", "adapter", "cached", "behaviour")
IMPORTANCE_SAMPLING = (
    "none",
    "token_truncate",
    "token_mask",
    "sequence_truncate",
    "sequence_mask",
)
_NEED_Q0 = ("squared", "cross_entropy", "advantage")


_OLD_NAMES = {"samples_per_prompt": "num_generations", "max_age": "max_offpolicy_steps"}


def _field(default: Any, words: str) -> Any:
    return field(default=default, metadata={"help": words})


@dataclass
class SPOConfig(TrainingArguments):
    """Everything of `transformers.TrainingArguments`, and what is below.

    An optimiser step learns from per_device_train_batch_size x gradient_accumulation_steps x
    processes trajectories of the store. max_steps must be given.

    The defaults of objective, beta, taper, sync_every, replay_ratio and rarity are the recipe that
    did best in docs/learning.md: online batches, one step each, from a model that was trained on
    stored solutions first (examples/supervised_start.py), where there are any.
    """

    store: str | None = _field(None, "trajectory store: a file, or postgresql://user@host/database")
    store_retry_seconds: float = _field(
        300.0, "how long a database that went away, as in a restart, is asked again"
    )
    run: str | None = _field(None, "name of this run in the store (default: that of output_dir)")
    objective: str = _field("group", "loss: squared, cross_entropy, group or advantage")
    beta: float = _field(0.1, "softness, reward per nat of log-ratio to the reference")
    leave_one_out: bool = _field(False, "for group: the baseline of a row leaves the row out")
    temperature: float = _field(1.0, "of sampling and of all log-probabilities")
    top_p: float = _field(1.0, "of sampling; q0 is looked up by it")
    learning_rate: float = _field(1e-6, "peak learning rate")
    taper: bool = _field(
        True,
        "weight failures by min(1, pi / behaviour), where that is known: without it, policies that "
        "lag behind harm (docs/learning.md)",
    )
    taper_below: float | None = _field(
        None, "what a failure is: a reward below it (default: the middle of reward_range)"
    )
    rarity: float = _field(
        0.0,
        "weight groups by (1 - share of them that did not fail) to this power: 2 gains pass@10 and "
        "costs pass@1",
    )

    mixture: str | dict[str, float] = _field(
        "online", "online, offline, half-online, or a fraction for each pool"
    )
    group_size: int = _field(4, "trajectories of a prompt drawn together")
    mixed_groups: bool = _field(
        False,
        "a group has rows of every pool of the mixture, online and others, and for objective group "
        "its baseline is that of the online ones; smaller where a prompt has fewer rows (default: "
        "each group is of one pool)",
    )
    max_offpolicy_steps: int | None = _field(
        None, "draw online only from so many policy versions back"
    )
    replay_versions: int | None = _field(
        None,
        "a replay buffer in place of max_offpolicy_steps: draw online uniformly, used or not, from "
        "what the last so many policy versions wrote; replay_ratio says how often on average",
    )
    max_tokens: int | None = _field(
        None,
        "most tokens that a trajectory to learn from may have, its prompt and every context "
        "counted; longer ones are drawn but left out",
    )
    max_uses: int | None = _field(None, "draw a trajectory at most so often")
    strata: list[list[float]] | None = _field(
        None, "least fractions by reward: [[fraction, low, high], ...]"
    )

    rollouts: str = _field("embedded", "embedded, external (spo rollout elsewhere) or none")
    sync_every: int = _field(1, "steps between publications of the behaviour policy")
    replay_ratio: float = _field(
        1.0,
        "embedded rollouts: steps for each batch of completions sampled, at most sync_every",
    )
    num_generations: int = _field(4, "embedded rollouts: completions of each prompt")
    rollout_batch_size: int = _field(16, "embedded rollouts: prompts generated at once")
    max_new_tokens: int = _field(256, "embedded rollouts: longest completion")
    reward: str | list[str] = field(
        default="tests",
        metadata={
            "help": "tests, answer, or a dotted path to a reward function of TRL's form; "
            "of several the sum",
            "repeat": True,
        },
    )
    reward_funcs: str | list[str] | None = field(
        default=None, metadata={"help": "TRL's name for reward", "repeat": True}
    )
    reward_weights: list[float] | None = _field(
        None, "of each reward in the sum (default: 1); one that gives None counts as 0"
    )
    wait_seconds: float = _field(3600.0, "external rollouts: how long to wait for trajectories")

    reference: str = _field(
        "auto",
        "model (a frozen copy of the policy as it starts, adapters included), adapter (the policy "
        "without its adapters, trained before or not), cached, behaviour (whoever wrote the "
        "trajectory, by the log-probabilities stored with it: no reference in memory), or auto: "
        "the policy as it starts, which is adapter where its adapters add nothing yet, and else "
        "model",
    )
    reference_fingerprint: str | None = _field(
        None, "which cached reference, as spo score prints it"
    )
    q0: str = _field(
        "stored",
        "Q_0 of objectives that need it: stored (with the prompts, or from q0_samples), or "
        "group_soft: q0_beta log mean exp(return / q0_beta) over the group; with squared and "
        "reference behaviour that is OAPL (arXiv 2602.19362)",
    )
    q0_beta: float | None = _field(None, "softness of group_soft (default: beta)")
    importance_sampling_mode: str = _field(
        "none",
        "what makes up for a sampler that is not the policy, by pi / behaviour, with "
        "importance_sampling_cap: token_truncate, token_mask, sequence_truncate or sequence_mask",
    )
    importance_sampling_cap: float = _field(
        2.0, "truncate: no larger weight than this; mask: weight 0 for a larger ratio"
    )
    importance_sampling_baseline: bool = _field(
        False,
        "for group: in the mean of its group a row counts min(1, pi / behaviour), where that is "
        "known; take it where the policies that write lag behind by tens of steps "
        "(docs/learning.md)",
    )
    q0_samples: int = _field(
        0, "samples of the reference for the value of a prompt that has none; 0: it must have one"
    )
    reward_range: list[float] = field(
        default_factory=lambda: [0.0, 1.0],
        metadata={"help": "worst and best reward; half a sample of each smooths estimates of q0"},
    )

    publish_to: str | None = _field(None, "folder for published policies")
    publish_keep: int = _field(2, "published policies to keep")
    publish_url: str | None = _field(None, "vLLM server that takes up each published policy")

    router_aux_loss_coef: float | None = _field(
        None,
        "weight of the load-balancing loss of a mixture of experts (default: that of the model's "
        "config; 0: without)",
    )
    packing: str = _field(
        "auto",
        "padded, packed, shared (packed, and completions of one prompt behind one copy of it), or "
        "auto: the last of these that the model allows",
    )
    disable_dropout: bool = _field(
        True,
        "train without dropout, also that of LoRA: the reference has none, so it would count as "
        "learned",
    )
    max_dropped_mass: float = _field(
        0.0, "probability that the gradient of a token may leave out (see token_logprobs)"
    )
    workspace_mib: int | None = _field(
        None, "scratch memory of the head's kernels (default: 64, on CUDA 256)"
    )
    log_entropy: bool | None = _field(
        None,
        "log the entropy of tokens (default: unless the head is frozen: it doubles that pass)",
    )
    health_checks: bool = _field(
        True, "warn of collapse, explosion and drift, from what is logged (spo_ext.trainer.health)"
    )

    eval_split: Split = _field("dev", "prompts that evaluation samples: train, dev or test")
    eval_prompts: int = _field(64, "how many of them")
    eval_samples: int = _field(10, "completions of each")
    eval_k: list[int] = field(default_factory=lambda: [1, 10], metadata={"help": "k of pass@k"})
    eval_success: float = _field(1.0, "a completion with this reward or more counts as passed")

    samples_per_prompt: int | None = _field(None, "the old name of num_generations")
    max_age: int | None = _field(None, "the old name of max_offpolicy_steps")

    def __post_init__(self) -> None:
        self.remove_unused_columns = False  # batches come from the store
        if self.store is None:
            refuse("SPOConfig", "store", "a file or a database", None)
        if self.max_steps <= 0:
            refuse("SPOConfig", "max_steps", "a number of optimiser steps > 0", self.max_steps)
        self._take_old_names()
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.run is None:
            self.run = Path(str(self.output_dir)).name
        self._check()
        refuse_unused(self)

    def _take_old_names(self) -> None:
        for old, new in _OLD_NAMES.items():
            value = getattr(self, old)
            if value is not None:
                text = f"SPOConfig: {old} is called {new} now; the old name goes with version 0.3"
                warnings.warn(text, FutureWarning, stacklevel=4)
                setattr(self, new, value)
                setattr(self, old, None)

    def _check(self) -> None:
        owner = "SPOConfig"
        check_name(owner, "run", self.run)
        check_one_of(owner, "objective", self.objective, _OBJECTIVES)
        check_one_of(owner, "rollouts", self.rollouts, ("embedded", "external", "none"))
        check_one_of(owner, "reference", self.reference, _REFERENCES)
        self._check_behaviour(owner)
        check_one_of(owner, "packing", self.packing, ("auto", "shared", "packed", "padded"))
        number(owner, "beta", self.beta, above=0.0)
        number(owner, "temperature", self.temperature, above=0.0)
        number(owner, "top_p", self.top_p, above=0.0, at_most=1.0)
        for name in ("sync_every", "num_generations", "rollout_batch_size", "max_new_tokens"):
            check_integer(owner, name, getattr(self, name), 1)
        number(owner, "store_retry_seconds", self.store_retry_seconds, at_least=0.0)
        number(owner, "replay_ratio", self.replay_ratio, at_least=1.0, at_most=self.sync_every)
        if self.replay_ratio > 1 and self.rollouts != "embedded":
            expected = f"1 for rollouts {self.rollouts!r}, which others write"
            refuse(owner, "replay_ratio", expected, self.replay_ratio)
        check_integer(owner, "q0_samples", self.q0_samples, 0)
        if self.max_tokens is not None:
            check_integer(owner, "max_tokens", self.max_tokens, 2)
        if len(self.reward_range) != 2 or not self.reward_range[0] < self.reward_range[1]:
            refuse(owner, "reward_range", "[worst, best] with worst < best", self.reward_range)
        if self.reward_funcs is not None and self.reward != "tests":
            refuse(owner, "reward_funcs", "left out with reward, which it is", self.reward_funcs)
        for weight in self.reward_weights or ():
            number(owner, "reward_weights", weight)
        number(owner, "rarity", self.rarity, at_least=0.0)
        if self.router_aux_loss_coef is not None:
            number(owner, "router_aux_loss_coef", self.router_aux_loss_coef, at_least=0.0)
        if self.rarity and self.group_size < 2:
            refuse(owner, "group_size", "at least 2 for a rarity > 0", self.group_size)
        if self.taper_below is not None:
            number(owner, "taper_below", self.taper_below)
        if self.per_device_train_batch_size % self.group_size:
            refuse(
                owner,
                "per_device_train_batch_size",
                f"a multiple of group_size {self.group_size} (a group's baseline is taken within "
                "a micro-batch)",
                self.per_device_train_batch_size,
            )
        if self.objective == "group" and self.group_size < 2:
            refuse(owner, "group_size", "at least 2 for objective group", self.group_size)
        if self.mixed_groups and self.leave_one_out:
            refuse(owner, "leave_one_out", "False with mixed_groups", self.leave_one_out)
        if self.importance_sampling_baseline and (self.objective != "group" or self.leave_one_out):
            expected = "False for another objective than group, and with leave_one_out"
            refuse(owner, "importance_sampling_baseline", expected, True)
        online = "online" in self.sampler_config().fractions
        if online == (self.rollouts == "none"):
            expected = "embedded or external for" if online else "none for"
            refuse(owner, "rollouts", f"{expected} mixture {self.mixture!r}", self.rollouts)
        if self.eval_strategy != "no" and max(self.eval_k, default=0) > self.eval_samples:
            refuse(owner, "eval_k", f"at most eval_samples {self.eval_samples}", self.eval_k)
        if self.n_gpu > 1:
            refuse(
                owner,
                "n_gpu",
                "1 a process: start it with torchrun or accelerate launch",
                self.n_gpu,
            )

    def _check_behaviour(self, owner: str) -> None:
        check_one_of(owner, "q0", self.q0, ("stored", "group_soft"))
        if self.q0 == "group_soft":
            if self.objective not in _NEED_Q0:
                refuse(owner, "q0", f"stored for objective {self.objective!r}", self.q0)
            if self.group_size < 2:
                refuse(owner, "group_size", "at least 2 for q0 group_soft", self.group_size)
            if self.q0_samples:
                refuse(owner, "q0_samples", "0 with q0 group_soft", self.q0_samples)
        elif self.q0_beta is not None:
            refuse(owner, "q0_beta", "left out without q0 group_soft", self.q0_beta)
        if self.q0_beta is not None:
            number(owner, "q0_beta", self.q0_beta, above=0.0)
        if self.reference == "behaviour":
            for name in ("q0_samples", "reference_fingerprint"):
                if getattr(self, name):
                    expected = "left out with reference behaviour, which is no model"
                    refuse(owner, name, expected, getattr(self, name))
            if self.top_p != 1:
                expected = "1 with reference behaviour: log-probabilities are those of all tokens"
                refuse(owner, "top_p", expected, self.top_p)
        check_one_of(
            owner, "importance_sampling_mode", self.importance_sampling_mode, IMPORTANCE_SAMPLING
        )
        number(owner, "importance_sampling_cap", self.importance_sampling_cap, at_least=1.0)

    @property
    def rewards(self) -> str | list[str]:
        """By either name."""
        return self.reward if self.reward_funcs is None else self.reward_funcs

    def to_dict(self) -> dict[str, Any]:
        """For logs and trackers: without the password of a database."""
        found: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
        return found | {"store": hide_passwords(str(self.store))}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.to_dict()})"

    __str__ = __repr__

    @property
    def needs_q0(self) -> bool:
        """Whether the store must have the value of every prompt."""
        return self.objective in _NEED_Q0 and self.q0 == "stored"

    @property
    def own_baseline(self) -> bool:
        """Whether a group's Q_0 is another mean than that of all its rows (`group_baseline`)."""
        other = self.mixed_groups or self.importance_sampling_baseline
        return other and self.objective == "group"

    @property
    def failure_below(self) -> float:
        """A completion with a lower reward has failed."""
        middle: float = sum(self.reward_range) / 2
        return middle if self.taper_below is None else self.taper_below

    @property
    def step_batch_size(self) -> int:
        """Trajectories of an optimiser step, over all processes."""
        here: int = self.per_device_train_batch_size * self.gradient_accumulation_steps
        processes: int = self.world_size
        return here * processes

    def sampler_config(self) -> SamplerConfig:
        """What the store draws, from these settings."""
        return SamplerConfig(
            batch_size=self.step_batch_size,
            mixture=self.mixture,
            run=self.run,
            seed=self.data_seed if self.data_seed is not None else self.seed,
            max_offpolicy_steps=self.max_offpolicy_steps,
            replay_versions=self.replay_versions,
            max_uses=self.max_uses,
            strata=[Stratum(*numbers) for numbers in self.strata or ()],
            group_size=self.group_size,
            mixed_groups=self.mixed_groups,
        )

    def loss_options(self) -> dict[str, Any]:
        """What `spo_ext.loss` gets in every micro-batch."""
        objective: Objective = self.objective  # type: ignore[assignment]
        if self.own_baseline:
            objective = "squared"  # which group is, with a Q_0 that the loss takes itself
        options: dict[str, Any] = {"beta": self.beta, "objective": objective, "reduction": "sum"}
        return options | ({"leave_one_out": True} if self.leave_one_out else {})
