"""Log-probabilities of the next token from logits that already exist."""

from typing import Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from spo_ext._ops import run
from spo_ext.arguments import integer, number, same_device


class LogitsOptions(TypedDict, total=False):
    """The options of `logprobs_from_logits`."""

    temperature: float
    ignore_index: int
    inplace_backward: bool


@overload
def logprobs_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    return_entropy: Literal[False] = ...,
    **options: Unpack[LogitsOptions],
) -> Tensor: ...


@overload
def logprobs_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    return_entropy: Literal[True],
    **options: Unpack[LogitsOptions],
) -> tuple[Tensor, Tensor]: ...


def logprobs_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(logits / temperature)[target] of logits that already exist, reading them once.

    Args:
        logits: [.., V], float32, bfloat16, float16 or float64; any strides.
        targets: [..], int64 or int32, in [0, V) or `ignore_index`.
        return_entropy: also return the entropy of each softmax, in nats; differentiable.
        inplace_backward: let the backward pass overwrite `logits` with its gradient, so that no
            second [.., V] tensor is made. The logits must be neither a leaf nor a view of one, and
            must not be used afterwards; PyTorch's version counter catches it if another operation
            saved them. Under torch.compile the gradient is a new tensor.

    Returns:
        float32 (float64 for float64 logits) [..] in nats, 0 at ignored targets; with
        `return_entropy`, also the entropies.
    """
    temperature = number("logprobs_from_logits", "temperature", temperature)
    ignore_index = integer("logprobs_from_logits", "ignore_index", ignore_index)
    if inplace_backward and logits.requires_grad and not torch.compiler.is_compiling():
        base = logits._base  # of a view
        if (logits if base is None else base).is_leaf:
            raise ValueError(
                "logprobs_from_logits: logits must not be a leaf with inplace_backward=True, since "
                f"its values would be lost, got {'one' if base is None else 'a view of one'}"
            )
    same_device("logprobs_from_logits", "logits", logits, targets=targets)
    logprobs, entropy, *_ = run(
        "logprobs_from_logits",
        logits,
        targets,
        temperature,
        ignore_index,
        return_entropy,
        inplace_backward,
    )
    return (logprobs, entropy) if return_entropy else logprobs
