"""Token log-probabilities, soft-Q values and the loss of Soft Policy Optimization, without [N, V] logits."""

from spo_ext import _ops as _ops  # registers the operators first
from spo_ext import reference
from spo_ext._ops import build_info
from spo_ext.functional import (
    LossStats,
    linear_loss,
    logprobs_from_logits,
    loss,
    soft_q,
    taper_weights,
    token_logprobs,
)
from spo_ext.prompts import prompt_value

__version__: str = build_info()["version"]

__all__ = [
    "LossStats",
    "build_info",
    "linear_loss",
    "logprobs_from_logits",
    "loss",
    "prompt_value",
    "reference",
    "soft_q",
    "taper_weights",
    "token_logprobs",
]
