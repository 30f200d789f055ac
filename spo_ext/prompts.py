"""The prompt value Q_0 = beta log E_{a ~ pi_ref}[exp(r / beta)], estimated from rewards."""

import warnings
from typing import Literal, overload

import torch
from torch import Tensor

Estimator = Literal["reference", "group", "leave_one_out", "ema"]


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
    decay: float = 0.9,
    return_n: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Q_0 of every prompt, in reward units.

    ==============
    ===========================================================================================
    reference       beta log mean exp(r / beta) over samples of the reference policy (Monte Carlo).
    With smoothing s,
                    s more samples of the best and s of the worst reward are counted in
    group           mean of r - beta R over a prompt's samples from any policy, R = log pi - log
    pi_ref
    leave_one_out   the same over the other samples of the prompt: one value per sample
    ema             decay * previous + (1 - decay) * group; a prompt without a sample keeps its
    value
    ==============
    ===========================================================================================

    A prompt with 0 of n successes has no finite Monte-Carlo estimate of its value, or one at the
    floor of the rewards, from
    where a later success looks impossibly good: smoothing = 0.5 adds half a success and half a
    failure.

    Args:
        rewards: [P, n], or [M] with `groups`, or [M] of a single prompt.
        beta: softness > 0.
        groups: [M] int, the prompt of each sample, in [0, P).
        num_prompts: P; default, from `groups`.
        smoothing: s >= 0, only for "reference".
        reward_range: (worst, best) reward, for smoothing; default, the extremes of `rewards`.
        log_ratios: R of each sample, like rewards, in nats; default 0 (samples of the reference).
        previous: [P], only for "ema".
        decay: in [0, 1), only for "ema".
        return_n: also return how many samples each value rests on.

    Returns:
        float32 [P] ([M] for "leave_one_out"), detached; with `return_n`, also int64 of the same
        shape.

    Raises:
        ValueError: for a value outside the ranges above, or a "reference" prompt without a finite
        estimate.
    """
    if estimator not in ("reference", "group", "leave_one_out", "ema"):
        raise ValueError(
            "prompt_value: estimator must be reference, group, leave_one_out or ema, "
            f"got {estimator!r}"
        )
    if not 0 < beta < float("inf"):
        raise ValueError(f"prompt_value: beta must be a finite number > 0, got {beta}")
    _refuse_unused(estimator, smoothing, log_ratios, previous)
    samples, prompts, count = _flatten(rewards, groups, num_prompts)
    n = torch.zeros(count, dtype=torch.int64, device=samples.device)
    n.index_add_(0, prompts, torch.ones_like(prompts))
    if estimator == "reference":
        value = _monte_carlo(samples, prompts, n, beta, smoothing, reward_range)
        return (value.float(), n) if return_n else value.float()
    gain = samples
    if log_ratios is not None:
        if log_ratios.shape != rewards.shape:
            raise ValueError(
                f"prompt_value: log_ratios must have shape {list(rewards.shape)} like rewards, "
                f"got {list(log_ratios.shape)}"
            )
        gain = samples - beta * log_ratios.detach().double().reshape(-1)
    total = torch.zeros(count, dtype=torch.float64, device=samples.device).index_add_(
        0, prompts, gain
    )
    if estimator == "leave_one_out":
        others = n[prompts] - 1
        # Alone, a sample has no other estimate than its own: residual 0.
        value = torch.where(others > 0, (total[prompts] - gain) / others.clamp(min=1), gain)
        n = others
    else:
        value = total / n.clamp(min=1)
        if estimator == "ema":
            value = _blend(value, n, previous, decay)
        elif bool((n == 0).any()):
            raise ValueError("prompt_value: every prompt must have a sample, got one without")
    return (value.float(), n) if return_n else value.float()


def _refuse_unused(
    estimator: str, smoothing: float, log_ratios: Tensor | None, previous: Tensor | None
) -> None:
    if smoothing < 0 or (smoothing > 0 and estimator != "reference"):
        raise ValueError(
            "prompt_value: smoothing must be >= 0, and 0 unless estimator is reference, "
            f"got {smoothing}"
        )
    if log_ratios is not None and estimator == "reference":
        raise ValueError("prompt_value: log_ratios must be None for the reference's own samples")
    if (previous is None) == (estimator == "ema"):
        raise ValueError(
            "prompt_value: previous must be given for ema and None otherwise, "
            f"got {None if previous is None else 'a tensor'} for {estimator}"
        )


def _flatten(
    rewards: Tensor, groups: Tensor | None, num_prompts: int | None
) -> tuple[Tensor, Tensor, int]:
    """Rewards as [M] in double, the prompt of each, and the number of prompts."""
    samples = rewards.detach().double().reshape(-1)
    if bool(torch.isnan(samples).any()) or bool((samples == float("inf")).any()):
        raise ValueError("prompt_value: rewards must be finite or -inf, got nan or inf")
    if rewards.dim() == 2:
        if groups is not None:
            raise ValueError("prompt_value: groups must be None for rewards [P, n]")
        count, n = rewards.shape
        return samples, torch.arange(count, device=samples.device).repeat_interleave(n), count
    if rewards.dim() != 1:
        raise ValueError(f"prompt_value: rewards must be [P, n] or [M], got {list(rewards.shape)}")
    if groups is None:
        return samples, torch.zeros(len(samples), dtype=torch.int64, device=samples.device), 1
    if groups.shape != rewards.shape or groups.is_floating_point():
        raise ValueError(
            f"prompt_value: groups must be integers of shape {list(rewards.shape)} like rewards, "
            f"got {groups.dtype} {list(groups.shape)}"
        )
    prompts = groups.to(torch.int64)
    highest = int(prompts.max()) if len(prompts) else -1
    count = highest + 1 if num_prompts is None else num_prompts
    if len(prompts) and (int(prompts.min()) < 0 or highest >= count):
        raise ValueError(
            f"prompt_value: groups must be in [0, {count}), got {int(prompts.min())}..{highest}"
        )
    return samples, prompts, count


def _monte_carlo(
    samples: Tensor,
    prompts: Tensor,
    n: Tensor,
    beta: float,
    smoothing: float,
    reward_range: tuple[float, float] | None,
) -> Tensor:
    if bool((n == 0).any()) and smoothing == 0:
        raise ValueError("prompt_value: every prompt must have a sample, got one without")
    worst, best = (
        reward_range
        if reward_range is not None
        else ((float(samples.min()), float(samples.max())) if len(samples) else (0.0, 0.0))
    )
    if smoothing > 0 and not worst < best:
        raise ValueError(
            "prompt_value: reward_range must be (worst, best) with worst < best for smoothing, "
            f"got ({worst}, {best}); with equal rewards it cannot be read off them"
        )
    top = best if best > -float("inf") else 0.0  # relative to it, no exponential overflows
    mass = torch.zeros(len(n), dtype=torch.float64, device=n.device)
    mass.index_add_(0, prompts, ((samples - top) / beta).exp())
    extra = torch.tensor([worst - top, best - top], dtype=torch.float64) / beta
    mass = mass + smoothing * float(extra.exp().sum())
    value = top + beta * (mass / (n + 2 * smoothing)).log()
    if bool(torch.isinf(value).any()):
        raise ValueError(
            "prompt_value: 0 of n samples succeeded for a prompt, whose value would be -inf; "
            "pass smoothing=0.5"
        )
    floor = value <= worst
    if smoothing == 0 and worst < best and bool(floor.any()):
        warnings.warn(
            f"prompt_value: {int(floor.sum())} of {len(n)} prompts had only the worst reward in "
            f"their samples (fewest: {int(n.min())}); their value sits at the floor {worst}. "
            "Pass smoothing=0.5 or sample more.",
            stacklevel=3,
        )
    return value


def _blend(value: Tensor, n: Tensor, previous: Tensor | None, decay: float) -> Tensor:
    if not 0 <= decay < 1:
        raise ValueError(f"prompt_value: decay must be in [0, 1), got {decay}")
    assert previous is not None
    if previous.shape != value.shape:
        raise ValueError(
            f"prompt_value: previous must have shape {list(value.shape)}, one per prompt, "
            f"got {list(previous.shape)}"
        )
    old = previous.detach().double()
    return torch.where(n > 0, decay * old + (1 - decay) * value, old)
