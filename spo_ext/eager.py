"""The whole method in plain PyTorch: the specification of the kernels, and their truth in float64.

Written to be read: it materialises the logits and loops over sequences.
"""

import math
from typing import Any

import torch
from torch import Tensor

Given = Any  # a Tensor, or None where the objective has no use for it


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of targets and entropies, both [..]; 0 where the target is ignored."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logprobs_from_logits(logits, targets, temperature=temperature, ignore_index=ignore_index)


def logprobs_from_logits(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of targets and entropies of logits [.., V]."""
    counted = targets != ignore_index
    log_p = torch.log_softmax(logits / temperature, -1)
    chosen = log_p.gather(-1, targets.long().masked_fill(~counted, 0).unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1)  # 0 log 0 = 0
    zero = torch.zeros_like(chosen)
    return torch.where(counted, chosen, zero), torch.where(counted, entropy, zero)


def sequences(
    tokens: Tensor, cu_seqlens: Tensor | None = None, mask: Tensor | None = None
) -> list[Tensor]:
    """The unmasked positions of every sequence, as indices into tokens.flatten()."""
    if cu_seqlens is None:
        positions = list(torch.arange(tokens.numel()).view(tokens.shape))
    else:
        positions = [
            torch.arange(int(a), int(b))
            for a, b in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)
        ]
    return positions if mask is None else [p[mask.flatten()[p]] for p in positions]


def soft_q(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    q0: Tensor,
    *,
    beta: float,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Q_t = Q_0 + sum_{i<=t} beta (log pi - log pi_ref); a masked position repeats the value
    before it."""
    advantages = beta * (logprobs - ref_logprobs)
    if mask is not None:
        advantages = torch.where(mask, advantages, torch.zeros_like(advantages))
    flat = advantages.flatten()
    parts = [q0[s] + flat[p].cumsum(0) for s, p in enumerate(sequences(logprobs, cu_seqlens))]
    return torch.cat(parts).view(logprobs.shape) if parts else advantages


def per_token(given: Tensor, logprobs: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether a tensor that may be per sequence, [S] or [S, 1], is per token instead. Where N = S,
    [N] must mean the same as [S]: `loss` refuses it unless every sequence has one token."""
    packed = cu_seqlens is not None and given.shape == (1, logprobs.numel())
    return packed or given.shape == logprobs.shape


def point_loss(q: Tensor, target: Tensor, *, objective: str, beta: float, delta: float) -> Tensor:
    """phi(Q, target) of the squared and cross-entropy objectives."""
    if objective != "cross_entropy":
        return (q - target) ** 2
    u, y = q / beta, (target / beta).exp()
    tangent = 1 / math.expm1(delta)  # d/du of -log(1 - exp u) at u = -delta
    edge = u.clamp(max=-delta)
    past = torch.where(u > -delta, u + delta, torch.zeros_like(u))
    failure = -torch.log(-torch.expm1(edge)) + tangent * past
    # A factor of exactly 0 must not meet an infinity: u is -inf where pi(a) is 0.
    success = torch.where(y > 0, -u.clamp(max=0), torch.zeros_like(u))
    return y * success + (1 - y) * failure


def loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    rewards: Given,
    q0: Given,
    *,
    beta: float,
    objective: str = "cross_entropy",
    groups: Given = None,
    leave_one_out: bool = False,
    advantages: Given = None,
    q_targets: Given = None,
    q_weights: Given = None,
    token_rewards: Given = None,
    weights: Given = None,
    delta: float = 0.2,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The loss of every sequence [S]; an empty sequence has loss 0."""
    parts = sequences(logprobs, cu_seqlens, mask)
    summed = not per_token(ref_logprobs, logprobs, cu_seqlens)
    ref_logprobs = ref_logprobs.flatten() if summed else ref_logprobs.reshape(logprobs.shape)
    if advantages is not None:
        whole = per_token(advantages, logprobs, cu_seqlens)
        advantages = advantages.reshape(logprobs.shape) if whole else advantages.flatten()
    if objective == "group":
        q0 = group_q0(
            parts, logprobs, ref_logprobs, rewards, groups, token_rewards, beta, leave_one_out
        )
    losses = []
    for s, p in enumerate(parts):
        log_ratio = logprobs.flatten()[p] - (0 if summed else ref_logprobs.flatten()[p])
        total = log_ratio.sum() - (ref_logprobs[s] if summed else 0)
        paid = torch.zeros_like(log_ratio) if token_rewards is None else token_rewards.flatten()[p]
        if len(p) == 0:
            value = total * 0
        elif objective == "linear":
            value = -total
        elif objective == "advantage":
            value = (
                (beta * log_ratio - advantage_targets(s, p, logprobs, rewards, q0, advantages)) ** 2
            ).sum()
        else:
            q = q0[s] - (beta * ref_logprobs[s] if summed else 0) + beta * log_ratio.cumsum(0)
            q = q - (paid.cumsum(0) - paid)  # a token's reward counts from the next token on
            if q_targets is None:
                phi = point_loss(
                    q[-1], rewards[s] + paid[-1], objective=objective, beta=beta, delta=delta
                )
            else:
                phi = point_loss(
                    q, q_targets.flatten()[p], objective=objective, beta=beta, delta=delta
                )
                phi = phi if q_weights is None else q_weights.flatten()[p] * phi
            value = phi.sum()
        losses.append(value if weights is None else weights[s] * value)
    return torch.stack(losses) if losses else logprobs.sum() * torch.zeros(0)


def advantage_targets(
    s: int,
    p: Tensor,
    logprobs: Tensor,
    rewards: Given,
    q0: Given,
    advantages: Given,
) -> Given:
    """The targets as given, per token or per sequence; else r - Q_0 in equal shares of a token."""
    if advantages is None:
        return (rewards[s] - q0[s]) / len(p)
    return advantages.flatten()[p] if advantages.shape == logprobs.shape else advantages[s]


def group_q0(
    parts: list[Tensor],
    logprobs: Tensor,
    ref_logprobs: Tensor,
    rewards: Tensor,
    groups: Tensor,
    token_rewards: Given,
    beta: float,
    leave_one_out: bool,
) -> Tensor:
    """Mean of r - beta R over each group's non-empty sequences (or the other ones), detached."""
    q0 = torch.zeros_like(rewards, dtype=logprobs.dtype)
    gain = {}
    for s, p in enumerate(parts):
        reference = (
            ref_logprobs.flatten()[p].sum()
            if ref_logprobs.shape == logprobs.shape
            else ref_logprobs[s]
        )
        paid = 0 if token_rewards is None else token_rewards.flatten()[p].sum()
        if len(p):
            gain[s] = rewards[s] + paid - beta * (logprobs.flatten()[p].sum() - reference).detach()
    for s in gain:
        peers = [t for t in gain if groups[t] == groups[s]]
        others = [t for t in peers if t != s]
        used = others if leave_one_out and others else peers
        q0[s] = sum(gain[t] for t in used) / len(used)
    return q0
