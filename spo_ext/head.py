"""Log-probabilities of the next token from hidden states and an LM head.

Shapes: hidden [.., d], weight [V, d], where [..] is [N] (packed) or [B, T] (padded) for every
per-token tensor.
"""

import dataclasses
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from spo_ext._ops import cuda_launches, run
from spo_ext.arguments import integer, number, same_device
from spo_ext.sharded import Scales, sharded_logprobs
from spo_ext.strategy import (
    KEEP,
    BackwardPlan,
    Chosen,
    HeadCall,
    Strategy,
    choose,
    default_workspace_mib,
    plan,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class HeadOptions(TypedDict, total=False):
    """The options of `token_logprobs`, as `linear_loss` passes them on."""

    bias: Tensor | None
    temperature: float
    logit_scale: float
    softcap: float | None
    ignore_index: int
    max_dropped_mass: float
    strategy: Strategy
    workspace_mib: int | None
    process_group: "ProcessGroup | None"


@overload
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    return_entropy: Literal[False] = ...,
    **options: Unpack[HeadOptions],
) -> Tensor: ...


@overload
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    return_entropy: Literal[True],
    **options: Unpack[HeadOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    return_entropy: bool = ...,
    return_dropped_mass: Literal[True],
    **options: Unpack[HeadOptions],
) -> tuple[Tensor, ...]: ...


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
    return_entropy: bool = False,
    return_dropped_mass: bool = False,
    max_dropped_mass: float = 0.0,
    strategy: Strategy = "auto",
    workspace_mib: int | None = None,
    process_group: "ProcessGroup | None" = None,
) -> Tensor | tuple[Tensor, ...]:
    """log softmax(z)[target] of an LM head, z = softcap(logit_scale (hidden weight^T + bias)) /
    temperature.

    The [N, V] logits never exist unless they fit in half of the workspace: memory beyond the inputs
    and gradients is `workspace_mib` MiB plus O(N), and with a frozen head one tensor like hidden.
    The logits of 16-bit inputs are float32. A token's result does not depend, to the
    last bit, on the other tokens, on their order or on the number of threads. A kernel that runs is
    not interrupted: Ctrl-C takes effect when it returns.

    Gradients are first derivatives: by backward, torch.func.grad or torch.func.vjp. torch.func.vmap
    loops over the samples. Second derivatives and forward mode are refused.

    Args:
        hidden: [.., d], float32, bfloat16, float16 or float64; any strides.
        weight: [V, d], any of these types (float64 exactly when hidden is).
        targets: [..], int64 or int32, in [0, V) or `ignore_index`, whose rows are skipped.
        bias: [V].
        temperature: > 0, divides the logits. It, logit_scale and softcap are numbers, or CPU
            tensors without dimensions that require no grad.
        logit_scale: multiplies the logits, before the softcap.
        softcap: c > 0 makes c tanh(z / c) of the logits, before the temperature.
        ignore_index: the target of tokens to be skipped.
        return_entropy: also return the entropy of each softmax, in nats; differentiable.
        return_dropped_mass: also return the probability left out of each token's gradient.
        max_dropped_mass: eps in [0, 1). At 0 the gradient is exact. Above it, the backward pass
            leaves out blocks of 256 neighbouring entries of the vocabulary, smallest first, as long
            as the probability left out of a token's gradient, m_t, stays within eps; the label's
            own terms are always in. With g_t the gradient that arrives and s = |logit_scale| /
            temperature
              |error of grad_hidden_t|            <= |g_t| s m_t D
              sum_v |error of grad_weight_v|      <= sum_t |g_t| s m_t |hidden_t|
            where D is the largest distance between two entries of a block (with softcap: the length
            of the longest one). An entry that no token kept a block of, and that is no label, gets
            no gradient. If a gradient arrives in the entropy, nothing is left out. On CUDA the
            bounds hold beside the rounding of dL/dz to 16 bits, for 16-bit inputs.
        strategy: how the backward pass works (`BackwardPlan`); `explain` says what "auto" chooses.
        workspace_mib: scratch memory of the kernels, in MiB; left out, 64 on the CPU and 256 on
            CUDA. On CUDA, 16-bit inputs with N d above
            5/8 of it cost one product more in the backward pass. Too little for the backward pass
            is told before the forward pass, on CUDA and under torch.compile in the backward pass.
            Results do not depend on it, but for the last bits of grad_weight with
            max_dropped_mass > 0, whose rows are added in portions that fit.
        process_group: weight and bias are this rank's part of the vocabulary, [V_r, d] and [V_r];
            the parts lie in the order of the ranks and may differ in size. Every rank calls with
            the same hidden and targets, and backward with the same gradient; all get the same
            results, and the whole of grad_hidden. Exact and without entropy.

    Returns:
        float32 (float64 for float64 inputs) [..] log-probabilities in nats, 0 at ignored targets;
        with `return_entropy`, also the entropies, and with `return_dropped_mass` the m_t, both
        [..] and 0 at ignored targets.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what it must be and what it was.
            On CUDA a target out of range stops the kernel by a device-side assert instead: to read
            it on the host would mean to wait for the device.
    """
    temperature, logit_scale, max_dropped_mass = (
        number("token_logprobs", name, value)
        for name, value in (
            ("temperature", temperature),
            ("logit_scale", logit_scale),
            ("max_dropped_mass", max_dropped_mass),
        )
    )
    softcap = None if softcap is None else number("token_logprobs", "softcap", softcap)
    ignore_index = integer("token_logprobs", "ignore_index", ignore_index)
    if workspace_mib is None:
        workspace_mib = default_workspace_mib(hidden)
    workspace_mib = integer("token_logprobs", "workspace_mib", workspace_mib)
    if not 0 <= max_dropped_mass < 1:
        raise ValueError(
            f"token_logprobs: max_dropped_mass must be in [0, 1), got {max_dropped_mass}"
        )
    same_device("token_logprobs", "hidden", hidden, weight=weight, targets=targets, bias=bias)
    if process_group is not None:
        if return_entropy or return_dropped_mass or max_dropped_mass:
            raise ValueError(
                "token_logprobs: return_entropy, return_dropped_mass and max_dropped_mass must be "
                "left out with process_group"
            )
        scales = Scales(temperature, logit_scale, softcap)
        return sharded_logprobs(
            hidden, weight, targets, bias, scales, ignore_index, strategy, workspace_mib,
            process_group,
        )  # fmt: skip
    call = HeadCall(hidden, weight, bias, return_entropy, max_dropped_mass, workspace_mib)
    chosen = choose(strategy, call)
    if chosen != "none" and hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        needs = [t is not None and t.requires_grad for t in (hidden, weight, bias)]
        torch.ops.spo.check_backward_workspace(
            hidden, weight, targets, bias, needs, workspace_mib, KEEP[chosen]
        )
    logprobs, entropy, *_, kept = run(
        "token_logprobs",
        hidden,
        weight,
        targets,
        bias,
        temperature,
        logit_scale,
        softcap,
        ignore_index,
        return_entropy,
        workspace_mib,
        KEEP[chosen],
        max_dropped_mass,
    )
    results = (logprobs, entropy) if return_entropy else (logprobs,)
    if return_dropped_mass:
        results += (_dropped_mass(chosen, kept, logprobs),)
    return results if len(results) > 1 else logprobs


def _dropped_mass(chosen: Chosen, kept: Tensor, logprobs: Tensor) -> Tensor:
    if chosen != "sparse":
        return torch.zeros_like(logprobs)
    return kept.detach().clamp(min=0).sum(-1).view(logprobs.shape)


def explain(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    return_entropy: bool = False,
    max_dropped_mass: float = 0.0,
    strategy: Strategy = "auto",
    workspace_mib: int | None = None,
) -> BackwardPlan:
    """The strategy that `token_logprobs` and `linear_loss` would use for these arguments, and why.

    Nothing is computed: shapes, dtypes and `requires_grad` decide.
    """
    if workspace_mib is None:
        workspace_mib = default_workspace_mib(hidden)
    call = HeadCall(hidden, weight, bias, return_entropy, max_dropped_mass, workspace_mib)
    found = plan(strategy, call)
    if not hidden.is_cuda:
        return found
    options = (return_entropy, workspace_mib, KEEP[found.strategy], max_dropped_mass)
    launches, moved = cuda_launches(hidden, weight, bias, options)
    known = None if found.strategy == "sparse" else moved >> 20
    return dataclasses.replace(found, launches=launches, moved_mib=known)
