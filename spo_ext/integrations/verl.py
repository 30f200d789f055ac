"""The squared SPO loss in verl: importing this registers advantage estimator and policy loss "spo".

verl finds this module by the entry-point group `verl.plugins`; written against verl 0.9.1.

A policy loss of verl sees neither rewards nor the reference, only log-probabilities pi and pi_old
and advantages. The squared loss still fits, exactly. With the penalty -beta (log pi_old - log
pi_ref) inside the rewards (`use_kl_in_reward`, kl_coef = beta) and r - Q_0 as score,

    A = sum_t rewards_t                         = r - Q_0 - beta sum_t (log pi_old - log pi_ref)
    d = beta sum_t (log pi - log pi_old) - A    = Q_0 + beta sum_t (log pi - log pi_ref) - r

whatever pi_old is. The cross-entropy loss has no such form: it needs Q_T and r apart.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

import spo_ext

try:
    from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss
except ImportError as error:
    raise ImportError(
        f"spo_ext.integrations.verl needs verl ({error}). Install it: pip install verl"
    ) from error

_BETA = "actor_rollout_ref.actor.policy_loss.dro_beta"


def spo_advantages(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """A / beta of every response, in nats: what sum_t (log pi - log pi_old) is to become.

    Divided by kl_coef, so that the beta of the policy loss cannot contradict it: were they to
    differ, the loss would be scaled, but have the same minimum.

    Args:
        token_level_rewards: [B, T], the score r - Q_0 of a response at one of its tokens, minus the
            KL penalty at all that count.
        response_mask: [B, T].
        config: `algorithm` of verl's configuration.

    Returns:
        advantages: [B, T], A / beta at every token.
        returns: [B, T], A at every token, in reward units.

    Raises:
        ValueError: if the configuration does not put beta (log pi_old - log pi_ref) in the rewards.
    """
    beta = _kl_coef(config)
    # Not masked: the penalty is already, and the score may stand at a token of a tool's answer.
    returns = token_level_rewards.sum(dim=-1, keepdim=True).expand(response_mask.shape)
    return (returns / beta).contiguous(), returns.contiguous()


def spo_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Mean of d^2 over the responses of the global batch; see the module.

    Args:
        old_log_prob: [B, T], nats; read by other losses of verl alone.
        log_prob: [B, T], nats, of the policy, differentiable.
        advantages: [B, T], from `spo_advantages`.
        response_mask: [B, T], True or 1 where the policy wrote the token.
        loss_agg_mode: "seq-mean-token-sum", the one of verl's that is a mean over sequences of sums
            over tokens.
        config: `actor` of verl's configuration. beta is its policy_loss.dro_beta, or else the
            environment variable SPO_BETA, for releases without that field.
        rollout_is_weights: must be None: the loss holds for completions of any policy.

    Returns:
        loss, times dp_size, since data-parallel ranks average their gradients; and metrics.

    Raises:
        ValueError: for anything else than the above, or with `use_kl_loss`.
    """
    if loss_agg_mode != "seq-mean-token-sum":
        raise ValueError(
            "spo: actor_rollout_ref.actor.loss_agg_mode must be seq-mean-token-sum, "
            f"got {loss_agg_mode}"
        )
    if rollout_is_weights is not None:
        raise ValueError("spo: rollout_is_weights must be None; switch rollout correction off")
    if getattr(config, "use_kl_loss", False):
        raise ValueError(
            "spo: actor_rollout_ref.actor.use_kl_loss must be False: the reference is in the "
            "rewards already (algorithm.use_kl_in_reward)"
        )
    beta = _loss_beta(config)
    mask = response_mask.bool()
    first = mask.int().argmax(dim=1, keepdim=True)
    rewards = beta * advantages.gather(1, first).squeeze(1)
    total, stats = spo_ext.loss(
        log_prob,
        old_log_prob.detach(),
        rewards.detach(),
        0.0,
        beta=beta,
        objective="squared",
        mask=mask,
        reduction="sum",
        return_stats=True,
    )
    batch = getattr(config, "global_batch_info", {})
    responses = batch.get("global_batch_size")
    if responses is None:
        responses = (stats.num_tokens > 0).sum().clamp(min=1)
    loss = total / responses * batch.get("dp_size", 1)
    means = stats.means()
    metrics = {
        "actor/spo_residual": means["residual"].item(),
        "actor/spo_residual_abs": means["residual_abs"].item(),
        "actor/ppo_kl": _mean_old_minus_new(log_prob, old_log_prob, mask),
    }
    return loss, metrics


def _mean_old_minus_new(log_prob: Tensor, old_log_prob: Tensor, mask: Tensor) -> float:
    """Per token, as verl's other losses report it."""
    difference = torch.where(mask, (old_log_prob - log_prob).detach(), 0.0)
    return float(difference.sum() / mask.sum().clamp(min=1))


def _kl_coef(config: Any) -> float:
    control = getattr(config, "kl_ctrl", None)
    beta = getattr(control, "kl_coef", None)
    rejection = getattr(getattr(config, "rollout_correction", None), "rollout_rs", None)
    checks = (
        ("use_kl_in_reward", getattr(config, "use_kl_in_reward", None), (True,)),
        ("kl_penalty", getattr(config, "kl_penalty", None), ("kl", "k1")),
        ("kl_ctrl.type", getattr(control, "type", None), ("fixed",)),
        # It takes tokens out of the mask, whose penalty is in the rewards already.
        ("rollout_correction.rollout_rs", rejection, (None,)),
    )
    for name, value, allowed in checks:
        if value not in allowed:
            words = " or ".join(map(str, allowed))
            raise ValueError(f"spo: algorithm.{name} must be {words}, got {value}")
    return _positive(beta, "algorithm.kl_ctrl.kl_coef")


def _loss_beta(config: Any) -> float:
    beta = getattr(getattr(config, "policy_loss", None), "dro_beta", None)
    if beta is not None:
        return _positive(beta, _BETA)
    if "SPO_BETA" not in os.environ:
        raise ValueError(
            f"spo: {_BETA} must be set to the softness beta (a policy loss of verl sees no other "
            "field for it; '${algorithm.kl_ctrl.kl_coef}' refers to the one value), or the "
            "environment variable SPO_BETA in every worker; got neither"
        )
    return _positive(os.environ["SPO_BETA"], "the environment variable SPO_BETA")


def _positive(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"spo: {name} must be a finite number > 0, got {value!r}")
    return number


register_adv_est("spo")(spo_advantages)
register_policy_loss("spo")(spo_policy_loss)
