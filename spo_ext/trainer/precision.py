"""One arithmetic for policy and reference: where they are equal, so are their log-probabilities."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from torch import nn

from spo_ext.store.checks import check_one_of

Precision = Literal["no", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("no", "bf16", "fp16")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def precision_of(accelerator: Accelerator) -> Precision:
    """The mixed precision that Accelerate puts around the policy.

    Raises ValueError for one that a reference cannot be given (fp8).
    """
    found = accelerator.mixed_precision if accelerator.native_amp else "no"
    check_one_of("SPO", "mixed_precision", found, PRECISIONS)
    return cast(Precision, found)


def autocast(model: nn.Module, precision: Precision) -> AbstractContextManager[object]:
    """What Accelerate puts around the policy's forward, for a model that it does not prepare."""
    if precision == "no":
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, _DTYPES[precision])


def keep_logprobs(accelerator: Accelerator) -> None:
    """Before the model is sharded: FSDP2 shall not round its answers to the precision of its
    weights, as Accelerate asks it to. A sum of log-probabilities has no digits to spare."""
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    policy: Any = getattr(plugin, "mixed_precision_policy", None)
    if getattr(policy, "output_dtype", None) is not None:
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)


def round_like_sharded(model: nn.Module, accelerator: Accelerator) -> None:
    """Rounds a reference's weights as FSDP2 rounds the policy's when it gathers them."""
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    dtype = getattr(getattr(plugin, "mixed_precision_policy", None), "param_dtype", None)
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)


def named_with(fingerprint: str, precision: Precision) -> str:
    """The name under which the store keeps what a reference says in this precision."""
    return fingerprint if precision == "no" else f"{precision}-{fingerprint}"


def is_named_with(fingerprint: str, precision: Precision) -> bool:
    given = fingerprint.partition("-")[0] if "-" in fingerprint else "no"
    return given == precision
