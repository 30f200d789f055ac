"""Token log-probabilities, soft-Q values and the loss of Soft Policy Optimization, without [N, V]
logits."""

import importlib
from types import ModuleType

from spo_ext import _ops as _ops  # registers the operators first
from spo_ext import eager
from spo_ext._ops import build_info
from spo_ext.head import explain, token_logprobs
from spo_ext.logits import logprobs_from_logits
from spo_ext.losses import linear_loss, loss, soft_q, taper_weights
from spo_ext.prompts import prompt_value
from spo_ext.stats import LossStats
from spo_ext.strategy import BackwardPlan
from spo_ext.vocabulary import OrderedHead, frequency_order, order_vocabulary

__version__: str = build_info()["version"]

__all__ = [
    "BackwardPlan",
    "LossStats",
    "OrderedHead",
    "build_info",
    "eager",
    "explain",
    "frequency_order",
    "linear_loss",
    "logprobs_from_logits",
    "loss",
    "order_vocabulary",
    "prompt_value",
    "soft_q",
    "taper_weights",
    "token_logprobs",
]


def __getattr__(name: str) -> ModuleType:
    # On first use, because it needs SQLAlchemy, which the rest does not. Not in __all__, because
    # `from spo_ext import *` would use it.
    if name == "store":
        return importlib.import_module("spo_ext.store")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
