"""Registration of the operators with PyTorch: the library, fake kernels and autograd, one block
per op.

Schemas are in csrc/spo_ops.cpp. A fake kernel answers with the shape and dtype of the real one,
for torch.compile.
The backward ops have no derivative of their own and say so.
"""

from typing import Any

import torch
from torch import Tensor

from spo_ext import _compiled

_C = _compiled.load()  # registers the schemas and kernels
_OPS = torch.ops.spo
_BLOCK_WORDS = 256  # kBlockWords of csrc/kept.h


def build_info() -> dict[str, str]:
    """How this extension was built: version, torch, compiler, the instruction set in use, CUDA
    toolkit, architectures and the CUTLASS version of the Hopper kernel.

    `cuda_toolkit`, `cuda_archs` and `cutlass` are empty for a build without CUDA; `cutlass` also
    for one without the Hopper kernel.
    """
    return dict(_C.build_info())


def _result_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _refuse_second_derivative(op: str) -> None:
    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{op}: second derivatives are not implemented; "
            "call backward or grad without create_graph"
        )

    torch.library.register_autograd(f"spo::{op}_backward", backward)


# --- token_logprobs ------------------------------------------------------------------------------


@torch.library.register_fake("spo::token_logprobs")
def _(
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
    keep,
    max_dropped_mass,
):
    logprobs = hidden.new_empty(targets.shape, dtype=_result_dtype(hidden))
    entropy = logprobs.new_empty(targets.shape if return_entropy else (0,))
    kept = {
        "nothing": lambda: logprobs.new_empty(0),
        "logits": lambda: logprobs.new_empty(targets.numel(), weight.shape[0]),
        "jacobian": lambda: hidden.new_empty(hidden.shape),
        "dropped": lambda: logprobs.new_empty(targets.numel(), -(-weight.shape[0] // _BLOCK_WORDS)),
    }[keep]()
    return logprobs, entropy, torch.empty_like(logprobs), torch.empty_like(logprobs), kept


@torch.library.register_fake("spo::token_logprobs_backward")
def _(
    grad_logprobs,
    grad_entropy,
    hidden,
    weight,
    targets,
    bias,
    logprobs,
    entropy,
    top,
    log_sum,
    kept,
    temperature,
    logit_scale,
    softcap,
    ignore_index,
    needs,
    workspace_mib,
    keep,
):
    bias_dtype = torch.float64 if bias is None else bias.dtype
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        weight.new_empty(weight.shape[:1] if needs[2] else (0,), dtype=bias_dtype),
    )


def _token_logprobs_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, bias, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, targets, bias, *output)
    ctx.set_materialize_grads(False)


def _token_logprobs_backward(
    ctx: Any,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    *others: None,
) -> tuple[Tensor | None, ...]:
    hidden, weight, targets, bias, logprobs, entropy, top, log_sum, kept = ctx.saved_tensors
    temperature, logit_scale, softcap, ignore_index, return_entropy, workspace_mib, keep, _ = (
        ctx.options
    )
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    grads = _OPS.token_logprobs_backward(
        grad_logprobs,
        grad_entropy if return_entropy else None,
        hidden,
        weight,
        targets,
        bias,
        logprobs,
        entropy,
        top,
        log_sum,
        kept,
        temperature,
        logit_scale,
        softcap,
        ignore_index,
        needs,
        workspace_mib,
        keep,
    )
    grad_hidden, grad_weight, grad_bias = (
        g if need else None for g, need in zip(grads, needs, strict=True)
    )
    return grad_hidden, grad_weight, None, grad_bias, *[None] * 8


torch.library.register_autograd(
    "spo::token_logprobs", _token_logprobs_backward, setup_context=_token_logprobs_setup
)
_refuse_second_derivative("token_logprobs")


# --- logprobs_from_logits ------------------------------------------------------------------------


@torch.library.register_fake("spo::logprobs_from_logits")
def _(logits, targets, temperature, ignore_index, return_entropy, inplace_backward):
    logprobs = logits.new_empty(targets.shape, dtype=_result_dtype(logits))
    entropy = logprobs.new_empty(targets.shape if return_entropy else (0,))
    return logprobs, entropy, torch.empty_like(logprobs), torch.empty_like(logprobs)


@torch.library.register_fake("spo::logprobs_from_logits_backward")
def _(grad_logprobs, grad_entropy, logits, *rest):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("spo::logprobs_from_logits_backward_")
def _(*args):
    return None


def _logprobs_from_logits_setup(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> None:
    logits, targets, *ctx.options = inputs
    ctx.save_for_backward(logits, targets, *output)
    ctx.set_materialize_grads(False)


def _logprobs_from_logits_backward(
    ctx: Any,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    *others: None,
) -> tuple[Tensor | None, ...]:
    logits, *saved = ctx.saved_tensors
    temperature, ignore_index, return_entropy, inplace_backward = ctx.options
    grad_entropy = grad_entropy if return_entropy else None
    arguments = (grad_logprobs, grad_entropy, logits, *saved, temperature, ignore_index)
    if inplace_backward and not torch.compiler.is_compiling():
        _OPS.logprobs_from_logits_backward_(*arguments)
        return logits, *[None] * 5
    return _OPS.logprobs_from_logits_backward(*arguments), *[None] * 5


torch.library.register_autograd(
    "spo::logprobs_from_logits",
    _logprobs_from_logits_backward,
    setup_context=_logprobs_from_logits_setup,
)
_refuse_second_derivative("logprobs_from_logits")


# --- soft_q --------------------------------------------------------------------------------------


@torch.library.register_fake("spo::soft_q")
def _(logprobs, ref_logprobs, q0, beta, cu_seqlens, mask):
    return logprobs.new_empty(logprobs.shape, dtype=_result_dtype(logprobs))


@torch.library.register_fake("spo::soft_q_backward")
def _(grad_q_values, beta, cu_seqlens, mask):
    return grad_q_values.new_empty(grad_q_values.shape), grad_q_values.new_empty(
        _num_sequences(grad_q_values, cu_seqlens)
    )


def _num_sequences(tokens: Tensor, cu_seqlens: Tensor | None) -> int:
    return tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _soft_q_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logprobs, ref_logprobs, q0, ctx.beta, cu_seqlens, mask = inputs
    ctx.dtypes = logprobs.dtype, q0.dtype
    ctx.save_for_backward(cu_seqlens, mask)


def _soft_q_backward(ctx: Any, grad_q_values: Tensor) -> tuple[Tensor | None, ...]:
    grad_logprobs, grad_q0 = _OPS.soft_q_backward(grad_q_values, ctx.beta, *ctx.saved_tensors)
    logprobs_dtype, q0_dtype = ctx.dtypes
    return grad_logprobs.to(logprobs_dtype), None, grad_q0.to(q0_dtype), None, None, None


torch.library.register_autograd("spo::soft_q", _soft_q_backward, setup_context=_soft_q_setup)
_refuse_second_derivative("soft_q")


# --- cumulative_loss -----------------------------------------------------------------------------


@torch.library.register_fake("spo::cumulative_loss")
def _(
    logprobs,
    ref_logprobs,
    rewards,
    q0,
    objective,
    beta,
    delta,
    groups,
    leave_one_out,
    advantages,
    q_targets,
    q_weights,
    token_rewards,
    weights,
    cu_seqlens,
    mask,
):
    size = _num_sequences(logprobs, cu_seqlens)
    columns = [logprobs.new_empty(size, dtype=_result_dtype(logprobs)) for _ in range(4)]
    return *columns, logprobs.new_empty(size, dtype=torch.int64)


@torch.library.register_fake("spo::cumulative_loss_backward")
def _(
    grad_loss,
    logprobs,
    ref_logprobs,
    rewards,
    q0,
    objective,
    beta,
    delta,
    advantages,
    q_targets,
    q_weights,
    token_rewards,
    weights,
    cu_seqlens,
    mask,
):
    grad_q0 = grad_loss.new_empty(grad_loss.shape, dtype=_result_dtype(logprobs))
    return logprobs.new_empty(logprobs.shape), grad_q0


def _cumulative_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        logprobs,
        ref_logprobs,
        rewards,
        q0,
        ctx.objective,
        ctx.beta,
        ctx.delta,
        groups,
        leave_one_out,
        *per_token,
        weights,
        cu_seqlens,
        mask,
    ) = inputs
    ctx.q0_dtype = None if q0 is None else q0.dtype
    if ctx.objective == "group":  # the baseline is detached: from here on it is a given Q_0
        ctx.objective, q0 = "squared", output[3]
    ctx.save_for_backward(
        logprobs, ref_logprobs, rewards, q0, *per_token, weights, cu_seqlens, mask
    )
    ctx.set_materialize_grads(False)


def _cumulative_loss_backward(ctx: Any, grad_loss: Tensor | None, *others: Any) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * 16
    logprobs, ref_logprobs, rewards, q0, *rest = ctx.saved_tensors
    grad_logprobs, grad_q0 = _OPS.cumulative_loss_backward(
        grad_loss, logprobs, ref_logprobs, rewards, q0, ctx.objective, ctx.beta, ctx.delta, *rest
    )
    needs_q0 = ctx.needs_input_grad[3]
    return grad_logprobs, None, None, grad_q0.to(ctx.q0_dtype) if needs_q0 else None, *[None] * 12


torch.library.register_autograd(
    "spo::cumulative_loss", _cumulative_loss_backward, setup_context=_cumulative_loss_setup
)
_refuse_second_derivative("cumulative_loss")
