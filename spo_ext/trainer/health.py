"""Tells from the logged numbers when training goes wrong, once per episode, with advice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

PATIENCE = 3  # numbers in a row that begin or end an episode: one alone may be noise
_CALM = 2 / 3  # of a limit: an episode ends below it, so that hovering around 1 is one episode


@dataclass(slots=True)
class Episode:
    """Counts of numbers in a row beyond the limit and well inside it; open while in trouble."""

    bad: int = 0
    calm: int = 0
    open: bool = False

    def begins(self, severity: float, patience: int = PATIENCE) -> bool:
        """severity: how far a number is on the way to its limit, 1 at it."""
        self.bad = self.bad + 1 if severity >= 1 else 0
        self.calm = self.calm + 1 if severity < _CALM else 0
        if self.calm >= PATIENCE:
            self.open = False
        if self.open or self.bad < patience:
            return False
        self.open = True
        return True


@dataclass(slots=True)
class Mean:
    """Of the numbers so far."""

    value: float = 0.0
    count: int = 0

    def add(self, value: float, least_rate: float = 0.0) -> None:
        """With least_rate a number weighs at least so much: a running mean that forgets."""
        self.count += 1
        self.value += max(least_rate, 1 / self.count) * (value - self.value)


ADVICE = {
    "nonfinite": (
        "The weights may be lost: continue from the last checkpoint, with a lower learning_rate "
        "and a max_grad_norm. Check the rewards, and the precision: fp16 lacks the range of bf16."
    ),
    "entropy": (
        "The policy hardly varies what it writes, and a group that agrees teaches nothing. Lower "
        "learning_rate, raise beta, draw larger groups (num_generations, group_size), mix in "
        "offline data (mixture), and continue from a checkpoint before the collapse."
    ),
    "residual": (
        "Lower learning_rate. Where batches hold old rows, sync more often (sync_every), leave out "
        "the oldest (max_offpolicy_steps) and let failures fade (taper). Look for outliers of the "
        "reward; where q0 is estimated, reward_range must be that of the rewards."
    ),
    "drift": (
        "Lower learning_rate. If the number falls, failures are pushed down without end: let them "
        "fade (taper) and sync more often (sync_every). If it rises, raise beta and read "
        "what is rewarded."
    ),
    "length": (
        "Read some: if an early end pays, correct the reward. Lower learning_rate, raise beta, mix "
        "in complete offline solutions (mixture)."
    ),
    "mismatch": (
        "Sample in the precision of training and at its temperature, with top_p 1, publish to all "
        "servers, and let them answer processed log-probabilities; what is left, "
        "importance_sampling_mode bounds."
    ),
    "truncated": (
        "If they need the room, raise max_new_tokens. Else check that prompts are in the format "
        "that the model knows, with its own end token, and that the reward wants an end; lower "
        "learning_rate, raise beta."
    ),
}


_START_INTERVALS = 5
_ENTROPY_SHARE = 0.1
_LENGTH_SHARE = 0.25
_EMPTY_TOKENS = 1.5
_TRUNCATED_SHARE = 0.95
_GAIN_SHARE = 0.1
_RESIDUAL_FACTOR = 4.0
_LEVEL_RATE = 0.1
_FAR_SPANS = 3.0
_MISMATCH = 0.05
_FINITE = ("loss", "grad_norm", "spo/log_ratio", "entropy")
# Of all that the policy has just written; then of the online rows of batches, old ones among them.
_ENTROPIES = ("rollout/entropy", "entropy", "store/behaviour_entropy")
_LENGTHS = {"completions/mean_length": "reward", "store/online_length": "store/online_reward"}
_CUTS = {"completions/clipped_ratio": "reward", "store/online_truncated": "store/online_reward"}

_Numbers = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class HealthWarning:
    """name: nonfinite, entropy, residual, drift, length, mismatch or truncated.

    message: numbers and advice.
    """

    name: str
    message: str


class Health:
    """Fed the numbers of every logging interval of a run; no tensor, no clock, no output.

    A warning comes in the third interval in a row beyond a limit, and again only after three in a
    row that are well inside it. The start of a run is the mean of the first five intervals inside
    the limits. The span of rewards is that of reward_range, or twice the largest standard deviation
    seen, which no narrower range can have.

    nonfinite
        loss, grad_norm, spo/log_ratio or entropy is nan or infinite: at once.
    entropy
        Below 1/10 of its start; runs that learn well end at 1/4 to 1/2 of it. It is that of fresh
        completions (rollout/entropy), and that of the rows of batches: `entropy`, or with a frozen
        head, which logs none, `store/behaviour_entropy`, of the policies that wrote them, which
        tells as late as they are old. Without any of them there is no check.
    residual
        spo/residual_abs above the span of rewards and above 4 times its running mean (a tenth of
        the way to each interval inside the limits), or above 3 spans. The residual of a policy near
        its reference is below one span. Not for cross_entropy, whose residual cannot exceed 1.
    drift
        |beta spo/log_ratio| above 3 spans of rewards: the optimum of the loss moves a completion by
        one at most. For cross_entropy, where failures may fall without end, instead spo/terminal_q
        above 3 beta: a probability of success of e^3.
    length
        Online completions, fresh ones (completions/mean_length) or those of batches
        (store/online_length), are on average below 1/4 of their length at the start, unless their
        reward has risen by a tenth of the span (learnt brevity), or below 1.5 tokens in any case.
    mismatch
        sampling/sampling_logp_difference/mean above 0.05: the sampler is another policy than the
        trainer at the same version.
    truncated
        95% of them reach the limit of tokens, unless their reward has risen likewise.

    Args:
        beta, objective: of the loss.
        reward_range: worst and best reward.
    """

    def __init__(self, beta: float, objective: str, reward_range: Sequence[float]) -> None:
        self._beta, self._logarithmic = beta, objective == "cross_entropy"
        self._span = reward_range[1] - reward_range[0]
        self._starts: dict[str, Mean] = {}
        self._level = Mean()
        self._episodes: dict[str, Episode] = {}
        self.count = 0

    def check(self, numbers: _Numbers) -> list[HealthWarning]:
        """What begins to go wrong in this interval; `count` has the warnings of the whole run.

        numbers: as SPOTrainer logs them; a check whose numbers are missing waits.
        """
        broken = [name for name in _FINITE if not math.isfinite(numbers.get(name, 0.0))]
        facts = f"{' and '.join(broken)} not finite"
        found = self._warn("nonfinite", "loss", float(bool(broken)), facts, patience=1)
        known = {name: value for name, value in numbers.items() if math.isfinite(value)}
        self._span = max(self._span, 2 * known.get("store/reward_std", 0.0))
        found += self._entropy(known) + self._residual(known) + self._drift(known)
        found += self._length(known) + self._truncated(known) + self._mismatch(known)
        for reward in _LENGTHS.values():
            self._add_start(reward, known)
        self.count += len(found)
        return found

    def state_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "count": self.count,
            "span": self._span,
            "level": asdict(self._level),
            "starts": {name: asdict(mean) for name, mean in self._starts.items()},
            "episodes": {name: asdict(episode) for name, episode in self._episodes.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues the run that `state_dict` was taken from."""
        self.count = state["count"]
        self._span = max(self._span, state["span"])
        self._level = Mean(**state["level"])
        self._starts = {name: Mean(**mean) for name, mean in state["starts"].items()}
        self._episodes = {name: Episode(**held) for name, held in state["episodes"].items()}

    def _entropy(self, known: _Numbers) -> list[HealthWarning]:
        found = []
        for name in _ENTROPIES:
            substitute = name == _ENTROPIES[-1] and "entropy" in known
            if name not in known or substitute:
                continue
            now, start = known[name], self._start(name)
            severity = _below(now, _ENTROPY_SHARE * start)
            if severity < 1:
                self._add_start(name, known)
            facts = f"collapse of entropy: {name} is {now:.3g} nats a token, {start:.3g} at first"
            found += self._warn("entropy", name, severity, facts)
        return found

    def _residual(self, known: _Numbers) -> list[HealthWarning]:
        name = "spo/residual_abs"
        if name not in known or self._logarithmic:
            return []
        now, level, limit = known[name], self._level, _FAR_SPANS * self._span
        facts = f"exploding residual: |Q_T - r| is {now:.3g} on average, {level.value:.3g} until "
        facts += f"now, and rewards span {self._span:.3g}"
        if level.count >= PATIENCE:
            limit = min(limit, max(self._span, _RESIDUAL_FACTOR * level.value))
        if now < limit:
            level.add(now, _LEVEL_RATE)
        return self._warn("residual", name, now / limit, facts)

    def _drift(self, known: _Numbers) -> list[HealthWarning]:
        name = "spo/terminal_q" if self._logarithmic else "spo/log_ratio"
        if name not in known:
            return []
        now, beta, span = known[name], self._beta, self._span
        facts = f"the policy leaves its reference: {name} is {now:.3g} on average, "
        if self._logarithmic:
            severity = max(0.0, now / (_FAR_SPANS * beta))
            facts += f"but Q_T / beta ({now / beta:.3g}) is the log of a probability"
        else:
            severity = abs(beta * now) / (_FAR_SPANS * span)
            facts += f"beta times it {beta * now:.3g}, but rewards span {span:.3g}, and no optimum "
            facts += "is farther away than that"
        return self._warn("drift", name, severity, facts)

    def _length(self, known: _Numbers) -> list[HealthWarning]:
        found = []
        for name, reward in _LENGTHS.items():
            if name not in known:
                continue
            now, start = known[name], self._start(name)
            limit = 0.0 if self._has_gained(reward, known) else _LENGTH_SHARE * start
            if start >= 2 * _EMPTY_TOKENS:
                limit = max(limit, _EMPTY_TOKENS)
            severity = _below(now, limit)
            if severity < 1:
                self._add_start(name, known)
            facts = f"collapse of length: {name} is {now:.3g} tokens, {start:.3g} at first"
            found += self._warn("length", name, severity, facts + self._rewards(reward, known))
        return found

    def _truncated(self, known: _Numbers) -> list[HealthWarning]:
        found = []
        for name, reward in _CUTS.items():
            if name not in known:
                continue
            severity = known[name] / _TRUNCATED_SHARE
            if self._has_gained(reward, known):
                severity = 0.0
            facts = f"completions do not end: {name} is {known[name]:.0%}"
            found += self._warn("truncated", name, severity, facts + self._rewards(reward, known))
        return found

    def _mismatch(self, known: _Numbers) -> list[HealthWarning]:
        name = "sampling/sampling_logp_difference/mean"
        if name not in known:
            return []
        facts = f"sampler and trainer differ: {name} is {known[name]:.3g} nats a token"
        return self._warn("mismatch", name, known[name] / _MISMATCH, facts)

    def _warn(
        self, name: str, series: str, severity: float, facts: str, patience: int = PATIENCE
    ) -> list[HealthWarning]:
        """Every series has episodes; while another of this name is in trouble, one is no news."""
        episodes = self._episodes
        known = any(held.open for key, held in episodes.items() if key.startswith(f"{name} "))
        begins = episodes.setdefault(f"{name} {series}", Episode()).begins(severity, patience)
        return [HealthWarning(name, f"{facts}. {ADVICE[name]}")] if begins and not known else []

    def _has_gained(self, reward: str, known: _Numbers) -> bool:
        if reward not in known or reward not in self._starts:
            return False
        return known[reward] > self._start(reward) + _GAIN_SHARE * self._span

    def _rewards(self, reward: str, known: _Numbers) -> str:
        now = known.get(reward)
        return "" if now is None else f", with rewards of {now:.3g} ({self._start(reward):.3g})"

    def _start(self, name: str) -> float:
        return self._starts[name].value if name in self._starts else 0.0

    def _add_start(self, name: str, known: _Numbers) -> None:
        mean = self._starts.setdefault(name, Mean()) if name in known else None
        if mean is not None and mean.count < _START_INTERVALS:
            mean.add(known[name])


def _below(now: float, limit: float) -> float:
    """limit / now, without dividing by zero; a limit of 0 is never reached."""
    return limit / max(now, 1e-9)
