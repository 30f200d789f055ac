"""Numbers of a logging interval over micro-batches and ranks, and the log for `spo report`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState

from spo_ext import LossStats
from spo_ext.durable import cut_unfinished_line, write_text
from spo_ext.trainer.config import SPOConfig
from spo_ext.trainer.feed import MicroBatch


class Meter:
    """Means, and the extremes that TRL logs too, and what adds up over the whole run.

    Sums stay on the device until `drain`, so that no step waits for them.

    totals: by name, of all ranks and intervals; part of a checkpoint.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._plain: dict[str, tuple[float, int]] = {}
        self._most: dict[str, Tensor] = {}
        self._spent: dict[str, float] = {}
        self.totals: dict[str, float] = {}

    def add(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """All of these numbers, or those at `where` (bool), with equal weight."""
        values = values.detach().double()
        if where is None:
            new = torch.stack([values.sum(), values.new_full((), values.numel())])
        else:  # by a mask: to index by it would wait for the device
            new = torch.stack([values.where(where, 0.0).sum(), where.double().sum()])
        self._sums[name] = self._sums[name] + new if name in self._sums else new

    def most(self, name: str, values: Tensor, where: Tensor) -> None:
        """The largest of the numbers at `where` (bool) in the interval; none there is 0."""
        new = values.detach().double().where(where, 0.0).max()
        self._most[name] = torch.maximum(self._most[name], new) if name in self._most else new

    def put(self, values: Mapping[str, float]) -> None:
        """One number each, of this rank, averaged over the steps and ranks where it is not nan."""
        for name, value in values.items():
            if math.isnan(value):
                continue
            total, count = self._plain.get(name, (0.0, 0))
            self._plain[name] = (total + value, count + 1)

    def spend(self, values: Mapping[str, float]) -> None:
        """Numbers of this rank that add up, such as tokens and seconds."""
        for name, value in values.items():
            self._spent[name] = self._spent.get(name, 0.0) + value

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all ranks since the last call, and the totals. Every rank calls it."""
        pairs: dict[str, Sequence[float]] = {n: value.tolist() for n, value in self._sums.items()}
        most = {name: float(value) for name, value in self._most.items()}
        mine = (pairs | self._plain, most, self._spent)
        self._sums, self._plain, self._most, self._spent = {}, {}, {}, {}
        gathered = [mine]
        if accelerator.num_processes > 1:
            gathered = [mine] * accelerator.num_processes
            torch.distributed.all_gather_object(gathered, mine)
        held: dict[str, list[float]] = {}
        largest: dict[str, float] = {}
        for means, extremes, spent in gathered:
            for name, (total, count) in means.items():
                before = held.setdefault(name, [0.0, 0.0])
                before[0] += total
                before[1] += count
            for name, value in extremes.items():
                largest[name] = max(value, largest.get(name, 0.0))
            for name, value in spent.items():
                self.totals[name] = self.totals.get(name, 0.0) + value
        found = {name: total / count for name, (total, count) in held.items() if count}
        return _derived(found) | largest | self.totals


def add_tokens(
    meter: Meter, logprobs: Tensor, ref_logprobs: Tensor, entropy: Tensor | None
) -> None:
    """Per token [N]: TRL's estimate of the KL divergence to the reference, and the entropy."""
    ratio = ref_logprobs - logprobs.detach()
    meter.add("kl", ratio.exp() - ratio - 1)
    if entropy is not None:
        meter.add("entropy", entropy)


def add_loss(meter: Meter, stats: LossStats, rewards: Tensor, floor: float) -> None:
    """Per sequence [S]: what SPO's own series rest on; floor is the lowest reward of the step."""
    meter.add("store/length", stats.num_tokens)
    meter.add("spo/log_ratio", stats.log_ratio)
    meter.add("spo/terminal_q", stats.terminal_q)
    meter.add("spo/q0", stats.q0)
    meter.add("spo/q0_at_floor", (stats.q0 <= floor).float())
    meter.add("spo/clipped", (stats.terminal_q > 0).float())
    if stats.residual is not None:
        meter.add("spo/residual", stats.residual)
        meter.add("spo/residual_abs", stats.residual.abs())
    finite = torch.isfinite(rewards) & torch.isfinite(stats.terminal_q)
    q, r = stats.terminal_q.double(), rewards.double()
    for name, values in (("q", q), ("r", r), ("qq", q * q), ("qr", q * r), ("rr", r * r)):
        meter.add(f"_{name}", values, where=finite)


def add_turns(meter: Meter, batch: MicroBatch) -> None:
    """Of all rows: how often the policy spoke, and what it was given on the way."""
    meter.add("store/turns", batch.turns)
    meter.add("_paid", batch.paid)


_BOUND = 0.1


def add_mismatch(meter: Meter, batch: MicroBatch, logprobs: Tensor) -> None:
    """How far the trainer is from the sampler at the version that sampled, per token in nats.

    At a step that begins a version the policy is the one that was published, so that log pi of its
    fresh rows should be the sampler's own: TRL's sampling_logp_difference, the KL divergence from
    sampler to trainer (k3), and the share of tokens that are more than 0.1 apart.
    """
    fresh = torch.repeat_interleave(batch.fresh, batch.cu_seqlens.diff())
    behaviour = batch.behaviour_logprobs
    where = (fresh & ~behaviour.isnan()).to(logprobs.device)
    if not bool(fresh.any()):
        return
    ratio = torch.where(where, logprobs.detach() - behaviour.to(logprobs), 0.0)
    meter.add("sampling/sampling_logp_difference/mean", ratio.abs(), where)
    meter.most("sampling/sampling_logp_difference/max", ratio.abs(), where)
    meter.add("sampling/kl", ratio.exp() - ratio - 1, where)
    meter.add("sampling/share_above_0.1", (ratio.abs() > _BOUND).double(), where)


def add_online(meter: Meter, batch: MicroBatch) -> None:
    """Of the rows that the policy of this run wrote: what `Health` watches."""
    online, lengths = batch.online, batch.cu_seqlens.diff()
    meter.add("store/online_length", lengths, where=online)
    meter.add("store/online_truncated", batch.truncated, where=online)
    meter.add("store/online_reward", batch.rewards, where=online & batch.rewards.isfinite())
    sums = batch.behaviour_sums
    known = online & sums.isfinite()
    meter.add("_surprise", -sums, where=known)
    meter.add("_surprise_tokens", lengths, where=known)


def _derived(means: dict[str, float]) -> dict[str, float]:
    """Second moments become what people read; names with an underscore go."""
    q, r = means.get("_q", 0.0), means.get("_r", 0.0)
    spread = means.get("_qq", 0.0) - q * q
    if spread > 1e-12:
        # The slope of r on Q_T: 1 if a unit of Q_T is worth a unit of reward.
        means["spo/calibration"] = (means["_qr"] - q * r) / spread
    if "_surprise" in means:
        # A mean over tokens; -log-prob of what a policy wrote is an unbiased estimate of entropy.
        means["store/behaviour_entropy"] = means["_surprise"] / means["_surprise_tokens"]
    if means.get("_paid"):
        means["store/token_rewards"] = means["_paid"]
    if "_rr" in means:
        means["store/reward"] = r
        means["store/reward_std"] = max(0.0, means["_rr"] - r * r) ** 0.5
    return {name: value for name, value in means.items() if not name.startswith("_")}


class RunLog(TrainerCallback):
    """spo_config.json, and metrics.jsonl with one object a log call.

    A resumed run appends; where two lines have the same step, the later one counts.

    spend: called at the end of every step, before it is logged.
    """

    def __init__(self, config: SPOConfig, spend: Callable[[], None]) -> None:
        self._config = config
        self._spend = spend
        self._folder = Path(str(config.output_dir))

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            settings = json.dumps(self._settings(), indent=2, default=str)
            write_text(self._folder / "spo_config.json", settings + "\n")
            cut_unfinished_line(self._folder / "metrics.jsonl")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._spend()

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            line = json.dumps({"step": state.global_step, **logs})
            with (self._folder / "metrics.jsonl").open("a") as file:
                file.write(line + "\n")

    def _settings(self) -> dict[str, Any]:
        found: dict[str, Any] = self._config.to_dict()
        return found


class _Progress(ProgressCallback):
    """Shows loss and reward in the bar, not all of the forty numbers of metrics.jsonl above it."""

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if self.training_bar is not None:
            names = ("loss", "reward", "store/online_reward", "eval_pass@1")
            self.training_bar.set_postfix({n: f"{logs[n]:.3g}" for n in names if n in logs})


def show_progress(trainer: Trainer) -> None:
    """Replaces the bar of transformers, if there is one."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(_Progress())
