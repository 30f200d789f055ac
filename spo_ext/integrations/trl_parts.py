"""The parts of the TRL mixin that need no TRL: prompt values of groups, masks and checks."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

import spo_ext
from spo_ext.stats import LossStats

logger = logging.getLogger(__name__)

Objective = Literal["squared", "cross_entropy"]
PromptValue = Literal["leave_one_out", "group", "importance", "column"]

# What TRL makes of images, which the model wants back.
MODEL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)

# Settings of GRPOConfig that say how advantages and probability ratios are used: SPO has neither.
_NO_EFFECT = (
    "delta",
    "epsilon",
    "epsilon_high",
    "importance_sampling_level",
    "loss_type",
    "sapo_temperature_neg",
    "sapo_temperature_pos",
    "scale_rewards",
    "use_bias_correction_kl",
    "vespo_k_neg",
    "vespo_k_pos",
    "vespo_lambda_neg",
    "vespo_lambda_pos",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_mode",
)


def check_choices(objective: str, prompt_value: str) -> None:
    """Raises ValueError."""
    for name, value, allowed in (
        ("objective", objective, get_args(Objective)),
        ("prompt_value", prompt_value, get_args(PromptValue)),
    ):
        if value not in allowed:
            raise ValueError(f"SPOMixin: {name} must be one of {', '.join(allowed)}, got {value!r}")
    if objective == "cross_entropy" and prompt_value in ("leave_one_out", "group"):
        raise ValueError(
            "SPOMixin: prompt_value must be column or importance for objective cross_entropy, "
            f"where Q_T / beta is a log-probability, got {prompt_value!r}, a baseline"
        )


def check_settings(trainer: Any, prompt_value: str) -> None:
    """Raises ValueError for what does not fit the loss; warns of what has no effect on it."""
    if not trainer.beta > 0:
        raise ValueError(
            "SPOMixin: beta of GRPOConfig must be > 0: it is the softness, and without it TRL has "
            f"no reference log-probabilities; got {trainer.beta}"
        )
    if trainer.multi_objective_aggregation != "sum_then_normalize" and (
        prompt_value not in ("leave_one_out", "group")
    ):
        raise ValueError(
            "SPOMixin: multi_objective_aggregation must be 'sum_then_normalize' for prompt_value "
            f"{prompt_value!r}, a value in reward units; got "
            f"{trainer.multi_objective_aggregation!r}"
        )
    defaults = {field.name: field.default for field in dataclasses.fields(trainer.args)}
    given = [
        f"{name}={getattr(trainer.args, name)!r}"
        for name in _NO_EFFECT
        if getattr(trainer.args, name) != defaults[name]
    ]
    if given:
        logger.warning("SPOMixin: no effect on the SPO loss: %s", ", ".join(given))


def normalized(rewards: Tensor, group_size: int) -> Tensor:
    """Rewards [N, K] of K functions, each less its mean over a prompt's completions and divided by
    their standard deviation (+ 1e-4); nan counts for nothing and stays."""
    groups = rewards.view(-1, group_size, rewards.shape[1])
    centred = groups - groups.nanmean(dim=1, keepdim=True)
    count = (~centred.isnan()).sum(dim=1, keepdim=True)
    variance = centred.square().nansum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
    return (centred / (variance.sqrt() + 1e-4)).view_as(rewards)


def loss_mask(batch: dict[str, Any]) -> Tensor:
    """bool [B, T]: tokens of the policy, so neither padding nor the answers of tools."""
    mask: Tensor = batch["completion_mask"].bool()
    return mask & batch["tool_mask"].bool() if "tool_mask" in batch else mask


def check_width(tokens: Tensor, limit: int | None) -> None:
    """Raises ValueError where rotary frequencies depend on the longest sequence of a batch."""
    if limit is not None and tokens.shape[1] > limit:
        raise ValueError(
            f"SPOMixin: prompt and completion must be at most {limit} tokens for this model, whose "
            f"rotary frequencies follow from the longest sequence of a batch, got "
            f"{tokens.shape[1]}: policy and reference would differ at equal weights"
        )


def left_padding(attention_mask: Tensor) -> Tensor:
    """int64 [B, 1], how many of the first columns are padding."""
    return attention_mask.int().argmax(dim=1, keepdim=True)


def rolled(values: Tensor, shift: Tensor) -> Tensor:
    """Rows [B, T] moved to the left by shift [B, 1]; what leaves there enters on the right."""
    columns = torch.arange(values.shape[1], device=values.device)
    return values.gather(1, (columns + shift) % values.shape[1])


def q0_column(rows: list[dict[str, Any]]) -> Tensor:
    """float32 [B], the column `q0`. Raises ValueError."""
    values = [row.get("q0") for row in rows]
    if None in values:
        raise ValueError(
            "SPOMixin: the dataset must have a number in column 'q0' in every row for "
            f"prompt_value='column', got columns {sorted(rows[values.index(None)])}"
        )
    return torch.tensor(values, dtype=torch.float32)


def group_q0(
    rewards: Tensor, log_ratios: Tensor, groups: Tensor, beta: float, prompt_value: PromptValue
) -> Tensor:
    """Q_0 for every completion [M] from those of its prompt; see `SPOMixin`.

    Args:
        rewards, log_ratios: [M]. groups: int64 [M], prompts numbered without a gap.
    """
    if len(rewards) == 0:
        return rewards
    if prompt_value == "leave_one_out":
        return spo_ext.prompt_value(
            rewards, beta=beta, groups=groups, estimator="leave_one_out", log_ratios=log_ratios
        )
    if prompt_value == "group":
        value = spo_ext.prompt_value(
            rewards, beta=beta, groups=groups, estimator="group", log_ratios=log_ratios
        )
        return value[groups]
    # exp(gain / beta) = exp(r / beta) pi_ref / pi: importance weights make it the reference's mean.
    gain = rewards.double() - beta * log_ratios.double()
    # A gain has no worst value to warn of.
    unbounded = (-math.inf, math.inf)
    value = spo_ext.prompt_value(gain, beta=beta, groups=groups, reward_range=unbounded)
    return value[groups]


def sums_of(
    stats: LossStats, mask: Tensor, per_token: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Per metric the sum over this rank's sequences, or tokens in `mask`, and their number."""
    assert stats.residual is not None
    series = {
        "terminal_q": stats.terminal_q,
        "q0": stats.q0,
        "log_ratio": stats.log_ratio,
        "residual": stats.residual,
        "residual_abs": stats.residual.abs(),
        "clipped": (stats.terminal_q > 0).double(),
    }
    live = stats.num_tokens > 0
    sums = {f"spo/{name}": (values[live].sum(), live.sum()) for name, values in series.items()}
    for name, values in per_token.items():
        sums[name] = (values.detach()[mask].sum(), mask.sum())
    return sums
