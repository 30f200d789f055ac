"""The losses of the controls: likelihood, PPO and GRPO.

Tensors are [S, T], a program a row; mask is 1.0 on its tokens and 0.0 after them. Means over tokens
are over all tokens of the batch. Log-probabilities are in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST_LOG_RATIO = 20.0  # exp of more overflows the product with an advantage
_EPSILON = 1e-6
_GROUP_EPSILON = 1e-4  # TRL's


def padded(values: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed [N], cut at cu_seqlens [S + 1], as [S, T] with zeros after the end; and the mask."""
    lengths = cu_seqlens.diff()
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return values.new_zeros(mask.shape).masked_scatter(mask, values), mask.to(values.dtype)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Over the tokens of mask; 0 if it has none."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def likelihood_loss(logprobs: Tensor, mask: Tensor, keep: Tensor) -> Tensor:
    """Mean negative log-probability of the tokens of the programs with keep [S] = 1."""
    return masked_mean(-logprobs, mask * keep[:, None])


def clipped_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> Tensor:
    """PPO's surrogate: -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), mean over tokens."""
    ratio = (logprobs - old_logprobs).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()
    limited = ratio.clamp(1 - clip, 1 + clip)
    return masked_mean(-torch.minimum(ratio * advantages, limited * advantages), mask)


def kl_rewards(
    old_logprobs: Tensor, ref_logprobs: Tensor, rewards: Tensor, mask: Tensor, kl: float
) -> Tensor:
    """PPO's reward per token [S, T]: -kl times the log-ratio, and the program's at its end."""
    per_token = -kl * (old_logprobs - ref_logprobs) * mask
    last = mask.sum(dim=1).long() - 1
    return per_token.index_put((torch.arange(len(last)), last), rewards, accumulate=True)


def gae(
    token_rewards: Tensor, values: Tensor, mask: Tensor, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates without discount, and the returns that values should be.

    delta_t = r_t + V_{t+1} - V_t, A_t = delta_t + lambda A_{t+1}; V is 0 after the end, values[t]
    is the state's before token t.
    """
    after = torch.zeros_like(values[:, 0])
    advantage = torch.zeros_like(after)
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        inside = mask[:, t]
        delta = token_rewards[:, t] + after - values[:, t]
        advantage = (delta + gae_lambda * advantage) * inside
        advantages[:, t] = advantage
        after = values[:, t] * inside
    return advantages, (advantages + values) * mask


def whitened(advantages: Tensor, mask: Tensor) -> Tensor:
    """With mean 0 and variance 1 over the tokens of the batch."""
    mean = masked_mean(advantages, mask)
    variance = masked_mean((advantages - mean).square(), mask)
    return (advantages - mean) / (variance.sqrt() + _EPSILON) * mask


def value_loss(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Half the mean squared error over tokens."""
    return 0.5 * masked_mean((values - returns).square(), mask)


def group_advantages(rewards: Tensor, groups: Tensor, keep: Tensor) -> Tensor:
    """GRPO's [S]: (r - mean) / standard deviation over the rows of a group with keep [S] = 1.

    The deviation is that of n - 1, as in TRL. A group that agrees has advantage 0, and so has a row
    that is not kept.
    """
    advantages = torch.zeros_like(rewards)
    for group in set(groups.tolist()):
        rows = (groups == group) & (keep > 0)
        if int(rows.sum()) > 1:
            kept = rewards[rows]
            advantages[rows] = (kept - kept.mean()) / (kept.std() + _GROUP_EPSILON)
    return advantages


def kl_estimate(
    logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor
) -> Tensor:
    """GRPO's penalty per token: ratio (exp(d) - d - 1) with d = log pi_ref - log pi.

    The ratio of the policy to the one that sampled has a gradient of its own: with it, as in TRL,
    the expected gradient is that of KL(pi || pi_ref); without it, of KL(pi_ref || pi) on-policy.
    """
    ratio = (logprobs - old_logprobs).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()
    difference = (ref_logprobs - logprobs).clamp(max=_LARGEST_LOG_RATIO)
    return masked_mean(ratio * (difference.exp() - difference - 1), mask)
