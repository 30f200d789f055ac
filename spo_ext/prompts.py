"""The prompt value Q_0 = beta log E_{a ~ pi_ref}[exp(r / beta)], estimated from rewards.

Samples are put in the order of their prompts and summed prompt by prompt, each in one order: a
value depends on the samples of its prompt alone, to the last bit.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NoReturn, get_args, overload

import torch
from torch import Tensor

from spo_ext.arguments import integer, number

Estimator = Literal["reference", "group", "leave_one_out", "ema"]

_DECAY = 0.9


@overload
def prompt_value(
    rewards: Tensor,
    *,
    beta: float,
    groups: Tensor | None = ...,
    estimator: Estimator = ...,
    num_prompts: int | None = ...,
    smoothing: float = ...,
    reward_range: tuple[float, float] | None = ...,
    log_ratios: Tensor | None = ...,
    previous: Tensor | None = ...,
    decay: float = ...,
    return_n: Literal[False] = ...,
) -> Tensor: ...


@overload
def prompt_value(
    rewards: Tensor,
    *,
    beta: float,
    groups: Tensor | None = ...,
    estimator: Estimator = ...,
    num_prompts: int | None = ...,
    smoothing: float = ...,
    reward_range: tuple[float, float] | None = ...,
    log_ratios: Tensor | None = ...,
    previous: Tensor | None = ...,
    decay: float = ...,
    return_n: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def prompt_value(
    rewards: Tensor,
    *,
    beta: float,
    groups: Tensor | None = None,
    estimator: Estimator = "reference",
    num_prompts: int | None = None,
    smoothing: float = 0.0,
    reward_range: tuple[float, float] | None = None,
    log_ratios: Tensor | None = None,
    previous: Tensor | None = None,
    decay: float = _DECAY,
    return_n: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Q_0 of every prompt, in reward units.

    reference: beta log mean exp(r / beta) over samples of the reference policy (Monte Carlo). With
        smoothing s, s more samples of the best and s of the worst reward are counted in.
    group: mean of r - beta R over a prompt's samples from any policy, R = log pi - log pi_ref
    leave_one_out: the same over the other samples of the prompt, one value per sample. A sample
        alone has no other estimate than its own: its residual is 0.
    ema: decay * previous + (1 - decay) * group; a prompt without a sample keeps its value

    A prompt with 0 of n successes has no finite Monte-Carlo estimate of its value, or one at the
    floor of the rewards, from where a later success looks impossibly good: smoothing = 0.5 adds
    half a success and half a failure.

    The values are read: on CUDA the call waits for the device.

    Args:
        rewards: [P, n], or [M] with `groups`, or [M] of a single prompt. Finite or -inf.
        beta: softness, a finite number > 0.
        groups: [M] integers, the prompt of each sample, in [0, P).
        num_prompts: P, only with `groups`; default, from them.
        smoothing: s >= 0, only for "reference".
        reward_range: (worst, best) reward, only for "reference"; default, the extremes of
            `rewards`. No reward may lie outside; worst may be -inf.
        log_ratios: R of each sample, like rewards, in nats, finite; default 0 (samples of the
            reference). Not for "reference".
        previous: [P], finite, only for "ema".
        decay: in [0, 1), only for "ema".
        return_n: also return how many samples each value rests on.

    Returns:
        float32 [P] ([M] for "leave_one_out"), detached; with `return_n`, also int64 of the same
        shape.

    Raises:
        ValueError, TypeError: for an argument that the estimator does not use, a value outside the
            ranges above, or a "reference" prompt without a finite estimate.
    """
    if estimator not in get_args(Estimator):
        _refuse(f"estimator must be {_either(get_args(Estimator))}, got {estimator!r}")
    beta, smoothing, decay = (
        number("prompt_value", name, value)
        for name, value in (("beta", beta), ("smoothing", smoothing), ("decay", decay))
    )
    if not 0 < beta < math.inf:
        _refuse(f"beta must be a finite number > 0, got {beta}")
    _check_use(estimator, smoothing, reward_range, log_ratios, previous, decay)
    prompts = _Prompts.of(rewards, groups, num_prompts)
    if estimator == "reference":
        value = _monte_carlo(prompts, rewards, beta, smoothing, reward_range)
        return (value.float(), prompts.n) if return_n else value.float()
    gain, n = prompts.samples, prompts.n
    if log_ratios is not None:
        gain = gain - beta * prompts.beside_rewards(log_ratios, rewards)
    if estimator == "leave_one_out":
        value, n = prompts.leave_one_out(gain)
    else:
        value = prompts.over_each(gain, torch.add, 0.0) / n.clamp(min=1)
        if estimator == "ema":
            value = _blend(value, n, previous, decay)
        elif not n.all():
            _refuse("every prompt must have a sample, got one without")
    return (value.float(), n) if return_n else value.float()


def _refuse(problem: str) -> NoReturn:
    raise ValueError(f"prompt_value: {problem}")


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _check_use(
    estimator: str,
    smoothing: float,
    reward_range: tuple[float, float] | None,
    log_ratios: Tensor | None,
    previous: Tensor | None,
    decay: float,
) -> None:
    if not 0 <= smoothing < math.inf or (smoothing > 0 and estimator != "reference"):
        _refuse(f"smoothing must be >= 0, and 0 unless estimator is reference, got {smoothing}")
    if reward_range is not None and estimator != "reference":
        _refuse(f"reward_range must be None unless estimator is reference, got {reward_range}")
    if log_ratios is not None and estimator == "reference":
        _refuse("log_ratios must be None for the reference's own samples")
    if (previous is None) == (estimator == "ema"):
        got = None if previous is None else "a tensor"
        _refuse(f"previous must be given for ema and None otherwise, got {got} for {estimator}")
    if not 0 <= decay < 1:
        _refuse(f"decay must be in [0, 1), got {decay}")
    if decay != _DECAY and estimator != "ema":
        _refuse(f"decay must be left out unless estimator is ema, got {decay}")


def _labels(rewards: Tensor, groups: Tensor | None, num_prompts: int | None) -> tuple[Tensor, int]:
    """The prompt of each sample [M], and the number of prompts."""
    if groups is None:
        if num_prompts is not None:
            _refuse(f"num_prompts must be None without groups, got {num_prompts}")
        count, n = rewards.shape if rewards.dim() == 2 else (1, len(rewards))
        return torch.arange(count, device=rewards.device).repeat_interleave(n), count
    if rewards.dim() == 2:
        _refuse("groups must be None for rewards [P, n]")
    if (
        groups.shape != rewards.shape
        or groups.is_floating_point()
        or groups.is_complex()
        or groups.dtype == torch.bool
    ):
        _refuse(
            f"groups must be integers of shape {list(rewards.shape)} like rewards, "
            f"got {groups.dtype} {list(groups.shape)}"
        )
    labels = groups.to(rewards.device, torch.int64)
    lowest, highest = (int(labels.min()), int(labels.max())) if len(labels) else (0, -1)
    count = (
        highest + 1 if num_prompts is None else integer("prompt_value", "num_prompts", num_prompts)
    )
    if lowest < 0 or highest >= count:
        _refuse(f"groups must be in [0, {count}), got {lowest}..{highest}")
    return labels, count


def _running(
    values: Tensor, position: Tensor, longest: int, combine: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Values [M] of prompt after prompt, combined with those before them in theirs; in a tree that
    the position in the prompt alone decides."""
    step = 1
    while step < longest:
        values = torch.where(position >= step, combine(values.roll(step), values), values)
        step *= 2
    return values


def _sums_before(values: Tensor, position: Tensor, longest: int) -> Tensor:
    sums = _running(values, position, longest, torch.add)
    return torch.where(position > 0, sums.roll(1), torch.zeros_like(sums))


@dataclass(frozen=True)
class _Prompts:
    """Samples [M] in double, in the order of their prompts [M]; `order` says where they were,
    `position` counts from the first of the prompt. n [P] is the number of samples."""

    samples: Tensor
    prompt: Tensor
    order: Tensor
    position: Tensor
    n: Tensor
    longest: int

    @classmethod
    def of(cls, rewards: Tensor, groups: Tensor | None, num_prompts: int | None) -> "_Prompts":
        if rewards.dim() not in (1, 2) or rewards.is_complex():
            got = f"{rewards.dtype} {list(rewards.shape)}"
            _refuse(f"rewards must be real, [P, n] or [M], got {got}")
        labels, count = _labels(rewards, groups, num_prompts)
        samples = rewards.detach().double().reshape(-1)
        if bool(torch.isnan(samples).any()) or bool((samples == math.inf).any()):
            _refuse("rewards must be finite or -inf, got nan or inf")
        prompt, order = labels.sort(stable=True)
        starts = torch.searchsorted(prompt, torch.arange(count + 1, device=prompt.device))
        position = torch.arange(len(prompt), device=prompt.device) - starts[prompt]
        longest = int(position.max()) + 1 if len(position) else 0
        return cls(samples[order], prompt, order, position, starts.diff(), longest)

    def beside_rewards(self, log_ratios: Tensor, rewards: Tensor) -> Tensor:
        """log_ratios like rewards, in double, in the order of the prompts."""
        if log_ratios.shape != rewards.shape:
            _refuse(
                f"log_ratios must have shape {list(rewards.shape)} like rewards, "
                f"got {list(log_ratios.shape)}"
            )
        if not log_ratios.isfinite().all():
            _refuse("log_ratios must be finite, got nan or inf")
        return log_ratios.detach().double().reshape(-1)[self.order]

    def over_each(
        self, values: Tensor, combine: Callable[[Tensor, Tensor], Tensor], of_none: float
    ) -> Tensor:
        """Values [M] combined over the samples of every prompt, [P]."""
        running = _running(values, self.position, self.longest, combine)
        out = values.new_full(self.n.shape, of_none)
        out[self.n > 0] = running[self.n.cumsum(0)[self.n > 0] - 1]
        return out

    def leave_one_out(self, gain: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of the others of its prompt and their number, for every sample where it was.

        They are summed from both sides: a total less the sample would keep its rounding, and of a
        sample of -inf nothing else."""
        n = self.n[self.prompt] - 1
        behind = _sums_before(gain.flip(0), (n - self.position).flip(0), self.longest).flip(0)
        others = _sums_before(gain, self.position, self.longest) + behind
        back = self.order.argsort()
        return torch.where(n > 0, others / n.clamp(min=1), gain)[back], n[back]


def _checked_range(
    prompts: _Prompts, rewards: Tensor, smoothing: float, given: tuple[float, float] | None
) -> tuple[float, float]:
    """The worst and the best reward, as numbers of the type of rewards."""
    samples = prompts.samples
    if given is None:
        worst, best = (float(samples.min()), float(samples.max())) if len(samples) else (0.0, 0.0)
    else:
        if len(given) != 2:
            _refuse(f"reward_range must be (worst, best), got {given}")
        worst, best = (number("prompt_value", "reward_range", value) for value in given)
        if rewards.is_floating_point():
            worst, best = torch.tensor([worst, best]).to(rewards.dtype).tolist()
    if not worst <= best or (smoothing > 0 and not worst < best < math.inf):
        _refuse(
            "reward_range must be (worst, best) with worst < best for smoothing, "
            f"got ({worst}, {best}); with equal rewards it cannot be read off them"
        )
    outside = ((samples < worst) | (samples > best)).nonzero()
    if len(outside):
        i = int(outside[0])
        _refuse(
            f"rewards must lie in reward_range ({worst}, {best}), got {float(samples[i])} "
            f"for prompt {int(prompts.prompt[i])}"
        )
    return worst, best


def _monte_carlo(
    prompts: _Prompts,
    rewards: Tensor,
    beta: float,
    smoothing: float,
    reward_range: tuple[float, float] | None,
) -> Tensor:
    n = prompts.n
    if smoothing == 0 and not n.all():
        _refuse("every prompt must have a sample, got one without")
    worst, best = _checked_range(prompts, rewards, smoothing, reward_range)
    top = prompts.over_each(prompts.samples, torch.maximum, -math.inf)
    # Relative to the best that its own mean counts, of no prompt all exponentials vanish.
    peak = torch.full_like(top, best) if smoothing > 0 else top
    if bool((peak == -math.inf).any()):
        _refuse(
            "0 of n samples succeeded for a prompt, whose value would be -inf; pass smoothing=0.5"
        )
    below = (prompts.samples - peak[prompts.prompt]) / beta
    count = n + 2 * smoothing
    mass, short = (prompts.over_each(f(below), torch.add, 0.0) for f in (torch.exp, torch.expm1))
    if smoothing > 0:
        mass = mass + smoothing * (1 + math.exp((worst - best) / beta))
        short = short + smoothing * math.expm1((worst - best) / beta)
    # exp(x) - 1 has the digits where beta is large, exp(x) where it is small.
    log_mean = torch.where(mass > count / 2, (short / count).log1p(), (mass / count).log())
    floor = top <= worst
    if smoothing == 0 and worst < best and bool(floor.any()):
        warnings.warn(
            f"prompt_value: {int(floor.sum())} of {len(n)} prompts had only the worst reward in "
            f"their samples (fewest: {int(n[floor].min())}); their value sits at the floor "
            f"{worst}. Pass smoothing=0.5 or sample more.",
            stacklevel=3,
        )
    return peak + beta * log_mean


def _blend(value: Tensor, n: Tensor, previous: Tensor | None, decay: float) -> Tensor:
    assert previous is not None
    if previous.shape != value.shape or not previous.isfinite().all():
        _refuse(
            f"previous must be finite and have shape {list(value.shape)}, one per prompt, "
            f"got {list(previous.shape)}"
        )
    old = previous.detach().double()
    return torch.where(n > 0, decay * old + (1 - decay) * value, old)
