"""Registration of the operators with PyTorch: the library, fake kernels and autograd, one block
per op.

Schemas are in csrc/spo_ops.cpp. A fake kernel answers with the shape and dtype of the real one,
for torch.compile, and refuses the shapes that it refuses, as far as they are known.
The backward ops have no derivative of their own and say so.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from spo_ext import _compiled

_C = _compiled.load()  # registers the schemas and kernels
_OPS = torch.ops.spo
_BLOCK = 256  # kBlockEntries of csrc/kept.h


def build_info() -> dict[str, str]:
    """How this extension was built: version, torch, compiler, the instruction set in use, CUDA
    toolkit, architectures and the CUTLASS version of the Hopper kernel.

    `cuda_toolkit`, `cuda_archs` and `cutlass` are empty for a build without CUDA; `cutlass` also
    for one without the Hopper kernel.
    """
    return dict(_C.build_info())


_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}


def _transformed(arguments: tuple[Any, ...]) -> bool:
    """Whether torch.func or forward-mode AD is at work, for which an op has no rule of its own."""
    if torch.compiler.is_compiling():
        return False
    tensors = (a for a in arguments if isinstance(a, Tensor))
    return torch._C._are_functorch_transforms_active() or any(
        forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]
        for tensor in tensors
    )


def run(op: str, *arguments: Any) -> Any:
    """torch.ops.spo.<op>, whose gradient torch.func can take as well."""
    if _transformed(arguments):
        return _FUNCTIONS[op].apply(*arguments)  # type: ignore[no-untyped-call]
    return getattr(_OPS, op)(*arguments)


def _register_autograd(
    op: str, backward: Callable[..., Any], setup: Callable[..., None], name: str
) -> None:
    """Register the first derivatives of an op, for autograd and for torch.func; `name` is what the
    user knows it by."""

    def refuse_backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            f"{name}: second derivatives are not implemented; "
            "call backward or grad without create_graph"
        )

    def no_setup(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    torch.library.register_autograd(f"spo::{op}", backward, setup_context=setup)
    torch.library.register_autograd(f"spo::{op}_backward", refuse_backward)
    _FUNCTIONS[op] = _function(name, op, backward, setup)
    _FUNCTIONS[f"{op}_backward"] = _function(name, f"{op}_backward", refuse_backward, no_setup)


def _function(
    name: str, op: str, backward: Callable[..., Any], setup: Callable[..., None]
) -> type[torch.autograd.Function]:
    def refuse_jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise NotImplementedError(
            f"{name}: forward-mode derivatives (torch.func.jvp, dual numbers) are not implemented; "
            "take gradients by backward, torch.func.grad or torch.func.vjp"
        )

    members = {
        "forward": staticmethod(lambda *arguments: getattr(_OPS, op)(*arguments)),
        "setup_context": staticmethod(setup),
        "backward": staticmethod(backward),
        "jvp": staticmethod(refuse_jvp),
        "generate_vmap_rule": True,
    }
    return type(name, (torch.autograd.Function,), members)


def _keep(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for the backward pass; what was made in inference mode as a copy, since autograd
    takes no other."""
    ctx.save_for_backward(
        *(t.clone() if t is not None and t.is_inference() else t for t in tensors)
    )


def _known_to_differ(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a != b
    # Costs a second to import, and is there already where sizes are symbols.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(a != b)


def _check_shape(op: str, name: str, tensor: Tensor | None, *shapes: Sequence[int]) -> None:
    """Refuse other shapes, without a guard on a size that is a symbol."""
    if tensor is None:
        return
    for shape in shapes:
        if len(shape) == tensor.dim() and not any(map(_known_to_differ, tensor.shape, shape)):
            return
    raise ValueError(f"{op}: {name} must have shape {shapes[-1]}, got {list(tensor.shape)}")


def _result_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


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
    if hidden.dim() < 1 or weight.dim() != 2:
        shapes = f"{list(hidden.shape)} and {list(weight.shape)}"
        raise ValueError(
            f"token_logprobs: hidden and weight must be [.., d] and [V, d], got {shapes}"
        )
    _check_shape("token_logprobs", "weight", weight, [weight.shape[0], hidden.shape[-1]])
    _check_shape("token_logprobs", "targets", targets, list(hidden.shape[:-1]))
    _check_shape("token_logprobs", "bias", bias, [weight.shape[0]])
    logprobs = hidden.new_empty(targets.shape, dtype=_result_dtype(hidden))
    entropy = logprobs.new_empty(targets.shape if return_entropy else (0,))
    kept = {
        "nothing": lambda: logprobs.new_empty(0),
        "logits": lambda: logprobs.new_empty(targets.numel(), weight.shape[0]),
        "jacobian": lambda: hidden.new_empty(hidden.shape),
        "dropped": lambda: logprobs.new_empty(targets.numel(), -(-weight.shape[0] // _BLOCK)),
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


def cuda_launches(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: Sequence[Any],
    ops: Any = _OPS,
    key: torch._C.DispatchKey = torch._C.DispatchKey.CUDA,
) -> tuple[int, int]:
    """Count the kernels of a forward and a backward pass on CUDA, and the bytes that their products
    move, by calling the ops with nothing started.

    `options` are those of the forward op, from return_entropy on.
    """
    keys = torch._C.DispatchKeySet(key)
    needs = [t is not None and t.requires_grad for t in (hidden, weight, bias)]
    inputs = (hidden, weight, hidden.new_empty(hidden.shape[:-1], dtype=torch.int64), bias)
    return_entropy, workspace_mib, keep, _ = options
    ops.launch_log(True)
    try:
        scales = (1.0, 1.0, None, -100)
        saved = ops.token_logprobs.default.redispatch(keys, *inputs, *scales, *options)
        if any(needs):
            grads = (saved[0], saved[1] if return_entropy else None)
            ops.token_logprobs_backward.default.redispatch(
                keys, *grads, *inputs, *saved, *scales, needs, workspace_mib, keep
            )
    finally:
        launches, moved = ops.launch_log(False)
    return launches, moved


def _token_logprobs_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, bias, *ctx.options = inputs
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.is_inference():
            raise RuntimeError(
                f"token_logprobs: {name} must not be made in torch.inference_mode where another "
                "tensor requires grad, since autograd cannot keep it; make it under torch.no_grad, "
                "or clone it"
            )
    logprobs, entropy, *states = output
    # The caller may change what he was given.
    _keep(ctx, hidden, weight, targets, bias, logprobs.clone(), entropy.clone(), *states)
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
    grads = run(
        "token_logprobs_backward",
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


_register_autograd(
    "token_logprobs", _token_logprobs_backward, _token_logprobs_setup, "token_logprobs"
)


# For torch.utils.flop_counter, which knows shapes: every token is taken to count, and of
# max_dropped_mass nothing, since what it saves depends on the probabilities.


@register_flop_formula(_OPS.token_logprobs)
def _(hidden, weight, targets, bias, *options, out_shape=None, **_):
    keep = options[-2]
    return 2 * math.prod(hidden) * weight[0] * (2 if keep == "jacobian" else 1)


@register_flop_formula(_OPS.token_logprobs_backward)
def _(grad_logprobs, grad_entropy, hidden, weight, *rest, out_shape=None, **_):
    needs, _workspace, keep = rest[-3:]
    products = needs[0] + needs[1] + (keep != "logits")
    return 0 if keep == "jacobian" else 2 * math.prod(hidden) * weight[0] * products


# --- logprobs_from_logits ------------------------------------------------------------------------


@torch.library.register_fake("spo::logprobs_from_logits")
def _(logits, targets, temperature, ignore_index, return_entropy, inplace_backward):
    if logits.dim() < 1:
        raise ValueError("logprobs_from_logits: logits must be [.., V], got a scalar")
    _check_shape("logprobs_from_logits", "targets", targets, list(logits.shape[:-1]))
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
    logprobs, entropy, *states = output
    _keep(ctx, logits, targets, logprobs.clone(), entropy.clone(), *states)
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
    if inplace_backward and not torch.compiler.is_compiling() and not _transformed(arguments):
        _OPS.logprobs_from_logits_backward_(*arguments)
        return logits, *[None] * 5
    return run("logprobs_from_logits_backward", *arguments), *[None] * 5


_register_autograd(
    "logprobs_from_logits",
    _logprobs_from_logits_backward,
    _logprobs_from_logits_setup,
    "logprobs_from_logits",
)


# --- soft_q --------------------------------------------------------------------------------------


def _check_layout(
    op: str, tokens: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None
) -> list[Any]:
    """The shape [S] of what is per sequence."""
    if tokens.dim() != (2 if cu_seqlens is None else 1):
        layout = "padded [B, T]" if cu_seqlens is None else "packed [N] when cu_seqlens is given"
        raise ValueError(f"{op}: logprobs must be {layout}, got {list(tokens.shape)}")
    _check_shape(op, "mask", mask, list(tokens.shape))
    return [tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1]


@torch.library.register_fake("spo::soft_q")
def _(logprobs, ref_logprobs, q0, beta, cu_seqlens, mask):
    size = _check_layout("soft_q", logprobs, cu_seqlens, mask)
    _check_shape("soft_q", "ref_logprobs", ref_logprobs, list(logprobs.shape))
    _check_shape("soft_q", "q0", q0, size)
    return logprobs.new_empty(logprobs.shape, dtype=_result_dtype(logprobs))


@torch.library.register_fake("spo::soft_q_backward")
def _(grad_q_values, beta, cu_seqlens, mask):
    size = _check_layout("soft_q_backward", grad_q_values, cu_seqlens, mask)
    return grad_q_values.new_empty(grad_q_values.shape), grad_q_values.new_empty(size)


def _soft_q_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logprobs, ref_logprobs, q0, ctx.beta, cu_seqlens, mask = inputs
    ctx.dtypes = logprobs.dtype, q0.dtype
    _keep(ctx, cu_seqlens, mask)


def _soft_q_backward(ctx: Any, grad_q_values: Tensor) -> tuple[Tensor | None, ...]:
    grad_logprobs, grad_q0 = run("soft_q_backward", grad_q_values, ctx.beta, *ctx.saved_tensors)
    logprobs_dtype, q0_dtype = ctx.dtypes
    return grad_logprobs.to(logprobs_dtype), None, grad_q0.to(q0_dtype), None, None, None


_register_autograd("soft_q", _soft_q_backward, _soft_q_setup, "soft_q")


# --- cumulative_loss -----------------------------------------------------------------------------


class LossArgs(NamedTuple):
    """The arguments of both passes, in the order of their schemas; shapes are those of `loss`."""

    logprobs: Tensor
    ref_logprobs: Tensor
    rewards: Tensor | None
    q0: Tensor | None
    objective: str
    beta: float
    delta: float
    groups: Tensor | None
    leave_one_out: bool
    advantages: Tensor | None
    q_targets: Tensor | None
    q_weights: Tensor | None
    token_rewards: Tensor | None
    weights: Tensor | None
    cu_seqlens: Tensor | None
    mask: Tensor | None

    def tensors(self) -> dict[str, Any]:
        """The arguments that are tensors, by name."""
        options = ("objective", "beta", "delta", "leave_one_out")
        pairs = zip(self._fields, self, strict=True)
        return {name: value for name, value in pairs if name not in options}

    @property
    def has_residual(self) -> bool:
        return self.rewards is not None and self.objective != "advantage"


@torch.library.register_fake("spo::cumulative_loss")
def _(*inputs):
    args = LossArgs(*inputs)
    size = _check_layout("loss", args.logprobs, args.cu_seqlens, args.mask)
    tokens = list(args.logprobs.shape)
    row = [] if args.cu_seqlens is None else [[1, *tokens]]
    shapes = dict.fromkeys(("rewards", "q0", "groups", "weights"), [size])
    shapes |= dict.fromkeys(("q_targets", "q_weights", "token_rewards"), [tokens])
    shapes |= dict.fromkeys(("ref_logprobs", "advantages"), [tokens, *row, [*size, 1], size])
    for name, allowed in shapes.items():
        _check_shape("loss", name, getattr(args, name), *allowed)
    loss, terminal_q, log_ratio, used_q0 = (
        args.logprobs.new_empty(size, dtype=_result_dtype(args.logprobs)) for _ in range(4)
    )
    residual = loss.new_empty(size if args.has_residual else 0)
    return loss, terminal_q, log_ratio, used_q0, residual, loss.new_empty(size, dtype=torch.int64)


@torch.library.register_fake("spo::cumulative_loss_backward")
def _(grad_loss, *inputs):
    args = LossArgs(*inputs)
    size = _check_layout("loss_backward", args.logprobs, args.cu_seqlens, args.mask)
    _check_shape("loss_backward", "grad_loss", grad_loss, size)
    grad_q0 = grad_loss.new_empty(size, dtype=_result_dtype(args.logprobs))
    return args.logprobs.new_empty(args.logprobs.shape), grad_q0


def _cumulative_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    args = LossArgs(*inputs)
    ctx.q0_dtype = None if args.q0 is None else args.q0.dtype
    if args.objective == "group":
        # The baseline is detached, so that dL/dR = -2 beta w residual, as of the linear objective
        # with these weights; a residual of exactly 0, as of a group of one, leaves no gradient.
        slope = -2 * args.beta * output[4]
        weights = slope if args.weights is None else slope * args.weights
        args = args._replace(objective="linear", rewards=None, weights=weights)
    tensors = args._replace(groups=None).tensors()
    absent: dict[str, Any] = dict.fromkeys(tensors)
    ctx.args = args._replace(**absent)
    _keep(ctx, *tensors.values())
    ctx.set_materialize_grads(False)


def _cumulative_loss_backward(ctx: Any, grad_loss: Tensor | None, *others: Any) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * 16
    saved = dict(zip(ctx.args.tensors(), ctx.saved_tensors, strict=True))
    grad_logprobs, grad_q0 = run("cumulative_loss_backward", grad_loss, *ctx.args._replace(**saved))
    grad_q0 = grad_q0.to(ctx.q0_dtype) if ctx.needs_input_grad[3] else None
    return grad_logprobs, None, None, grad_q0, *[None] * 12


_register_autograd("cumulative_loss", _cumulative_loss_backward, _cumulative_loss_setup, "loss")
